"""A compressed weight: a sum of parts under an optional input transform, `W ~ (P_1 + P_2 + ...) T`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from trimtab.core.errors import CheckpointError, ConfigError
from trimtab.tensors.base import Part, part_class, part_from_state
from trimtab.tensors.rotation import Rotation


@dataclass(frozen=True, eq=False)
class CompressedTensor:
    """What replaces the weight of one linear layer.

    parts        at least one; all of the shape [out, in] of the weight
    transform    T, applied to the input: `y = sum_i P_i (T x)`, so the parts stand for W T^-1

    Raises ConfigError if there are no parts or their shapes differ. Buffers are named by the index of their part,
    "0.codes", "0.scales", "1.left", ...
    """

    parts: tuple[Part, ...]
    transform: Rotation | None = None

    def __post_init__(self) -> None:
        if not self.parts:
            raise ConfigError("a compressed tensor needs at least one part.")
        shapes = [part.shape for part in self.parts]
        if len(set(shapes)) > 1:
            listed = ", ".join(f"{part.kind} {list(shape)}" for part, shape in zip(self.parts, shapes, strict=True))
            raise ConfigError(f"the parts of a compressed tensor must have one shape, these have: {listed}.")
        if self.transform is not None and self.transform.size != self.shape[1]:
            raise ConfigError(
                f"a transform of size {self.transform.size} does not fit parts of shape {list(self.shape)}: "
                f"it acts on the {self.shape[1]} inputs."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        return self.parts[0].shape

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense [out, in] weight this stands for, transform undone; summed in float32, then rounded to `dtype`."""
        total = reduce(torch.add, (part.dequantize() for part in self.parts))
        if self.transform is not None:
            total = self.transform.inverse(total)  # rows of P T are T^t applied to the rows of P
        return total.to(dtype)

    def matmul(self, x: Tensor) -> Tensor:
        """x [..., in] -> x @ W^T [..., out] in the dtype of x, without forming W where the parts can."""
        if x.shape[-1] != self.shape[1]:
            raise ConfigError(f"input of shape {list(x.shape)} for a weight of shape {list(self.shape)} ([out, in]).")
        if self.transform is not None:
            x = self.transform.apply(x)
        return reduce(torch.add, (part.matmul(x) for part in self.parts))

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers of all parts. A transform stores none: it is rebuilt from its spec."""
        return sum(part.nbytes for part in self.parts)

    def spec(self) -> dict[str, Any]:
        """JSON values: {"parts": [...], "transform": {...} or None}."""
        transform = None if self.transform is None else self.transform.spec()
        return {"parts": [part.spec() for part in self.parts], "transform": transform}

    def state(self) -> dict[str, Tensor]:
        """All buffers, named "INDEX.NAME"."""
        return {f"{i}.{name}": tensor for i, part in enumerate(self.parts) for name, tensor in part.state().items()}

    @classmethod
    def buffers(cls, spec: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> (shape, dtype) of the buffers that `from_state` wants. Raises CheckpointError on a bad spec."""
        wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for index, part in enumerate(_part_specs(spec)):
            wanted |= {f"{index}.{name}": buffer for name, buffer in part_class(part).buffers(part).items()}
        return wanted

    @classmethod
    def from_state(cls, spec: Mapping[str, Any], state: Mapping[str, Tensor]) -> CompressedTensor:
        """Rebuild without copying. Raises CheckpointError if the spec is bad or a buffer does not fit it."""
        specs = _part_specs(spec)
        grouped: list[dict[str, Tensor]] = [{} for _ in specs]
        for key, tensor in state.items():
            index, _, name = key.partition(".")
            if not (index.isdecimal() and int(index) < len(specs) and name):
                raise CheckpointError(f"unexpected buffer '{key}' for a compressed tensor of {len(specs)} parts.")
            grouped[int(index)][name] = tensor
        transform = spec.get("transform")
        try:
            return cls(
                tuple(part_from_state(part, buffers) for part, buffers in zip(specs, grouped, strict=True)),
                None if transform is None else Rotation.from_spec(transform),
            )
        except ConfigError as error:
            raise CheckpointError(f"compressed tensor: {error}") from None

    def check(self) -> None:
        """Raise CheckpointError if a buffer holds values that no compression writes."""
        for part in self.parts:
            part.check()


def _part_specs(spec: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    parts = spec.get("parts")
    if not (isinstance(parts, list) and parts and all(isinstance(part, Mapping) for part in parts)):
        raise CheckpointError(f"compressed tensor: 'parts' must be a list of part specs, not {parts!r}.")
    return parts
