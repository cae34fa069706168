"""The products of `sparse_matmul_many` with fixed weights, prepared for decoding."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trimtab.kernels import library
from trimtab.kernels.library import SparseWeightStruct
from trimtab.kernels.prepared import PreparedProducts
from trimtab.kernels.sparse_matmul import native
from trimtab.kernels.sparse_matmul.weight import SparseWeight, check_all


def prepared_sparse(weights: Sequence[SparseWeight]) -> PreparedProducts:
    """Errors as in `sparse_matmul_many`."""
    check_all(weights)
    in_features = weights[0].in_features
    described = function = None
    if library.absent() is None and native.refuses(torch.empty(1, in_features), weights) is None:
        described = (SparseWeightStruct * len(weights))(*map(native.describe, weights))
        function = library.native_library().tt_sparse_matmul
    tensors = [tensor for weight in weights for tensor in weight.tensors().values()]
    return PreparedProducts(tensors, in_features, [weight.out_features for weight in weights], described, function)
