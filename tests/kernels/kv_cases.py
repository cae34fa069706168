"""Random runs of every kind, and lanes of them, for the backends of kv_attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.kernels.kv_attention.codes import pack_rows
from trimtab.kernels.kv_attention.run import TILE, Lane, Rope, Run, tiles

BITS = (1, 2, 3, 4, 8)
PADDING = float("nan")
"""What parameters of tokens past the end of a run hold: no result may see it."""


def random_run(
    tokens: int,
    heads: int = 2,
    dim: int = 64,
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    bits: int = 4,
    group_tokens: int = 0,
    group_channels: int = 0,
    minimum: bool = True,
    levels: bool = False,
    coupled: int = 1,
    rank: int = 0,
    outliers: float = 0.0,
    outlier_dtype: torch.dtype = torch.float16,
    hadamard: int = 0,
    order: bool = False,
    first_position: int | None = None,
    overrides: int = 0,
) -> Run:
    """A run of exact numbers if `dtype` is given, else of codes; everything else as in Run, present if asked for."""
    draw = torch.Generator().manual_seed(seed)
    found: dict[str, Any] = {"tokens": tokens, "heads": heads, "head_dim": dim, "first_position": first_position}
    if dtype is not None:
        wider = torch.randn(heads, tokens + 3, dim, generator=draw).to(dtype)  # a view: steps are not the shape's
        found["exact"] = wider[:, 1 : tokens + 1]
    elif coupled > 1:
        found |= _coupled(tokens, heads, dim, bits, coupled, draw)
    else:
        codes = torch.randint(0, 1 << bits, (heads, tokens, dim), generator=draw)
        found |= {"codes": pack_rows(codes, bits), "bits": bits}
        spread = 1.0 if levels else 4.0 / (1 << bits)
        if levels:
            found["levels"] = torch.randn(1 << bits, generator=draw).sort().values
        if group_tokens or group_channels:
            shape = (
                (heads, -(-tokens // group_tokens), dim)
                if group_tokens
                else _by_channel(run_channels(found), group_channels, tokens)
            )
            found |= {"group_tokens": group_tokens, "group_channels": group_channels}
            found["scale"] = _padded((torch.rand(shape, generator=draw) + 0.5) * spread, tokens, group_channels)
            if minimum:
                found["minimum"] = _padded(torch.randn(shape, generator=draw) - 1.0, tokens, group_channels)
    if rank:
        found["token_factors"] = _padded(
            torch.randn(heads, rank, TILE * tiles(tokens), generator=draw) * 0.3, tokens, 1
        )
        found["channel_factors"] = torch.randn(heads, rank, dim, generator=draw).half()
    if outliers:
        found |= _outliers(tokens, heads, dim, outliers, outlier_dtype, draw)
    if hadamard:
        found["hadamard"] = hadamard
    if order:
        found["order"] = torch.randperm(heads * dim, generator=draw).to(torch.int16)
    if overrides:
        places = torch.randperm(tokens, generator=draw)[: min(overrides, tokens)].sort().values
        found["override_tokens"] = places.to(torch.int32)
        found["override_values"] = torch.randn(heads, len(places), dim, generator=draw).to(outlier_dtype)
    return Run(**found)


def run_channels(fields: dict[str, Any]) -> int:
    return int(fields["heads"] * fields["head_dim"])


def _by_channel(channels: int, group: int, tokens: int) -> tuple[int, int]:
    return channels // group, TILE * tiles(tokens)


def _padded(parameters: Tensor, tokens: int, per_token: int) -> Tensor:
    if per_token:
        parameters[..., tokens:] = PADDING
    return parameters.half()


def _coupled(tokens: int, heads: int, dim: int, bits: int, coupled: int, draw: torch.Generator) -> dict[str, Any]:
    codes = torch.randint(0, 1 << bits, (heads, tokens, dim // coupled), generator=draw)
    book = torch.randn(heads, dim // coupled, 1 << bits, coupled, generator=draw).half()
    found: dict[str, Any] = {"bits": bits, "coupled": coupled, "codebook": book}
    found["codes"] = pack_rows(codes & 0xFF, min(bits, 8))
    if bits > 8:
        found["high_codes"] = pack_rows(codes >> 8, bits - 8)
    return found


def _outliers(
    tokens: int, heads: int, dim: int, share: float, dtype: torch.dtype, draw: torch.Generator
) -> dict[str, Any]:
    marked = torch.rand(heads, tiles(tokens) * TILE, dim, generator=draw) < share
    marked[:, tokens:] = False
    by_tile = marked.unflatten(1, (-1, TILE)).transpose(2, 3).flatten(2)  # [H, T, d * 32]: place = channel * 32 + token
    places = by_tile.nonzero()[:, 2]
    starts = torch.cat([torch.zeros(1, dtype=torch.long), by_tile.sum(2).flatten().cumsum(0)])
    return {
        "outlier_starts": starts.to(torch.int32),
        "outlier_places": places.to(torch.int32).to(torch.int16),
        "outlier_values": (torch.randn(len(places), generator=draw) * 5).to(dtype),
    }


def random_rope(positions: int, half: int, seed: int = 3) -> Rope:
    """Angles of an ordinary table, scaled as some models do."""
    angles = torch.arange(positions)[:, None] * 100.0 ** (-torch.arange(half) / half)
    return Rope(angles.cos() * 1.1, angles.sin() * 1.1)


def random_query(
    rows: int, heads: int, length: int, dim: int, dtype: torch.dtype = torch.float32, seed: int = 1
) -> Tensor:
    return torch.randn(rows, heads, length, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)


def lane_of(
    keys: Run | list[Run], values: Run | list[Run] | None = None, row: int = 0, heads: tuple[int, ...] | None = None
) -> Lane:
    """A lane of these runs; without values, of exact ones that cover the same tokens."""
    key_runs = [keys] if isinstance(keys, Run) else keys
    first = key_runs[0]
    if values is None:
        values = random_run(sum(r.tokens for r in key_runs), first.heads, first.head_dim, dtype=torch.float32, seed=99)
    value_runs = [values] if isinstance(values, Run) else values
    return Lane(row, heads or tuple(range(first.heads)), tuple(key_runs), tuple(value_runs))
