"""The systems that `trimtab bench decode` knows, by name. Imports none of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trimtab.core.errors import ConfigError, did_you_mean
from trimtab.core.registry import method_info
from trimtab.evaluation.beside.base import System
from trimtab.evaluation.kv_decode.systems import trimtab_cache

REPRESENTATIONS = ("grid-4", "grid-3", "grid-2", "grid-8", "grid-4+rank-32", "grid-4+outliers-0.5")
"""trimtab's representations that are measured unless others are named."""
_HALF = {"sparsity": 0.5, "within": "row"}  # chosen by magnitude: the speed of a part does not depend on who chose
PRUNED: dict[str, tuple[str | None, Mapping[str, Any]]] = {
    "dense": (None, {}),
    "sparse-50": ("magnitude", _HALF),
    "sparse-60": ("magnitude", {**_HALF, "sparsity": 0.6}),
    "sparse-2:4": ("magnitude", {"sparsity": "2:4"}),
    "sparse-50+4bit": ("magnitude", {**_HALF, "value_bits": 4}),
    "neurons-30": ("neurons", {"sparsity": 0.3, "counted": "parameters", "round_to": 32}),
    "rsparse-50": ("rsparse", {"sparsity": 0.5, "prefill": "dense"}),
    "rsparse-50-thresholds": ("rsparse", {"sparsity": 0.5, "prefill": "dense", "alpha": 1.0}),
}
"""Name -> method and options of trimtab's models with less in them, beside the one they are made of. All of them are
asked for as "pruned"."""
GROUP = 64
_GRID = "rtn"  # whose codes are the cheapest to find; the speed of a grid does not depend on who chose them

_QUANTO, _TORCHAO = {"optimum.quanto": "optimum-quanto"}, {"torchao": "torchao"}
_LLAMA_CPP = {"llama_cpp": "llama-cpp-python", "gguf": "gguf"}
_TERMS: dict[str, Callable[[str], float]] = {"rank": int, "outliers": lambda percent: float(percent) / 100}
_KV_TYPES = ("f16", "q8_0", "q4_0")


def _peer(name: str, needs: Mapping[str, str]) -> System:
    return System(name, "peer_sessions:open_peer", {"name": name}, needs)


def _llama_cpp(weights: str, cache: str = "f16", suffix: str = "") -> System:
    options = {"weight_type": weights, "cache_type": cache}
    return System(f"llama.cpp/{weights}{suffix}", "llama_cpp:open_llama_cpp", options, _LLAMA_CPP)


_FIXED = (
    _peer("torch/bf16", {}),
    _peer("quanto/int4", _QUANTO),
    _peer("bitsandbytes/nf4", {"bitsandbytes": "bitsandbytes"}),
    _peer("torchao/int4", _TORCHAO),
    _peer("torchao/int8", _TORCHAO),
    _peer("hqq/4", {"hqq": "hqq"}),
    *(_llama_cpp(weights) for weights in ("f16", "q8_0", "q4_0", "q4_k_m", "q2_k")),
)
_WITH_CACHE = tuple(_llama_cpp("q4_0", cache, f"+kv-{cache}") for cache in _KV_TYPES)
"""What a whole step with a compressed cache is compared with: 4-bit weights and each type of keys and values."""


def trimtab_system(name: str, cache: str | None = None) -> System:
    """trimtab's `METHOD-BITS[-GROUP][+rank-R][+outliers-PERCENT]`, or one of PRUNED; grid-BITS stands for rtn, the
    group is 64 unless named. Raises ConfigError for what is none."""
    suffix = "" if cache is None else f"+{cache}"
    options: dict[str, Any] = {} if cache is None else {"cache": dict(trimtab_cache(cache).options)}
    if name in PRUNED:
        options["method"], options["settings"] = PRUNED[name]
        return System(f"trimtab/{name}{suffix}", "trimtab_session:open_trimtab", options)
    representation, *terms = name.split("+")
    method, *numbers = representation.split("-")
    form = "METHOD-BITS, METHOD-BITS-GROUP, and +rank-32 or +outliers-0.5 after it"
    if not 1 <= len(numbers) <= 2 or not all(number.isdigit() for number in numbers):
        raise ConfigError(f"'{name}' is no representation; write {form}, or one of {', '.join(PRUNED)}.")
    info = method_info(_GRID if method == "grid" else method)
    if info.room != "weights":
        raise ConfigError(f"'{name}': {info.name} is a method of the room {info.room}, not of weights.")
    settings = {"bits": int(numbers[0]), "group_size": int(numbers[1]) if numbers[1:] else GROUP}
    options |= {"method": info.name, "settings": settings}
    for term in terms:
        kind, _, value = term.partition("-")
        try:
            options[kind] = _TERMS[kind](value)
        except (KeyError, ValueError):
            raise ConfigError(f"'{name}': '{term}' is no term; write {form}.") from None
    return System(f"trimtab/{name}{suffix}", "trimtab_session:open_trimtab", options)


def choose(systems: Sequence[str] | None = None, cache: str | None = None) -> list[System]:
    """The systems to measure, in the order of the table: trimtab's, then the others.

    systems   names, or libraries, which stand for all of theirs ("llama.cpp"), or "pruned" for trimtab's PRUNED; None:
              all but those
    cache     trimtab's cache METHOD-BITS for trimtab's systems, beside llama.cpp's 4-bit weights with each of its
              types of keys and values; None: 16-bit keys and values everywhere

    Raises ConfigError for a name that is none of these.
    """
    fixed = _FIXED if cache is None else _WITH_CACHE
    own = REPRESENTATIONS if cache is None else REPRESENTATIONS[:1]
    if systems is None:
        return [*(trimtab_system(name, cache) for name in own), *fixed]
    chosen: dict[str, System] = {}
    for name in systems:
        if name == "trimtab":
            found = [trimtab_system(representation, cache) for representation in own]
        elif name == "pruned":
            found = [trimtab_system(pruned, cache) for pruned in PRUNED]
        elif name.startswith("trimtab/"):
            found = [trimtab_system(name.removeprefix("trimtab/"), cache)]
        else:
            found = [system for system in fixed if name in (system.name, system.library)]
        if not found:
            known = {"trimtab", "pruned", *(system.name for system in fixed), *(system.library for system in fixed)}
            raise ConfigError(f"unknown system '{name}'. {did_you_mean(name, known)}")
        chosen |= {system.name: system for system in found}
    return sorted(chosen.values(), key=lambda system: system.library != "trimtab")
