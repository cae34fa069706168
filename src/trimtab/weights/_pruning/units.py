"""Which entries of which linears are removed together.

    element            one entry of one linear
    n_of_m             as element, of every m neighbouring columns of a row exactly n are removed
    neuron             row i of gate and up, column i of down
    rotary_pair        dimensions p and p + rotary_dim / 2 of a KV head: rows of its keys and of all its queries
    value_direction    dimension t of a KV head: a row of its values, and a column of `o` for each of its queries
    head               a KV head with all queries that read it: rows of q, k and v, columns of o
    layer              all linears of a block

A `UnitMap` is index algebra and nothing else: it knows names and shapes, not weights. Scores of entries come in,
scores of units go out (`reduce`); a decision about units comes in, masks of entries go out (`masks`). Fused linears
(qkv, gate_up) are seen through their `rows`, so the maps are the same for every family.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from trimtab.core.errors import TargetError

if TYPE_CHECKING:
    from trimtab.models.views import BlockView, LinearView, Role

UnitKind = Literal["element", "n_of_m", "neuron", "rotary_pair", "value_direction", "head", "layer"]
Reduction = Literal["sum", "mean", "max"]


@dataclass(frozen=True, eq=False)
class UnitMap(ABC):
    """name: of the linear or block that the units are in; `kind` and `name` identify a map within a model."""

    kind: UnitKind
    name: str

    @property
    @abstractmethod
    def count(self) -> int:
        """Number of units."""

    @abstractmethod
    def sizes(self) -> Tensor:
        """Parameters of each unit in weights, int64 [count]."""

    @abstractmethod
    def masks(self, keep: Tensor) -> dict[str, Tensor]:
        """`keep` (bool [count]) -> name of each linear -> bool [out, in], false at the entries of removed units.

        The masks are views where a unit is whole rows or columns: do not write to them.
        """

    def rows(self, keep: Tensor) -> dict[str, Tensor]:
        """Name of each linear -> bool [out], false at rows that removed units own whole, bias included."""
        return {}

    @abstractmethod
    def reduce(self, scores: Mapping[str, Tensor], how: Reduction = "sum") -> Tensor:
        """Name of each linear -> scores [out, in] of its entries, to scores of units, float32 [count]."""

    def _checked(self, keep: Tensor) -> Tensor:
        if keep.dtype != torch.bool or tuple(keep.shape) != (self.count,):
            raise TargetError(
                f"{self.name}: {self.count} units of kind '{self.kind}' want bool [{self.count}], not {keep.dtype} "
                f"{list(keep.shape)}."
            )
        return keep


@dataclass(frozen=True, eq=False)
class EntryUnits(UnitMap):
    """Single entries of one linear, unit i * in + j being (i, j); `group` is (n, m) for n_of_m, else None."""

    shape: tuple[int, int]
    group: tuple[int, int] | None = None

    @property
    def count(self) -> int:
        return self.shape[0] * self.shape[1]

    def sizes(self) -> Tensor:
        return torch.ones(1, dtype=torch.int64).expand(self.count)

    def masks(self, keep: Tensor) -> dict[str, Tensor]:
        """Raises TargetError if the units come in groups and a group does not lose exactly n."""
        mask = self._checked(keep).view(self.shape)
        if self.group is not None:
            n, m = self.group
            wrong = ((~mask).view(self.shape[0], -1, m).sum(dim=-1) != n).nonzero()
            if len(wrong):
                row, place = wrong[0].tolist()
                raise TargetError(f"{self.name}: row {row} does not lose {n} of columns {place * m} .. +{m}.")
        return {self.name: mask}

    def reduce(self, scores: Mapping[str, Tensor], how: Reduction = "sum") -> Tensor:
        return scores[self.name].float().reshape(-1)


@dataclass(frozen=True, eq=False)
class UnitSlice:
    """The rows (axis "out") or columns ("in") of one linear that belong to units.

    linear, shape    its name, and [out, in]
    owners           int64, one per row or column: the unit that it belongs to, -1 if to none
    """

    linear: str
    shape: tuple[int, int]
    axis: Literal["out", "in"]
    owners: Tensor

    def kept(self, keep: Tensor) -> Tensor:
        """bool, one per row or column: false where its unit is removed."""
        owned = self.owners >= 0
        return torch.where(owned, keep[self.owners.clamp(min=0)], True)

    def across(self, kept: Tensor) -> Tensor:
        """A vector along the axis, as a view [out, in]."""
        return (kept[:, None] if self.axis == "out" else kept[None]).expand(self.shape)

    @property
    def other(self) -> int:
        """Entries of one row, or of one column."""
        return self.shape[1] if self.axis == "out" else self.shape[0]


@dataclass(frozen=True, eq=False)
class SliceUnits(UnitMap):
    """Units made of whole rows and columns; a linear stands in one slice only."""

    units: int
    slices: tuple[UnitSlice, ...]

    @property
    def count(self) -> int:
        return self.units

    def sizes(self) -> Tensor:
        sizes = torch.zeros(self.units, dtype=torch.int64)
        for part in self.slices:
            owned = part.owners[part.owners >= 0]
            sizes += torch.bincount(owned, minlength=self.units) * part.other
        return sizes

    def masks(self, keep: Tensor) -> dict[str, Tensor]:
        keep = self._checked(keep)
        return {part.linear: part.across(part.kept(keep)) for part in self.slices}

    def rows(self, keep: Tensor) -> dict[str, Tensor]:
        return {part.linear: part.kept(keep) for part in self.slices if part.axis == "out"}

    def kept_indices(self, keep: Tensor) -> dict[str, Tensor]:
        """Name of each linear -> the rows or columns that stay, int64 ascending: what a smaller linear is made of."""
        keep = self._checked(keep)
        return {part.linear: part.kept(keep).nonzero()[:, 0] for part in self.slices}

    def reduce(self, scores: Mapping[str, Tensor], how: Reduction = "sum") -> Tensor:
        totals = torch.zeros(self.units)
        for part in self.slices:
            own = scores[part.linear].float()
            axis = 1 if part.axis == "out" else 0
            along = own.amax(dim=axis) if how == "max" else own.sum(dim=axis)
            owned = part.owners >= 0
            places = part.owners[owned]
            if how == "max":
                totals = totals.scatter_reduce(0, places, along[owned], "amax")
            else:
                totals = totals.index_add(0, places, along[owned])
        return totals / self.sizes() if how == "mean" else totals


def elements(linear: LinearView) -> EntryUnits:
    """Every entry of a linear."""
    return EntryUnits("element", linear.name, (linear.out_features, linear.in_features))


def n_of_m(linear: LinearView, n: int, m: int) -> EntryUnits:
    """Every entry of a linear, n of every m columns to be removed. Raises TargetError if m does not divide `in`."""
    if linear.in_features % m:
        raise TargetError(
            f"{linear.name} (role {linear.role}): {n}:{m} sparsity wants groups of {m} columns, and {m} does not "
            f"divide {linear.in_features}."
        )
    return EntryUnits("n_of_m", linear.name, (linear.out_features, linear.in_features), (n, m))


def neurons(block: BlockView) -> SliceUnits:
    """The neurons of a block's MLP, gated or not."""
    width = _one(block, "down").in_features
    owners = torch.arange(width)
    rows: dict[Role, Tensor] = {"gate": owners, "up": owners} if block.mlp.gated else {"up": owners}
    return _units("neuron", f"{block.name}.mlp", width, block.mlp.linears, rows, {"down": owners})


def rotary_pairs(block: BlockView) -> SliceUnits:
    """Unit j * (rotary_dim / 2) + p is pair p of KV head j; dimensions that are not rotated belong to no unit.

    Raises TargetError without rotary embedding, and where queries and keys of a head are normalised (Qwen3, Gemma 3):
    the norm ties the dimensions of a head to one another, so a pair cannot go alone.
    """
    attention = block.attention
    if not attention.rotary:
        raise TargetError(f"{block.name}: its attention has no rotary embedding, so there are no rotary pairs.")
    if attention.q_norm is not None or attention.k_norm is not None:
        raise TargetError(f"{block.name}: queries and keys are normalised by head; a rotary pair cannot be removed.")
    half = attention.rotary_dim // 2
    within = torch.full((attention.head_dim,), -1)
    within[: 2 * half] = torch.arange(half).repeat(2)
    keys = _of_heads(within, half, attention.num_kv_heads, 1)
    queries = _of_heads(within, half, attention.num_kv_heads, attention.num_heads // attention.num_kv_heads)
    count = half * attention.num_kv_heads
    return _units("rotary_pair", _attention(block), count, attention.linears, {"q": queries, "k": keys}, {})


def value_directions(block: BlockView) -> SliceUnits:
    """Unit j * head_dim + t is dimension t of the values of KV head j."""
    attention = block.attention
    within, share = torch.arange(attention.head_dim), attention.num_heads // attention.num_kv_heads
    values = _of_heads(within, attention.head_dim, attention.num_kv_heads, 1)
    outputs = _of_heads(within, attention.head_dim, attention.num_kv_heads, share)
    return _units("value_direction", _attention(block), len(values), attention.linears, {"v": values}, {"o": outputs})


def heads(block: BlockView) -> SliceUnits:
    """Unit j is KV head j with its queries, so that the number of queries per KV head stays what it is."""
    attention = block.attention
    within, share = torch.zeros(attention.head_dim, dtype=torch.int64), attention.num_heads // attention.num_kv_heads
    keys = _of_heads(within, 1, attention.num_kv_heads, 1)
    queries = _of_heads(within, 1, attention.num_kv_heads, share)
    rows: dict[Role, Tensor] = {"q": queries, "k": keys, "v": keys}
    return _units("head", _attention(block), attention.num_kv_heads, attention.linears, rows, {"o": queries})


def layer(block: BlockView) -> SliceUnits:
    """One unit: the whole block."""
    slices = tuple(
        UnitSlice(x.name, (x.out_features, x.in_features), "out", torch.zeros(x.out_features, dtype=torch.int64))
        for x in block.linears
    )
    return SliceUnits("layer", block.name, 1, slices)


def _of_heads(within: Tensor, per_head: int, kv_heads: int, share: int) -> Tensor:
    """Owners of all rows of a projection: `within` [head_dim] is the unit in its head, -1 for none; `share` heads in a
    row belong to one KV head."""
    starts = torch.arange(kv_heads)[:, None, None] * per_head
    owners = torch.where(within >= 0, within + starts, -1)
    return owners.expand(kv_heads, share, len(within)).reshape(-1)


def _attention(block: BlockView) -> str:
    return f"{block.name}.attention"


def _one(block: BlockView, role: Role) -> LinearView:
    for linear in block.linears:
        if linear.role == role:
            return linear
    raise TargetError(f"{block.name} has no linear of role '{role}'.")


def _units(
    kind: UnitKind,
    name: str,
    count: int,
    linears: tuple[LinearView, ...],
    rows: Mapping[Role, Tensor],
    columns: Mapping[Role, Tensor],
) -> SliceUnits:
    """Slices of the linears that hold these roles, fused or not. Raises TargetError for a role that none holds."""
    slices, found = [], set()
    for linear in linears:
        shape = (linear.out_features, linear.in_features)
        if linear.role in columns:
            slices.append(UnitSlice(linear.name, shape, "in", columns[linear.role]))
            found.add(linear.role)
            continue
        held = {role: linear.rows.get(role) for role in rows if role in linear.rows or role == linear.role}
        if not held:
            continue
        owners = torch.full((linear.out_features,), -1)
        for role, place in held.items():
            owners[slice(None) if place is None else place] = rows[role]
        slices.append(UnitSlice(linear.name, shape, "out", owners))
        found |= set(held)
    if missing := sorted((set(rows) | set(columns)) - found):
        raise TargetError(f"{name}: no linear of role {', '.join(missing)}, so it has no units of kind '{kind}'.")
    return SliceUnits(kind, name, count, tuple(slices))
