"""Plain PyTorch: what int_matmul computes."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.core.errors import ConfigError
from trimtab.kernels.packing import unpack

SCALE_LIMITS = (1e-5, 1e4)
"""Of a scale between a row's smallest and largest input, from QLLM."""


def round_inputs(x: Tensor, *, x_bits: int, x_scale: float | None, x_symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(q, scale, zero): q [..., width] whole numbers, scale and zero [..., 1], all float32; x ~ scale * (q - zero).

    The scale of a row that cannot be rounded is NaN.
    """
    x = x.float()
    nan = x.new_full((*x.shape[:-1], 1), float("nan"))
    if x_scale is not None:  # static: nothing is measured
        scale = torch.where(x.isnan().any(-1, keepdim=True), nan, x_scale)
        return _symmetric(x, scale, x_bits), scale, torch.zeros_like(scale)
    smallest, largest = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    if not x_symmetric:
        top = 2.0**x_bits - 1
        scale = ((largest - smallest) / top).clamp(*SCALE_LIMITS)
        zero = (-smallest / scale).round()
        q = ((x / scale).round() + zero).clamp(0, top)
        return (
            q.nan_to_num(0.0),
            torch.where(smallest.isfinite() & largest.isfinite(), scale, nan),
            zero.nan_to_num(0.0),
        )
    magnitude = torch.maximum(largest, -smallest)
    scale = torch.where(magnitude.isfinite(), magnitude / (2.0 ** (x_bits - 1) - 1), nan)
    return _symmetric(x, scale, x_bits), scale, torch.zeros_like(scale)


def _symmetric(x: Tensor, scale: Tensor, x_bits: int) -> Tensor:
    top = 2.0 ** (x_bits - 1) - 1
    return torch.where(scale == 0, 0.0, (x / scale).round().clamp(-top, top)).nan_to_num(0.0)


def int_matmul_reference(
    x: Tensor,
    packed: Tensor,
    weight_scales: Tensor,
    *,
    bits: int,
    in_features: int,
    x_bits: int,
    x_scale: float | None = None,
    x_symmetric: bool = True,
    index: Tensor | None = None,
    row_sums: Tensor | None = None,
) -> Tensor:
    """Rounded inputs times whole weights in float64, which holds these sums exactly; scaled in float32."""
    q, scale, zero = round_inputs(x, x_bits=x_bits, x_scale=x_scale, x_symmetric=x_symmetric)
    if index is not None:
        check_index(index, x.shape[-1])
        q = q[..., index]
    weight = unpack(packed, bits, in_features).double() - 2 ** (bits - 1)
    total = torch.nn.functional.linear(q.double(), weight)
    if not x_symmetric:
        total -= zero.double() * (weight.sum(1) if row_sums is None else row_sums.double())
    return (total.float() * weight_scales.float() * scale).to(x.dtype)


def check_index(index: Tensor, width: int) -> None:
    """Raises ConfigError for an entry that is no input of x."""
    smallest, largest = int(index.min()), int(index.max())
    if smallest < 0 or largest >= width:
        raise ConfigError(f"index has entries from {smallest} to {largest}, but x ends in [{width}].")
