"""Multiply by a weight stored as packed codes with group scales: `x @ W^T`, `w = scale * (code - zero)`."""

from __future__ import annotations

from trimtab.kernels.grid_matmul.reference import grid_matmul_reference as grid_matmul

__all__ = ["grid_matmul"]
