"""What every backend must compute, in plain PyTorch: the dense values of a run, and attention over lanes of runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.kernels.kv_attention.codes import unpack_rows
from trimtab.kernels.kv_attention.run import TILE, Lane, Rope, Run


def decode(run: Run, rope: Rope | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense keys or values [H, m, d]; float32 arithmetic, or float64 if asked for.

    Keys stored before rotary embedding are rotated if `rope` is given, and returned as stored if it is None (their
    overrides, which are rotated, are then left out).
    """
    work = torch.float64 if dtype == torch.float64 else torch.float32
    dense = _main(run, work)
    if run.token_factors is not None and run.channel_factors is not None:
        a = run.token_factors[..., : run.tokens].to(work)
        dense = dense + torch.einsum("hrm,hrd->hmd", a, run.channel_factors.to(work))
    if run.outlier_starts is not None:
        dense = _with_outliers(run, dense)
    if run.hadamard or run.order is not None:
        dense = _unrotated(run, dense)
    rotate = run.first_position is not None
    if rotate and rope is not None:
        assert run.first_position is not None
        dense = rotary(dense, rope, torch.arange(run.tokens, device=dense.device) + run.first_position)
    if run.override_tokens is not None and run.override_values is not None and not (rotate and rope is None):
        dense = dense.index_copy(1, run.override_tokens.long(), run.override_values.to(work))
    return dense.to(dtype)


def rotary(x: Tensor, rope: Rope, positions: Tensor) -> Tensor:
    """x [..., m, d] rotated to positions [m], in the dtype of x."""
    cos, sin = rope.cos[positions].to(x.dtype), rope.sin[positions].to(x.dtype)
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def hadamard_transform(x: Tensor, size: int) -> Tensor:
    """x [..., c] times the normalised Walsh-Hadamard matrix, in blocks of `size` (a power of two that divides c)."""
    blocks = torch.unflatten(x, -1, (-1, size))
    width = 1
    while width < size:
        pairs = torch.unflatten(blocks, -1, (-1, 2, width))
        blocks = torch.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], dim=-2)
        blocks = blocks.flatten(-3)
        width *= 2
    transformed: Tensor = blocks.flatten(-2) * size**-0.5
    return transformed


def _main(run: Run, work: torch.dtype) -> Tensor:
    if run.exact is not None:
        return run.exact.to(work)
    assert run.codes is not None
    if run.coupled > 1:
        assert run.codebook is not None
        codes = unpack_rows(run.codes, min(run.bits, 8), run.tokens).long()
        if run.high_codes is not None:
            codes = codes | (unpack_rows(run.high_codes, run.bits - 8, run.tokens).long() << 8)
        heads = torch.arange(run.heads, device=codes.device)[:, None, None]
        groups = torch.arange(codes.shape[-1], device=codes.device)
        return run.codebook.to(work)[heads, groups, codes].flatten(-2)
    codes = unpack_rows(run.codes, run.bits, run.tokens)
    values = codes.to(work) if run.levels is None else run.levels.to(work)[codes.long()]
    if run.scale is not None:
        values = values * _spread(run, run.scale.to(work))
    if run.minimum is not None:
        values = values + _spread(run, run.minimum.to(work))
    return values


def _spread(run: Run, parameters: Tensor) -> Tensor:
    """Scales or minima of groups, one for each [H, m, d] entry."""
    if run.group_tokens:
        group = torch.arange(run.tokens, device=parameters.device) // run.group_tokens
        return parameters[:, group]
    channels = torch.arange(run.heads * run.head_dim, device=parameters.device) // run.group_channels
    return torch.unflatten(parameters[channels, : run.tokens], 0, (run.heads, run.head_dim)).transpose(1, 2)


def _with_outliers(run: Run, dense: Tensor) -> Tensor:
    assert run.outlier_starts is not None
    assert run.outlier_places is not None
    assert run.outlier_values is not None
    starts = run.outlier_starts.long()
    tiles_per_head = (starts.numel() - 1) // run.heads
    owner = torch.repeat_interleave(torch.arange(starts.numel() - 1, device=starts.device), starts.diff())
    place = run.outlier_places.long() & 0xFFFF
    token = owner % tiles_per_head * TILE + place % TILE
    dense = dense.clone()
    dense[owner // tiles_per_head, token, place // TILE] = run.outlier_values.to(dense.dtype)
    return dense


def _unrotated(run: Run, dense: Tensor) -> Tensor:
    flat = dense.transpose(0, 1).flatten(1)  # [m, H d], rows in the order they are stored
    if run.order is not None:
        flat = torch.empty_like(flat).index_copy_(1, run.order.long(), flat)
    if run.hadamard:
        flat = hadamard_transform(flat, run.hadamard)
    return torch.unflatten(flat, 1, (run.heads, run.head_dim)).transpose(0, 1)


def kv_attention_reference(
    query: Tensor,
    lanes: Sequence[Lane],
    *,
    scale: float,
    rope: Rope | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    first_visible: Tensor | None = None,
    tail_visible: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `kv_attention`."""
    rows, query_heads, length, dim = query.shape
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = torch.zeros((rows, query_heads, length, dim), dtype=work, device=query.device)
    lse = torch.full((rows, query_heads, length), -torch.inf, dtype=work, device=query.device)
    group = query_heads // sum(len(lane.heads) for lane in lanes if lane.row == lanes[0].row)
    for lane in lanes:
        n = lane.tokens
        if n == 0:
            continue
        keys = torch.cat([decode(run, rope, work) for run in lane.keys], dim=1)
        values = torch.cat([decode(run, None, work) for run in lane.values], dim=1)
        heads = torch.tensor([h * group + i for h in lane.heads for i in range(group)], device=query.device)
        q = query[lane.row, heads].to(work)
        scores = q @ keys.repeat_interleave(group, dim=0).transpose(1, 2) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if bias is not None:
            scores = scores + bias[lane.row, heads, None, :n].to(work)
        if first_visible is not None:
            hidden = torch.arange(n, device=query.device) < first_visible[lane.row, :, None]
            scores = scores.masked_fill(hidden, -torch.inf)
        if tail_visible is not None:
            shown = tail_visible[lane.row][:, -min(n, tail_visible.shape[2]) :]
            scores[..., n - shown.shape[1] :] = scores[..., n - shown.shape[1] :].masked_fill(~shown, -torch.inf)
        totals = torch.logsumexp(scores, dim=-1)
        weights = torch.exp(scores - totals[..., None]).nan_to_num(0.0)
        out[lane.row, heads] = weights @ values.repeat_interleave(group, dim=0)
        lse[lane.row, heads] = totals
    return out.to(query.dtype), lse
