"""Rotate keys over several heads, sort the channels by level, quantize per token: 2 bits in large groups.

Paper: Zunhai Su, Zhe Chen, Wang Shen, Hanyu Wei, Linge Li, Huangqi Yu, Kehong Yuan, "RotateKV: Accurate and Robust
2-Bit KV Cache Quantization for LLMs via Outlier-Aware Adaptive Rotations", IJCAI 2025, arXiv:2501.16383.

Keys before rotary embedding are multiplied by a Hadamard matrix over the channels of `heads_per_rotation` heads,
which spreads large channels over all of them; then the channels of the layer are put in the order of their *signed*
sum over calibration text, so that those of similar level share a group. Values are rotated head by head. Groups are
`group_size` channels of a token, with

    max and min scaled by rho toward zero,    s = (max - min) / (2^bits - 1),    code = clamp(round((x - min) / s))

and rho = 0.8 at 2 bits, 1 above. Reading undoes the order, the rotation and applies rotary embedding. Tokens of a
prompt that hold one of the `pivots` largest entries of what enters a layer, and the first token, stay exact.

Departures: a prompt attends to exact keys and values, as with all caches here; the paper's attends to quantized ones.
Rotations are computed where tokens are stored and read, so weights stay as they are (the paper merges them into W_k,
W_v and W_o; models with key norms could not). The minimum is a float16 number in place of an integer zero point.
Fewer heads are rotated together, a power of two, where the layer has no multiple of `heads_per_rotation`. Tokens are
encoded 32 at a time, so up to 31 recent ones are exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from trimtab.cache.base import CacheMethod, Fitted, LayerShape
from trimtab.core.errors import ConfigError
from trimtab.models.segments import HeadPlan, TensorPlan
from trimtab.tensors.kv.codec import KVCodec
from trimtab.tensors.kv.rotation import channel_order

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from trimtab.models.calibration_set import CalibrationSet

__all__ = ["RotateKV"]

BLOCK_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class RotateKV(CacheMethod):
    """Options of RotateKV.

    bits                 of a code, keys and values
    group_size           channels of a token that share a scale and a minimum; at most a layer's key channels for
                         keys, a head's for values
    heads_per_rotation   KV heads that are rotated together
    clip                 rho; the default is the paper's for the number of bits
    pivots               largest entries of a layer's input whose tokens stay exact; 0: none
    reorder              put channels in the order of their signed sum
    """

    calibrated: ClassVar[bool] = True

    bits: Literal[2, 3, 4, 8] = 2
    group_size: int = 128
    heads_per_rotation: int = 4
    clip: float | None = None
    pivots: int = 20
    reorder: bool = True

    def check(self) -> None:
        if self.group_size < 1 or self.heads_per_rotation < 1 or self.pivots < 0:
            raise ConfigError(
                f"rotatekv: group_size={self.group_size} and heads_per_rotation={self.heads_per_rotation} must be "
                f">= 1, pivots={self.pivots} >= 0."
            )
        if self.clip is not None and not 0 < self.clip <= 1:
            raise ConfigError(f"rotatekv: clip={self.clip} must be in (0, 1].")

    def fit_options(self) -> dict[str, object]:
        return {"heads_per_rotation": self.heads_per_rotation}

    def fit(self, model: PreTrainedModel, calibration: CalibrationSet) -> dict[str, Tensor]:
        """`order.LAYER`: int16 [Hk d], channels by ascending signed sum of the rotated keys."""
        from trimtab.cache._capture import captured_layers

        found = {}
        for layer in captured_layers(model, calibration, fisher=False):
            size = self._rotation(*layer.keys.shape[1:])
            found[f"order.{layer.layer}"] = channel_order(layer.keys.double().sum(dim=0), size)
        return found

    def _rotation(self, kv_heads: int, head_dim: int) -> int:
        """Channels that are rotated together. Raises ConfigError for heads that a Hadamard matrix does not fit."""
        if head_dim & (head_dim - 1):
            raise ConfigError(
                f"rotatekv: the head dimension {head_dim} is not a power of two, which a Hadamard matrix of this kind "
                "needs."
            )
        heads = self.heads_per_rotation
        while heads & (heads - 1) or kv_heads % heads:
            heads -= 1
        return heads * head_dim

    def head_plans(self, layer: LayerShape, fitted: Fitted) -> tuple[HeadPlan, ...]:
        clip = self.clip if self.clip is not None else (0.8 if self.bits == 2 else 1.0)
        channels = layer.kv_heads * layer.head_dim
        keys = KVCodec(
            bits=self.bits,
            group_channels=min(self.group_size, channels),
            clip=clip,
            hadamard=self._rotation(layer.kv_heads, layer.head_dim),
            order=fitted[f"order.{layer.index}"] if self.reorder else None,
        )
        values = KVCodec(
            bits=self.bits,
            group_channels=min(self.group_size, layer.head_dim),
            clip=clip,
            hadamard=layer.head_dim,
        )
        return (
            HeadPlan(
                heads=layer.all_heads,
                keys=TensorPlan(codec=keys, block=BLOCK_TOKENS, pre_rope=True),
                values=TensorPlan(codec=values, block=BLOCK_TOKENS),
                pivots=self.pivots,
            ),
        )
