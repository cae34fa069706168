"""Error of keys, values and attention outputs when a cache stands between the model's own queries, keys and values.

The model reads a text without compression, and what its attention layers receive is kept. Each layer of a cache is then
given exactly these tensors in chunks, so errors of earlier layers do not mix in. Nothing is approximated: what is
measured is the cache itself, with the plan of the method.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.cache.exact import Exact
from trimtab.evaluation.caches.decoding import CHUNK
from trimtab.evaluation.client import inference
from trimtab.kernels.kv_attention import Rope
from trimtab.kernels.kv_attention.reference import decode
from trimtab.models.segments import CachePlan, HeadPlan, SegmentCache
from trimtab.models.segments.layer import SegmentLayer
from trimtab.models.segments.pivots import watch_inputs
from trimtab.models.segments.rope import rotated, unrotated
from trimtab.tensors.kv.codec import KVCodec

if TYPE_CHECKING:
    from trimtab.cache.base import CacheMethod


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """What one attention layer received for one text of T tokens.

    query, keys, values   [1, heads, T, d], keys after rotary embedding
    hidden                [1, T, c], what entered the block
    scale, softcap, sliding_window   of its attention
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    hidden: Tensor
    scale: float
    softcap: float | None
    sliding_window: int | None

    def to(self, dtype: torch.dtype) -> LayerInputs:
        cast = {name: getattr(self, name).to(dtype) for name in ("query", "keys", "values", "hidden")}
        return dataclasses.replace(self, **cast)


class _Recorder(SegmentLayer):  # type: ignore[no-untyped-call]
    """A cache layer that keeps what its attention receives."""

    received: LayerInputs | None = None
    hidden: Tensor | None = None

    def note_inputs(self, hidden: Tensor) -> None:
        self.hidden = hidden

    def attend(
        self,
        query: Tensor,
        mask: Tensor | None,
        position_ids: Tensor | None,
        scaling: float,
        softcap: float | None,
        sliding_window: int | None,
    ) -> Tensor:
        assert self.pending is not None
        assert self.hidden is not None
        self.received = LayerInputs(query, *self.pending, self.hidden, scaling, softcap, sliding_window)
        return super().attend(query, mask, position_ids, scaling, softcap, sliding_window)


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """The inputs of all attention layers for one text, read without compression."""

    layers: tuple[LayerInputs, ...]

    @classmethod
    def of(cls, model: PreTrainedModel, tokens: Sequence[int]) -> AttentionInputs:
        """Read a text of at least two tokens. The model is left with the attention implementation "trimtab"."""
        cache = Exact().new(model)
        recorders = [_Recorder(cache, layer.index, layer.plan, None) for layer in cache.segment_layers]
        cache.layers = list(recorders)
        watch_inputs(model)
        with inference(model):
            model(input_ids=torch.tensor([list(tokens)], device=model.device), past_key_values=cache)
        found = [recorder.received for recorder in recorders]
        return cls(tuple(received for received in found if received is not None))

    def to(self, dtype: torch.dtype) -> AttentionInputs:
        """The same in another precision, to count the bytes of a model that runs in it."""
        return AttentionInputs(tuple(layer.to(dtype) for layer in self.layers))


@torch.inference_mode()
def replay(cache: SegmentCache, inputs: AttentionInputs, *, chunk: int = CHUNK) -> list[Tensor]:
    """Attention outputs [1, Hq, T, d] of each layer of a new cache for these inputs, given in chunks.

    Afterwards the cache holds the text, as if the model had read it.
    """
    outputs = []
    for layer, given in zip(cache.segment_layers, inputs.layers, strict=True):
        parts = []
        for begin in range(0, given.keys.shape[2], chunk):
            end = min(begin + chunk, given.keys.shape[2])
            if end - begin > 1:
                layer.note_inputs(given.hidden[:, begin:end])
            layer.update(given.keys[:, :, begin:end], given.values[:, :, begin:end])
            positions = torch.arange(begin, end, device=given.keys.device)[None]
            query = given.query[:, :, begin:end]
            parts.append(layer.attend(query, None, positions, given.scale, given.softcap, given.sliding_window))
        outputs.append(torch.cat(parts, dim=2))
    return outputs


@dataclass(frozen=True, slots=True)
class AttentionError:
    """Relative errors ||x - x^|| / ||x|| of each layer: Frobenius norms over all texts, heads, tokens and dimensions.

    output          attention output, keys and values as the method keeps them
    output_keys     attention output with exact values
    output_values   attention output with exact keys
    keys, values    what the cache holds after the text, its exact window included; evicted tokens count as zeros

    What is evicted is missing from all three outputs.
    """

    output: tuple[float, ...]
    output_keys: tuple[float, ...]
    output_values: tuple[float, ...]
    keys: tuple[float, ...]
    values: tuple[float, ...]

    def means(self) -> dict[str, float]:
        """Means over layers."""
        return {f.name: sum(row := getattr(self, f.name)) / len(row) for f in dataclasses.fields(self)}

    def to_dict(self) -> dict[str, object]:
        """Means by name, and the layers under "layers"."""
        return {**self.means(), "layers": {name: list(row) for name, row in dataclasses.asdict(self).items()}}


def attention_error(
    model: PreTrainedModel, method: CacheMethod, texts: Sequence[AttentionInputs], *, chunk: int = CHUNK
) -> AttentionError:
    """Measure a method on what `AttentionInputs.of` kept of some texts of this model."""
    plan = method.new(model).plan
    plans = {
        "output": plan,
        "output_keys": _with_exact(plan, "values"),
        "output_values": _with_exact(plan, "keys"),
    }
    count = len(plan.layers)
    lost = {name: [0.0] * count for name in (*plans, "keys", "values")}
    size = {name: [0.0] * count for name in ("output", "keys", "values")}
    for inputs in texts:
        exact = replay(Exact().new(model), inputs, chunk=chunk)
        for name, own in plans.items():
            cache = SegmentCache(model, own)
            for index, (out, true) in enumerate(zip(replay(cache, inputs, chunk=chunk), exact, strict=True)):
                lost[name][index] += _square(out - true)
            if name == "output":
                for index, given in enumerate(inputs.layers):
                    held = held_tensors(cache.segment_layers[index])
                    for kind, tensor, true in zip(("keys", "values"), held, (given.keys, given.values), strict=True):
                        lost[kind][index] += _square(tensor - true[0])
                        size[kind][index] += _square(true)
                    size["output"][index] += _square(exact[index])
    relative = {
        name: tuple((e / size[name if name in size else "output"][i]) ** 0.5 for i, e in enumerate(sums))
        for name, sums in lost.items()
    }
    return AttentionError(**relative)


def _with_exact(plan: CachePlan, kind: str) -> CachePlan:
    """The plan with keys, or values, as they are; the same tokens are evicted."""

    def changed(group: HeadPlan) -> HeadPlan:
        own = dataclasses.replace(getattr(group, kind), codec=KVCodec(bits=0), pre_rope=False)
        return dataclasses.replace(group, **{kind: own})

    layers = tuple(tuple(changed(group) for group in groups) for groups in plan.layers)
    return CachePlan(layers, plan.name, plan.options)


@torch.inference_mode()
def held_tensors(layer: SegmentLayer, row: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values [Hk, T, d] float32 that a layer holds of its T tokens, at their positions in the text.

    Zeros where a token has been evicted.
    """
    heads = sum(len(group.plan.heads) for group in layer.groups)
    shape = (heads, layer.length, layer.groups[0].keys.buffer.shape[3])
    found = torch.zeros(shape, device=layer.device), torch.zeros(shape, device=layer.device)
    for group in layer.groups:
        count = group.tokens(row)
        sinks = min(group.plan.sinks, count) if group.plan.recent is not None else 0
        kept = torch.cat([torch.arange(sinks), torch.arange(layer.length - count + sinks, layer.length)])
        rope: Rope | None = None if layer.rope is None else layer.rope.table(layer.length, layer.device)
        lane = group.lane(row, group.plan.heads)
        keys = torch.cat([decode(run, rope, torch.float32) for run in lane.keys], dim=1)
        values = torch.cat([decode(run, None, torch.float32) for run in lane.values], dim=1)
        if group.plan.positions == "cache":
            assert layer.rope is not None
            in_cache = layer.rope.angles(torch.arange(count, device=layer.device))
            keys = rotated(unrotated(keys, in_cache), layer.rope.angles(kept.to(layer.device)))
        for target, tensor in zip(found, (keys, values), strict=True):
            for index, head in enumerate(group.plan.heads):
                target[head, kept] = tensor[index]
    return found


def _square(x: Tensor) -> float:
    return float(x.double().square().sum())
