"""Keys and values of calibration text, layer by layer, with the squared gradients of the loss if asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.core.progress import progress
from trimtab.kernels.kv_attention import Rope
from trimtab.models.attention_capture import observed_attention
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.frozen import frozen
from trimtab.models.segments import RopeSource
from trimtab.models.segments.rope import rotated, unrotated
from trimtab.models.views import ModelView

MAX_BYTES = 2 << 30
"""Captured at a time; with more layers than fit, the text is read again for the next ones."""
_BATCH_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Captured:
    """Keys and values of one layer, float32 [T, Hk, d], tokens of all texts one after the other, padding left out.

    keys      before rotary embedding
    *_fisher  squared gradients of the mean next-token loss of each batch, same shape; None if not asked for
    """

    layer: int
    keys: Tensor
    values: Tensor
    keys_fisher: Tensor | None = None
    values_fisher: Tensor | None = None


def captured_layers(
    model: PreTrainedModel, calibration: CalibrationSet, *, fisher: bool, skip_first: int = 0
) -> Iterator[Captured]:
    """All layers in turn. `skip_first` tokens of each text are left out, as those a cache keeps exactly.

    Raises TargetError for a model without rotary positions.
    """
    blocks = ModelView.of(model).blocks
    ropes = [RopeSource(model, block.index) for block in blocks]
    tokens = calibration.count
    widest = max(block.attention.num_kv_heads * block.attention.head_dim for block in blocks)
    per_layer = tokens * widest * 4 * (4 if fisher else 2)
    at_once = max(1, min(len(blocks), MAX_BYTES // per_layer))
    for start in range(0, len(blocks), at_once):
        wanted = range(start, min(start + at_once, len(blocks)))
        yield from _captured(model, calibration, ropes, wanted, fisher, skip_first)


def _captured(
    model: PreTrainedModel,
    calibration: CalibrationSet,
    ropes: list[RopeSource],
    wanted: range,
    fisher: bool,
    skip_first: int,
) -> list[Captured]:
    found: dict[str, dict[int, list[Tensor]]] = {name: {i: [] for i in wanted} for name in _PARTS}
    grouped = torch.split(torch.arange(calibration.tokens.shape[0]), max(1, _BATCH_TOKENS // calibration.length))
    with frozen(model), progress("reading calibration text", len(grouped)) as advance:
        for rows in grouped:
            tokens, mask = calibration.tokens[rows], calibration.mask[rows]
            keep = mask.clone()
            keep[:, :skip_first] = False
            _read(model, tokens.to(model.device), mask.to(model.device), keep, ropes, wanted, fisher, found)
            advance("")
    return [
        Captured(
            layer,
            torch.cat(found["keys"][layer]),
            torch.cat(found["values"][layer]),
            torch.cat(found["keys_fisher"][layer]) if fisher else None,
            torch.cat(found["values_fisher"][layer]) if fisher else None,
        )
        for layer in wanted
    ]


_PARTS = ("keys", "values", "keys_fisher", "values_fisher")


def _read(
    model: PreTrainedModel,
    tokens: Tensor,
    mask: Tensor,
    keep: Tensor,
    ropes: list[RopeSource],
    wanted: range,
    fisher: bool,
    found: dict[str, dict[int, list[Tensor]]],
) -> None:
    positions = torch.arange(tokens.shape[1], device=tokens.device)

    def see(layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        if layer not in wanted:
            return
        rope = ropes[layer].angles(positions)

        def flat(x: Tensor) -> Tensor:
            return x.detach().float().transpose(1, 2)[keep].cpu()

        found["keys"][layer].append(flat(unrotated(key.detach().float(), rope)))
        found["values"][layer].append(flat(value))
        if fisher:
            # the gradient before rotary embedding is that after it, times the transpose of the rotation
            transposed = Rope(rope.cos, -rope.sin)
            key.register_hook(  # type: ignore[no-untyped-call]
                lambda g: found["keys_fisher"][layer].append(flat(rotated(g.float(), transposed)).square())
            )
            value.register_hook(  # type: ignore[no-untyped-call]
                lambda g: found["values_fisher"][layer].append(flat(g).square())
            )

    with observed_attention(model, see), torch.set_grad_enabled(fisher):
        embedded = model.get_input_embeddings()(tokens)
        if fisher:
            embedded = embedded.detach().requires_grad_(True)
        labels = tokens.masked_fill(~mask, -100) if fisher else None
        out = model(inputs_embeds=embedded, attention_mask=mask, labels=labels, use_cache=False)
        if fisher:
            out.loss.backward()
