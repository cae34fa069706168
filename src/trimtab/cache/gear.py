"""A quantized backbone, a low-rank correction of its error, and the outliers kept exactly.

Paper: Hao Kang, Qingru Zhang, Souvik Kundu, Geonhwa Jeong, Zaoxing Liu, Tushar Krishna, Tuo Zhao, "GEAR: An Efficient
KV Cache Compression Recipe for Near-Lossless Generative Inference of LLM", 2024, arXiv:2403.05527.

    X ~ D^ + A B^T, overwritten by S

S holds the `outliers` / 2 largest and smallest entries of each vector: of a channel of keys over the block, of a
token of values over all heads. They are replaced by the mean of their vector, what remains is quantized to D^, and A
B^T is the low-rank part of the residual of each head, by power iteration; the residual is zero where there are
outliers. Exact tokens gather in a buffer; a full buffer is encoded on its own, with factors of its own.

Departures: power iteration starts from normal numbers of a fixed seed and orthonormalises in each pass, because
uniform ones are nearly of rank one; the official code uses the projection of the first row for the whole batch. A
block of generated tokens is encoded once; the official streaming path encodes the whole, already encoded, past again.
Ranks and outliers are set apart for keys and values, since low rank helps keys and outliers help values. A vector
shorter than 2 / outliers has no outliers: keys of generated blocks of 64 tokens, with the paper's 2 %.
"""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.cache._gear import GearMethod
from trimtab.core.errors import ConfigError

__all__ = ["Gear"]


@dataclass(frozen=True, kw_only=True)
class Gear(GearMethod):
    """Options of GEAR beyond those of GEAR-L.

    outliers_keys     share of a channel's entries that are kept exactly, half of them largest, half smallest
    outliers_values   the same for a token of values
    """

    outliers_keys: float = 0.02
    outliers_values: float = 0.02

    @property
    def _fractions(self) -> tuple[float, float]:
        return self.outliers_keys, self.outliers_values

    def check(self) -> None:
        super().check()
        for name in ("outliers_keys", "outliers_values"):
            if not 0 <= getattr(self, name) < 0.5:
                raise ConfigError(f"gear: {name}={getattr(self, name)} must be in [0, 0.5).")
