"""The contract of input transforms: what is done to the input before the parts of a compressed tensor multiply it.

`y = (P_1 + P_2 + ...) T(x)`. T may mix channels (a rotation), copy, drop or average them (so that the parts are wider
or narrower than the layer's input), or round them to a grid of their own.
"""

from __future__ import annotations

import importlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.core.errors import CheckpointError, ConfigError, did_you_mean

_TRANSFORM_MODULES = ("rotation", "activations", "reindex")
TRANSFORM_KINDS: dict[str, type[Transform]] = {}
"""kind -> class, filled as transforms are defined; checkpoints load nothing else."""

Buffers = dict[str, tuple[tuple[int, ...], torch.dtype]]


class Transform(ABC):
    """One immutable transform of vectors [..., in_features] to [..., width]. Subclasses set `kind`, which registers."""

    kind: ClassVar[str]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if kind := cls.__dict__.get("kind"):
            TRANSFORM_KINDS[kind] = cls

    @property
    @abstractmethod
    def in_features(self) -> int:
        """Entries of the layer's input."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Entries of what the parts multiply."""

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> T(x) [..., width], in the dtype of x."""

    @abstractmethod
    def fold(self, weight: Tensor) -> Tensor:
        """weight [out, width] -> the [out, in_features] weight that acts on x itself: W T, rounding of x left out."""

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """JSON values from which `buffers` knows the buffers: {"kind": ..., ...}."""

    def state(self) -> dict[str, Tensor]:
        """The buffers as stored; most transforms have none."""
        return {}

    @classmethod
    def buffers(cls, spec: Mapping[str, Any]) -> Buffers:
        """Name -> (shape, dtype) of the buffers that `from_state` wants. Raises CheckpointError on a bad spec."""
        return {}

    @classmethod
    @abstractmethod
    def from_state(cls, spec: Mapping[str, Any], state: Mapping[str, Tensor]) -> Transform:
        """Rebuild without copying. Raises CheckpointError for a bad spec or buffers that do not fit it."""

    def check(self) -> None:  # noqa: B027 - most transforms have nothing to check
        """Raise CheckpointError if the buffers hold values that no compression writes."""

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(t.numel() * t.element_size() for t in self.state().values())


@dataclass(frozen=True, eq=False)
class Chain(Transform):
    """Several transforms, the first applied first. Raises ConfigError if their widths do not fit or it is empty."""

    kind: ClassVar[str] = "chain"

    steps: tuple[Transform, ...]

    def __post_init__(self) -> None:
        widths = [(step.in_features, step.width) for step in self.steps]
        if not widths or any(a[1] != b[0] for a, b in itertools.pairwise(widths)):
            raise ConfigError(f"transforms of (in, out) {widths} do not follow one another.")

    @property
    def in_features(self) -> int:
        return self.steps[0].in_features

    @property
    def width(self) -> int:
        return self.steps[-1].width

    def apply(self, x: Tensor) -> Tensor:
        return reduce(lambda value, step: step.apply(value), self.steps, x)

    def fold(self, weight: Tensor) -> Tensor:
        return reduce(lambda value, step: step.fold(value), reversed(self.steps), weight)

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind, "steps": [step.spec() for step in self.steps]}

    def state(self) -> dict[str, Tensor]:
        return {f"{i}.{name}": value for i, step in enumerate(self.steps) for name, value in step.state().items()}

    @classmethod
    def buffers(cls, spec: Mapping[str, Any]) -> Buffers:
        wanted: Buffers = {}
        for index, step in enumerate(_steps(spec)):
            wanted |= {f"{index}.{name}": buffer for name, buffer in transform_class(step).buffers(step).items()}
        return wanted

    @classmethod
    def from_state(cls, spec: Mapping[str, Any], state: Mapping[str, Tensor]) -> Chain:
        grouped: list[dict[str, Tensor]] = [{} for _ in _steps(spec)]
        for key, value in state.items():
            index, _, name = key.partition(".")
            if not (index.isdecimal() and int(index) < len(grouped)):
                raise CheckpointError(f"unexpected buffer '{key}' for a chain of {len(grouped)} transforms.")
            grouped[int(index)][name] = value
        return cls(tuple(transform_from_state(step, own) for step, own in zip(_steps(spec), grouped, strict=True)))

    def check(self) -> None:
        for step in self.steps:
            step.check()


def _steps(spec: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    steps = spec.get("steps")
    if not (isinstance(steps, list) and steps and all(isinstance(step, Mapping) for step in steps)):
        raise CheckpointError(f"a chain of transforms needs a list 'steps', not {steps!r}.")
    return steps


def transform_class(spec: Mapping[str, Any]) -> type[Transform]:
    """The class that a spec's kind names. Raises CheckpointError if there is none."""
    for module in _TRANSFORM_MODULES:
        importlib.import_module(f"trimtab.tensors.{module}")
    kind = spec.get("kind")
    if kind not in TRANSFORM_KINDS:
        raise CheckpointError(f"input transform of unknown kind {kind!r}. {did_you_mean(str(kind), TRANSFORM_KINDS)}")
    return TRANSFORM_KINDS[str(kind)]


def transform_from_state(spec: Mapping[str, Any], state: Mapping[str, Tensor]) -> Transform:
    """Rebuild any transform; the kind must be one of TRANSFORM_KINDS. Raises CheckpointError."""
    try:
        return transform_class(spec).from_state(spec, state)
    except ConfigError as error:
        raise CheckpointError(f"input transform: {error}") from None
