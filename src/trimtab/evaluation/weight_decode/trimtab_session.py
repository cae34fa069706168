"""trimtab's representations, with low-rank and outlier terms and a compressed cache where they are wanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from trimtab import models
from trimtab.core.registry import method_class
from trimtab.evaluation.weight_decode.measure import Setting
from trimtab.evaluation.weight_decode.peer_sessions import WeightSession
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.compressed_linear import CompressedLinear
from trimtab.models.compression import compress
from trimtab.models.fast_decoding import fast_decoding
from trimtab.models.fast_linear import use_fast_linear
from trimtab.tensors.base import Part
from trimtab.tensors.compressed import CompressedTensor
from trimtab.tensors.low_rank import LowRank
from trimtab.tensors.sparse import SparseOutliers
from trimtab.tensors.sparse_inputs import SparseInputs


def open_trimtab(
    directory: Path,
    setting: Setting,
    *,
    method: str | None,
    settings: Mapping[str, Any],
    rank: int = 0,
    outliers: float = 0.0,
    cache: Mapping[str, Any] | None = None,
) -> WeightSession:
    """The model compressed by a method, on the tokens of the prompt if it wants text; None: as it is.

    rank, outliers   of the terms added to every layer: a low-rank part, and this share of the entries kept exactly
    cache            {"method", "options"} of a method of the room `cache`; None: transformers' own, in 16 bits
    """
    model = models.load(directory)
    dense = {name: linear.weight.detach() for name, linear in model.named_modules() if isinstance(linear, nn.Linear)}
    if method is None:
        fast_decoding(model)
    else:
        chosen: Any = method_class(method)
        text = CalibrationSet.from_tokens(torch.tensor([setting.tokens()[: setting.prompt]]))
        compress(model, chosen(**settings), calibration=text, progress=False)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, CompressedLinear) and (rank or outliers):
            _replace(model, name, with_terms(layer, dense[name], rank, outliers))
    dense.clear()
    return _Session(model, _caches(model, cache), library="trimtab", fast=use_fast_linear(model))


class _Session(WeightSession):
    """A session of layers that may read a part of what they hold."""

    def reference_step(self, token: int) -> list[float] | None:
        """None where layers choose inputs by a threshold: one that rounding moves over it moves others in the next
        layer, so that two exact ways to compute soon differ. The bench of kernels/gather_matmul demands parity."""
        layers = [layer for layer in self._model.modules() if isinstance(layer, CompressedLinear)]
        if any(isinstance(part, SparseInputs) for layer in layers for part in layer.tensor.parts):
            return None
        return super().reference_step(token)

    def facts(self) -> dict[str, Any]:
        layers = [layer for layer in self._model.modules() if isinstance(layer, CompressedLinear)]
        unread = sum(part.nbytes - part.read_bytes for layer in layers for part in layer.tensor.parts)
        return {**super().facts(), "read_bytes": self.weight_bytes() - self.embedding_bytes() - unread}


def with_terms(layer: CompressedLinear, weight: Tensor, rank: int, outliers: float) -> CompressedLinear:
    """The layer with what its parts leave of `weight` [out, in] in two more terms, found in one cheap pass each."""
    parts: list[Part] = list(layer.tensor.parts)
    error = weight.float() - layer.dequantize()
    if outliers:
        kept = SparseOutliers.select(error, outliers)
        parts.append(kept)
        error = error - kept.dequantize()
    if rank:
        # one step of a randomized range finder: its speed is the same as that of the best factors
        probe = torch.randn(error.shape[1], rank, generator=torch.Generator().manual_seed(rank))
        basis = torch.linalg.qr(error @ probe).Q
        parts.append(LowRank(basis.bfloat16(), (basis.t() @ error).bfloat16()))
    return CompressedLinear(CompressedTensor(tuple(parts), layer.tensor.transform), layer.bias)


def _replace(model: PreTrainedModel, name: str, layer: CompressedLinear) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, layer)


def _caches(model: PreTrainedModel, cache: Mapping[str, Any] | None) -> Callable[[], Any]:
    if cache is None:
        return lambda: DynamicCache(config=model.config)
    method: Any = method_class(cache["method"])(**cache["options"])
    return lambda: method.new(model)
