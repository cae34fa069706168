"""Let groups of neighbouring weights share codes into learnt codebooks, fitted to the error of the layer's output.

Paper: Egiazarian, Panferov, Kuznedelev, Frantar, Babenko, Alistarh, "Extreme Compression of Large Language Models via
Additive Quantization", ICML 2024, arXiv:2401.06118.

AQLM's format and its work on one layer. Row i, vector j of g weights, M codebooks of 2^B vectors, one scale per row:

    w~_ij = s_i sum_m C_m[code_ijm]             bits per weight = M B / g + 16 M 2^B g / (out in) + 16 / in

1. s_i = |W_i|. Residual k-means of the vectors w_ij / s_i, one codebook after the other, points weighted by what their
   error counts, s_i^2 and the mean of their columns' E[x^2].
2. With H = E[x x^T], in turn: `steps` steps of Adam on codebooks and scales for tr((W~ - W) H (W~ - W)^T), then a beam
   search of the codes for the same; until a round gains less than `tolerance`.

`bits` fixes M = bits g / 8 at B = 8. M = 1 is plain vector quantization. Codebooks belong to one matrix each and are
counted: at g = 4 one takes 2 KiB, which is 0.06 bits per weight of 512 x 512 and 0.5 of 128 x 256. Where they would
take more than half the bytes of the codes, B shrinks until they do not.

Departures from the authors' code:
  - 8 bits at most to a code, so that lookups stay in fast memory and small matrices do not drown in codebooks (2^16
    vectors of 8 weights take 1 MiB).
  - k-means++ begins with spread vectors and empty clusters are placed anew, where they draw the first vectors at
    random and leave empty clusters: fewer iterations serve.
  - The Adam rate is relative to the root mean square of what it changes, so that it does not depend on the layer's
    width. It is higher, and a round has 25 steps instead of 100: on a random 704 x 256 matrix the same error (0.0445
    against 0.0443 of the output's energy) in a quarter of the time.
  - A hundredth of its mean is added to the diagonal of H, as in gptq: inputs that calibration has not seen count a
    little.
  - Tuning of whole blocks is not part of it; pv_tuning tunes the whole model.

Cost: about steps x out x in^2 operations for each round, a few rounds; on the processor slower than gptq.
When it fails: small matrices (codebooks weigh much); 3 bits, which need three codebooks of 8 weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trimtab.core.errors import ConfigError, TargetError
from trimtab.tensors.compressed import CompressedTensor
from trimtab.tensors.metric import Metric
from trimtab.weights._codebook_fit import fit_layer, initial_codebook
from trimtab.weights.base import LinearMethod, Notes

if TYPE_CHECKING:
    from trimtab.models.statistics import Need, Stats
    from trimtab.models.views import LinearView

__all__ = ["Vq"]

CODE_BITS = 8
GROUPS = {2: 4, 3: 8, 4: 2}


@dataclass(frozen=True, kw_only=True)
class Vq(LinearMethod):
    """AQLM without its tuning of blocks.

    bits             bits of codes per weight: 2, 3 or 4; scales and codebooks come on top
    in_group_size    g, neighbouring weights of a row to a vector; must divide the width of every target, and 8 must
                     divide bits x g. 0: 4 at 2 bits (one codebook), 8 at 3 bits (three), 2 at 4 bits (one). 8 at 2 bits
                     (two codebooks) is better for matrices of a million weights and more
    data_free        k-means only: no calibration text, no fitting to the output
    iterations       of k-means, at most
    steps            of Adam in each round
    lr               of Adam, relative to the root mean square of codebooks and of scales
    tolerance        a round that lowers the error by less than this share is the last
    beam             candidates kept in the search over several codebooks
    """

    bits: Literal[2, 3, 4] = 4
    in_group_size: int = 0
    data_free: bool = False
    iterations: int = 10
    steps: int = 25
    lr: float = 5e-3
    tolerance: float = 0.01
    beam: int = 4

    def check(self) -> None:
        if self.in_group_size < 0 or self.bits * self.group_size % CODE_BITS:
            raise ConfigError(
                f"Vq: option in_group_size={self.in_group_size} must be 0, or such that {CODE_BITS} divides bits x "
                f"in_group_size = {self.bits * self.group_size}."
            )
        for name in ("iterations", "steps", "beam"):
            if getattr(self, name) < 1:
                raise ConfigError(f"Vq: option {name}={getattr(self, name)} must be at least 1.")
        if not 0 < self.lr <= 1 or not 0 < self.tolerance < 1:
            raise ConfigError(f"Vq: options lr={self.lr} and tolerance={self.tolerance} must be above 0, below 1.")

    @property
    def group_size(self) -> int:
        """g."""
        return self.in_group_size or GROUPS[self.bits]

    @property
    def codebooks(self) -> int:
        """M."""
        return self.bits * self.group_size // CODE_BITS

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset() if self.data_free else frozenset({"gram"})

    def check_linear(self, linear: LinearView) -> None:
        if linear.in_features % self.group_size:
            raise TargetError(
                f"{linear.name} (role {linear.role}): in_group_size={self.group_size} does not divide its width, "
                f"{linear.in_features}. Use one that does and makes bits x in_group_size a multiple of {CODE_BITS}."
            )

    def code_bits(self, shape: tuple[int, int]) -> int:
        """B for a matrix of this [out, in] shape: 8, or less where codebooks would outgrow half the codes."""
        vectors = shape[0] * shape[1] // self.group_size
        bits = CODE_BITS
        while bits > 1 and (1 << bits) * self.group_size * 2 > vectors / 2:
            bits -= 1
        return bits

    def compress(self, linear: LinearView, stats: Stats | None) -> tuple[CompressedTensor, Notes]:
        weight = linear.weight.float()
        shape = (linear.out_features, linear.in_features)
        gram = None if stats is None else stats.gram
        diagonal = None if gram is None else gram.diagonal()
        part, k_means = initial_codebook(
            weight,
            diagonal,
            count=self.codebooks,
            bits=self.code_bits(shape),
            width=self.group_size,
            iterations=self.iterations,
            name=linear.name,
        )
        notes: Notes = {"codebooks": self.codebooks, "code_bits": part.code_bits, "k_means_error": k_means}
        if gram is not None:
            metric = Metric.gram(gram.to(weight.device), name=f"the input of {linear.name}")
            part, rounds = fit_layer(
                part, weight, metric, steps=self.steps, lr=self.lr, tolerance=self.tolerance, beam=self.beam
            )
            notes["rounds"] = rounds
        return CompressedTensor(parts=(part,)), notes
