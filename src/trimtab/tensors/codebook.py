"""A weight as sums of learnt vectors: g neighbouring weights of a row are `scale_row * sum_m codebook_m[code_m]`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from trimtab.core.errors import CheckpointError, ConfigError, NumericsError
from trimtab.kernels.codebook_matmul import codebook_matmul
from trimtab.tensors.base import Part, checked_buffers, shape_from_spec, stored_like
from trimtab.tensors.codebook_search import best_codes, best_codes_of_rows, sum_of_codes

if TYPE_CHECKING:
    from trimtab.tensors.metric import Metric

MAX_CODE_BITS = 15
BEAM = 4


@dataclass(frozen=True, eq=False)
class Codebook(Part):
    """Additive codebooks (AQLM, arXiv:2401.06118); one codebook is vector quantization.

    codes        [out, in / g, M], uint8 up to 256 vectors in a codebook, int16 above
    codebooks    float16 [M, 2^B, g]
    scales       float16 [out]; zero makes a row zero

    Bits per weight: M (8 or 16) / g + 16 M 2^B g / (out in) + 16 / in. Raises ConfigError for what does not fit.
    """

    kind: ClassVar[str] = "codebook"

    codes: Tensor
    codebooks: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        if self.codes.ndim != 3 or self.codebooks.ndim != 3 or tuple(self.scales.shape) != (self.codes.shape[0],):
            raise ConfigError(
                f"codes {list(self.codes.shape)}, codebooks {list(self.codebooks.shape)} and scales "
                f"{list(self.scales.shape)} must be [out, in / g, M], [M, 2^B, g] and [out]."
            )
        size = self.codebooks.shape[1]
        if (
            self.codebooks.shape[0] != self.codes.shape[2]
            or size & (size - 1)
            or not 0 < self.code_bits <= MAX_CODE_BITS
        ):
            raise ConfigError(
                f"{self.codes.shape[2]} codes to a vector need as many codebooks of 2 to {1 << MAX_CODE_BITS} vectors, "
                f"a power of two; the codebooks are {list(self.codebooks.shape)}."
            )
        if (self.codes.dtype, self.codebooks.dtype, self.scales.dtype) != (
            code_dtype(self.code_bits),
            torch.float16,
            torch.float16,
        ):
            raise ConfigError(
                f"codes are {self.codes.dtype}, codebooks {self.codebooks.dtype}, scales {self.scales.dtype}; want "
                f"{code_dtype(self.code_bits)}, float16 and float16."
            )

    @property
    def code_bits(self) -> int:
        """B: the codebooks have 2^B vectors."""
        return int(self.codebooks.shape[1]).bit_length() - 1

    @property
    def group_size(self) -> int:
        """g: weights that share one choice of codes."""
        return int(self.codebooks.shape[2])

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.codes.shape[0]), int(self.codes.shape[1]) * self.group_size

    @property
    def code_shape(self) -> tuple[int, int]:
        return int(self.codes.shape[0]), int(self.codes.shape[1])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.dense(self.continuous()).to(dtype)

    def matmul(self, x: Tensor) -> Tensor:
        return codebook_matmul(x, self.codes, self.codebooks, self.scales, in_features=self.shape[1])

    def project(
        self,
        target: Tensor,
        metric: Metric | None = None,
        subset: Tensor | None = None,
        *,
        differ: bool = False,
        beam: int = BEAM,
    ) -> Codebook:
        """Codes of small error with codebooks and scales kept, by beam search that begins at the present codes.

        One codebook: the nearest vector. Without a metric, and where it weighs all columns alike, each vector is
        searched on its own; else the vectors of a row in turn, so that later ones make up for the errors of earlier
        ones (`differ` is then refused). The error never rises. In rows of scale zero codes mean nothing.
        """
        if tuple(target.shape) != self.shape:
            raise ConfigError(f"target of shape {list(target.shape)} for codebooks of shape {list(self.shape)}.")
        if not bool(torch.isfinite(target).all()):
            raise NumericsError(f"the target of shape {list(target.shape)} has NaN or infinite values.")
        scales = self.scales.float()
        points = target.float() / torch.where(scales == 0, 1.0, scales)[:, None]  # before anything is compared
        tables = self.codebooks.float()
        if metric is not None and metric.column is not None:
            if differ:
                raise ConfigError("`differ` chooses each vector on its own: leave out the metric.")
            matrix = metric.column if metric.matrix is None else metric.matrix
            found = best_codes_of_rows(points, self.codes, tables, matrix.float(), beam=beam, subset=subset)
        else:
            vectors = points.reshape(*self.code_shape, self.group_size)
            chosen = torch.ones(self.code_shape, dtype=torch.bool, device=points.device) if subset is None else subset
            found = self.codes.long()
            found[chosen] = best_codes(vectors[chosen], found[chosen], tables, beam=beam, differ=differ)
        return replace(self, codes=found.to(self.codes.dtype))

    def continuous(self) -> dict[str, Tensor]:
        """Codebooks and scales."""
        return {"codebooks": self.codebooks, "scales": self.scales}

    def dense(self, continuous: Mapping[str, Tensor]) -> Tensor:
        vectors = sum_of_codes(self.codes, continuous["codebooks"].float())
        return vectors.flatten(1) * continuous["scales"].float()[:, None]

    def with_continuous(self, continuous: Mapping[str, Tensor]) -> Codebook:
        return replace(self, **stored_like(self, continuous))

    def spec(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "shape": list(self.shape),
            "group_size": self.group_size,
            "codebooks": int(self.codebooks.shape[0]),
            "code_bits": self.code_bits,
        }

    def state(self) -> dict[str, Tensor]:
        return {"codes": self.codes, **self.continuous()}

    @classmethod
    def buffers(cls, spec: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        out_features, in_features = shape_from_spec(spec)
        width, count, bits = (spec.get(name) for name in ("group_size", "codebooks", "code_bits"))
        if not (
            type(width) is int and width > 0 and in_features % width == 0
            and type(count) is int and count > 0
            and type(bits) is int and 0 < bits <= MAX_CODE_BITS
        ):  # fmt: skip
            raise CheckpointError(
                f"codebook part of shape {[out_features, in_features]}: 'group_size' must divide the width, "
                f"'codebooks' be a count, 'code_bits' at most {MAX_CODE_BITS}, not {width!r}, {count!r}, {bits!r}."
            )
        return {
            "codes": ((out_features, in_features // width, count), code_dtype(bits)),
            "codebooks": ((count, 1 << bits, width), torch.float16),
            "scales": ((out_features,), torch.float16),
        }

    @classmethod
    def from_state(cls, spec: Mapping[str, Any], state: Mapping[str, Tensor]) -> Codebook:
        return cls(**checked_buffers(cls, spec, state))

    def check(self) -> None:
        """Raise CheckpointError if a number is not finite or a code names no vector."""
        for name, numbers in self.continuous().items():
            if not bool(torch.isfinite(numbers).all()):
                raise CheckpointError(f"codebook part of shape {list(self.shape)}: '{name}' has NaN or infinity.")
        if self.codes.numel() and not 0 <= int(self.codes.min()) <= int(self.codes.max()) < self.codebooks.shape[1]:
            raise CheckpointError(
                f"codebook part of shape {list(self.shape)}: codes from {int(self.codes.min())} to "
                f"{int(self.codes.max())} for codebooks of {self.codebooks.shape[1]} vectors."
            )


def code_dtype(bits: int) -> torch.dtype:
    """The type that codes of so many bits are stored in."""
    return torch.uint8 if bits <= 8 else torch.int16
