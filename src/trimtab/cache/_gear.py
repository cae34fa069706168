"""What gear and gear_l share: a uniform backbone, a low-rank correction of its residual, a buffer of exact tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trimtab.cache.base import CacheMethod, Fitted, LayerShape
from trimtab.core.errors import ConfigError
from trimtab.models.segments import HeadPlan, TensorPlan
from trimtab.tensors.kv.codec import KVCodec
from trimtab.tensors.kv.outliers import OutlierRule


@dataclass(frozen=True, kw_only=True)
class GearMethod(CacheMethod):
    """The options of both.

    bits                  of the backbone
    backbone              "kivi": groups of group_size (keys along tokens, values along channels). "kcvt": one group per
                          channel of keys over the block, one per token of values over all heads
    group_size            numbers that share a scale and a minimum, for "kivi"
    buffer                recent tokens that stay exact until they are encoded together, a multiple of group_size
    rank_keys             rank of the correction of a block of generated tokens, per head; 0: none
    rank_values           the same for values
    prefill_rank_keys     rank of the correction of a prompt, per head
    prefill_rank_values   the same for values
    iterations            of the power iteration
    """

    bits: Literal[2, 3, 4, 8] = 2
    backbone: Literal["kivi", "kcvt"] = "kivi"
    group_size: int = 64
    buffer: int = 64
    rank_keys: int = 2
    rank_values: int = 2
    prefill_rank_keys: int = 4
    prefill_rank_values: int = 4
    iterations: int = 3

    @property
    def _fractions(self) -> tuple[float, float]:
        """Shares of outliers in keys and in values."""
        return 0.0, 0.0

    def check(self) -> None:
        name = type(self).name()
        ranks = (self.rank_keys, self.rank_values, self.prefill_rank_keys, self.prefill_rank_values)
        if min(ranks) < 0 or self.iterations < 1:
            raise ConfigError(f"{name}: ranks {ranks} must be >= 0 and iterations={self.iterations} >= 1.")
        if self.group_size < 16 or self.group_size % 16:
            raise ConfigError(f"{name}: group_size={self.group_size} is not a multiple of 16.")
        if self.buffer < 16 or (self.backbone == "kivi" and self.buffer % self.group_size):
            raise ConfigError(
                f"{name}: buffer={self.buffer} must be at least 16 tokens and, with the backbone 'kivi', a multiple of "
                f"group_size={self.group_size}: keys leave the buffer in whole groups of tokens."
            )

    def head_plans(self, layer: LayerShape, fitted: Fitted) -> tuple[HeadPlan, ...]:
        if self.backbone == "kivi" and layer.head_dim % self.group_size:
            raise ConfigError(
                f"{type(self).name()}: group_size={self.group_size} does not divide the head dimension "
                f"{layer.head_dim}, over which the groups of values run."
            )
        if max(self.rank_keys, self.rank_values, self.prefill_rank_keys, self.prefill_rank_values) > layer.head_dim:
            raise ConfigError(f"{type(self).name()}: a rank exceeds the head dimension {layer.head_dim}.")
        group = self.group_size if self.backbone == "kivi" else -1
        of_keys, of_values = self._fractions
        keys = KVCodec(
            bits=self.bits,
            group_tokens=group,
            outliers=OutlierRule(along="tokens", fraction=of_keys) if of_keys else None,
            rank=self.rank_keys,
            prefill_rank=self.prefill_rank_keys,
            iterations=self.iterations,
        )
        values = KVCodec(
            bits=self.bits,
            group_channels=group,
            outliers=OutlierRule(along="channels", fraction=of_values) if of_values else None,
            rank=self.rank_values,
            prefill_rank=self.prefill_rank_values,
            iterations=self.iterations,
        )
        return (
            HeadPlan(
                heads=layer.all_heads,
                keys=TensorPlan(codec=keys, block=self.buffer),
                values=TensorPlan(codec=values, block=self.buffer),
            ),
        )
