"""Systems on torch: transformers' caches, trimtab's, and kvpress, on the same model."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, QuantizedCache

import trimtab
from trimtab import models
from trimtab.cache._making import fit
from trimtab.core.registry import method_class
from trimtab.evaluation.kv_decode.measure import Setting
from trimtab.kernels.bandwidth import kernel_report
from trimtab.kernels.op import KERNELS_VARIABLE
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.fast_linear import FastLinear, use_fast_linear

_CALIBRATION_SEQUENCES = 4  # of a quarter of the context each


class TorchSession:
    """A transformers model with a cache.

    new_cache    makes an empty cache
    reading      what surrounds the reading of a prompt
    telling      whether layers are told `cache_position`, which transformers itself no longer does and kvpress asks for
    count        bytes of a cache; the default goes through its tensors
    fast         trimtab's linear layers, where they are in use; then steps can be repeated with the references
    """

    def __init__(
        self,
        model: PreTrainedModel,
        new_cache: Callable[[], Any],
        *,
        library: str,
        reading: Callable[[], AbstractContextManager[Any]] = nullcontext,
        telling: bool = False,
        count: Callable[[Any], int] | None = None,
        fast: FastLinear | None = None,
    ) -> None:
        self._model, self._new_cache, self._library, self._reading = model, new_cache, library, reading
        self._telling, self._count, self._fast = telling, count, fast
        self._cache: Any = None
        self._logits = torch.empty(0)
        self._position = 0

    def prefill(self, tokens: Sequence[int]) -> None:
        """Empty the cache and read the prompt; only the last token's logits are computed."""
        self._cache, self._position = None, 0  # the old one is gone before the new one fills
        self._cache = self._new_cache()
        with self._reading():
            self._forward(tokens)

    def step(self, token: int) -> None:
        """One forward pass over one token."""
        self._forward([token])

    def _forward(self, tokens: Sequence[int]) -> None:
        # positions are told: caches that drop tokens are shorter than the text
        positions = torch.arange(self._position, self._position + len(tokens))[None]
        told = {"cache_position": positions[0]} if self._telling else {}
        with torch.inference_mode():
            output = self._model(
                input_ids=torch.tensor(tokens)[None],
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
                **told,
            )
        self._logits, self._position = output.logits[0, -1], self._position + len(tokens)

    def logits(self) -> list[float]:
        """Of the last token."""
        return self._logits.float().tolist()

    def kv_bytes(self) -> int:
        """Bytes of the cache's buffers."""
        return tensor_bytes(self._cache) if self._count is None else self._count(self._cache)

    def reference_step(self, token: int) -> list[float] | None:
        """One step with torch's linear layers and the kernels' references, which put keys and values together first."""
        if self._fast is None:
            return None
        self._fast.remove()
        with _reference_kernels():
            self.step(token)
        self._fast = use_fast_linear(self._model)
        return self.logits()

    def facts(self) -> dict[str, Any]:
        """Version, how the bytes were counted, and for trimtab's systems the kernels that run here."""
        source = "storage of the cache's tensors" if self._count is None else "the cache's own count of its buffers"
        facts: dict[str, Any] = {"library": f"{self._library} {_version(self._library)}", "kv_bytes_from": source}
        if self._fast is not None:
            available = [kernel for kernel in kernel_report() if kernel["available"]]
            # the fastest is first; a backend that is missing must not look like one that is slow
            facts["kernels"] = {kernel["operation"]: kernel["backend"] for kernel in reversed(available)}
        return facts


def open_dynamic(directory: Path, setting: Setting, *, fast_linear: bool) -> TorchSession:
    """transformers' default cache, keys and values in the model's dtype; with trimtab's linear layers if asked for."""
    model = models.load(directory)
    fast = use_fast_linear(model) if fast_linear else None
    library = "trimtab" if fast_linear else "transformers"
    return TorchSession(model, lambda: DynamicCache(config=model.config), library=library, fast=fast)


def open_quantized(directory: Path, setting: Setting, *, backend: str, bits: int) -> TorchSession:
    """transformers' quantized cache with its defaults: groups of 64, the 128 most recent tokens exact.

    Axes are those that transformers' guide names for each: 1 for hqq, 0 for quanto.
    """
    model = models.load(directory)
    axes = {"axis_key": 1, "axis_value": 1} if backend == "hqq" else {}

    def new() -> QuantizedCache:
        return QuantizedCache(backend=backend, config=model.config, nbits=bits, **axes)

    return TorchSession(model, new, library={"quanto": "optimum-quanto"}.get(backend, backend))


def open_kvpress(directory: Path, setting: Setting, *, press: str, options: dict[str, Any]) -> TorchSession:
    """A press of kvpress: after reading the prompt it removes a share of the tokens."""
    kvpress = importlib.import_module("kvpress")
    model = models.load(directory)
    made = getattr(kvpress, press)(**options)
    return TorchSession(model, DynamicCache, library="kvpress", reading=lambda: made(model), telling=True)


def open_trimtab(directory: Path, setting: Setting, *, method: str, options: dict[str, Any]) -> TorchSession:
    """A method of the cache room, with trimtab's linear layers; what it learns, it learns from random tokens."""
    model = models.load(directory)
    chosen: Any = method_class(method)(**options)
    if chosen.calibrated:
        generator = torch.Generator().manual_seed(setting.seed + 1)
        tokens = torch.randint(setting.vocabulary, (_CALIBRATION_SEQUENCES, setting.context // 4), generator=generator)
        fit(chosen, model, CalibrationSet.from_tokens(tokens, source="random tokens"))
    return TorchSession(
        model,
        lambda: chosen.new(model),
        library="trimtab",
        count=lambda cache: int(cache.nbytes()),
        fast=use_fast_linear(model),
    )


@contextmanager
def _reference_kernels() -> Iterator[None]:
    before = os.environ.get(KERNELS_VARIABLE)
    os.environ[KERNELS_VARIABLE] = "reference"
    try:
        yield
    finally:
        del os.environ[KERNELS_VARIABLE]
        if before is not None:
            os.environ[KERNELS_VARIABLE] = before


def _version(library: str) -> str:
    return trimtab.__version__ if library == "trimtab" else importlib.metadata.version(library)


def tensor_bytes(holder: object) -> int:
    """Bytes of the storages of all tensors that an object holds, through its attributes and containers, each once.

    Tensors made of others, as quantized ones are, count as their parts. Modules and configurations are not entered.
    """
    storages: dict[int, int] = {}
    seen: set[int] = set()
    waiting: list[object] = [holder]
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            if hasattr(item, "__tensor_flatten__"):
                waiting += [getattr(item, name) for name in item.__tensor_flatten__()[0]]
            else:
                storage = item.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, (list, tuple, set)):
            waiting += item
        elif type(item).__module__.startswith(("transformers.cache_utils", "trimtab.")):
            waiting += vars(item).values() if hasattr(item, "__dict__") else ()
    return sum(storages.values())
