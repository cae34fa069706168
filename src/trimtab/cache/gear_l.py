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
    """No options of its own."""
