"""Weights on a grid, made of codes, for the tests of the kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab.kernels.packing import pack


@dataclass
class Grid:
    codes: Tensor
    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    options: dict[str, int]

    def weight(self) -> Tensor:
        """float64 [out, in], from the codes, by the definition."""
        length = self.options["in_features"] // self.scales.shape[1]
        zeros = 2 ** (self.options["bits"] - 1) if self.zeros is None else self.zeros.repeat_interleave(length, 1)
        return (self.codes.double() - zeros) * self.scales.double().repeat_interleave(length, 1)

    def arguments(self) -> tuple[Any, ...]:
        return self.packed, self.scales, self.zeros


def make_grid(
    out: int,
    width: int,
    bits: int,
    group_size: int,
    *,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> Grid:
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group_size == -1 else width // group_size
    codes = torch.randint(0, 2**bits, (out, width), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(out, groups, generator=generator) + 0.1).to(scale_dtype)
    zeros = None if symmetric else torch.randint(0, 2**bits, (out, groups), dtype=torch.uint8, generator=generator)
    options = {"bits": bits, "group_size": group_size, "in_features": width}
    return Grid(codes, pack(codes, bits), scales, zeros, options)


def inputs(rows: int, width: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative_rms(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture(autouse=True)
def no_choice_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRIMTAB_KERNELS", "TRIMTAB_ISA"):
        monkeypatch.delenv(name, raising=False)
