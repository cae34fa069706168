"""Keys per channel before rotary embedding, a learnt table of levels per layer, outliers kept exactly.

Paper: Coleman Hooper, Sehoon Kim, Hiva Mohammadzadeh, Michael W. Mahoney, Yakun Sophia Shao, Kurt Keutzer, Amir
Gholami, "KVQuant: Towards 10 Million Context Length LLM Inference with KV Cache Quantization", NeurIPS 2024,
arXiv:2401.18079.

With U and L the 1 - outliers / 2 and outliers / 2 quantiles of a vector, z = (U + L) / 2 and s = (U - L) / 2,

    x' = (x - z) / s      code = nearest of 2^bits levels to x'      x^ = s level + z

A vector of keys is a channel, before rotary embedding, its quantiles taken once from calibration text; a vector of
values is a token over all heads, its quantiles taken when it is stored (the k-th largest and smallest entry, k - 1 of
each being outliers). Entries outside are outliers, kept in 16 bits with their place. The levels of a layer's keys,
and of its values, minimise sum w (x' - level)^2 over calibration text by k-means, w = F s^2 with F the squared
gradient of the loss (equation 7). At 2 bits the table read is shifted and stretched so that mean and deviation of
what is read equal those of x' (Q-Norm). The first `sinks` tokens stay exact and out of all statistics.

Departures: the official code weighs by F alone; `weight_by_scale=false` does. Keys are read back by undoing rotary
embedding instead of hooking the projection: the same numbers. Tokens are encoded 32 at a time, so up to 31 recent
ones are exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from trimtab.cache.base import CacheMethod, Fitted, LayerShape
from trimtab.core.errors import ConfigError
from trimtab.models.segments import HeadPlan, TensorPlan
from trimtab.tensors.kv.codec import KVCodec
from trimtab.tensors.kv.levels import fisher_weights, fit_levels, q_norm
from trimtab.tensors.kv.outliers import OutlierRule

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from trimtab.models.calibration_set import CalibrationSet

__all__ = ["Kvquant"]

BLOCK_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class Kvquant(CacheMethod):
    """Options of KVQuant.

    bits              of a code; the table has 2^bits levels
    outliers          share of entries kept exactly; 0: none, and U and L are the extremes
    sinks             first tokens that stay exact
    uniform           equally spaced levels instead of learnt ones: the baseline
    fisher            weigh k-means by squared gradients; false: all alike
    weight_by_scale   multiply these weights by s^2
    q_norm            correct mean and deviation when codes are read; the default does so at 2 bits
    """

    calibrated: ClassVar[bool] = True

    bits: Literal[1, 2, 3, 4] = 3
    outliers: float = 0.01
    sinks: int = 1
    uniform: bool = False
    fisher: bool = True
    weight_by_scale: bool = True
    q_norm: bool | None = None

    def check(self) -> None:
        if not 0 <= self.outliers < 0.5:
            raise ConfigError(f"kvquant: outliers={self.outliers} must be in [0, 0.5).")
        if self.sinks < 0:
            raise ConfigError(f"kvquant: sinks={self.sinks} must be >= 0.")

    def fit_options(self) -> dict[str, object]:
        return {name: value for name, value in self.to_dict().items() if name != "q_norm"}

    def fit(self, model: PreTrainedModel, calibration: CalibrationSet) -> dict[str, Tensor]:
        """For each layer: keys' scale, minimum, lower, upper; levels and q-norm levels of keys and of values."""
        from trimtab.cache._capture import captured_layers

        found: dict[str, Tensor] = {}
        for layer in captured_layers(model, calibration, fisher=self.fisher, skip_first=self.sinks):
            for name, tensor in self._fit_keys(layer.keys, layer.keys_fisher).items():
                found[f"keys.{layer.layer}.{name}"] = tensor
            for name, tensor in self._fit_values(layer.values, layer.values_fisher).items():
                found[f"values.{layer.layer}.{name}"] = tensor
        return found

    def _fit_keys(self, keys: Tensor, fisher: Tensor | None) -> dict[str, Tensor]:
        ordered = keys.sort(dim=0).values  # torch.quantile takes no large tensors
        last = len(ordered) - 1
        lower = ordered[round(last * self.outliers / 2)]
        upper = ordered[round(last * (1 - self.outliers / 2))]
        minimum = ((upper + lower) / 2).half()
        scale = ((upper - lower) / 2).half()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        inside = (keys >= lower) & (keys <= upper)
        x = ((keys - minimum.float()) / scale.float())[inside]
        tables = self._tables(x, fisher, scale.float().expand_as(keys), inside)
        fixed = {"scale": scale[:, None], "minimum": minimum[:, None], "lower": lower, "upper": upper}
        return {**fixed, **tables}

    def _fit_values(self, values: Tensor, fisher: Tensor | None) -> dict[str, Tensor]:
        flat = values.flatten(1)
        beyond = int(self.outliers / 2 * flat.shape[1] + 1e-9) + 1 if self.outliers else 0
        upper = flat.topk(beyond + 1, dim=1).values[:, -1:]
        lower = flat.topk(beyond + 1, dim=1, largest=False).values[:, -1:]
        scale = ((upper - lower) / 2).clamp(min=1e-8)
        inside = (flat >= lower) & (flat <= upper)
        x = ((flat - (upper + lower) / 2) / scale)[inside]
        return self._tables(x, None if fisher is None else fisher.flatten(1), scale.expand_as(flat), inside)

    def _tables(self, x: Tensor, fisher: Tensor | None, scale: Tensor, inside: Tensor) -> dict[str, Tensor]:
        if self.uniform:
            levels = torch.linspace(-1.0, 1.0, 1 << self.bits)
        else:
            weights = None
            if fisher is not None:
                weights = fisher_weights(fisher[inside], scale[inside] if self.weight_by_scale else None)
            levels = fit_levels(x, self.bits, weights)
        return {"levels": levels, "q_norm": q_norm(levels, x)}

    def head_plans(self, layer: LayerShape, fitted: Fitted) -> tuple[HeadPlan, ...]:
        keys = {
            n: fitted[f"keys.{layer.index}.{n}"] for n in ("scale", "minimum", "lower", "upper", "levels", "q_norm")
        }
        values = {n: fitted[f"values.{layer.index}.{n}"] for n in ("levels", "q_norm")}
        normed = self.bits == 2 if self.q_norm is None else self.q_norm
        channels = layer.kv_heads * layer.head_dim
        cap = int(self.outliers / 2 * channels) + 1
        key_codec = KVCodec(
            bits=self.bits,
            levels=keys["levels"],
            decode_levels=keys["q_norm"] if normed else None,
            scale=keys["scale"],
            minimum=keys["minimum"],
            outliers=OutlierRule(lower=keys["lower"], upper=keys["upper"], cap=cap) if self.outliers else None,
        )
        value_codec = KVCodec(
            bits=self.bits,
            group_channels=-1,
            levels=values["levels"],
            decode_levels=values["q_norm"] if normed else None,
            range_rule="quantile" if self.outliers else "minmax",
            outliers=OutlierRule(fraction=self.outliers, along="channels") if self.outliers else None,
        )
        return (
            HeadPlan(
                heads=layer.all_heads,
                keys=TensorPlan(codec=key_codec, block=BLOCK_TOKENS, pre_rope=True),
                values=TensorPlan(codec=value_codec, block=BLOCK_TOKENS),
                sinks=self.sinks,
            ),
        )
