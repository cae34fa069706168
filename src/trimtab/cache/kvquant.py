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
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from trimtab.cache._tables import channel_tables, token_tables
from trimtab.cache.base import CacheMethod, Fitted, LayerShape
from trimtab.core.errors import ConfigError
from trimtab.models.segments import HeadPlan, TensorPlan
from trimtab.tensors.kv.codec import KVCodec
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
            options: dict[str, Any] = {
                "bits": self.bits,
                "outliers": self.outliers,
                "uniform": self.uniform,
                "weight_by_scale": self.weight_by_scale,
            }
            flat = None if layer.values_fisher is None else layer.values_fisher.flatten(1)
            tables = {
                "keys": channel_tables(layer.keys, layer.keys_fisher, **options),
                "values": token_tables(layer.values.flatten(1), flat, **options),
            }
            found |= {f"{kind}.{layer.layer}.{n}": t for kind, table in tables.items() for n, t in table.items()}
        return found

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
