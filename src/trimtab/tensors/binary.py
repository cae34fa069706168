"""A weight as a sum of binary bases with one scale per row each: `w = sum_i alpha_i b_i (+ c)`, `b_i` = -1 or +1.

The N signs of a weight are stored side by side as one N-bit code, in the layout of kernels/packing.py: bit i of the
code is 1 where base i is +1. So a row of weights has 2^N levels, sums of its scales under all signs, and the kernel for
tables of levels multiplies it. Bytes are those of N bit planes: N bits per weight and N scales per row.
Source: QBB, NeurIPS 2024 (the layout is ours).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.core.errors import CheckpointError, ConfigError, NumericsError
from trimtab.kernels.grid_matmul import GridWeight
from trimtab.kernels.packing import pack, packed_bytes, unpack
from trimtab.tensors.base import Part, checked_buffers, dtype_from_spec, shape_from_spec, stored_like
from trimtab.tensors.metric import Metric

ALPHA_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
BASES = (2, 3, 4)


@dataclass(frozen=True, eq=False)
class BinaryBases(Part):
    """Signs as codes, and scales.

    packed      uint8 [out, packed_bytes(in, N)]
    alphas      [N, out] in float16, bfloat16 or float32; any sign
    constant    [out] in the dtype of alphas, added to every weight of a row; None: nothing
    """

    kind: ClassVar[str] = "binary"

    in_features: int
    packed: Tensor
    alphas: Tensor
    constant: Tensor | None = None

    @classmethod
    def nearest(cls, weight: Tensor, alphas: Tensor, constant: Tensor | None = None) -> BinaryBases:
        """The signs with which stored `alphas` [N, out] (and `constant` [out]) come nearest to `weight` [out, in].

        Raises ConfigError for shapes, dtypes or a number of bases that cannot be.
        """
        if weight.ndim != 2 or alphas.ndim != 2 or alphas.shape[1] != weight.shape[0] or alphas.shape[0] not in BASES:
            raise ConfigError(
                f"alphas {list(alphas.shape)} do not fit a weight of shape {list(weight.shape)}: they must be "
                f"[N, out], with N one of {', '.join(map(str, BASES))} bases."
            )
        if alphas.dtype not in ALPHA_DTYPES.values():
            raise ConfigError(f"alphas are {alphas.dtype}; want one of {', '.join(ALPHA_DTYPES)}.")
        codes = _nearest_codes(weight, _levels(alphas, constant), None)
        return cls(int(weight.shape[1]), pack(codes, len(alphas)), alphas.contiguous(), constant)

    @classmethod
    def from_signs(cls, signs: Tensor, alphas: Tensor) -> BinaryBases:
        """From given signs [N, out, in], -1 or +1, and scales [N, out]."""
        weights = 2 ** torch.arange(len(signs), device=signs.device)
        codes = ((signs > 0) * weights[:, None, None]).sum(dim=0).to(torch.uint8)
        return cls(int(signs.shape[2]), pack(codes, len(signs)), alphas.contiguous())

    @property
    def bases(self) -> int:
        """N."""
        return int(self.alphas.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        return int(self.packed.shape[0]), self.in_features

    def codes(self) -> Tensor:
        """uint8 [out, in]; bit i is 1 where base i is +1."""
        return unpack(self.packed, self.bases, self.in_features)

    @functools.cached_property
    def levels(self) -> Tensor:
        """The value of each code, float32 [out, 2^N]."""
        return _levels(self.alphas, self.constant)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.levels.gather(1, self.codes().long()).to(dtype)

    def grid_weight(self) -> GridWeight:
        """Each row with a table of its own."""
        scales = torch.ones(self.shape[0], 1, device=self.alphas.device)
        return GridWeight(self.packed, scales, None, self.bases, -1, self.in_features, self.levels)

    def project(
        self, target: Tensor, metric: Metric | None = None, subset: Tensor | None = None, *, differ: bool = False
    ) -> BinaryBases:
        """Signs nearest to `target`. A weight's signs are one code, so nearest is elementwise whatever the `metric`."""
        if tuple(target.shape) != self.shape:
            raise ConfigError(f"target of shape {list(target.shape)} for binary bases of shape {list(self.shape)}.")
        if not bool(torch.isfinite(target).all()):
            raise NumericsError(f"the target of shape {list(target.shape)} has NaN or infinite values.")
        old = self.codes()
        codes = _nearest_codes(target, self.levels, old if differ else None)
        return replace(self, packed=pack(codes if subset is None else torch.where(subset, codes, old), self.bases))

    def continuous(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.state().items() if name != "codes"}

    def dense(self, continuous: Mapping[str, Tensor]) -> Tensor:
        return _levels(continuous["alphas"], continuous.get("constant")).gather(1, self.codes().long())

    def with_continuous(self, continuous: Mapping[str, Tensor]) -> BinaryBases:
        stored = stored_like(self, continuous)
        return replace(self, alphas=stored["alphas"], constant=stored.get("constant"))

    def spec(self) -> dict[str, Any]:
        name = str(self.alphas.dtype).removeprefix("torch.")
        constant = self.constant is not None
        return {"kind": self.kind, "shape": list(self.shape), "bases": self.bases, "dtype": name, "constant": constant}

    def state(self) -> dict[str, Tensor]:
        state = {"codes": self.packed, "alphas": self.alphas}
        return state if self.constant is None else state | {"constant": self.constant}

    @classmethod
    def buffers(cls, spec: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        (out_features, in_features), dtype = shape_from_spec(spec), dtype_from_spec(spec, ALPHA_DTYPES)
        bases = spec.get("bases")
        if bases not in BASES:
            raise CheckpointError(f"binary part: 'bases' must be one of {', '.join(map(str, BASES))}, not {bases!r}.")
        wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "codes": ((out_features, packed_bytes(in_features, bases)), torch.uint8),
            "alphas": ((bases, out_features), dtype),
        }
        return wanted | ({"constant": ((out_features,), dtype)} if spec.get("constant") else {})

    @classmethod
    def from_state(cls, spec: Mapping[str, Any], state: Mapping[str, Tensor]) -> BinaryBases:
        found = checked_buffers(cls, spec, state)
        return cls(shape_from_spec(spec)[1], found["codes"], found["alphas"], found.get("constant"))

    def check(self) -> None:
        """Raise CheckpointError if a scale has NaN or infinity."""
        for name, numbers in self.continuous().items():
            if not bool(torch.isfinite(numbers).all()):
                raise CheckpointError(f"binary part of shape {list(self.shape)}: '{name}' has NaN or infinity.")


def sign_table(bases: int, like: Tensor) -> Tensor:
    """[2^N, N] of -1 and +1: the signs that each code stands for, in the dtype and on the device of `like`."""
    codes = torch.arange(1 << bases, device=like.device)
    return ((codes[:, None] >> torch.arange(bases, device=like.device)) & 1).to(like) * 2 - 1


def _levels(alphas: Tensor, constant: Tensor | None) -> Tensor:
    """float32 [out, 2^N]; differentiable."""
    wide = alphas.float()
    levels = wide.t() @ sign_table(len(wide), wide).t()
    return levels if constant is None else levels + constant.float()[:, None]


def _nearest_codes(target: Tensor, levels: Tensor, differ_from: Tensor | None) -> Tensor:
    """uint8 [out, in]: the code whose level is nearest, or the second nearest where it is that of `differ_from`.

    Of two levels at equal distance the lower one is taken.
    """
    ordered, code_of = levels.sort(dim=1)
    target = target.float().contiguous()
    between = ((ordered[:, 1:] + ordered[:, :-1]) / 2).contiguous()
    place = torch.searchsorted(between, target)
    if differ_from is not None:
        last = levels.shape[1] - 1
        above = target > ordered.gather(1, place)
        other = torch.where(above, place + 1, place - 1)
        other = torch.where(other > last, last - 1, torch.where(other < 0, 1, other))
        place = torch.where(code_of.gather(1, place) == differ_from, other, place)
    return code_of.gather(1, place).to(torch.uint8)
