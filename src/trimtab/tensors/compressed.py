"""A compressed weight: a sum of parts under an optional input transform, `W ~ (P_1 + P_2 + ...) T`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from trimtab.core.errors import CheckpointError, ConfigError
from trimtab.kernels.int_matmul import int_matmul
from trimtab.tensors.activations import ActivationGrid
from trimtab.tensors.base import Part, part_class, part_from_state
from trimtab.tensors.grid import GroupGrid
from trimtab.tensors.transform import Buffers, Chain, Transform, transform_class, transform_from_state

_TRANSFORM = "transform"


@dataclass(frozen=True, eq=False)
class CompressedTensor:
    """What replaces the weight of one linear layer.

    parts        at least one; all of the shape [out, in] of the weight, or [out, transform.width]
    transform    T, applied to the input: `y = sum_i P_i T(x)`, so for an invertible T the parts stand for W T^-1

    Raises ConfigError if there are no parts or their shapes differ. Buffers are named by the index of their part,
    "0.codes", "0.scales", "1.left", ..., and those of the transform "transform.index", ...
    """

    parts: tuple[Part, ...]
    transform: Transform | None = None

    def __post_init__(self) -> None:
        if not self.parts:
            raise ConfigError("a compressed tensor needs at least one part.")
        shapes = [part.shape for part in self.parts]
        if len(set(shapes)) > 1:
            listed = ", ".join(f"{part.kind} {list(shape)}" for part, shape in zip(self.parts, shapes, strict=True))
            raise ConfigError(f"the parts of a compressed tensor must have one shape, these have: {listed}.")
        width = self.parts[0].shape[1]
        if self.transform is not None and self.transform.width != width:
            raise ConfigError(
                f"a transform to {self.transform.width} entries does not fit parts of shape "
                f"{list(self.parts[0].shape)}: they multiply {width} inputs."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight; `in` is that of the layer's input, in front of the transform."""
        out_features, width = self.parts[0].shape
        return out_features, width if self.transform is None else self.transform.in_features

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense [out, in] weight this stands for, transform undone; summed in float32, then rounded to `dtype`."""
        total = reduce(torch.add, (part.dequantize() for part in self.parts))
        if self.transform is not None:
            total = self.transform.fold(total)
        return total.to(dtype)

    def matmul(self, x: Tensor) -> Tensor:
        """x [..., in] -> x @ W^T [..., out] in the dtype of x, without forming W where the parts can."""
        if x.shape[-1] != self.shape[1]:
            raise ConfigError(f"input of shape {list(x.shape)} for a weight of shape {list(self.shape)} ([out, in]).")
        if self.transform is not None:
            if (product := self._whole_numbers(x, self.transform)) is not None:
                return product
            x = self.transform.apply(x)
        first, *others = self.parts
        return reduce(lambda total, part: part.add_to(total, x), others, first.matmul(x))

    def _whole_numbers(self, x: Tensor, transform: Transform) -> Tensor | None:
        """The same product with whole numbers, if rounded inputs meet one grid that has nothing but a scale per row."""
        steps = transform.steps if isinstance(transform, Chain) else (transform,)
        rounding, part = steps[-1], self.parts[0]
        if not isinstance(rounding, ActivationGrid) or not isinstance(part, GroupGrid) or len(self.parts) > 1:
            return None
        fmt = part.format
        if not (fmt.symmetric and fmt.axis == "in" and fmt.bits in (4, 8) and part.scales.shape[1] == 1):
            return None
        for step in steps[:-1]:
            x = step.apply(x)
        return int_matmul(
            x,
            part.packed,
            part.scales[:, 0],
            bits=fmt.bits,
            in_features=part.in_features,
            x_bits=rounding.bits,
            x_scale=1.0 if rounding.mode == "static" else None,
            x_symmetric=rounding.symmetric,
            index=rounding.index,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, those of the transform included."""
        return sum(part.nbytes for part in self.parts) + (0 if self.transform is None else self.transform.nbytes)

    def spec(self) -> dict[str, Any]:
        """JSON values: {"parts": [...], "transform": {...} or None}."""
        transform = None if self.transform is None else self.transform.spec()
        return {"parts": [part.spec() for part in self.parts], "transform": transform}

    def state(self) -> dict[str, Tensor]:
        """All buffers, named "INDEX.NAME" and "transform.NAME"."""
        owners: dict[str, Part | Transform] = {str(index): part for index, part in enumerate(self.parts)}
        if self.transform is not None:
            owners[_TRANSFORM] = self.transform
        return {f"{owner}.{name}": tensor for owner, it in owners.items() for name, tensor in it.state().items()}

    @classmethod
    def buffers(cls, spec: Mapping[str, Any]) -> Buffers:
        """Name -> (shape, dtype) of the buffers that `from_state` wants. Raises CheckpointError on a bad spec."""
        owners = {str(index): part_class(part).buffers(part) for index, part in enumerate(_part_specs(spec))}
        if (transform := spec.get("transform")) is not None:
            owners[_TRANSFORM] = transform_class(transform).buffers(transform)
        return {f"{owner}.{name}": buffer for owner, own in owners.items() for name, buffer in own.items()}

    @classmethod
    def from_state(cls, spec: Mapping[str, Any], state: Mapping[str, Tensor]) -> CompressedTensor:
        """Rebuild without copying. Raises CheckpointError if the spec is bad or a buffer does not fit it."""
        specs, transform = _part_specs(spec), spec.get("transform")
        owners = [str(index) for index in range(len(specs))] + ([] if transform is None else [_TRANSFORM])
        grouped: dict[str, dict[str, Tensor]] = {owner: {} for owner in owners}
        for key, tensor in state.items():
            owner, _, name = key.partition(".")
            if owner not in grouped or not name:
                raise CheckpointError(f"unexpected buffer '{key}' for a compressed tensor of {len(specs)} parts.")
            grouped[owner][name] = tensor
        try:
            return cls(
                tuple(part_from_state(part, grouped[owner]) for owner, part in zip(owners, specs, strict=False)),
                None if transform is None else transform_from_state(transform, grouped[_TRANSFORM]),
            )
        except ConfigError as error:
            raise CheckpointError(f"compressed tensor: {error}") from None

    def check(self) -> None:
        """Raise CheckpointError if a buffer holds values that no compression writes."""
        for part in self.parts:
            part.check()
        if self.transform is not None:
            self.transform.check()


def _part_specs(spec: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    parts = spec.get("parts")
    if not (isinstance(parts, list) and parts and all(isinstance(part, Mapping) for part in parts)):
        raise CheckpointError(f"compressed tensor: 'parts' must be a list of part specs, not {parts!r}.")
    return parts
