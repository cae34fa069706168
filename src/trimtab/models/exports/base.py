"""The contract of export formats: what a format sees of a model, what it may refuse, what it writes.

A format says for each compressed layer whether it can hold it, and if not, which part stands in the way and why. All
layers are asked before anything is written; the files appear complete or not at all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trimtab.core.config import Config
from trimtab.core.errors import TargetError
from trimtab.models.compressed_linear import CompressedLinear
from trimtab.models.narrow import narrow_linears
from trimtab.tensors.activations import ActivationGrid
from trimtab.tensors.compressed import CompressedTensor
from trimtab.tensors.grid import GroupGrid
from trimtab.tensors.transform import Chain


@dataclass(frozen=True, slots=True)
class Layer:
    """A compressed layer: its dotted name in the model, its weight, and whether the family stores it as [in, out]."""

    name: str
    tensor: CompressedTensor
    transposed: bool


@dataclass(frozen=True, slots=True)
class Source:
    """What a format sees of a model.

    layers     the compressed layers by name
    dense      names of the linear layers (nn.Linear of the family's own model) that are not compressed
    """

    model: PreTrainedModel
    layers: Mapping[str, Layer]
    dense: tuple[str, ...]

    @classmethod
    def of(cls, model: PreTrainedModel) -> Source:
        """Look at a model; compares it with an empty one of its configuration to tell what its layers were.

        Raises TargetError for a model with layers that are narrower than its configuration can say.
        """
        if narrow := narrow_linears(model):
            raise TargetError(
                f"{len(narrow)} layers, {next(iter(narrow))} among them, are narrower than the configuration of such a "
                "model can say, so no other program could load it. Slice all MLPs to one width and leave attention as "
                "it is, for instance with export=uniform of modegpt."
            )
        compressed = {name: module for name, module in model.named_modules() if isinstance(module, CompressedLinear)}
        original = dict(plain_model(model).named_modules())
        layers = {
            name: Layer(name, module.tensor, isinstance(original[name], Conv1D)) for name, module in compressed.items()
        }
        linears = (name for name, module in original.items() if isinstance(module, nn.Linear))
        return cls(model, layers, tuple(name for name in linears if name not in layers))


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written.

    nbytes    of all files
    layers    one entry per compressed layer: `layer`, `stored_as`, and `relative_error` where the format rounds the
              weight that the layer stands for (Frobenius norm, relative to it; 0.0 where every value carries over)
    """

    path: Path
    format: str
    nbytes: int
    layers: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class ExportFormat(Config, ABC):
    """One format with its options."""

    name: ClassVar[str]
    marker: ClassVar[str | None] = "config.json"
    """A file that every directory of this format holds; None if the format is one file."""

    @abstractmethod
    def refusal(self, layer: Layer) -> str | None:
        """Why this layer cannot be held, naming the part; None if it can."""

    @abstractmethod
    def write(self, source: Source, path: Path, final: Path) -> list[dict[str, Any]]:
        """Fill the empty directory `path` (or write the file `path`), of layers that were not refused.

        `final` is the name that it will have. Raises OSError if the disk refuses.
        Returns the entries of `Exported.layers`.
        """

    def check_source(self, source: Source) -> None:
        """Raise an error for what no single layer shows, such as layers that differ where they may not."""

    @classmethod
    def offer(cls, layer: Layer, source: Source) -> str | None:
        """How this format can hold the layer of a model, in words for an error of another format; None if it cannot."""
        return None if cls().refusal(layer) else cls.name


def plain_model(model: PreTrainedModel) -> PreTrainedModel:
    """An uncompressed model of the same class and configuration on the meta device: shapes and modules, no weights."""
    with torch.device("meta"):
        return type(model)(model.config)


def only_grid(layer: Layer) -> GroupGrid | str:
    """The grid, if the layer is one grid along "in" with whole zero points and no transform; else why it is not."""
    if layer.tensor.transform is not None:
        return "its input transform has no place in this format"
    for index, part in enumerate(layer.tensor.parts):
        if not isinstance(part, GroupGrid):
            return f"part {index} of kind '{part.kind}' has no place in this format"
        if index:
            return f"part {index} is a second grid, and this format holds one"
    grid = layer.tensor.parts[0]
    assert isinstance(grid, GroupGrid)
    if grid.format.axis != "in":
        return f"part 0 of kind 'grid' has groups along '{grid.format.axis}', and this format wants them along 'in'"
    if grid.zeros is not None and grid.zeros.is_floating_point():
        return "part 0 of kind 'grid' has fractional zero points, and this format holds whole ones"
    return grid


def rounded_input(layer: Layer) -> str | None:
    """Why no weight alone stands for the layer: it rounds its input. None if it does not."""
    transform = layer.tensor.transform
    steps = transform.steps if isinstance(transform, Chain) else (transform,)
    for step in steps:
        if isinstance(step, ActivationGrid):
            return f"its input is rounded to {step.bits} bits, which this format does not say"
    return None


def exactly(values: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The same numbers in another dtype; None if one of them is no number of that dtype."""
    cast = values.to(dtype)
    return cast if torch.equal(cast.double(), values.double()) else None


def scales_as(grid: GroupGrid, *dtypes: torch.dtype) -> Tensor | None:
    """The grid's scales in the first of these dtypes that holds them all exactly, their own dtype before others."""
    for dtype in sorted(dtypes, key=lambda dtype: dtype != grid.scales.dtype):
        if (scales := exactly(grid.scales, dtype)) is not None:
            return scales
    return None
