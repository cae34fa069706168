"""Attention of many queries: a prompt on its own, exactly, or over history that is decoded once for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from trimtab.kernels.kv_attention import Lane, Rope
from trimtab.kernels.kv_attention.reference import decode


def exact_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sliding_window: int | None,
) -> Tensor:
    """Causal attention of a prompt to itself: query [R, Hq, T, d], keys and values [R, Hk, T, d].

    mask [R, 1, T, T], bool or additive; None: causal, within the sliding window if there is one.
    """
    length = query.shape[2]
    if mask is None and sliding_window is not None and length > sliding_window:
        mask = causal_mask(length, length, query.device)
        mask = mask & ~torch.ones_like(mask).tril(-sliding_window)
    if softcap is None:
        grouped = query.shape[1] != keys.shape[1]
        if mask is not None and grouped:  # torch's fast kernel takes no mask with grouped heads
            keys, values = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (keys, values))
            grouped = False
        return scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
        )
    if mask is None:
        mask = causal_mask(length, length, query.device)
    return plain_attention(query, keys, values, mask, scale, softcap, None)


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """bool [1, 1, queries, keys]: the last query sees all keys."""
    return torch.ones((1, 1, queries, keys), dtype=torch.bool, device=device).tril(keys - queries)


def plain_attention(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, softcap: float | None, bias: Tensor | None
) -> Tensor:
    """Attention in float32 or wider with every score written out; mask as in `exact_attention`, bias broadcast."""
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    group = query.shape[1] // keys.shape[1]
    k, v = (t.repeat_interleave(group, dim=1).to(work) for t in (keys, values))
    scores = query.to(work) @ k.transpose(2, 3) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias.to(work)
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(dim=-1).nan_to_num(0.0) @ v).to(query.dtype)


def dense_lane(lanes: Sequence[Lane], rope: Rope | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values [Hk, n, d] of one row, whose lanes hold the same number of tokens."""
    work = torch.float64 if dtype == torch.float64 else torch.float32
    heads = [head for lane in lanes for head in lane.heads]
    order = torch.tensor(heads).argsort()
    keys = torch.cat([torch.cat([decode(run, rope, work) for run in lane.keys], dim=1) for lane in lanes])
    values = torch.cat([torch.cat([decode(run, None, work) for run in lane.values], dim=1) for lane in lanes])
    return keys[order].to(dtype), values[order].to(dtype)


def attention_over_dense(
    query: Tensor,
    lanes: Sequence[Lane],
    *,
    scale: float,
    rope: Rope | None,
    softcap: float | None,
    bias: Tensor | None,
    first_visible: Tensor | None,
    tail_visible: Tensor | None,
) -> Tensor:
    """`kv_attention` for many queries: each lane is decoded once, then attended to with torch's kernels."""
    out = torch.zeros_like(query)
    group = query.shape[1] // sum(len(lane.heads) for lane in lanes if lane.row == lanes[0].row)
    for lane in lanes:
        n, row = lane.tokens, lane.row
        if not n:
            continue
        heads = [head * group + i for head in lane.heads for i in range(group)]
        keys, values = (t[None] for t in dense_lane([lane], rope, query.dtype))
        mask = torch.ones((query.shape[2], n), dtype=torch.bool, device=query.device)
        if first_visible is not None:
            mask &= torch.arange(n, device=query.device) >= first_visible[row, :, None]
        if tail_visible is not None:
            shown = tail_visible[row][:, -min(n, tail_visible.shape[2]) :]
            mask[:, n - shown.shape[1] :] &= shown
        q, shown_bias = query[row, heads][None], None if bias is None else bias[row, heads, None, :n][None]
        if softcap is None and shown_bias is None:
            k, v = (t.repeat_interleave(group, dim=1) for t in (keys, values))
            mine = scaled_dot_product_attention(q, k, v, attn_mask=mask[None, None], scale=scale)
        else:
            mine = plain_attention(q, keys, values, mask[None, None], scale, softcap, shown_bias)
        out[row, heads] = mine[0].nan_to_num(0.0)
    return out


def pad_columns(bias: Tensor, length: int) -> Tensor:
    """bias [R, Hq, n] with zeros for keys that it says nothing about."""
    return pad(bias, (0, length - bias.shape[2])) if bias.shape[2] < length else bias
