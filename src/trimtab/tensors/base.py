"""The contract of compressed tensors: values that know how to multiply, how large they are and how to be stored.

A compressed weight is a sum of parts under an input transform,

    W ~ E[ (Q(codes, params) + L1 L2 + S) T ],

each part a `Part`. All parts of one weight have the shape `[out, in]` of that weight; groups run along `in`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from trimtab.tensors.metric import Metric

PART_KINDS: dict[str, type[Part]] = {}
"""kind -> class, filled as parts are defined; the allow-list from which checkpoints are loaded."""


class Part(ABC):
    """One immutable summand of a compressed tensor. Subclasses set `kind`, which registers them."""

    kind: ClassVar[str]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if kind := cls.__dict__.get("kind"):
            PART_KINDS[kind] = cls

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out, in) of the dense tensor this stands for."""

    @abstractmethod
    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense [out, in] tensor."""

    @abstractmethod
    def matmul(self, x: Tensor) -> Tensor:
        """x [..., in] -> x @ W^T [..., out], in the dtype of x; uses the fastest kernel that accepts the input."""

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """JSON values from which `like` knows names, shapes and dtypes of the buffers: {"kind": ..., ...}."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """The buffers as stored: name -> tensor. Contiguous, and all that is needed beside `spec()`."""

    @classmethod
    @abstractmethod
    def buffers(cls, spec: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> (shape, dtype) of the buffers that `from_state` wants. Raises CheckpointError on a bad spec."""

    @classmethod
    @abstractmethod
    def from_state(cls, spec: Mapping[str, Any], state: Mapping[str, Tensor]) -> Part:
        """Rebuild without copying. Raises CheckpointError if a buffer is missing or has another shape or dtype."""

    @abstractmethod
    def project(self, target: Tensor, metric: Metric | None = None, subset: Tensor | None = None) -> Part:
        """The part of the same form nearest to the dense `target` [out, in], continuous parameters kept.

        `subset` (bool [out, in]) limits the change: codes outside it stay as they are. The primitive behind
        alternating quantization and SVD, straight-through training and discrete steps.
        """

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, padding included."""
        return sum(t.numel() * t.element_size() for t in self.state().values())


def part_from_state(spec: Mapping[str, Any], state: Mapping[str, Tensor]) -> Part:
    """Rebuild any part; the kind must be one of PART_KINDS. Raises CheckpointError."""
    from trimtab.core.errors import CheckpointError, did_you_mean

    kind = spec.get("kind")
    if kind not in PART_KINDS:
        raise CheckpointError(f"compressed tensor of unknown kind {kind!r}. {did_you_mean(str(kind), PART_KINDS)}")
    return PART_KINDS[kind].from_state(spec, state)
