"""Several channels share one code: at 1 bit per channel, 256 centroids for eight channels instead of two levels each.

Paper: Tianyi Zhang, Jonah Yi, Zhaozhuo Xu, Anshumali Shrivastava, "KV Cache is 1 Bit Per Channel: Efficient Large
Language Model Inference with Coupled Quantization", NeurIPS 2024, arXiv:2405.03917.

Channels of a key or value depend on each other, so the entropy of `channels` of them together grows more slowly than
the sum of theirs. Each group of `channels` neighbouring channels of a head has a codebook of 2^bits centroids, learnt
from calibration text by k-means, and a token stores the number of the nearest one (plain distance). With `fisher` the
k-means minimises

    sum_j (g_j . g_j) |a_j - centroid(a_j)|^2

with g_j the gradient of the loss with respect to a_j. Keys are taken before rotary embedding. A name such as CQ-8c8b
means channels=8, bits=8: bits / channels bits per channel. Codebooks take Hk d 2^bits x 16 bits per tensor and layer
whatever `channels` is; they are counted.

Departures: k-means takes 16,384 of the calibration tokens and 25 iterations by default; the authors publish no code.
Tokens are encoded 32 at a time, so up to 31 recent ones are exact beyond the `window`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from trimtab.cache.base import CacheMethod, Fitted, LayerShape
from trimtab.core.errors import ConfigError
from trimtab.models.segments import HeadPlan, TensorPlan
from trimtab.tensors.kv.codebook import fit_codebook
from trimtab.tensors.kv.codec import KVCodec

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from trimtab.models.calibration_set import CalibrationSet

__all__ = ["Cq"]

BLOCK_TOKENS = 32
MAX_TOKENS = 16_384
"""Points of each k-means."""


@dataclass(frozen=True, kw_only=True)
class Cq(CacheMethod):
    """Options of Coupled Quantization.

    channels     neighbouring channels of a head that share a code; 1: a learnt table for each channel (codes are then
                 stored in pairs)
    bits         of a code
    fisher       weigh k-means by squared gradients; false: all tokens alike
    window       recent tokens that stay exact
    iterations   of k-means, at most
    """

    calibrated: ClassVar[bool] = True

    channels: int = 4
    bits: int = 8
    fisher: bool = True
    window: int = 0
    iterations: int = 25

    def check(self) -> None:
        if self.channels < 1 or self.window < 0:
            raise ConfigError(f"cq: channels={self.channels} must be >= 1 and window={self.window} >= 0.")
        allowed = (1, 2, 4) if self.channels == 1 else (1, 2, 3, 4, 8, 9, 10, 11, 12)
        if self.bits not in allowed:
            raise ConfigError(f"cq: bits={self.bits} with channels={self.channels}; codes can have {allowed} bits.")

    def fit_options(self) -> dict[str, object]:
        return {name: value for name, value in self.to_dict().items() if name != "window"}

    def fit(self, model: PreTrainedModel, calibration: CalibrationSet) -> dict[str, Tensor]:
        """`keys.LAYER` and `values.LAYER`: codebooks, float16 [Hk, d / channels, 2^bits, channels]."""
        from trimtab.cache._capture import captured_layers

        found = {}
        for layer in captured_layers(model, calibration, fisher=self.fisher):
            for name, x, f in (
                ("keys", layer.keys, layer.keys_fisher),
                ("values", layer.values, layer.values_fisher),
            ):
                if x.shape[2] % self.channels:
                    raise ConfigError(f"cq: channels={self.channels} does not divide the head dimension {x.shape[2]}.")
                points = self._grouped(x)
                weights = None if f is None else self._grouped(f).sum(dim=-1)
                centroids = fit_codebook(points, self.bits, weights, iterations=self.iterations)
                if self.channels == 1:
                    centroids = _pairs(centroids)
                found[f"{name}.{layer.layer}"] = torch.unflatten(centroids, 0, (x.shape[1], -1))
        return found

    def _grouped(self, x: Tensor) -> Tensor:
        """[T, Hk, d] -> [Hk d / channels, at most MAX_TOKENS evenly spread tokens, channels]."""
        return torch.unflatten(x[:: -(-len(x) // MAX_TOKENS)].flatten(1), 1, (-1, self.channels)).transpose(0, 1)

    def head_plans(self, layer: LayerShape, fitted: Fitted) -> tuple[HeadPlan, ...]:
        plans = {}
        for name in ("keys", "values"):
            codebook = fitted[f"{name}.{layer.index}"]
            doubled = 2 if self.channels == 1 else 1
            codec = KVCodec(bits=self.bits * doubled, coupled=self.channels * doubled, codebook=codebook)
            plans[name] = TensorPlan(codec=codec, window=self.window, block=BLOCK_TOKENS, pre_rope=name == "keys")
        return (HeadPlan(heads=layer.all_heads, keys=plans["keys"], values=plans["values"]),)


def _pairs(tables: Tensor) -> Tensor:
    """Scalar tables [C, 2^b, 1] of single channels as codebooks [C / 2, 4^b, 2] of pairs: all combinations.

    The nearest pair is the pair of the nearest, so this stores what a table for each channel would.
    """
    first, second = tables[0::2, :, 0], tables[1::2, :, 0]
    both = torch.stack(
        [first[:, :, None].expand(-1, -1, first.shape[1]), second[:, None].expand(-1, first.shape[1], -1)], -1
    )
    return both.flatten(1, 2)
