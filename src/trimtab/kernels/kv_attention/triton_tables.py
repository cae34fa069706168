"""What the Triton program reads about runs and lanes: tables of int64, addresses among them, and what to compile for.

    runs    one record per run, its fields in the order of `RUN_FIELDS`
    items   one record per piece of work, in the order of `ITEM_FIELDS`: some tokens of a lane that lie in one run of
            keys and in one of values. Items of a lane are consecutive
    lanes   row, tokens, first item, end of the items, then the KV head of each head, -1 beyond the last
    order   numbers of items, those of one launch side by side

Runs never change, so what is found out about one is kept for as long as it lives.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.kernels.kv_attention.run import EXACT_DTYPES, TILE, Lane, Run, tiles

RUN_FIELDS = (
    *("tokens", "tiles", "exact", "head_stride", "token_stride", "codes", "high_codes", "codebook", "levels", "scale"),
    *("minimum", "group_tokens", "groups", "rank", "token_factors", "channel_factors", "outlier_starts"),
    *("outlier_places", "outlier_values", "first_position", "overrides", "override_tokens", "override_values"),
)
ITEM_FIELDS = ("lane", "key_run", "key_start", "value_run", "value_start", "first", "tokens")
LANE_FIELDS = ("row", "tokens", "first_item", "end_item")

_ALIGNED = ("exact", "codes", "high_codes", "scale", "minimum")  # read 16 bytes at a time


class Main(NamedTuple):
    """How codes stand for numbers: runs of one launch agree in it.

    grouping   of scales and minima: "" none, "tokens", "channels", or "channels of a head" if groups lie within heads
               and are powers of two
    """

    bits: int = 0
    coupled: int = 1
    grouping: str = ""
    group_channels: int = 0
    levels: bool = False
    scale: bool = False
    minimum: bool = False


class Format(NamedTuple):
    """What the program is compiled for, on the side of keys or of values: `main`, and what any of the runs has.

    numbers    dtype of exact runs and of overrides
    outliers   dtype of outliers, "" if there are none
    """

    main: Main
    exact: bool
    numbers: str
    low_rank: bool
    outliers: str
    rope: bool
    overrides: bool


@dataclass(frozen=True)
class _Facts:
    """Of one run: its record, its part of a format, and why the program cannot read it, or None."""

    record: tuple[int, ...]
    format: Format
    device: torch.device
    refusal: str | None


_known: weakref.WeakKeyDictionary[Run, _Facts] = weakref.WeakKeyDictionary()


def facts_of(run: Run) -> _Facts:
    """What is known of a run, worked out once as long as it lives: runs do not change."""
    found = _known.get(run)
    if found is None:
        found = _known[run] = _facts(run)
    return found


def _facts(run: Run) -> _Facts:
    strides = (0, 0) if run.exact is None else run.exact.stride()[:2]
    values = {
        "tokens": run.tokens,
        "tiles": tiles(run.tokens),
        "head_stride": strides[0],
        "token_stride": strides[1],
        "group_tokens": run.group_tokens,
        "groups": -(-run.tokens // run.group_tokens) if run.group_tokens else 0,
        "rank": run.rank,
        "first_position": -1 if run.first_position is None else run.first_position,
        "overrides": 0 if run.override_tokens is None else run.override_tokens.numel(),
    }
    tensors = run.tensors()
    for name in RUN_FIELDS:
        values.setdefault(name, tensors[name].data_ptr() if name in tensors else 0)
    return _Facts(tuple(values[name] for name in RUN_FIELDS), _format(run), run.device, _refusal(run, tensors))


def _format(run: Run) -> Format:
    main = Main()
    if run.exact is None:
        size = run.group_channels
        grouping = "tokens" if run.group_tokens else "channels" if size else ""
        if size and run.head_dim % size == 0 and size & (size - 1) == 0 and run.first_position is None:
            grouping = "channels of a head"
        has = (run.levels is not None, run.scale is not None, run.minimum is not None)
        main = Main(run.bits, run.coupled, grouping, size, *has)
    numbers = run.exact if run.exact is not None else run.override_values
    return Format(
        main=main,
        exact=run.exact is not None,
        numbers="" if numbers is None else _name(numbers),
        low_rank=run.rank > 0,
        outliers="" if run.outlier_values is None else _name(run.outlier_values),
        rope=run.first_position is not None,
        overrides=run.override_tokens is not None,
    )


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _refusal(run: Run, tensors: dict[str, Tensor]) -> str | None:
    if run.hadamard or run.order is not None:
        return "a run is stored rotated (hadamard or order), which the Triton program does not undo"
    for name, tensor in tensors.items():
        if name == "exact":
            if tensor.dtype not in EXACT_DTYPES or tensor.stride(2) != 1:
                return f"exact numbers are {tensor.dtype} with strides {tensor.stride()}"
        elif not tensor.is_contiguous():
            return f"{name} of shape {list(tensor.shape)} is not contiguous"
        if name in _ALIGNED and tensor.data_ptr() % 16:
            return f"{name} does not begin at a multiple of 16 bytes"
    if run.exact is not None and any(stride % 8 for stride in run.exact.stride()[:2]):
        return f"exact numbers have strides {run.exact.stride()}, not multiples of 8"
    return None


class Segment(NamedTuple):
    """Tokens of a lane, from index `first` on, that lie in one run of keys and in one of values."""

    key: Run
    key_start: int
    value: Run
    value_start: int
    first: int
    tokens: int


def segments(lane: Lane) -> Iterator[Segment]:
    """A lane from its oldest token to its newest."""
    keys, values = (iter([run for run in side if run.tokens]) for side in (lane.keys, lane.values))
    key, value = next(keys, None), next(values, None)
    key_start = value_start = first = 0
    while key is not None and value is not None:
        tokens = min(key.tokens - key_start, value.tokens - value_start)
        yield Segment(key, key_start, value, value_start, first, tokens)
        first, key_start, value_start = first + tokens, key_start + tokens, value_start + tokens
        if key_start == key.tokens:
            key, key_start = next(keys, None), 0
        if value_start == value.tokens:
            value, value_start = next(values, None), 0


def refused_lanes(lanes: Sequence[Lane], device: torch.device, rope: bool) -> str | None:
    """Why the program cannot read these runs, or None."""
    for side in ("keys", "values"):
        runs = list(chain.from_iterable(getattr(lane, side) for lane in lanes))
        facts = [facts_of(run) for run in runs]
        for one in facts:
            if one.refusal is not None:
                return f"{side}: {one.refusal}"
            if one.device != device:
                return f"{side} are on {one.device} and query on {device}"
            if one.format.rope and not rope:
                return f"{side} are stored before rotary embedding, and no rope is given"
        for field in ("numbers", "outliers"):
            dtypes = {getattr(one.format, field) for one in facts} - {""}
            if len(dtypes) > 1:
                return f"{side} mix {' and '.join(sorted(dtypes))}"
    for lane in lanes:
        for part in segments(lane):
            for run, start in ((part.key, part.key_start), (part.value, part.value_start)):
                if run.exact is None and start % TILE:
                    return "keys and values are cut within each other's tiles of 32 tokens"
    return None


@dataclass(frozen=True, eq=False)
class Launch:
    """Items whose runs agree in their `Main`: `count` of them from place `first` of `order`."""

    key: Format
    value: Format
    first: int
    count: int


@dataclass(frozen=True, eq=False)
class Tables:
    """What the programs read on the device, all int64: records of runs, items and lanes, and the order of the items."""

    runs: Tensor
    items: Tensor
    lanes: Tensor
    order: Tensor
    launches: tuple[Launch, ...]
    item_count: int
    lane_count: int
    heads: int
    """Most heads of a lane."""


def make_tables(lanes: Sequence[Lane], item_tokens: int, device: torch.device) -> Tables:
    """Tables of lanes to which `refused_lanes` has no objection. Items have `item_tokens` tokens, or fewer."""
    records: list[int] = []
    keys, key_formats = _numbered([lane.keys for lane in lanes], records)
    values, value_formats = _numbered([lane.values for lane in lanes], records)
    items: list[int] = []
    lane_records: list[int] = []
    members: dict[tuple[int, int], list[int]] = {}
    heads = max(len(lane.heads) for lane in lanes)
    count = 0
    for index, lane in enumerate(lanes):
        first_item = count
        for part in segments(lane):
            (key, key_form), (value, value_form) = keys[part.key], values[part.value]
            before = count
            for at in range(0, part.tokens, item_tokens):
                tokens = min(item_tokens, part.tokens - at)
                items += (index, key, part.key_start + at, value, part.value_start + at, part.first + at, tokens)
                count += 1
            members.setdefault((key_form, value_form), []).extend(range(before, count))
        lane_records += (lane.row, lane.tokens, first_item, count, *lane.heads, *[-1] * (heads - len(lane.heads)))

    launches, order = [], []  # type: list[Launch], list[int]
    for (key_form, value_form), own in members.items():
        launches.append(Launch(key_formats[key_form], value_formats[value_form], first=len(order), count=len(own)))
        order += own
    tables = [records, items, lane_records, order]
    for table in tables:
        table += [0] * (len(table) % 2)  # Triton compiles anew for an address that is no multiple of 16
    together = torch.tensor(list(chain.from_iterable(tables)), dtype=torch.int64).to(device)
    runs_table, items_table, lanes_table, order_table = torch.split(together, [len(table) for table in tables])
    return Tables(runs_table, items_table, lanes_table, order_table, tuple(launches), count, len(lanes), heads)


def _numbered(side: Sequence[Sequence[Run]], records: list[int]) -> tuple[dict[Run, tuple[int, int]], list[Format]]:
    """For each run its number and that of its format, and these formats: one for each `Main` of coded runs.

    Exact runs go with the first of the coded ones, so that one launch serves a lane of both. Appends to `records`.
    """
    numbers: dict[Run, tuple[int, int]] = {}
    mains: dict[Main, int] = {}
    formats: set[Format] = set()
    for run in chain.from_iterable(side):
        if run not in numbers:
            facts = facts_of(run)
            form = 0 if facts.format.exact else mains.setdefault(facts.format.main, len(mains))
            numbers[run] = len(records) // len(RUN_FIELDS), form
            records.extend(facts.record)
            formats.add(facts.format)
    return numbers, [_joined(main, formats) for main in mains or (Main(),)]


def _joined(main: Main, formats: set[Format]) -> Format:
    """`main`, and what any run has."""
    return Format(
        main=main,
        exact=any(one.exact for one in formats),
        numbers=max(one.numbers for one in formats),
        low_rank=any(one.low_rank for one in formats),
        outliers=max(one.outliers for one in formats),
        rope=any(one.rope for one in formats),
        overrides=any(one.overrides for one in formats),
    )
