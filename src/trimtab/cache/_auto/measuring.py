"""What each candidate spoils: the error of the attention output, weighted by how much the loss depends on it.

For a head with output o (exact) and o^ (keys, or values, as the candidate stores them, the rest exact)

    error = sum over queries and channels of (g (o^ - o))^2,      g = dLoss / do

on calibration text: second order in the loss, with the squared gradient for the curvature. Each query sees its latest
tokens exactly, as many as a cache would keep so: the window and half of a block that waits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.cache._auto.candidates import Candidate, Kind
from trimtab.core.progress import progress
from trimtab.kernels.kv_attention.reference import decode
from trimtab.models.attention_capture import observed_attention
from trimtab.models.frozen import frozen
from trimtab.models.segments import RopeSource
from trimtab.models.segments.rope import unrotated
from trimtab.models.views import ModelView


@dataclass(frozen=True, slots=True)
class LayerSample:
    """What one attention layer computed with on calibration text, float32.

    query [R, Hq, T, d], keys and values [R, Hk, T, d], gradient [R, Hq, T, d] of the loss at the output
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    gradient: Tensor


def layer_samples(model: PreTrainedModel, tokens: Tensor) -> list[LayerSample]:
    """One forward and backward pass over tokens [R, T]. The parameters' gradients are left alone."""
    blocks = ModelView.of(model).blocks
    seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    gradients: dict[int, Tensor] = {}
    hooks = []
    for block in blocks:
        output = next(linear for linear in block.attention.linears if linear.role == "o")

        def watch(module: torch.nn.Module, args: tuple[Any, ...], index: int = block.index) -> None:
            args[0].register_hook(lambda g: gradients.__setitem__(index, g.detach().float()))

        hooks.append(output.module.register_forward_pre_hook(watch))

    def see(layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        seen[layer] = (query.detach().float(), key.detach().float(), value.detach().float())

    try:
        with frozen(model), torch.enable_grad(), observed_attention(model, see):
            embedded = model.get_input_embeddings()(tokens.to(model.device)).detach().requires_grad_(True)
            model(inputs_embeds=embedded, labels=tokens.to(model.device), use_cache=False).loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for block in blocks:
        query, key, value = seen[block.index]
        gradient = torch.unflatten(gradients[block.index], -1, (query.shape[1], query.shape[3])).transpose(1, 2)
        found.append(LayerSample(query, key, value, gradient))
    return found


def candidate_errors(
    samples: list[LayerSample],
    ropes: list[RopeSource],
    ways: Mapping[Kind, list[Candidate]],
    tables: Mapping[str, Tensor],
    scalings: list[float],
    windows: Sequence[int],
) -> dict[Kind, Tensor]:
    """{"keys": [windows, layers, Hk, candidates], "values": ...}: the error of each beside each window."""
    errors: dict[Kind, list[Tensor]] = {"keys": [], "values": []}
    with progress("measuring candidates", len(samples)) as advance:
        for index, sample in enumerate(samples):
            exact = _Exact(sample, scalings[index])
            for kind in errors:
                own = {
                    name.removeprefix(f"{kind}.{index}."): tensor
                    for name, tensor in tables.items()
                    if name.startswith(f"{kind}.{index}.")
                }
                found = [
                    exact.errors(
                        kind, _stored(sample, kind, way, own, ropes[index]), [w + way.block // 2 for w in windows]
                    )
                    for way in ways[kind]
                ]
                errors[kind].append(torch.stack(found, dim=-1))
            advance("")
    return {kind: torch.stack(found, dim=1) for kind, found in errors.items()}


def _stored(sample: LayerSample, kind: Kind, way: Candidate, tables: Mapping[str, Tensor], rope: RopeSource) -> Tensor:
    """Keys or values [R, Hk, T, d] as the candidate gives them back."""
    x = sample.keys if kind == "keys" else sample.values
    rows, heads, length, dim = x.shape
    codec = way.codec(tables, range(heads), dim)
    first = None
    if way.pre_rope:
        x, first = unrotated(x, rope.angles(torch.arange(length, device=x.device))), [0] * rows
    parts = []
    step = way.block if way.rank else length
    for start in range(0, length, step):
        block = x[:, :, start : start + step]
        positions = None if first is None else [start] * rows
        table = rope.table(length, x.device) if way.pre_rope else None
        parts.append(torch.stack([decode(run, table) for run in codec.encode(block, first_position=positions)]))
    return torch.cat(parts, dim=2)


class _Exact:
    """The exact attention of a layer, and how far another one's output is from it."""

    def __init__(self, sample: LayerSample, scaling: float) -> None:
        self.sample = sample
        self.scaling = scaling
        self.group = sample.query.shape[1] // sample.keys.shape[1]
        place = torch.arange(sample.query.shape[2], device=sample.query.device)
        self.distance = place[:, None] - place
        self.values = self._spread(sample.values)
        self.scores = self._scores(sample.keys)
        self.weights = self.scores.softmax(dim=-1)
        self.output = self.weights @ self.values

    def _spread(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.group, dim=1)

    def _scores(self, keys: Tensor) -> Tensor:
        scores: Tensor = self.sample.query @ self._spread(keys).transpose(2, 3) * self.scaling
        return scores.masked_fill_(self.distance < 0, -torch.inf)

    def errors(self, kind: Kind, stored: Tensor, exact_tokens: Sequence[int]) -> Tensor:
        """[len(exact_tokens), Hk] with these keys or values for all but so many of the latest tokens."""
        changed = self._scores(stored) if kind == "keys" else self._spread(stored - self.sample.values)
        found = []
        for exact in exact_tokens:
            near = self.distance < exact
            if kind == "keys":
                moved = torch.where(near, self.scores, changed).softmax(dim=-1) @ self.values - self.output
            else:
                moved = self.weights.masked_fill(near, 0.0) @ changed
            per_head = (moved * self.sample.gradient).square().sum(dim=(0, 2, 3))
            found.append(per_head.view(-1, self.group).sum(dim=1))
        return torch.stack(found)
