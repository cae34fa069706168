"""How a system makes a linear layer of a dense weight. Each opener gives a Maker."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.core.errors import ConfigError
from trimtab.core.registry import method_class
from trimtab.evaluation.kv_decode.torch_sessions import tensor_bytes
from trimtab.evaluation.linear_speed.measure import Layer, Setting
from trimtab.evaluation.weight_decode.quantizing import QUANTIZERS, weight_tensors
from trimtab.evaluation.weight_decode.trimtab_session import with_terms
from trimtab.models.compressed_linear import CompressedLinear
from trimtab.models.views import LinearView

Maker = Callable[[Tensor], Layer]


def trimtab_maker(
    directory: Path,
    setting: Setting,
    *,
    method: str,
    settings: Mapping[str, Any],
    rank: int = 0,
    outliers: float = 0.0,
) -> Maker:
    """A CompressedLinear by a method that needs no data; its reference is the product with its dense weight."""
    chosen: Any = method_class(method)(**settings)

    def make(weight: Tensor) -> Layer:
        linear = _dense(weight)
        view = LinearView("linear", "o", "layers.0.attention_out", 0, linear[0], linear)
        layer = CompressedLinear(chosen.compress(view, None)[0])
        if rank or outliers:
            layer = with_terms(layer, weight, rank, outliers)
        return Layer(layer, layer.tensor.nbytes, layer.dequantize())

    return make


def peer_maker(directory: Path, setting: Setting, *, name: str) -> Maker:
    """torch's linear layer, or what another library makes of it."""

    def make(weight: Tensor) -> Layer:
        linear = _dense(weight)
        QUANTIZERS[name][1](linear)
        return Layer(linear, tensor_bytes(weight_tensors(linear)), None)

    return make


def whole_models_only(directory: Path, setting: Setting, *, name: str) -> Maker:
    """Raises ConfigError: this system has no layer that can be called alone."""
    raise ConfigError(f"{name} runs whole models only; see: trimtab bench decode")


def _dense(weight: Tensor) -> nn.Sequential:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return nn.Sequential(linear.to(torch.bfloat16))
