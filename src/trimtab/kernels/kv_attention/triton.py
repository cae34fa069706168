"""The Triton kernel on CUDA tensors, or interpreted on CPU tensors when TRITON_INTERPRET=1.

Checked for equal results with Triton's interpreter, and that it compiles for sm_90, only: no GPU was at hand, so its
block sizes are reasoned and its speed is not known. Lanes are cut where a run of keys or of values ends, and further
into items, enough to fill the device. A program attends over one item for all queries of one KV head, decoding 64
tokens of keys and of values at a time; a second one merges the items of a lane in a fixed order, so results do not
change from run to run. All rows and heads go in one launch, exact windows included, if their coded runs have one form;
otherwise there is one launch per form.

Refused, for another backend to do: rotated runs (hadamard, order), keys and values that are cut within each other's
tiles, different dtypes of exact numbers on one side, head sizes that are no multiples of 8, gradients.

Keys, values and softmax weights are rounded to the dtype of query before they are multiplied; all sums are float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.kernels.kv_attention.run import TILE, Lane, Rope
from trimtab.kernels.kv_attention.triton_tables import Tables, make_tables, refused_lanes
from trimtab.kernels.triton_device import absent, interpreted, refused, wanted_programs

__all__ = ["absent", "kv_attention_triton", "refuses"]

_MAX_DIM = 256
_MAX_QUERIES = 128
"""Queries of one KV head: they are all kept in registers."""
_TILES = 2
"""Tiles decoded at a time: 64 tokens of 128 channels are 64 registers of each thread."""


def refuses(
    query: Tensor,
    lanes: Sequence[Lane],
    *,
    scale: float,
    rope: Rope | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    first_visible: Tensor | None = None,
    tail_visible: Tensor | None = None,
) -> str | None:
    """Why these arguments need another backend, or None."""
    if reason := refused({"query": query}, ("query",), strided=("query",)):
        return reason
    if query.shape[3] > _MAX_DIM or query.shape[3] % 8:
        return f"heads have size {query.shape[3]}; the Triton program takes multiples of 8 up to {_MAX_DIM}"
    others = {"bias": bias, "first_visible": first_visible, "tail_visible": tail_visible}
    others |= {} if rope is None else {"cos": rope.cos, "sin": rope.sin}
    for name, tensor in others.items():
        if tensor is not None and tensor.device != query.device:
            return f"{name} is on {tensor.device} and query on {query.device}"
    if lanes and queries_per_head(query, lanes) > _MAX_QUERIES:
        return f"{queries_per_head(query, lanes)} queries share a KV head; the Triton program takes {_MAX_QUERIES}"
    return refused_lanes(lanes, query.device, rope is not None)


def kv_attention_triton(
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
    """`kv_attention` in Triton, for input that `refuses` has no objection to."""
    held = [lane for lane in lanes if lane.tokens]
    if not held or not query.numel():
        return _nothing_seen(query)
    tables = make_tables(held, item_tokens(held, query.device), query.device)
    return attend(
        query,
        tables,
        queries_per_head(query, lanes),
        scale=scale,
        rope=rope,
        softcap=softcap,
        bias=bias,
        first_visible=first_visible,
        tail_visible=tail_visible,
    )


def attend(
    query: Tensor,
    tables: Tables,
    queries: int,
    *,
    scale: float,
    rope: Rope | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    first_visible: Tensor | None = None,
    tail_visible: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What is done on the device, once the tables are there. `queries`: those of one KV head."""
    from trimtab.kernels.kv_attention.triton_program import attend_program, merge_program

    _, query_heads, length, dim = query.shape
    out, lse = _nothing_seen(query)
    parts = (tables.item_count, tables.heads, queries)
    sums = torch.empty((*parts, dim), dtype=torch.float32, device=query.device)
    statistics = torch.empty((*parts, 2), dtype=torch.float32, device=query.device)
    shape = {"HEADS": tables.heads, "QUERIES": queries, "DIM": dim, "D": _power_of_two(dim)}
    for launch in tables.launches:
        attend_program[(launch.count, tables.heads)](
            query.contiguous(),
            tables.runs,
            tables.items,
            tables.lanes,
            tables.order,
            launch.first,
            lse if rope is None else rope.cos.contiguous(),
            lse if rope is None else rope.sin.contiguous(),
            1 if rope is None else rope.cos.shape[1],
            lse if bias is None else bias.contiguous(),
            0 if bias is None else bias.shape[2],
            tables.lanes if first_visible is None else first_visible.contiguous(),
            tables.lanes if tail_visible is None else tail_visible.contiguous().view(torch.uint8),
            0 if tail_visible is None else tail_visible.shape[2],
            sums,
            statistics,
            float(scale),
            float(softcap or 1),
            query_heads,
            length,
            KEY=launch.key,
            VALUE=launch.value,
            HAS_SOFTCAP=softcap is not None,
            HAS_BIAS=bias is not None,
            HAS_FIRST=first_visible is not None,
            HAS_TAIL=tail_visible is not None,
            Q=max(16, _power_of_two(queries)),  # a matrix product has 16 rows or more
            TILES=_TILES,
            # The interpreter's matrix product reads bfloat16 as integers.
            DOT="float32" if interpreted() else str(query.dtype).removeprefix("torch."),
            num_warps=4,
            **shape,
        )
    merge_program[(tables.lane_count, tables.heads, queries)](
        sums, statistics, tables.lanes, out, lse, query_heads, length, num_warps=2, **shape
    )
    return out, lse


def _nothing_seen(query: Tensor) -> tuple[Tensor, Tensor]:
    """The result for rows without tokens."""
    lse = torch.full(query.shape[:3], -torch.inf, dtype=torch.float32, device=query.device)
    return torch.zeros_like(query, memory_format=torch.contiguous_format), lse


def queries_per_head(query: Tensor, lanes: Sequence[Lane]) -> int:
    """Query heads of a KV head, times the queries of each."""
    kv_heads = sum(len(lane.heads) for lane in lanes if lane.row == lanes[0].row)
    return int(query.shape[1] // kv_heads * query.shape[2])


def item_tokens(lanes: Sequence[Lane], device: torch.device) -> int:
    """Tokens of an item, whole steps, so that there are about as many programs as keep the device busy."""
    step = TILE * _TILES
    total = sum(lane.tokens * len(lane.heads) for lane in lanes)
    return max(1, -(-total // (wanted_programs(device) * step))) * step


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
