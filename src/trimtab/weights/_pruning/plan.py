"""What was decided: for each set of units, which are kept. A table that is stored, compared, merged, applied again.

A plan names linears and blocks, and holds no weights. Kept units stay kept units: applying a plan twice is applying it
once, and `merge` is what applying both would leave.

On disk a plan is one safetensors file: a bit for each unit, packed as a row of a bitmap, and the table as JSON
in the header.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.core.errors import CheckpointError, CompositionError, TargetError
from trimtab.core.files import atomic_file
from trimtab.kernels.sparse_matmul.bitmap import pack_bits, unpack_bits, words
from trimtab.models.info import info_of
from trimtab.models.views import LinearView, ModelView
from trimtab.tensors.support import SupportPart
from trimtab.weights._pruning.units import UnitKind, UnitMap

PLAN_VERSION = 1
RECORDED = "kept_units"
"""The metric of a run record that holds `Plan.rows` of what was sliced."""

Key = tuple[str, UnitKind]


@dataclass(frozen=True, eq=False)
class PlanEntry:
    """keep: bool [units], true where a unit stays. name and kind are those of the UnitMap that it is about."""

    name: str
    kind: UnitKind
    keep: Tensor

    @classmethod
    def of(cls, units: UnitMap, keep: Tensor) -> PlanEntry:
        return cls(units.name, units.kind, units._checked(keep).cpu())

    @property
    def key(self) -> Key:
        return self.name, self.kind

    @property
    def kept(self) -> int:
        return int(self.keep.sum())

    @property
    def units(self) -> int:
        return int(self.keep.numel())


@dataclass(frozen=True, slots=True)
class PlanDifference:
    """Of one entry: units that only the first plan keeps, that only the second does, and that both keep. Where a plan
    has no such entry, it keeps all."""

    name: str
    kind: UnitKind
    only_first: int
    only_second: int
    both: int


@dataclass(frozen=True, eq=False)
class Plan:
    """Entries in the order of the model; no two are of one name and kind.

    budget    what was asked for, for people: {"sparsity": "2:4", "within": "row"}, say; JSON values

    Raises CompositionError if an entry comes twice.
    """

    entries: tuple[PlanEntry, ...]
    budget: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        keys = [entry.key for entry in self.entries]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise CompositionError(f"a plan has two entries of {twice[0][1]} units in {twice[0][0]}; merge plans.")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan) or [e.key for e in self.entries] != [e.key for e in other.entries]:
            return False
        return all(torch.equal(a.keep, b.keep) for a, b in zip(self.entries, other.entries, strict=True))

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def of_model(cls, model: PreTrainedModel) -> Plan:
        """What was removed of a model: of linears that are stored without zeros, entry by entry; of what was sliced,
        the units that its record says were kept. Raises CheckpointError for a record that cannot be read."""
        info = info_of(model)
        rows = [] if info.record is None else info.record.metrics.get(RECORDED, [])
        try:
            entries = list(cls.of_rows(rows).entries)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{info.source}: the plan in its record cannot be read ({error}).") from None
        for linear in ModelView.of(model).linears:
            parts = linear.compressed.tensor.parts if linear.compressed else ()
            if len(parts) == 1 and isinstance(parts[0], SupportPart):
                entries.append(PlanEntry(linear.name, "element", parts[0].mask().reshape(-1).cpu()))
        return cls(tuple(entries))

    def table(self) -> list[dict[str, Any]]:
        """One row per entry, JSON values: name, kind, units, kept, kept_fraction."""
        return [
            {
                "name": entry.name,
                "kind": entry.kind,
                "units": entry.units,
                "kept": entry.kept,
                "kept_fraction": entry.kept / entry.units,
            }
            for entry in self.entries
        ]

    def rows(self) -> list[dict[str, Any]]:
        """`table`, each row with the kept units themselves, "keep": the bits of `save` in base64; for run records."""
        bits = (pack_bits(entry.keep[None])[0].numpy().tobytes() for entry in self.entries)
        return [{**row, "keep": base64.b64encode(b).decode()} for row, b in zip(self.table(), bits, strict=True)]

    @classmethod
    def of_rows(cls, rows: Sequence[Mapping[str, Any]]) -> Plan:
        """What `rows` wrote. Raises KeyError, TypeError or ValueError for rows that are not its."""
        return cls(tuple(_entry(row, _bits(row["keep"])) for row in rows))

    def merge(self, other: Plan) -> Plan:
        """What both keep. Raises CompositionError if they count the units of an entry differently."""
        merged = {entry.key: entry for entry in self.entries}
        for entry in other.entries:
            own = merged.get(entry.key)
            merged[entry.key] = entry if own is None else PlanEntry(*entry.key, _both(own, entry))
        return Plan(tuple(merged.values()), {**self.budget, **other.budget})

    def followed_by(self, other: Plan) -> Plan:
        """What is kept of the original's units after `other` was made for what this plan left of them.

        Raises CompositionError if an entry of `other` has another number of units than this one kept.
        """
        entries = {entry.key: entry for entry in self.entries}
        for entry in other.entries:
            if (own := entries.get(entry.key)) is None:
                entries[entry.key] = entry
                continue
            if own.kept != entry.units:
                raise CompositionError(
                    f"a plan keeps {own.kept} {own.kind} units of {own.name}, and the next one is about {entry.units}."
                )
            keep = own.keep.clone()
            keep[own.keep] = entry.keep
            entries[entry.key] = PlanEntry(*entry.key, keep)
        return Plan(tuple(entries.values()), {**self.budget, **other.budget})

    def diff(self, other: Plan) -> tuple[PlanDifference, ...]:
        """Where the plans differ, in this plan's order and then the other's; empty if they keep the same units."""
        first, second = ({entry.key: entry for entry in plan.entries} for plan in (self, other))
        found = []
        for key in [*first, *(key for key in second if key not in first)]:
            either = first.get(key) or second[key]
            everything = PlanEntry(*key, torch.ones_like(either.keep))
            a, b = first.get(key, everything), second.get(key, everything)
            both = int(_both(a, b).sum())
            if not a.kept == b.kept == both:
                found.append(PlanDifference(*key, a.kept - both, b.kept - both, both))
        return tuple(found)

    def masks(self, maps: Iterable[UnitMap]) -> dict[str, Tensor]:
        """Name of each linear -> bool [out, in], false where an entry removes; `maps` are those that entries are about.

        Raises TargetError if an entry has no map, or one with another number of units.
        """
        return _together(units.masks(entry.keep) for entry, units in self._matched(maps))

    def _matched(self, maps: Iterable[UnitMap]) -> Iterator[tuple[PlanEntry, UnitMap]]:
        known = {(units.name, units.kind): units for units in maps}
        for entry in self.entries:
            if entry.key not in known:
                raise TargetError(
                    f"the plan has {entry.kind} units of {entry.name}, which the model does not have. It was made for "
                    "another model."
                )
            yield entry, known[entry.key]

    def zero(self, linears: Sequence[LinearView], maps: Iterable[UnitMap]) -> None:
        """Set what the plan removes to zero, in place, in dense linears; biases of removed rows with them.

        Raises TargetError as `masks` does, for a linear that is missing, and for one that is compressed already.
        """
        by_name = {linear.name: linear for linear in linears}
        maps = tuple(maps)
        masks = self.masks(maps)
        rows = _together(units.rows(entry.keep) for entry, units in self._matched(maps))
        for name in masks:
            if name not in by_name:
                raise TargetError(f"the plan removes entries of {name}, which is not among the linears given.")
            by_name[name].weight  # noqa: B018 - raises if it is compressed, before anything changes
        for name, mask in masks.items():
            weight, bias = by_name[name].weight, by_name[name].bias
            weight.masked_fill_(~mask.to(weight.device), 0.0)
            if bias is not None and name in rows:
                bias.masked_fill_(~rows[name].to(bias.device), 0.0)

    def save(self, path: str | Path) -> None:
        """Write one file, atomically. Raises OutputError."""
        rows = [{**row, "tensor": f"{row['kind']}:{row['name']}"} for row in self.table()]
        tensors = {row["tensor"]: pack_bits(e.keep[None])[0] for row, e in zip(rows, self.entries, strict=True)}
        header = {
            "trimtab_plan": str(PLAN_VERSION),
            "table": json.dumps(rows),
            "budget": json.dumps(dict(self.budget), sort_keys=True),
        }
        with atomic_file(Path(path), also=(SafetensorError,)) as partial:
            save_file(tensors, partial, metadata=header)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read what `save` wrote. Raises CheckpointError if it is missing, damaged, no plan, or of a newer version."""
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                if header.get("trimtab_plan") != str(PLAN_VERSION):
                    found = header.get("trimtab_plan")
                    raise CheckpointError(f"{path} is not a plan of version {PLAN_VERSION} (found {found}).")
                entries = tuple(_entry(row, file.get_tensor(row["tensor"])) for row in json.loads(header["table"]))
                return cls(entries, json.loads(header["budget"]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, CompositionError) as error:
            raise CheckpointError(f"plan {path} cannot be read: {error}") from None


def _bits(text: str) -> Tensor:
    data = bytearray(base64.b64decode(text, validate=True))
    return torch.frombuffer(data, dtype=torch.int64) if data else torch.empty(0, dtype=torch.int64)


def _entry(row: Mapping[str, Any], bits: Tensor) -> PlanEntry:
    units = int(row["units"])
    if row["kind"] not in get_args(UnitKind) or bits.dtype != torch.int64 or tuple(bits.shape) != (words(units),):
        raise ValueError(f"entry {row['name']!r} of kind {row['kind']!r} does not fit its bits.")
    entry = PlanEntry(str(row["name"]), row["kind"], unpack_bits(bits[None], units)[0])
    if entry.kept != row["kept"]:
        raise ValueError(f"entry {row['name']!r} keeps {entry.kept} units, its table says {row['kept']}.")
    return entry


def _together(masks: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What all keep, by name."""
    found: dict[str, Tensor] = {}
    for own in masks:
        for name, mask in own.items():
            found[name] = mask & found[name] if name in found else mask
    return found


def _both(first: PlanEntry, second: PlanEntry) -> Tensor:
    if first.units != second.units:
        raise CompositionError(
            f"the plans count {first.units} and {second.units} {first.kind} units in {first.name}: they are of "
            "different models."
        )
    return first.keep & second.keep
