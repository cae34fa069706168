"""Keys quantized per channel, values per token, recent tokens exact; no calibration.

Paper: Zirui Liu, Jiayi Yuan, Hongye Jin, Shaochen Zhong, Zhaozhuo Xu, Vladimir Braverman, Beidi Chen, Xia Hu, "KIVI:
A Tuning-Free Asymmetric 2bit Quantization for KV Cache", ICML 2024, arXiv:2402.02750.

Keys have a few channels of large magnitude, the same for all tokens, and values have none. So a group of keys is
`group_size` consecutive tokens of one channel, which confines the error of a large channel to that channel, and a
group of values is `group_size` channels of one token, which confines the error of a token to that token. In a group x

    s = (max x - min x) / (2^bits - 1)     code = round((x - min x) / s)     x^ = code s + min x

with s and min x in float16, rounded before the codes are computed. A prompt attends to exact keys and values; then
keys are quantized in blocks of `window` tokens, so 0 to window - 1 recent ones are exact, and so are the last
`window` values.

Departures: values leave the window in blocks of 32 tokens instead of one by one, so window to window + 31 of them are
exact (their codes are the same). A group of equal numbers is stored exactly; the official code divides by zero there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trimtab.cache.base import CacheMethod, Fitted, LayerShape
from trimtab.core.errors import ConfigError
from trimtab.models.segments import HeadPlan, TensorPlan
from trimtab.tensors.kv.codec import KVCodec

__all__ = ["Kivi"]

VALUE_BLOCK_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class Kivi(CacheMethod):
    """Options of KIVI.

    bits         of a code; the authors advise 2 for models without grouped heads, and 4 with them
    value_bits   of a code of the values; the default is `bits`
    group_size   numbers that share a scale and a minimum: tokens of a channel (keys), channels of a token (values)
    window       recent tokens that stay exact, a multiple of group_size
    """

    bits: Literal[1, 2, 3, 4, 8] = 2
    value_bits: Literal[1, 2, 3, 4, 8] | None = None
    group_size: int = 32
    window: int = 128

    def check(self) -> None:
        if self.group_size < 16 or self.group_size % 16:
            raise ConfigError(f"kivi: group_size={self.group_size} is not a multiple of 16.")
        if self.window < self.group_size or self.window % self.group_size:
            raise ConfigError(
                f"kivi: window={self.window} is not a multiple of group_size={self.group_size}: keys leave the "
                "window in whole groups of tokens."
            )

    def head_plans(self, layer: LayerShape, fitted: Fitted) -> tuple[HeadPlan, ...]:
        if layer.head_dim % self.group_size:
            raise ConfigError(
                f"kivi: group_size={self.group_size} does not divide the head dimension {layer.head_dim}, over which "
                "the groups of values run."
            )
        keys = KVCodec(bits=self.bits, group_tokens=self.group_size)
        values = KVCodec(bits=self.value_bits or self.bits, group_channels=self.group_size)
        return (
            HeadPlan(
                heads=layer.all_heads,
                keys=TensorPlan(codec=keys, window=0, block=self.window),
                values=TensorPlan(codec=values, window=self.window, block=VALUE_BLOCK_TOKENS),
            ),
        )
