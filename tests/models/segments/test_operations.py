"""Any sequence of operations holds what lists of tokens would hold, and encoded runs never change."""

from __future__ import annotations

import functools
import hashlib
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab.core.errors import CompositionError
from trimtab.kernels.kv_attention import Run
from trimtab.models.random import random_model
from trimtab.models.segments import SegmentCache

from .plans import exact, feed, kivi, new_cache, same, tokens

Row = list[Tensor]
"""Tokens of a row, each [2 (key, value), Hk, d]."""


@functools.cache
def model() -> torch.nn.Module:
    return random_model("llama", num_hidden_layers=1, head_dim=8, max_position_embeddings=100_000)


def make(plan: str) -> SegmentCache:
    return SegmentCache(model(), {"exact": exact, "kivi": kivi}[plan](model()))


class Mirror:
    """The cache under test, and beside it what it should hold."""

    def __init__(self, plan: str, rows: int) -> None:
        self.plan, self.cache = plan, make(plan)
        self.rows: list[Row] = [[] for _ in range(rows)]
        self.draft: list[list[Tensor | None]] | None = None
        self.seen: dict[int, tuple[Run, str]] = {}

    @property
    def layer(self):  # type: ignore[no-untyped-def]
        return self.cache.segment_layers[0]

    def append(self, length: int, seed: int, padded: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        new = torch.randn((2, len(self.rows), 2, length, 8), generator=generator)
        valid = torch.ones((len(self.rows), length), dtype=torch.bool)
        if padded:
            valid = torch.rand((len(self.rows), length), generator=generator) > 0.3
        columns = self.layer.length + length
        mask = torch.ones((len(self.rows), 1, length, columns), dtype=torch.bool).tril(columns - length)
        mask[..., -length:] &= valid[:, None, None]
        query = torch.randn((len(self.rows), 4, length, 8), generator=generator)
        self.layer.update(new[0], new[1])
        out = self.layer.attend(query, mask if padded else None, None, 0.35, None, None)
        assert torch.isfinite(out).all()
        for row in range(len(self.rows)):
            for index in range(length):
                token = new[:, row, :, index] if valid[row, index] else None
                if self.draft is not None:
                    self.draft[row].append(token)
                elif token is not None:
                    self.rows[row].append(token)

    def finish(self, data: st.DataObject) -> None:
        assert self.draft is not None
        drafted, self.draft = self.draft, None
        how = data.draw(st.sampled_from(["rollback", "all", "path"]))
        if how == "rollback":
            self.cache.rollback()
            return
        paths = [[i for i, token in enumerate(own) if token is not None] for own in drafted]
        if how == "path":
            paths = [data.draw(st.lists(st.sampled_from(p), unique=True)) if p else [] for p in paths]
        self.cache.commit(paths if how == "path" else None)
        for row, path in enumerate(paths):
            self.rows[row] += [token for i in path if (token := drafted[row][i]) is not None]

    def check(self) -> None:
        if not self.layer.rows:
            return
        for row, own in enumerate(self.rows):
            assert self.layer.lengths[row] == self.layer.groups[0].tokens(row) == len(own)
            if own:
                keys, values = self.layer._dense(row)
                wanted = replayed(self.plan, own)
                assert torch.equal(keys, wanted[0])
                assert torch.equal(values, wanted[1])
        for side in self.layer.groups[0].sides:
            for run in (run for runs in side.runs for run in runs):
                kept, digest = self.seen.setdefault(id(run), (run, fingerprint(run)))
                assert kept is run
                assert digest == fingerprint(run)


def fingerprint(run: Run) -> str:
    digest = hashlib.sha256(repr(run.spec()).encode())
    for name, tensor in sorted(run.tensors().items()):
        digest.update(f"{name} {tensor.data_ptr()}".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def replayed(plan: str, own: Row) -> tuple[Tensor, Tensor]:
    """Keys and values of the same tokens given one row alone, in one piece."""
    whole = torch.stack(own, dim=2)
    if plan == "exact":
        return whole[0], whole[1]
    layer = make(plan).segment_layers[0]
    layer.update(whole[None, 0], whole[None, 1])
    layer.attend(torch.zeros((1, 4, len(own), 8)), None, None, 0.35, None, None)
    keys, values = layer._dense(0)
    return keys, values


@pytest.mark.parametrize("plan", ["exact", "kivi"])
@given(data=st.data())
@settings(max_examples=25)
def test_operations(plan: str, data: st.DataObject) -> None:
    mirror = Mirror(plan, data.draw(st.integers(1, 3)))
    snapshot: tuple[SegmentCache, list[Row]] | None = None
    with torch.no_grad():
        for _ in range(data.draw(st.integers(1, 10))):
            choices = ["append", "append", "reorder"]
            choices += ["finish"] if mirror.draft is not None else ["begin", "fork", "snapshot", "restore", "crop"]
            operation = data.draw(st.sampled_from(choices))
            if operation == "append":
                mirror.append(data.draw(st.integers(1, 40)), data.draw(st.integers(0, 99)), data.draw(st.booleans()))
            elif operation == "begin":
                mirror.cache.begin()
                mirror.draft = [[] for _ in mirror.rows]
            elif operation == "finish":
                mirror.finish(data)
            elif operation == "reorder" and mirror.layer.rows:
                rows = data.draw(st.lists(st.integers(0, len(mirror.rows) - 1), min_size=1, max_size=3))
                mirror.cache.reorder(rows)
                mirror.rows = [list(mirror.rows[row]) for row in rows]
                mirror.draft = None if mirror.draft is None else [list(mirror.draft[row]) for row in rows]
            elif operation == "fork":
                old, before = mirror.cache, [list(own) for own in mirror.rows]
                mirror.cache = old.fork()
                mirror.append(30, 7, False)
                forked, mirror.cache, after = mirror.cache, old, mirror.rows
                mirror.rows = before
                mirror.check()
                mirror.cache, mirror.rows = forked, after
            elif operation == "snapshot":
                snapshot = mirror.cache.snapshot(), [list(own) for own in mirror.rows]
            elif operation == "restore" and snapshot is not None and snapshot[0].plan is mirror.cache.plan:
                mirror.cache.restore(snapshot[0])
                mirror.rows = [list(own) for own in snapshot[1]]
            elif operation == "crop" and mirror.layer.rows:
                count = data.draw(st.integers(0, 6))
                held = [[*own] for own in mirror.rows]
                try:
                    mirror.cache.crop(-count)
                    mirror.rows = [own[: max(0, len(own) - count)] for own in held]
                except CompositionError:
                    assert plan == "kivi"
            if mirror.draft is None:
                mirror.check()


@settings(max_examples=25)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.booleans())
def test_any_split_of_a_text_gives_the_same_codes(sizes: list[int], pre_rope: bool) -> None:
    """Padding in between included."""
    text = torch.randn((2, 1, 2, sum(sizes), 8), generator=torch.Generator().manual_seed(3))
    held = []
    for split, padded in ((sizes, False), ([sum(sizes)], False), (sizes, True)):
        cache = SegmentCache(model(), kivi(model(), pre_rope=pre_rope))
        layer, begin = cache.segment_layers[0], 0
        with torch.no_grad():
            for size in split:
                pad = 3 if padded else 0
                part = torch.nn.functional.pad(text[..., begin : begin + size, :], (0, 0, pad, 0), value=torch.nan)
                mask = None
                if padded:
                    mask = torch.ones((1, 1, size + pad, layer.length + size + pad), dtype=torch.bool)
                    mask[..., layer.length : layer.length + pad] = False
                layer.update(part[0], part[1])
                query = torch.zeros((1, 4, size + pad, 8))
                positions = (torch.arange(-pad, size) + begin).clamp(min=0)[None]
                layer.attend(query, mask, positions, 0.35, None, None)
                begin += size
        held.append([[*codes(side.runs[0]), side.window(0)] for side in layer.groups[0].sides])
    for other in held[1:]:
        for mine, theirs in zip(held[0], other, strict=True):
            assert len(mine) == len(theirs)
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def codes(runs: list[Run]) -> list[Tensor]:
    """Codes, scales and minima of all runs together; keys [H, groups, d], values [groups, tokens]."""
    if not runs:
        return []
    along = 1
    parameters = [torch.cat([getattr(run, name) for run in runs], dim=along) for name in ("scale", "minimum")]
    return [torch.cat([run.codes for run in runs if run.codes is not None], dim=1), *parameters]


def storage_bytes(cache: SegmentCache) -> int:
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in cache.tensors() if t.numel()}
    return sum(found.values())


@pytest.mark.parametrize("plan", ["exact", "kivi"])
def test_bytes_are_those_of_storages_and_grow_by_blocks(plan: str) -> None:
    big = random_model("llama", num_hidden_layers=1, max_position_embeddings=1000)
    cache = new_cache(big, plan)
    with torch.no_grad():
        feed(big, cache, tokens(1, 100), [100])
        sizes, runs = [], []
        for _ in range(120):
            feed(big, cache, tokens(1, 1), [1])
            assert cache.nbytes() == storage_bytes(cache) == sum(cache.bytes_by_part().values())
            sizes.append(cache.nbytes())
            runs.append([run for side in cache.segment_layers[0].groups[0].sides for run in side.runs[0]])
    changes = sum(a != b for a, b in itertools.pairwise(sizes))
    assert changes <= 120 // 16 + 2
    assert all(run in runs[-1] for run in runs[0])


def test_sliding_windows_forget() -> None:
    """Memory is bounded, after a long prompt too; what is seen is all there."""
    big = random_model("mistral", max_position_embeddings=1000)
    for plan in ("exact", "kivi"):
        cache = new_cache(big, plan)
        with torch.no_grad():
            feed(big, cache, tokens(1, 300), [300])
            assert cache.tokens < 24 + 3 * 32
            sizes = []
            for _ in range(120):
                feed(big, cache, tokens(1, 1), [1])
                sizes.append(cache.nbytes())
            assert max(sizes[60:]) <= max(sizes[:60])
            assert cache.tokens < 24 + 3 * 32


def test_reset_and_determinism() -> None:
    llama = random_model("llama")
    cache = new_cache(llama, "kivi")
    with torch.no_grad():
        first = feed(llama, cache, tokens(2, 100), [60, 1, 39])
        held = [layer._dense(0) for layer in cache.segment_layers]
        cache.reset()
        second = feed(llama, cache, tokens(2, 100), [60, 1, 39])
    assert torch.equal(first, second)
    assert same(held, [layer._dense(0) for layer in cache.segment_layers])
