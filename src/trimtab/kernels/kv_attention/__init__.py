"""Attention of a few queries over cached keys and values, straight on their compressed runs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from trimtab.kernels import library
from trimtab.kernels.kv_attention import native, triton
from trimtab.kernels.kv_attention.reference import kv_attention_reference
from trimtab.kernels.kv_attention.run import Lane, Rope, Run
from trimtab.kernels.op import Backend, KernelOp

__all__ = ["KV_ATTENTION", "Lane", "Rope", "Run", "kv_attention"]

KV_ATTENTION = KernelOp(
    "kv_attention",
    reference=kv_attention_reference,
    backends=(
        Backend("triton", run=triton.kv_attention_triton, absent=triton.absent, refuses=triton.refuses),
        Backend("native", run=native.kv_attention_native, absent=library.absent, refuses=native.refuses),
    ),
)


def kv_attention(
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
    """softmax(scale * q k^T + bias) v of each query over the tokens of its lane: ([R, Hq, L, d], [R, Hq, L]).

    query           [R, Hq, L, d] float32, float16 or bfloat16, rotated to its position
    lanes           every (row, KV head) in at most one; query head h reads KV head h // (Hq / Hk). Rows without tokens
                    give zeros and -infinity
    rope            rotates the keys of runs that have a first_position
    softcap         scores become softcap * tanh(scores / softcap), before bias and masks
    bias            float32 [R, Hq, n], added to the scores of key i of the lane; n at least the longest lane
    first_visible   int64 [R, L]: keys of the lane before this index are hidden (sliding windows)
    tail_visible    bool [R, L, S]: whether query l sees the last S keys of the lane; shorter lanes have the last of
                    these columns. None: all visible

    Returns the outputs in the dtype of query, and the log-sum-exp of the scores, float32; all sums are float32.
    """
    return KV_ATTENTION(
        query,
        lanes,
        scale=scale,
        rope=rope,
        softcap=softcap,
        bias=bias,
        first_visible=first_visible,
        tail_visible=tail_visible,
    )
