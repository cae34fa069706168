"""What the claims of cache methods share: read text through a cache on `ref`, and measure what that costs.

Calibration text is the shipped prose for calibration, measurement the held-out prose. Everything is computed in
float32; bytes are counted as they are for a bfloat16 model. Results are kept while the process lives.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from trimtab.cache import Kivi, RotateKV
from trimtab.cache.base import CacheMethod, Fitted, LayerShape
from trimtab.claims._reference import reference
from trimtab.evaluation import Divergence, NextTokens
from trimtab.evaluation.caches import (
    AttentionError,
    AttentionInputs,
    attention_error,
    cache_bits,
    cache_divergence,
    replay,
)
from trimtab.evaluation.outliers import Kind
from trimtab.models import load
from trimtab.models.segments import HeadPlan
from trimtab.tensors.kv.codec import KVCodec
from trimtab.tensors.kv.size import nbytes

WINDOWS, LENGTH = 4, 2048
MEASURED = f"measured on {WINDOWS} x {LENGTH:,} tokens of held-out prose that the model reads through the cache"


@dataclass(frozen=True, kw_only=True)
class KeysPerToken(Kivi):
    """The baseline that several papers argue against: keys in groups of channels of a token, as values are.

    The same bytes as Kivi with the same options.
    """

    def head_plans(self, layer: LayerShape, fitted: Fitted) -> tuple[HeadPlan, ...]:
        (plan,) = super().head_plans(layer, fitted)
        codec = KVCodec(bits=self.bits, group_channels=self.group_size)
        return (dataclasses.replace(plan, keys=dataclasses.replace(plan.keys, codec=codec)),)


@dataclass(frozen=True, kw_only=True)
class NotRotated(RotateKV):
    """RotateKV without its rotations and its order of channels, everything else equal."""

    def head_plans(self, layer: LayerShape, fitted: Fitted) -> tuple[HeadPlan, ...]:
        (plan,) = super().head_plans(layer, fitted)
        plain: dict[str, Any] = {
            kind: dataclasses.replace(part, codec=dataclasses.replace(part.codec, hadamard=0, order=None))
            for kind, part in (("keys", plan.keys), ("values", plan.values))
            if isinstance(part.codec, KVCodec)
        }
        return (dataclasses.replace(plan, **plain),)


@dataclass(frozen=True, slots=True)
class Measured:
    """One cache on `ref`.

    divergence        from the model without a cache
    bits_per_byte_change, bits_per_byte   of the text
    bits              per element of the cache, all allocated buffers counted, on a bfloat16 model
    attention         relative errors of outputs, keys and values, on the first window
    """

    divergence: Divergence
    bits_per_byte: float
    bits_per_byte_change: float
    bits: float
    attention: AttentionError

    @property
    def kl(self) -> float:
        return self.divergence.estimates()["kl_nats_per_token"].value

    @property
    def key_error(self) -> float:
        """Relative error of the attention output that the keys cause, mean over layers."""
        return self.attention.means()["output_keys"]

    @property
    def value_error(self) -> float:
        return self.attention.means()["output_values"]


@functools.cache
def model_with(outliers: Kind | None, seed: int = 0) -> PreTrainedModel:
    """`ref` in float32, kept; with outlier channels if asked, which change no logit."""
    return reference(outliers, seed)


@functools.cache
def predictions() -> NextTokens:
    """What `ref` predicts on long windows of held-out prose; the same with outlier channels."""
    return NextTokens.of(model_with(None), windows=WINDOWS, length=LENGTH)


@functools.cache
def inputs(outliers: Kind | None, seed: int = 0) -> AttentionInputs:
    """What the attention layers receive for the first window."""
    return AttentionInputs.of(model_with(outliers, seed), predictions().tokens[0, :-1].tolist())


@functools.cache
def measured(method: CacheMethod, outliers: Kind | None = None, seed: int = 0) -> Measured:
    """Read the windows through the cache, and count its bytes after one of them."""
    model = model_with(outliers, seed)
    found = cache_divergence(model, method, predictions())
    estimates = found.estimates()
    cache = method.new(model)
    replay(cache, inputs(outliers, seed).to(torch.bfloat16))
    return Measured(
        divergence=found.divergence,
        bits_per_byte=estimates["bits_per_byte"].value,
        bits_per_byte_change=estimates["bits_per_byte_change"].value,
        bits=cache_bits(cache).bits,
        attention=attention_error(model, method, [inputs(outliers, seed)]),
    )


def closer(one: Measured, other: Measured) -> bool:
    """Whether the first is nearer to the model without a cache: the paired 95 % interval of KL is below zero."""
    return one.divergence.kl_difference(other.divergence).high < 0


def figures(name: str, found: Measured) -> dict[str, float]:
    """What a verdict shows of one cache."""
    return {
        f"kl_nats_per_token_{name}": found.kl,
        f"bits_per_element_{name}": found.bits,
    }


def long_text_bytes(method: CacheMethod, tokens: int) -> int:
    """Bytes that a cache for one layer of `ref`, as bfloat16, allocates for so many tokens, times its layers."""
    model = load("ref")
    model.config.max_position_embeddings = tokens
    layers = int(model.config.num_hidden_layers)
    cache = method.new(model)
    layer = cache.segment_layers[0]
    generator = torch.Generator().manual_seed(0)
    shape = (1, model.config.num_key_value_heads, LENGTH, model.config.head_dim)
    with torch.inference_mode():
        for _ in range(tokens // LENGTH):
            keys, values = (torch.randn(shape, generator=generator).bfloat16() for _ in range(2))
            layer.store(keys, values)
    return cache.nbytes() * layers


def key_errors_of_a_prompt(method: CacheMethod) -> tuple[float, float]:
    """Of the first window: half of it is stored as one prompt, the other half attends to it.

    Returns the relative error of the attention output that keys cause, mean over layers, and bits per key element
    that is encoded.
    """
    model, half = model_with(None), LENGTH // 2
    error = attention_error(model, method, [inputs(None)], chunk=half).means()["output_keys"]
    cache = method.new(model)
    spent = elements = 0
    for layer, given in zip(cache.segment_layers, inputs(None).layers, strict=True):
        layer.store(given.keys[:, :, :half], given.values[:, :, :half])
        for group in layer.groups:
            for runs in group.keys.runs:
                spent += nbytes(runs) * 8
                elements += sum(run.tokens * run.heads * run.head_dim for run in runs)
    return error, spent / elements
