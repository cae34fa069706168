"""GEAR without its outliers: a quantized backbone and a low-rank correction of what it gets wrong.

Paper: Hao Kang, Qingru Zhang, Souvik Kundu, Geonhwa Jeong, Zaoxing Liu, Tushar Krishna, Tuo Zhao, "GEAR: An Efficient
KV Cache Compression Recipe for Near-Lossless Generative Inference of LLM", 2024, arXiv:2403.05527.

See `gear`, of which this leaves out the sparse part: X ~ D^ + A B^T. It is what the authors' fused kernels implement.
"""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.cache._gear import GearMethod

__all__ = ["GearL"]


@dataclass(frozen=True, kw_only=True)
class GearL(GearMethod):
    """Options of GEAR-L.

    bits                  of the backbone
    backbone              "kivi": groups of group_size (keys along tokens, values along channels). "kcvt": one group per
                          channel of keys over the block, one per token of values over all heads
    group_size            numbers that share a scale and a minimum, for "kivi"
    buffer                recent tokens that stay exact until they are encoded together, a multiple of group_size
    rank_keys             rank of the correction of a block of generated tokens, per head; 0: none
    rank_values           the same for values
    prefill_rank_keys     rank of the correction of a prompt, per head
    prefill_rank_values   the same for values
    iterations            of the power iteration
    """
