"""The products of `grid_matmul_many` with fixed weights, prepared for decoding."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trimtab.kernels import library
from trimtab.kernels.grid_matmul import native
from trimtab.kernels.grid_matmul.weight import GridWeight, check_all
from trimtab.kernels.library import GridWeightStruct
from trimtab.kernels.prepared import PreparedProducts


def prepared_grids(weights: Sequence[GridWeight]) -> PreparedProducts:
    """Errors as in `grid_matmul_many`."""
    check_all(weights)
    in_features = weights[0].in_features
    described = function = None
    if library.absent() is None and native.refuses(torch.empty(1, in_features), weights) is None:
        described = (GridWeightStruct * len(weights))(*map(native.describe, weights))
        function = library.native_library().tt_grid_matmul
    tensors = [tensor for weight in weights for tensor in weight.tensors().values()]
    return PreparedProducts(tensors, in_features, [weight.out_features for weight in weights], described, function)
