"""The systems that `trimtab bench kv-decode` knows, by name. Imports none of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.core.errors import ConfigError, did_you_mean
from trimtab.core.registry import method_info, methods
from trimtab.evaluation.beside.base import System

CACHES = ("kivi-4", "kivi-2", "gear-2", "exact")
"""trimtab's caches that are measured unless others are named."""


def _quantized(variant: str, backend: str, bits: int, needs: Mapping[str, str]) -> System:
    return System(f"transformers/{variant}", "torch_sessions:open_quantized", {"backend": backend, "bits": bits}, needs)


def _press(variant: str, press: str, **options: Any) -> System:
    options = {"press": press, "options": options}
    return System(f"kvpress/{variant}", "torch_sessions:open_kvpress", options, {"kvpress": "kvpress"})


def _llama_cpp(variant: str) -> System:
    needs = {"llama_cpp": "llama-cpp-python", "gguf": "gguf"}
    return System(f"llama.cpp/{variant}", "llama_cpp_session:open_llama_cpp", {"cache_type": variant}, needs)


_QUANTO, _HQQ = {"optimum.quanto": "optimum-quanto"}, {"hqq": "hqq"}
_FIXED = (
    System("trimtab/dynamic-fast-linear", "torch_sessions:open_dynamic", {"fast_linear": True}),
    System("transformers/dynamic-bf16", "torch_sessions:open_dynamic", {"fast_linear": False}),
    _quantized("quanto-4", "quanto", 4, _QUANTO),
    _quantized("quanto-2", "quanto", 2, _QUANTO),
    _quantized("hqq-4", "hqq", 4, _HQQ),
    _quantized("hqq-2", "hqq", 2, _HQQ),
    _press("knorm-keep-0.5", "KnormPress", compression_ratio=0.5),
    # the paper's observation window; kvpress' own default of 64 does not fit the short context
    _press("snapkv-keep-0.5", "SnapKVPress", compression_ratio=0.5, window_size=32),
    _llama_cpp("f16"),
    _llama_cpp("q8_0"),
    _llama_cpp("q4_0"),
)


def trimtab_cache(name: str) -> System:
    """trimtab's cache METHOD-BITS, or METHOD where it has no option `bits` to set. Raises ConfigError."""
    method, _, bits = name.rpartition("-")
    options: dict[str, Any] = {"bits": int(bits)} if method and bits.isdigit() else {}
    info = method_info(method if options else name)
    if info.room != "cache":
        known = [found.name for found in methods().values() if found.room == "cache"]
        raise ConfigError(f"'{name}' is a method of the room {info.room}, not a cache. {did_you_mean(name, known)}")
    return System(f"trimtab/{name}", "torch_sessions:open_trimtab", {"method": info.name, "options": options})


def choose(systems: Sequence[str] | None = None, caches: Sequence[str] | None = None) -> list[System]:
    """The systems to measure, in the order of the table: trimtab's caches, then the others.

    systems   names, or libraries, which stand for all of theirs ("llama.cpp"); None: all, unless only caches are wanted
    caches    trimtab's caches as METHOD-BITS; None: CACHES, where `systems` does not name any

    Both given: the named systems and the named caches. Raises ConfigError for a name that is none of these.
    """
    if systems is None:
        return [*(trimtab_cache(name) for name in (CACHES if caches is None else caches)), *_FIXED]
    chosen = {f"trimtab/{name}": trimtab_cache(name) for name in caches or ()}
    for name in systems:
        if found := {system.name: system for system in _FIXED if name in (system.name, system.library)}:
            chosen |= found
            if name == "trimtab" and caches is None:
                chosen |= {f"trimtab/{cache}": trimtab_cache(cache) for cache in CACHES}
        elif name.startswith("trimtab/"):
            chosen[name] = trimtab_cache(name.removeprefix("trimtab/"))
        else:
            known = {*(system.name for system in _FIXED), *(system.library for system in _FIXED)}
            known |= {f"trimtab/{cache}" for cache in CACHES}
            raise ConfigError(f"unknown system '{name}'. {did_you_mean(name, known)}")
    own = [system for name, system in chosen.items() if system.opener.endswith(":open_trimtab")]
    return own + [system for system in _FIXED if system.name in chosen]
