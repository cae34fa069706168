"""Attention of new queries over what a layer holds: lanes, visibility, and the choice of how to compute it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.kernels.kv_attention import Lane, kv_attention
from trimtab.models.segments.dense import attention_over_dense, pad_columns
from trimtab.models.segments.group import Group
from trimtab.models.segments.plan import HeadPlan
from trimtab.models.segments.visibility import first_visible, tail_visible

if TYPE_CHECKING:
    from trimtab.models.segments.layer import SegmentLayer

MAX_QUERIES = 64
"""Queries up to which attention runs on the compressed tokens; more are a prompt, for which they are decoded once."""


def attend_to_all(
    layer: SegmentLayer,
    query: Tensor,
    valid: list[list[int]] | None,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    sliding_window: int | None,
    bias: Tensor | None,
) -> Tensor:
    """Attention of new queries to all that a layer holds, themselves included: [R, Hq, T, d] -> [R, Hq, T, d]."""
    length, span, columns, tail = query.shape[2], query.shape[2], valid, None
    if layer.draft is not None:
        span, columns = layer.length - layer.draft.length, layer.draft.columns
    if length > 1 or layer.draft is not None:
        tail = tail_visible(mask, length, span, columns, layer.rows, query.device)
    options: dict[str, Any] = {"scale": scaling, "rope": layer._rope_table(), "softcap": softcap}
    options["tail_visible"] = tail
    attention = attention_over_dense if length > MAX_QUERIES else _over_runs
    if sliding_window is None or len(layer.groups) == 1:
        lanes = [group.lane(row, group.plan.heads) for group in layer.groups for row in range(layer.rows)]
        first = None
        if sliding_window is not None:
            first = _first_visible(layer, layer.groups[0], tail, sliding_window)
        return attention(query, lanes, bias=_as_wide(bias, lanes), first_visible=first, **options)
    # groups hold different tokens, so a window begins at another index in each
    out = torch.empty_like(query)
    for group in layer.groups:
        heads = query_heads(layer.plan, group.plan, query.shape[1])
        lanes = [group.lane(row, tuple(range(len(group.plan.heads)))) for row in range(layer.rows)]
        first = _first_visible(layer, group, tail, sliding_window)
        own_bias = _as_wide(None if bias is None else bias[:, heads], lanes)
        out[:, heads] = attention(query[:, heads], lanes, bias=own_bias, first_visible=first, **options)
    return out


def _first_visible(layer: SegmentLayer, group: Group, tail: Tensor | None, window: int) -> Tensor:
    held = [group.tokens(row) for row in range(layer.rows)]
    first = first_visible(held, tail, window, layer.device)
    if group.plan.recent is None or group.in_cache:
        return first
    for row, tokens in enumerate(held):
        if tokens < layer.lengths[row]:  # after the sinks tokens are gone, so sinks are farther than it seems
            first[row].clamp_(min=group.plan.sinks)
    return first


def query_heads(plans: Sequence[HeadPlan], plan: HeadPlan, heads: int) -> list[int]:
    """Which of a layer's query heads read the KV heads of one of its plans."""
    share = heads // sum(len(each.heads) for each in plans)
    return [head * share + i for head in plan.heads for i in range(share)]


def _over_runs(query: Tensor, lanes: Sequence[Lane], **options: Any) -> Tensor:
    return kv_attention(query, lanes, **options)[0]


def _as_wide(bias: Tensor | None, lanes: Sequence[Lane]) -> Tensor | None:
    """A bias for as many keys as the longest lane has."""
    return None if bias is None else pad_columns(bias, max(lane.tokens for lane in lanes))
