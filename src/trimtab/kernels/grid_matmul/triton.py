"""Placeholder while the GPU version is written."""

from __future__ import annotations

from torch import Tensor


def absent() -> str | None:
    return "not written yet"


def refuses(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, *, bits: int, group_size: int, in_features: int
) -> str | None:
    return None


def grid_matmul_triton(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, *, bits: int, group_size: int, in_features: int
) -> Tensor:
    raise NotImplementedError
