"""How much an error in a weight matters: the norm that a method minimises, as a value.

    identity      |D|_F^2
    diagonal      sum_ij c_j D_ij^2              c_j = E[x_j^2]
    row_column    sum_ij r_i c_j D_ij^2          r c^T close to the Fisher information
    gram          tr(D H D^T)                    H = E[x x^T]; the error of the layer's output

All weights are in squared units: LQ-LoRA's d_row = sqrt(mean_j F_ij) is `row_column(F.mean(1), F.mean(0))`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from trimtab.core.errors import ConfigError, NumericsError

WHITEN_FLOOR = 1e-8
"""Smallest root weight relative to the largest when dividing by it (dead rows and columns)."""
WHITEN_RIDGE = 1e-6
"""Added to a Gram matrix for whitening, in units of its mean diagonal; it may have fewer tokens than columns."""
_ESCALATIONS = 3


@dataclass(frozen=True)
class InverseCholesky:
    """What sequential quantization reads its compensation from.

    factor     U float32 [in, in], upper triangular with positive diagonal; U^T U = (H + damping * mean(diag H) * I)^-1
    damping    the relative damping that was needed: the one asked for, or 10, 100, 1000 times it
    dead       bool [in]; columns that no input reached (H_jj = 0), for which 1 stands on the diagonal
    """

    factor: Tensor
    damping: float
    dead: Tensor


@dataclass(frozen=True, eq=False)
class Metric:
    """Build with `identity()`, `diagonal(c)`, `row_column(r, c)` or `gram(h)`; `name` is what errors call it.

    row       weights [out] of squared errors, None = ones
    column    weights [in] of squared errors, None = ones
    matrix    H [in, in], only for a Gram metric

    Raises NumericsError for NaN, infinity or a negative weight, ConfigError for a shape that cannot be.
    """

    kind: Literal["identity", "diagonal", "row_column", "gram"]
    row: Tensor | None = None
    column: Tensor | None = None
    matrix: Tensor | None = None
    name: str = "metric"

    @classmethod
    def identity(cls) -> Metric:
        return cls("identity")

    @classmethod
    def diagonal(cls, column: Tensor, name: str = "metric") -> Metric:
        return cls("diagonal", column=_weights(column, f"column weights of {name}"), name=name)

    @classmethod
    def row_column(cls, row: Tensor, column: Tensor, name: str = "metric") -> Metric:
        row = _weights(row, f"row weights of {name}")
        return cls("row_column", row=row, column=_weights(column, f"column weights of {name}"), name=name)

    @classmethod
    def gram(cls, matrix: Tensor, name: str = "metric") -> Metric:
        """`matrix` [in, in], symmetric. Any positive scaling of E[x x^T] serves."""
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ConfigError(f"Gram matrix of {name} has shape {list(matrix.shape)}; it must be square.")
        matrix = _wide(matrix)
        _refuse_non_finite(matrix, f"Gram matrix of {name}")
        return cls("gram", column=_weights(matrix.diagonal(), f"Gram diagonal of {name}"), matrix=matrix, name=name)

    def squared_norm(self, error: Tensor) -> float:
        """|D|^2 of `error` [out, in], as listed above."""
        self._fits(error)
        d = error.double()
        if self.row is not None:
            d = d * self.row.double().sqrt()[:, None]
        if self.matrix is not None:
            return max(0.0, float(((d @ self.matrix.double()) * d).sum()))
        squares = d.square()
        return float((squares if self.column is None else squares * self.column.double()).sum())

    def weighted_norm(self, error: Tensor) -> float:
        """The root of `squared_norm`."""
        return math.sqrt(self.squared_norm(error))

    def relative_error(self, weight: Tensor, approximation: Tensor) -> float:
        """|W_hat - W|^2 / |W|^2, a ratio of squares; 0 for a zero weight kept, infinity for one changed."""
        error = self.squared_norm(approximation.double() - weight.double())
        scale = self.squared_norm(weight)
        return error / scale if scale > 0 else (0.0 if error == 0 else float("inf"))

    def entry_weights(self, shape: tuple[int, int]) -> Tensor:
        """Weight of each squared entry, float32, broadcasts to [out, in]; a Gram metric gives its diagonal."""
        self._fits(torch.empty(shape, device="meta"))
        if self.column is None:
            return torch.tensor(1.0)  # without a device of its own: it follows what it multiplies
        return (self.column if self.row is None else self.row[:, None] * self.column).float()

    def whiten(self, error: Tensor) -> Tensor:
        """D -> E, float64, with |E|_F = |D| in this metric (a Gram metric adds WHITEN_RIDGE)."""
        self._fits(error)
        e = error.double()
        if self.row is not None:
            e = _root(self.row)[:, None] * e
        if self.matrix is not None:
            return e @ self._lower
        return e if self.column is None else e * _root(self.column)

    def unwhiten_left(self, left: Tensor) -> Tensor:
        """Undo the rows' part: left factor [out, r] of a whitened product -> that of the product, float64."""
        return left.double() if self.row is None else left.double() / _root(self.row)[:, None]

    def unwhiten_right(self, right: Tensor) -> Tensor:
        """Undo the columns' part on a right factor [r, in], float64."""
        right = right.double()
        if self.matrix is not None:
            solved: Tensor = torch.linalg.solve_triangular(self._lower, right, upper=False, left=False)
            return solved
        return right if self.column is None else right / _root(self.column)

    def unwhiten(self, error: Tensor) -> Tensor:
        """The inverse of `whiten`, float64."""
        self._fits(error)
        return self.unwhiten_right(self.unwhiten_left(error))

    def column_order(self, in_features: int | None = None) -> Tensor:
        """Columns by decreasing weight (act-order), int64 [in]; equal ones keep their order.

        Raises ConfigError for the identity without `in_features`, for it does not know how many there are.
        """
        if self.column is not None:
            return torch.argsort(self.column, descending=True, stable=True)
        if in_features is None:
            raise ConfigError("the identity metric does not know its width: give in_features.")
        return torch.arange(in_features)

    def permuted(self, order: Tensor) -> Metric:
        """The metric of a weight whose columns are taken in this order."""
        column = None if self.column is None else self.column[order]
        matrix = None if self.matrix is None else self.matrix[order][:, order]
        return replace(self, column=column, matrix=matrix)

    def inverse_cholesky(self, damp: float = 0.01) -> InverseCholesky:
        """The upper Cholesky factor of the inverse of H, damped by `damp * mean(diag H)`; solved in float64.

        A diagonal or row x column metric counts as its diagonal H. The mean is taken before dead columns get their 1
        (the original code: after), so that the scale of H does not matter. If the factorisation fails, the damping is
        multiplied by 10, at most three times; the result tells which was used. Raises NumericsError if none serves,
        ConfigError for the identity (pass `gram(torch.eye(n))`) or a negative damping.
        """
        if self.column is None:
            raise ConfigError("the identity metric does not know its width: use Metric.gram(torch.eye(in_features)).")
        if damp < 0:
            raise ConfigError(f"damping {damp} must not be negative.")
        dead = self.column == 0
        h = (self.column.double().diag() if self.matrix is None else self.matrix.double()).clone()
        mean = float(h.diagonal().mean())
        h.diagonal()[dead] = 1.0
        for escalation in range(_ESCALATIONS + 1):
            damping = damp * 10**escalation
            damped = h.clone()
            damped.diagonal().add_(damping * mean)
            lower, info = torch.linalg.cholesky_ex(damped)
            if int(info):
                continue
            upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            factor = upper.float()
            if not int(info) and bool(torch.isfinite(factor).all()) and bool((factor.diagonal() > 0).all()):
                return InverseCholesky(factor, damping, dead)
        raise NumericsError(
            f"the Gram matrix of {self.name} {list(h.shape)} is not positive definite even with damping {damping:g} "
            "of its mean diagonal. Use more calibration text, or a larger damping."
        )

    @functools.cached_property
    def _lower(self) -> Tensor:
        """L, float64 lower triangular, with L L^T = H + ridge; computed once per metric."""
        assert self.matrix is not None
        h = self.matrix.double()
        mean = float(h.diagonal().mean())
        if mean == 0:  # no input at all: every direction counts the same
            return torch.eye(len(h), dtype=torch.float64, device=h.device)
        ridge = WHITEN_RIDGE
        while ridge < 1:
            damped = h.clone()
            damped.diagonal().add_(ridge * mean)
            lower, info = torch.linalg.cholesky_ex(damped)
            if not int(info):
                factor: Tensor = lower
                return factor
            ridge *= 10
        raise NumericsError(f"the Gram matrix of {self.name} {list(h.shape)} is far from positive semidefinite.")

    def _fits(self, error: Tensor) -> None:
        wanted = [None if self.row is None else len(self.row), None if self.column is None else len(self.column)]
        found = list(error.shape)
        if len(found) != 2 or any(w is not None and w != f for w, f in zip(wanted, found, strict=True)):
            expected = [w if w is not None else "any" for w in wanted]
            raise ConfigError(f"{self.name} ({self.kind}) is for weights of shape {expected}, not {found}.")


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _weights(weights: Tensor, what: str) -> Tensor:
    if weights.ndim != 1:
        raise ConfigError(f"{what} have shape {list(weights.shape)}; they must be one per row or column.")
    weights = _wide(weights)
    _refuse_non_finite(weights, what)
    if bool((weights < 0).any()):
        index = int((weights < 0).nonzero()[0])
        raise NumericsError(
            f"{what}: entry {index} is negative ({float(weights[index]):.4g}); squared errors cannot count so."
        )
    return weights


def _refuse_non_finite(tensor: Tensor, what: str) -> None:
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        index = (~finite).nonzero()[0].tolist()
        raise NumericsError(
            f"{what}: {int((~finite).sum())} of {tensor.numel()} values are NaN or infinite, "
            f"the first at {index} is {float(tensor[tuple(index)])}."
        )


def _root(weights: Tensor) -> Tensor:
    root = weights.double().sqrt()
    largest = float(root.max()) if root.numel() else 0.0
    return root.clamp(min=largest * WHITEN_FLOOR) if largest > 0 else torch.ones_like(root)
