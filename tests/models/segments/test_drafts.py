"""Drafts: trees, paths, roll-back; what is taken back leaves no trace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trimtab.core.errors import CompositionError, DataError
from trimtab.models.random import random_model
from trimtab.models.segments import SegmentCache

from .plans import content, feed, new_cache, same, tokens

PARENTS = [-1, 0, 0, 1, 1, 2, 3]
"""A tree of drafted tokens: token i follows token PARENTS[i], -1 the text."""
DEPTHS = [0, 1, 1, 2, 2, 2, 3]
LEAVES = {4: [0, 1, 4], 5: [0, 2, 5], 6: [0, 1, 3, 6]}


def tree_mask(held: int, rows: int) -> Tensor:
    seen = torch.zeros((len(PARENTS), len(PARENTS)), dtype=torch.bool)
    for token in range(len(PARENTS)):
        ancestor = token
        while ancestor >= 0:
            seen[token, ancestor] = True
            ancestor = PARENTS[ancestor]
    mask = torch.cat([torch.ones((len(PARENTS), held), dtype=torch.bool), seen], dim=1)
    return mask.expand(rows, 1, -1, -1)


@pytest.mark.parametrize(
    ("plan", "family", "pre_rope"),
    [
        *[(p, f, r) for p in ("exact", "kivi") for f in ("llama", "gemma2") for r in {f == "gemma2", True}],
        *[(p, "gpt2", False) for p in ("exact", "kivi")],
        ("streaming", "llama", False),
        ("streaming", "gemma2", False),
    ],
)
@pytest.mark.parametrize("steps", [1, 2])
def test_a_tree_is_its_paths(plan: str, family: str, pre_rope: bool, steps: int) -> None:
    model, prompt, draft = random_model(family), tokens(2, 45), tokens(2, len(PARENTS), seed=2)
    cache = new_cache(model, plan, **({} if plan == "streaming" else {"pre_rope": pre_rope}))
    feed(model, cache, prompt, [40, 5])
    alone = {leaf: cache.fork() for leaf in LEAVES}
    mask, positions = tree_mask(45, 2), torch.tensor(DEPTHS)[None] + 45
    window = model.config.get_text_config().sliding_window if family == "gemma2" else None
    cache.begin()
    parts = []
    for begin, end in [(0, 7)] if steps == 1 else [(0, 3), (3, 7)]:
        shown = mask[:, :, begin:end, : 45 + end].clone()
        parts.append(
            model(
                draft[:, begin:end], past_key_values=cache, attention_mask=shown, position_ids=positions[:, begin:end]
            ).logits
        )
    found = torch.cat(parts, dim=1)
    assert window is None or window < 45
    for leaf, path in LEAVES.items():
        wanted = feed(model, alone[leaf], draft[:, path], [len(path)])
        torch.testing.assert_close(found[:, path], wanted, atol=2e-5, rtol=1e-4)
    cache.commit([LEAVES[6]] * 2)
    assert cache.get_seq_length() == 49
    after, following = tokens(2, 40, seed=3), alone[6]
    torch.testing.assert_close(
        feed(model, cache, after, [3, 1, 36]), feed(model, following, after, [3, 1, 36]), atol=2e-5, rtol=1e-4
    )


def test_paths_of_different_length() -> None:
    model, draft = random_model("llama"), tokens(2, len(PARENTS), seed=2)
    cache = new_cache(model, pre_rope=True)
    feed(model, cache, tokens(2, 20), [20])
    cache.begin()
    positions = torch.tensor(DEPTHS)[None] + 20
    model(draft, past_key_values=cache, attention_mask=tree_mask(20, 2), position_ids=positions)
    cache.commit([LEAVES[6], LEAVES[5]])
    assert cache.segment_layers[0].lengths == [24, 23]
    after = tokens(2, 4, seed=3)
    found = model(after, past_key_values=cache, position_ids=torch.tensor([[24], [23]]) + torch.arange(4)).logits
    for row, path in enumerate((LEAVES[6], LEAVES[5])):
        text = torch.cat([tokens(2, 20)[row], draft[row, path], after[row]])[None]
        wanted = model(text, use_cache=False).logits[:, -4:]
        torch.testing.assert_close(found[row : row + 1], wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("plan", ["exact", "kivi", "streaming"])
@pytest.mark.parametrize("held", [0, 5, 60])
def test_rollback_leaves_no_trace(plan: str, held: int) -> None:
    model, after = random_model("llama"), tokens(2, 60, seed=3)
    cache, other = new_cache(model, plan), new_cache(model, plan)
    for each in (cache, other):
        if held:
            feed(model, each, tokens(2, held), [held])
    runs = [run for layer in cache.segment_layers for g in layer.groups for s in g.sides for r in s.runs for run in r]
    cache.begin()
    feed(model, cache, tokens(2, 40, seed=2), [20, 1, 19])
    cache.rollback()
    assert cache.get_seq_length() == held
    left = [run for layer in cache.segment_layers for g in layer.groups for s in g.sides for r in s.runs for run in r]
    assert all(a is b for a, b in zip(runs, left, strict=True))
    assert torch.equal(feed(model, cache, after, [30, 1, 29]), feed(model, other, after, [30, 1, 29]))


def test_commit_all_is_feeding() -> None:
    model = random_model("llama")
    for plan in ("exact", "kivi", "streaming"):
        cache, other = new_cache(model, plan), new_cache(model, plan)
        cache.begin()
        feed(model, cache, tokens(1, 70), [70])
        cache.commit()
        feed(model, other, tokens(1, 70), [70])
        torch.testing.assert_close(
            feed(model, cache, tokens(1, 9, seed=4), [9]), feed(model, other, tokens(1, 9, seed=4), [9])
        )


def test_padding_in_drafts() -> None:
    """Columns of padding are counted by paths, and cannot be kept."""
    model, ids = random_model("llama"), tokens(2, 30)
    cache = new_cache(model)
    mask = torch.ones((2, 30), dtype=torch.long)
    mask[1, 24:27] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    feed(model, cache, ids[:, :20], [20])
    cache.begin()
    more = {"attention_mask": mask, "position_ids": positions[:, 20:]}
    found = feed(model, cache, ids[:, 20:], [3, 4, 3], **more)
    wanted = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, 20:]
    shown = mask[:, 20:].bool()
    torch.testing.assert_close(found[shown], wanted[shown], atol=2e-5, rtol=1e-4)
    with pytest.raises(DataError, match="padding in row 1"):
        cache.commit(torch.arange(6))
    assert cache.in_transaction
    cache.commit([[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 7, 8]])
    assert cache.segment_layers[0].lengths == [28, 26]


def test_forks_are_independent() -> None:
    model = random_model("gemma2")
    cache = new_cache(model, "kivi")
    feed(model, cache, tokens(2, 70), [70])
    before, copy, deep = content_of(cache), cache.fork(), cache.__deepcopy__({})
    feed(model, copy, tokens(2, 50, seed=2), [20, 30])
    assert same(content_of(cache), before)
    assert same(content_of(deep), before)
    snapshot = cache.snapshot()
    feed(model, cache, tokens(2, 50, seed=5), [50])
    cache.restore(snapshot)
    assert same(content_of(cache), before)
    wanted = feed(model, deep, tokens(2, 9, seed=6), [9])
    assert torch.equal(feed(model, cache, tokens(2, 9, seed=6), [9]), wanted)
    shared = {id(run) for run in deep.segment_layers[0].groups[0].keys.runs[0]}
    assert shared & {id(run) for run in cache.segment_layers[0].groups[0].keys.runs[0]}


def content_of(cache: SegmentCache) -> list[tuple[Tensor, Tensor]]:
    return [(k.clone(), v.clone()) for k, v in content(cache)]


def test_reorder_within_a_draft_and_of_a_bias() -> None:
    model = random_model("llama")
    cache = new_cache(model, pre_rope=True)
    feed(model, cache, tokens(2, 20), [20])
    cache.key_bias = {0: torch.randn(2, 4, 20), 1: torch.randn(2, 4, 20)}
    other = cache.fork()
    cache.begin()
    feed(model, cache, tokens(2, 4, seed=2), [4])
    cache.reorder([1, 1, 0])
    cache.commit(torch.tensor([0, 1]))
    other.reorder([1, 1, 0])
    feed(model, other, tokens(2, 4, seed=2)[[1, 1, 0], :2], [2])
    after = tokens(3, 5, seed=3)
    torch.testing.assert_close(feed(model, cache, after, [1, 4]), feed(model, other, after, [1, 4]))


def test_crop_is_refused_whole_or_done_whole() -> None:
    model = random_model("llama")
    cache = new_cache(model, "kivi")
    feed(model, cache, tokens(1, 70), [70])
    before = content_of(cache)
    with pytest.raises(CompositionError, match="cannot be removed"):
        cache.crop(-20)
    assert same(content_of(cache), before)
    cache.crop(-5)
    assert cache.get_seq_length() == 65
    other = new_cache(model, "kivi")
    feed(model, other, tokens(1, 65), [65])
    for (k, v), (other_k, other_v) in zip(content(cache), content(other), strict=True):
        torch.testing.assert_close(k, other_k)
        torch.testing.assert_close(v, other_v)
