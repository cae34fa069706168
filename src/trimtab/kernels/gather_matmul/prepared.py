"""The products of gather_matmul with fixed weights, prepared for decoding: those of one input in one native call."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trimtab.kernels import library
from trimtab.kernels.gather_matmul import native
from trimtab.kernels.gather_matmul.weight import GatherWeight
from trimtab.kernels.library import GatherWeightStruct
from trimtab.kernels.prepared import PreparedProducts


def prepared_gather(weights: Sequence[GatherWeight]) -> PreparedProducts:
    """Weights of equal in_features. Raises ConfigError if one is wrong in itself."""
    for weight in weights:
        weight.check()
    in_features = weights[0].in_features
    described = function = None
    if library.absent() is None and not any(refuses(weight) for weight in weights):
        described = (GatherWeightStruct * len(weights))(*map(native.describe, weights))
        function = library.native_library().tt_gather_matmul
    tensors = [tensor for weight in weights for tensor in weight.tensors().values()]
    return PreparedProducts(tensors, in_features, [weight.out_features for weight in weights], described, function)


def refuses(weight: GatherWeight) -> str | None:
    """Why the native kernel cannot multiply few rows of any dtype by this weight, or None."""
    probe = torch.empty(1, weight.in_features)
    return native.refuses(probe, weight.columns, 0.0, weight.scale, weight.left, weight.right)
