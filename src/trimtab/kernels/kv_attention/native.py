"""The C++ kernels of native/ on runs in CPU memory, through ctypes.

Arithmetic is float32; the products of a run are taken on its codes where that is possible
(native/kv_code_products.h), else on tiles of 32 tokens that are decoded on the way. Results do not depend on the number
of threads: a lane is cut into chunks of tokens by its length alone, and their partial results are merged in order.
Queries of 16 bits meet 2- and 4-bit codes as whole numbers where the processor has AVX-512 VNNI
(native/kv_avx512_vnni.cpp); with TRIMTAB_ISA=avx512 they do not.

Each run is described once, in a struct that is kept as long as the run, so a call joins bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from trimtab.core.errors import ConfigError
from trimtab.kernels.kv_attention.run import CODE_BITS, EXACT_DTYPES, Lane, Rope, Run
from trimtab.kernels.library import DTYPES, check, isa_limit, native_library
from trimtab.kernels.refusals import refused

_RUN = struct.Struct("=10q15q6i")  # tt_kv_run of native/api.h
_EXACT_RUN = struct.Struct("=6q32xq112x4i8x")  # the same of exact numbers, all else zero
LANE = struct.Struct("=8q")  # tt_kv_lane
_PROBLEM = struct.Struct("=14q8q2f2i")  # tt_kv_problem
_MISFITS = {
    3: "runs of a lane have other heads or head dimensions, or its keys and values cover different tokens",
    4: "a run of keys has positions past the rotary table",
}
_described: WeakKeyDictionary[Run, bytes | str] = WeakKeyDictionary()


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
    for name, tensor, dtype in (
        ("bias", bias, torch.float32),
        ("first_visible", first_visible, torch.int64),
        ("tail_visible", tail_visible, torch.bool),
    ):
        if tensor is not None and (tensor.dtype != dtype or tensor.device.type != "cpu"):
            return f"{name} is {tensor.dtype} on {tensor.device}, native kernels read {dtype} in CPU memory"
    if rope is not None and not all(_is_table(table) for table in (rope.cos, rope.sin)):
        return "the rotary table is not contiguous float32 in CPU memory"
    for lane in lanes:
        for run in (*lane.keys, *lane.values):
            found = _describe(run)
            if isinstance(found, str):
                return found
    return None


def kv_attention_native(
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
    """`kv_attention` in C++, on the CPU, for input that `refuses` has no objection to.

    Raises ConfigError for lanes whose runs do not fit each other or the rotary table.
    """
    rows, query_heads, length, dim = query.shape
    if query.stride(3) != 1:
        query = query.contiguous()
    out = torch.empty((rows, query_heads, length, dim), dtype=query.dtype)
    lse = torch.empty((rows, query_heads, length), dtype=torch.float32)
    if bias is not None and bias.stride(2) != 1:
        bias = bias.contiguous()
    first_visible = None if first_visible is None else first_visible.contiguous()
    tail_visible = None if tail_visible is None else tail_visible.contiguous()

    packed_lanes: list[bytes] = []
    heads: list[int] = []
    runs: list[bytes] = []
    for lane in lanes:
        keys, values = len(lane.keys), len(lane.values)
        at = len(runs)
        packed_lanes.append(LANE.pack(lane.row, lane.tokens, len(heads), len(lane.heads), at, keys, at + keys, values))
        heads.extend(lane.heads)
        runs.extend(_described_bytes(lane.keys))
        runs.extend(_described_bytes(lane.values))
    kv_heads = sum(len(lane.heads) for lane in lanes if lane.row == lanes[0].row)
    described = problem(
        query,
        out,
        lse,
        group=query_heads // max(kv_heads, 1),
        lanes=len(lanes),
        scale=scale,
        rope=rope,
        softcap=softcap,
        bias=bias,
        first_visible=first_visible,
        tail_visible=tail_visible,
    )
    run(described, b"".join(packed_lanes), struct.pack(f"={len(heads)}q", *heads), b"".join(runs))
    return out, lse


def problem(
    query: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    group: int,
    lanes: int,
    scale: float,
    rope: Rope | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    first_visible: Tensor | None = None,
    tail_visible: Tensor | None = None,
) -> bytes:
    """tt_kv_problem: what all lanes share. It points into the tensors."""
    return _PROBLEM.pack(
        *query.shape,
        *query.stride()[:3],
        *(group, lanes),
        *((0, 0) if rope is None else rope.cos.shape),
        *((0, 0) if bias is None else bias.stride()[:2]),
        0 if tail_visible is None else tail_visible.shape[2],
        query.data_ptr(),
        *((0, 0) if rope is None else (rope.cos.data_ptr(), rope.sin.data_ptr())),
        *(0 if tensor is None else tensor.data_ptr() for tensor in (bias, first_visible, tail_visible)),
        *(out.data_ptr(), lse.data_ptr()),
        *(scale, softcap or 0.0, DTYPES[query.dtype], isa_limit()),
    )


def exact_run(tensor: Tensor, row: int) -> bytes:
    """tt_kv_run of one row of dense keys or values [R, H, m, d], the last dimension contiguous."""
    _, heads, tokens, dim = tensor.shape
    steps = tensor.stride()
    return _EXACT_RUN.pack(
        *(tokens, heads, dim, -1, steps[1], steps[2]),
        tensor.data_ptr() + row * steps[0] * tensor.element_size(),
        *(0, 1, 0, DTYPES[tensor.dtype]),
    )


def run(described: bytes, lanes: bytes, heads: bytes, runs: bytes) -> None:
    """The library's call. Raises ConfigError for lanes whose runs do not fit each other or the rotary table."""
    status = native_library().tt_kv_attention(described, lanes, heads, runs, torch.get_num_threads())
    if status in _MISFITS:
        raise ConfigError(f"kv_attention cannot read these lanes: {_MISFITS[status]}.")
    check(status)


def _is_table(table: Tensor) -> bool:
    return table.dtype == torch.float32 and table.device.type == "cpu" and table.is_contiguous()


def _described_bytes(runs: Iterable[Run]) -> list[bytes]:
    found = [_describe(run) for run in runs]
    return [item for item in found if isinstance(item, bytes)]


def _describe(run: Run) -> bytes | str:
    """tt_kv_run of a run, or why it has none."""
    found = _described.get(run)
    if found is None:
        found = _described[run] = _objection(run) or _pack(run)
    return found


_WANTED = {
    "codes": (torch.uint8,),
    "high_codes": (torch.uint8,),
    "codebook": (torch.float16,),
    "scale": (torch.float16,),
    "minimum": (torch.float16,),
    "levels": (torch.float32,),
    "token_factors": (torch.float16,),
    "channel_factors": (torch.float16,),
    "outlier_starts": (torch.int32,),
    "outlier_places": (torch.int16,),
    "outlier_values": (torch.float16, torch.bfloat16),
    "order": (torch.int16,),
    "override_tokens": (torch.int32,),
    "override_values": EXACT_DTYPES,
}


def _objection(run: Run) -> str | None:
    for name, tensor in run.tensors().items():
        if tensor.device.type != "cpu":
            return f"{name} of a run is on {tensor.device}, native kernels read CPU memory"
        if name == "exact":
            if tensor.dtype not in EXACT_DTYPES or (tensor.stride(2) != 1 and run.head_dim > 1):
                return f"exact of a run is {tensor.dtype} with strides {tensor.stride()}"
        elif tensor.dtype not in _WANTED[name] or not tensor.is_contiguous():
            wanted = " or ".join(map(str, _WANTED[name]))
            return f"{name} of a run is {tensor.dtype}, native kernels read contiguous {wanted}"
    if run.exact is None:
        if run.coupled == 1 and run.bits not in CODE_BITS:
            return f"codes of {run.bits} bits"
        if run.coupled > 1 and not (run.bits in CODE_BITS or (8 < run.bits <= 16 and run.bits - 8 in CODE_BITS)):
            return f"coupled codes of {run.bits} bits"
        if run.group_tokens % 16 and run.group_tokens < run.tokens:
            return f"groups of {run.group_tokens} tokens"
    return None


def _pack(run: Run) -> bytes:
    def pointer(tensor: Tensor | None) -> int:
        return 0 if tensor is None else tensor.data_ptr()

    def dtype(tensor: Tensor | None) -> int:
        return 0 if tensor is None else DTYPES[tensor.dtype]

    has_group = run.scale is not None or run.minimum is not None
    return _RUN.pack(
        *(run.tokens, run.heads, run.head_dim),
        -1 if run.first_position is None else run.first_position,
        *((0, 0) if run.exact is None else run.exact.stride()[:2]),
        *((run.group_tokens, run.group_channels) if has_group else (0, 0)),
        run.rank if run.channel_factors is not None else 0,
        0 if run.override_tokens is None else run.override_tokens.numel(),
        *(pointer(run.exact), pointer(run.codes), pointer(run.high_codes), pointer(run.codebook), pointer(run.scale)),
        *(pointer(run.minimum), pointer(run.levels), pointer(run.token_factors), pointer(run.channel_factors)),
        *(pointer(run.outlier_starts), pointer(run.outlier_places), pointer(run.outlier_values), pointer(run.order)),
        *(pointer(run.override_tokens), pointer(run.override_values)),
        *(run.bits, run.coupled, run.hadamard),
        *(dtype(run.exact), dtype(run.outlier_values), dtype(run.override_values)),
    )
