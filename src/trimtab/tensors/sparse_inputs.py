"""A dense weight of which a token reads only the columns whose inputs are large, and a low-rank copy for the others.

For a weight W [out, in] with a factor of rank r:

    columns      [in, out]     W transposed, so that the weights of one input lie together; bfloat16, float16, float32
    threshold    float32 [1]   an input j counts for a token where |x_j| scale_j > threshold
    scale        float32 [in]  norms of the columns of W; not stored if the criterion is |x_j| alone
    left, right  [out, r], [r, in]; left right ~ W. Not stored if r is 0

    y = W (m * x) + left (right ((1 - m) * x)),    m_j = 1 where input j counts

This is the one part whose product is not linear in x: `dequantize` is W, `matmul` is the y above. It takes more memory
than W, not less; what is smaller is what a decoded token reads: see `read_bytes`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from trimtab.core.errors import CheckpointError, ConfigError
from trimtab.kernels.gather_matmul import MAX_ROWS, GatherWeight, gather_matmul
from trimtab.kernels.gather_matmul.reference import counts
from trimtab.tensors.base import Part, checked_buffers, dtype_from_spec, shape_from_spec, stored_like
from trimtab.tensors.low_rank import FACTOR_DTYPES, svd

if TYPE_CHECKING:
    from trimtab.tensors.metric import Metric

Prefill = Literal["sparse", "dense"]
"""What a call with more than MAX_ROWS rows computes: as few rows do, or with all of W, as prompts may be read."""

_every_token: ContextVar[bool] = ContextVar("every_token_sparse", default=False)


@contextmanager
def every_token_sparse() -> Iterator[None]:
    """Within, no token is computed densely, whatever the parts' `prefill` says: so that what is measured of a model on
    whole texts is what it does when it writes them. `trimtab.evaluation` measures so."""
    token = _every_token.set(True)
    try:
        yield
    finally:
        _every_token.reset(token)


@dataclass(frozen=True, eq=False)
class SparseInputs(Part):
    """See the module for the tensors.

    kept       inputs that are to count for a token, on average: what the threshold was chosen for
    """

    kind: ClassVar[str] = "sparse_inputs"

    columns: Tensor
    threshold: Tensor
    scale: Tensor | None
    left: Tensor | None
    right: Tensor | None
    kept: int
    prefill: Prefill = "sparse"

    @classmethod
    def of(
        cls,
        weight: Tensor,
        threshold: float,
        kept: int,
        *,
        rank: int = 0,
        weighted: bool = True,
        prefill: Prefill = "sparse",
        factor_dtype: torch.dtype | None = None,
        factors: tuple[Tensor, Tensor] | None = None,
    ) -> SparseInputs:
        """Of a weight [out, in], in its dtype; factors are stored in it too, unless `factor_dtype` names another.

        factors    left and right of this rank, if they are known already
        """
        if factors is None and rank:
            made = svd(weight.float(), rank, dtype=factor_dtype or weight.dtype)
            factors = made.left, made.right
        left, right = factors if factors is not None and rank else (None, None)
        return cls(
            weight.t().contiguous(),
            torch.tensor([threshold], dtype=torch.float32, device=weight.device),
            column_norms(weight) if weighted else None,
            left,
            right,
            kept,
            prefill,
        )

    @property
    def shape(self) -> tuple[int, int]:
        in_features, out_features = self.columns.shape
        return int(out_features), int(in_features)

    @property
    def rank(self) -> int:
        return 0 if self.right is None else int(self.right.shape[0])

    @property
    def limit(self) -> float:
        """The threshold as a number."""
        return float(self.threshold)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.columns.t().to(dtype)

    def matmul(self, x: Tensor) -> Tensor:
        """x [..., in] -> y [..., out], in the dtype of x, by the module's formula; each row by its own m.

        More than MAX_ROWS rows are multiplied with W as a whole: masked, or not, if `prefill` is "dense".
        """
        if x.shape.numel() <= MAX_ROWS * x.shape[-1]:
            return gather_matmul(x, self.columns, self.limit, self.scale, self.left, self.right)
        wide = torch.promote_types(x.dtype, self.columns.dtype)
        columns = self.columns.to(wide)
        if self.prefill == "dense" and not _every_token.get():
            return (x.to(wide) @ columns).to(x.dtype)
        large = counts(x, self.limit, self.scale)
        out = torch.where(large, x, 0).to(wide) @ columns
        if self.left is not None and self.right is not None:
            rest = torch.where(large, 0, x).to(wide)
            out = out + (rest @ self.right.to(wide).t()) @ self.left.to(wide).t()
        return out.to(x.dtype)

    def gather_weight(self) -> GatherWeight:
        return GatherWeight(self.columns, self.threshold, self.scale, self.left, self.right)

    @property
    def read_bytes(self) -> int:
        out_features, _ = self.shape
        skipped = (self.shape[1] - self.kept) * out_features * self.columns.element_size()
        return self.nbytes - skipped

    @property
    def macs(self) -> int:
        """Multiply-accumulates for an average token."""
        out_features, in_features = self.shape
        return self.kept * out_features + self.rank * (out_features + in_features)

    @property
    def code_shape(self) -> None:
        return None

    def project(
        self, target: Tensor, metric: Metric | None = None, subset: Tensor | None = None, *, differ: bool = False
    ) -> SparseInputs:
        """`target` itself, with its own norms and factors, at the same threshold. What `metric` would weigh is stored
        exactly. It has no codes: `subset` and `differ` are refused."""
        if subset is not None or differ:
            raise ConfigError("a sparse_inputs part has no codes to change: project it without a subset.")
        if tuple(target.shape) != self.shape:
            raise ConfigError(f"target of shape {list(target.shape)} for a sparse_inputs part of {list(self.shape)}.")
        return self.with_continuous({"columns": target.t()})

    def continuous(self) -> dict[str, Tensor]:
        return {"columns": self.columns}

    def dense(self, continuous: Mapping[str, Tensor]) -> Tensor:
        return continuous["columns"].float().t()

    def with_continuous(self, continuous: Mapping[str, Tensor]) -> SparseInputs:
        """With other columns, their norms and their factors."""
        weight = stored_like(self, continuous)["columns"].t()
        return self.of(
            weight,
            self.limit,
            self.kept,
            rank=self.rank,
            weighted=self.scale is not None,
            prefill=self.prefill,
            factor_dtype=None if self.left is None else self.left.dtype,
        )

    def spec(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "shape": list(self.shape),
            "dtype": _name(self.columns),
            "kept": self.kept,
            "weighted": self.scale is not None,
            "rank": self.rank,
            "factor_dtype": None if self.left is None else _name(self.left),
            "prefill": self.prefill,
        }

    def state(self) -> dict[str, Tensor]:
        found = {
            "columns": self.columns,
            "threshold": self.threshold,
            "scale": self.scale,
            "left": self.left,
            "right": self.right,
        }
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @classmethod
    def buffers(cls, spec: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        (out_features, in_features), dtype = shape_from_spec(spec), dtype_from_spec(spec, FACTOR_DTYPES)
        for name, most in (("kept", in_features), ("rank", min(out_features, in_features))):
            if type(spec.get(name)) is not int or not 0 <= spec[name] <= most:
                raise CheckpointError(
                    f"sparse_inputs part: '{name}' must be a count up to {most}, not {spec.get(name)!r}."
                )
        if spec.get("prefill") not in ("sparse", "dense") or type(spec.get("weighted")) is not bool:
            raise CheckpointError(
                f"sparse_inputs part: 'prefill' is sparse or dense and 'weighted' true or false, not "
                f"{spec.get('prefill')!r} and {spec.get('weighted')!r}."
            )
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "columns": ((in_features, out_features), dtype),
            "threshold": ((1,), torch.float32),
        }
        if spec["weighted"]:
            found["scale"] = ((in_features,), torch.float32)
        if rank := spec["rank"]:
            factors = dtype_from_spec({**spec, "dtype": spec.get("factor_dtype")}, FACTOR_DTYPES)
            found |= {"left": ((out_features, rank), factors), "right": ((rank, in_features), factors)}
        return found

    @classmethod
    def from_state(cls, spec: Mapping[str, Any], state: Mapping[str, Tensor]) -> SparseInputs:
        found = checked_buffers(cls, spec, state)
        optional = {name: found.get(name) for name in ("scale", "left", "right")}
        return cls(found["columns"], found["threshold"], **optional, kept=spec["kept"], prefill=spec["prefill"])

    def check(self) -> None:
        """Raise CheckpointError for numbers that are not finite, and for a scale below 0."""
        where = f"sparse_inputs part of shape {list(self.shape)}"
        for name, tensor in self.state().items():
            if not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(f"{where}: '{name}' has NaN or infinity.")
        if self.scale is not None and bool((self.scale < 0).any()):
            raise CheckpointError(f"{where}: 'scale' has values below 0, and is made of norms.")


def column_norms(weight: Tensor) -> Tensor:
    """Euclidean norm of each column of a weight [out, in], float32 [in]."""
    norms: Tensor = torch.linalg.vector_norm(weight.float(), dim=0)
    return norms


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
