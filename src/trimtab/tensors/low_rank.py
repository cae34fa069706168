"""Low-rank parts, and the one truncated SVD behind all methods that make them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.core.errors import CheckpointError, ConfigError, NumericsError
from trimtab.kernels.terms import FEW_ROWS, low_rank_add
from trimtab.tensors.base import Part, checked_buffers, dtype_from_spec, shape_from_spec, stored_like
from trimtab.tensors.metric import Metric

FACTOR_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_EXACT_SIDE = 1024  # randomized only where both sides are longer
_OVERSAMPLE = 10
_POWER_ITERATIONS = 4


@dataclass(frozen=True, eq=False)
class LowRank(Part):
    """`left @ right` with left [out, r] and right [r, in] in one floating dtype; r = 0 is the zero matrix.

    Raises ConfigError if the factors do not fit.
    """

    kind: ClassVar[str] = "low_rank"

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        shapes = list(self.left.shape), list(self.right.shape)
        if self.left.ndim != 2 or self.right.ndim != 2 or shapes[0][1] != shapes[1][0]:
            raise ConfigError(
                f"factors of shape {shapes[0]} and {shapes[1]} do not multiply; want [out, r] and [r, in]."
            )
        if self.left.dtype != self.right.dtype or self.left.dtype not in FACTOR_DTYPES.values():
            raise ConfigError(
                f"factors are {self.left.dtype} and {self.right.dtype}; want one of {', '.join(FACTOR_DTYPES)}."
            )

    @property
    def rank(self) -> int:
        """Columns of the left factor, whether or not they are independent."""
        return int(self.left.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.left.shape[0]), int(self.right.shape[1])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return (self.left.float() @ self.right.float()).to(dtype)

    def matmul(self, x: Tensor) -> Tensor:
        """Two thin products, in the dtype of x or that of the factors, whichever is wider."""
        wide = torch.promote_types(x.dtype, self.left.dtype)
        return ((x.to(wide) @ self.right.to(wide).t()) @ self.left.to(wide).t()).to(x.dtype)

    def add_to(self, out: Tensor, x: Tensor) -> Tensor:
        """While decoding, one call that reads both factors once and rounds once."""
        if x.shape.numel() <= FEW_ROWS * x.shape[-1]:
            return low_rank_add(out, x, self.left, self.right)
        return out + self.matmul(x)

    @property
    def code_shape(self) -> None:
        return None

    def project(
        self, target: Tensor, metric: Metric | None = None, subset: Tensor | None = None, *, differ: bool = False
    ) -> LowRank:
        """The nearest matrix of this rank to `target`. A low-rank part has no codes: `subset`, `differ` are refused."""
        if subset is not None or differ:
            raise ConfigError("a low-rank part has no codes of its own to change: project it without a subset.")
        if tuple(target.shape) != self.shape:
            raise ConfigError(f"target of shape {list(target.shape)} for a low-rank part of shape {list(self.shape)}.")
        return svd(target, self.rank, metric, dtype=self.left.dtype)

    def continuous(self) -> dict[str, Tensor]:
        return self.state()

    def dense(self, continuous: Mapping[str, Tensor]) -> Tensor:
        return continuous["left"].float() @ continuous["right"].float()

    def with_continuous(self, continuous: Mapping[str, Tensor]) -> LowRank:
        return LowRank(**stored_like(self, continuous))

    def spec(self) -> dict[str, Any]:
        name = str(self.left.dtype).removeprefix("torch.")
        return {"kind": self.kind, "shape": list(self.shape), "rank": self.rank, "dtype": name}

    def state(self) -> dict[str, Tensor]:
        return {"left": self.left.contiguous(), "right": self.right.contiguous()}

    @classmethod
    def buffers(cls, spec: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        (out_features, in_features), dtype = shape_from_spec(spec), dtype_from_spec(spec, FACTOR_DTYPES)
        rank = spec.get("rank")
        if type(rank) is not int or rank < 0:
            raise CheckpointError(f"low_rank part: 'rank' must be a count, not {rank!r}.")
        return {"left": ((out_features, rank), dtype), "right": ((rank, in_features), dtype)}

    @classmethod
    def from_state(cls, spec: Mapping[str, Any], state: Mapping[str, Tensor]) -> LowRank:
        found = checked_buffers(cls, spec, state)
        return cls(found["left"], found["right"])

    def check(self) -> None:
        """Raise CheckpointError if a factor has NaN or infinity."""
        for name, factor in self.state().items():
            if not bool(torch.isfinite(factor).all()):
                raise CheckpointError(
                    f"low_rank part of shape {list(self.shape)}: factor '{name}' has NaN or infinity."
                )


def svd(error: Tensor, rank: int, metric: Metric | None = None, *, dtype: torch.dtype = torch.float32) -> LowRank:
    """The matrix of at most this rank nearest to `error` [out, in] in `metric` (None: Frobenius), as factors.

    Whiten, truncate the SVD, unwhiten: exactly optimal for every Metric (a Gram metric up to its ridge), by
    Eckart-Young. Float64 inside. Exact, by the eigenvectors of the smaller Gram matrix (three times as fast as an SVD,
    to 1e-8 of the largest singular value), while the shorter side is at most 1,024; above, for ranks up to a quarter of
    it, randomized range finding (rank + 10 columns, four power iterations, fixed seed: deterministic).
    The two factors of each component get equal norms, so that narrow dtypes serve both, and the largest entry of each
    left column is positive, so that equal inputs give equal factors.

    Raises ConfigError for a rank outside 0 .. min(out, in), NumericsError for NaN or infinity in `error` or in the
    rounded factors. Sources: LQ-LoRA, arXiv:2311.12023 (row x column); CLoQ, arXiv:2501.18475 (Gram).
    """
    if error.ndim != 2:
        raise ConfigError(f"svd wants a matrix [out, in], not a tensor of shape {list(error.shape)}.")
    shorter = min(error.shape)
    if not 0 <= rank <= shorter:
        raise ConfigError(f"rank={rank} for a weight of shape {list(error.shape)}; it must be in 0 .. {shorter}.")
    if not bool(torch.isfinite(error).all()):
        raise NumericsError(f"the matrix of shape {list(error.shape)} to be approximated has NaN or infinite values.")
    metric = metric or Metric.identity()
    left, right = _truncated(metric.whiten(error), rank)
    left, right = metric.unwhiten_left(left), metric.unwhiten_right(right)
    left_norm, right_norm = left.norm(dim=0), right.norm(dim=1)
    balance = torch.where((left_norm > 0) & (right_norm > 0), (right_norm / left_norm).sqrt(), 1.0)
    if rank:
        largest = left.abs().argmax(dim=0, keepdim=True)
        balance = balance * torch.where(left.gather(0, largest)[0] < 0, -1.0, 1.0)
    stored = LowRank((left * balance).to(dtype).contiguous(), (right / balance[:, None]).to(dtype).contiguous())
    if not all(bool(torch.isfinite(factor).all()) for factor in (stored.left, stored.right)):
        raise NumericsError(
            f"the rank-{rank} factors of a {list(error.shape)} weight overflow {dtype}; use a wider dtype."
        )
    return stored


def _truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The leading singular components as left [out, r] and right [r, in]; the singular values are in one of them."""
    shorter = min(matrix.shape)
    if rank == 0:
        return matrix[:, :0], matrix[:0]
    if shorter <= _EXACT_SIDE or 4 * rank > shorter:
        return _exact(matrix, rank)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(matrix.shape[1], rank + _OVERSAMPLE, generator=generator, dtype=matrix.dtype).to(matrix.device)
    basis = torch.linalg.qr(matrix @ probe).Q
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.t() @ basis).Q).Q
    left, right = _exact(basis.t() @ matrix, rank)
    return basis @ left, right


def _exact(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    if matrix.shape[0] < matrix.shape[1]:
        right, left = _exact(matrix.t(), rank)
        return left.t(), right.t()
    vectors = torch.linalg.eigh(matrix.t() @ matrix).eigenvectors[:, -rank:].flip(1)
    return matrix @ vectors, vectors.t()
