"""Why a compiled kernel cannot take tensors: the reasons that the backends of all operations share."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

FLOATS = frozenset((torch.float32, torch.float16, torch.bfloat16))
"""What kernels take as numbers; sums are float32."""
GRADIENT = "a gradient is wanted, which only the reference has"


def refused(
    tensors: Mapping[str, Tensor | None],
    floats: Collection[str],
    *,
    strided: Collection[str] = ("x",),
    on: torch.device | None = None,
) -> str | None:
    """Why the tensors cannot be read, in words, or None. A tensor that is None is left out.

    floats    names of those that must be one of FLOATS
    strided   names of those that need not be contiguous
    on        the device where Triton kernels read; None: native kernels read CPU memory
    """
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not (tensor.is_cpu if on is None else tensor.device == on):
            reader = "native kernels read CPU memory" if on is None else f"Triton kernels read all on {on}"
            return f"{name} is on {tensor.device}, {reader}"
        if not tensor.is_contiguous() and name not in strided:
            return f"{name} of shape {list(tensor.shape)} is not contiguous"
    for name in floats:
        if (number := tensors[name]) is not None and number.dtype not in FLOATS:
            kernels = "native" if on is None else "Triton"
            return f"{name} is {number.dtype}; {kernels} kernels take float32, float16 and bfloat16"
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors.values()):
        return GRADIENT
    return None
