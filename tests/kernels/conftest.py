"""Weights on a grid, made of codes, and instruction sets, for the tests of the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from trimtab.kernels import library
from trimtab.kernels.grid_matmul import GridWeight
from trimtab.kernels.packing import pack

HERE = library.machine_isas() if library.absent() is None else ()
needs_native = pytest.mark.skipif(not HERE, reason=str(library.absent()))

KINDS = ("symmetric", "zeros", "fractional", "levels", "row_levels")
"""What codes mean: less 2^(bits-1); less whole or fractional zero points; indices of levels of all rows or per row."""


@dataclass
class Grid:
    codes: Tensor
    given: GridWeight

    def weight(self) -> Tensor:
        """float64 [out, in], from the codes, by the definition."""
        given, rows = self.given, torch.arange(self.codes.shape[0])[:, None]
        length = given.in_features // given.scales.shape[1]
        if given.levels is not None:
            levels = given.levels.double().expand(self.codes.shape[0], -1)
            numbers = levels[rows, self.codes.long()]
        elif given.zeros is not None:
            numbers = self.codes.double() - given.zeros.double().repeat_interleave(length, 1)
        else:
            numbers = self.codes.double() - 2 ** (given.bits - 1)
        return numbers * given.scales.double().repeat_interleave(length, 1)


def make_grid(
    out: int,
    width: int,
    bits: int,
    group_size: int,
    kind: str = "symmetric",
    *,
    scale_dtype: torch.dtype = torch.float16,
    zero_dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> Grid:
    """`zero_dtype` is of fractional zero points. Levels are numbers of bfloat16, to which a kernel may round them."""
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group_size == -1 else width // group_size
    codes = torch.randint(0, 2**bits, (out, width), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(out, groups, generator=generator) + 0.1).to(scale_dtype)
    zeros = levels = None
    if kind == "zeros":
        zeros = torch.randint(0, 2**bits, (out, groups), dtype=torch.uint8, generator=generator)
    elif kind == "fractional":
        zeros = (torch.rand(out, groups, generator=generator) * (2**bits + 1) - 1).to(zero_dtype)
    elif kind == "levels":
        levels = torch.randn(2**bits, generator=generator).bfloat16().float()
    elif kind == "row_levels":
        levels = torch.randn(out, 2**bits, generator=generator).bfloat16().float()
    return Grid(codes, GridWeight(pack(codes, bits), scales, zeros, bits, group_size, width, levels))


def inputs(rows: int, width: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative_rms(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture(autouse=True)
def no_choice_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRIMTAB_KERNELS", "TRIMTAB_ISA"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=library.ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set that this machine has, in force while the test runs."""
    if request.param not in HERE:
        pytest.skip(f"this machine has {', '.join(HERE) or 'no native kernels'}")
    monkeypatch.setenv(library.ISA_VARIABLE, request.param)
    return str(request.param)
