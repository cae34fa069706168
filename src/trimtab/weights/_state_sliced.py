"""A sliced block as named tensors and JSON: `<linear>:weight`, `<linear>:bias`, the pairs of its heads, its plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from trimtab.models.narrow import HeadGeometry
from trimtab.weights._pruning.plan import Plan
from trimtab.weights.base import NarrowLinear, SlicedBlock

_PAIRS = ":pairs"
Content = dict[str, Any]


def encoded(block: SlicedBlock) -> tuple[dict[str, Tensor], Content]:
    """Tensors and the JSON values that go with them."""
    tensors = {f"{name}:weight": done.weight for name, done in block.linears.items()}
    tensors |= {f"{name}:bias": done.bias for name, done in block.linears.items() if done.bias is not None}
    heads = None
    if block.heads is not None:
        heads = {"value_dim": block.heads.value_dim}
        if block.heads.pairs is not None:
            tensors[_PAIRS] = block.heads.pairs
    notes = {name: dict(done.notes) for name, done in block.linears.items()}
    return tensors, {"narrow": notes, "heads": heads, "plan": Plan(block.plan).rows()}


def is_sliced(content: Mapping[str, Any]) -> bool:
    """Whether these are the values of a sliced block."""
    return "narrow" in content


def decoded(tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> SlicedBlock:
    """What `encoded` was given. Raises KeyError, TypeError or ValueError for values that are not its."""
    linears = {
        name: NarrowLinear(tensors[f"{name}:weight"], tensors.get(f"{name}:bias"), notes)
        for name, notes in content["narrow"].items()
    }
    heads = content["heads"]
    geometry = None if heads is None else HeadGeometry(tensors.get(_PAIRS), heads["value_dim"])
    return SlicedBlock(linears, geometry, Plan.of_rows(content["plan"]).entries)
