"""Caches with a budget for each head: the ends of the range, each head's own bytes, and where the classes come from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.cache import Exact, HeadScores, RetrievalHeads, Streaming, detect_heads
from trimtab.cache._retrieval import detection
from trimtab.cache._retrieval.budgets import full_heads
from trimtab.cache._retrieval.scores import TrialScore, head_layout
from trimtab.cache._retrieval.trials import Trial
from trimtab.core.errors import ConfigError
from trimtab.models import info_of, load, tokenizer_of
from trimtab.models.segments import SegmentCache

from .conftest import feed, fitted, tiny, tokens

SINKS, RECENT, HEAD_DIM = 4, 28, 32
pytestmark = pytest.mark.usefixtures("no_gradients")


def budget(model: PreTrainedModel, fraction: float, bits: Literal[0, 2] = 0) -> SegmentCache:
    method = RetrievalHeads(full_fraction=fraction, sinks=SINKS, recent=RECENT, bits=bits)
    return fitted(model, method).new(model)


@pytest.mark.parametrize("source", ["tiny", "ref-mini"])
def test_with_all_heads_full_it_is_the_exact_cache_bit_for_bit(source: str) -> None:
    model = tiny() if source == "tiny" else load(source, dtype=torch.float32)
    ids, sizes = tokens(2, 400), [300, 90, *[1] * 10]
    found = feed(model, budget(model, 1.0), ids, sizes)
    assert torch.equal(found, feed(model, Exact().new(model), ids, sizes))


def with_window(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits where all heads of all layers see the sinks, the last tokens and their own, at positions of the text."""
    query, key = torch.arange(ids.shape[1])[:, None], torch.arange(ids.shape[1])
    seen = (key <= query) & ((key < SINKS) | (query - key <= RECENT))
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
    logits: Tensor = model(ids, attention_mask=mask, use_cache=False).logits
    model.set_attn_implementation(before)
    return logits


@pytest.mark.parametrize("source", ["tiny", "ref-mini"])
def test_with_no_head_full_it_is_streaming_at_positions_of_the_text(source: str) -> None:
    model = tiny() if source == "tiny" else load(source, dtype=torch.float32)
    ids = tokens(1, 60)
    wanted = with_window(model, ids)
    found = feed(model, budget(model, 0.0), ids, [1] * 60)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    moved = feed(model, Streaming(sinks=SINKS, window=RECENT).new(model), ids, [1] * 60)
    torch.testing.assert_close(moved[:, : SINKS + RECENT], wanted[:, : SINKS + RECENT], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(moved, wanted, atol=1e-2)


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_tokens_that_each_head_holds(fraction: float, dtype: torch.dtype) -> None:
    """Up to the room that a buffer keeps; a dense cache with a mask would take the bytes of the exact one."""
    model, length = tiny(dtype=dtype), 480
    cache, exact = budget(model, fraction), Exact().new(model)
    for each in (cache, exact):
        feed(model, each, tokens(1, length), [length - 20, *[1] * 20])
    full = round(4 * fraction)
    held = {
        (layer.index, head): group.tokens(0)
        for layer in cache.segment_layers
        for group in layer.groups
        for head in group.plan.heads
    }
    assert sorted(held.values()) == [SINKS + RECENT] * (4 - full) + [length] * full
    per_token = 2 * HEAD_DIM * dtype.itemsize
    stored = per_token * sum(held.values())
    room = per_token * (full * 256 + (4 - full) * 64)
    assert stored <= cache.nbytes() <= stored + room
    assert exact.nbytes() >= per_token * 4 * length
    if fraction < 1:
        assert cache.nbytes() < exact.nbytes() * (fraction + (1 - fraction) * 0.25)


def test_bits_are_those_of_the_full_heads() -> None:
    model = tiny()
    sizes = {}
    choices: tuple[Literal[0, 2], ...] = (0, 2)
    for bits in choices:
        cache = budget(model, 0.5, bits=bits)
        feed(model, cache, tokens(1, 480), [480])
        sizes[bits] = cache.nbytes()
        windows = [g for layer in cache.segment_layers for g in layer.groups if g.plan.recent is not None]
        assert len(windows) >= 1
        assert all(getattr(side.plan.codec, "bits", None) == 0 for group in windows for side in group.sides)
    assert sizes[2] < sizes[0] / 1.5


def scores_of(model: PreTrainedModel, *copies: tuple[int, int, int]) -> HeadScores:
    layout = head_layout(model)
    trial = TrialScore(length=100, depth=0.5, span=4, answered=True, copies=copies)
    return HeadScores(
        model="toy",
        fingerprint=layout.fingerprint,
        layers=layout.layers,
        heads=layout.heads,
        kv_heads=layout.kv_heads,
        threshold=0.1,
        trials=(trial,),
    )


def test_classes_come_from_the_file(tmp_path: Path) -> None:
    model, path = tiny(), str(tmp_path / "scores.json")
    other = tiny(num_hidden_layers=3)
    for each in (model, other):
        info_of(each).tokenizer = tokenizer_of(load("ref-mini"))
    scores = scores_of(model, (0, 0, 1), (1, 3, 4))  # query head 3 reads KV head 1
    scores.save(path)
    cache = RetrievalHeads(full_fraction=0.25, scores=path).new(model)
    full = [
        (layer.index, head)
        for layer in cache.segment_layers
        for plan in layer.plan
        if plan.recent is None
        for head in plan.heads
    ]
    assert full == [(1, 1)]
    assert full_heads(scores.kv_scores, 0.25).nonzero().tolist() == [[1, 1]]
    with pytest.raises(ConfigError, match="Detect the heads of this model"):
        RetrievalHeads(scores=path).new(other)


def test_a_first_use_runs_few_and_short_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("ref-mini", dtype=torch.float32)
    seen: list[Trial] = []
    model.config.max_position_embeddings = 131_072

    def detect(model: PreTrainedModel, trials: Sequence[Trial], **_: Any) -> HeadScores:
        seen.extend(trials)
        return scores_of(model)

    monkeypatch.setattr(detection, "detect", detect)
    RetrievalHeads().new(model)
    assert len(seen) == 30
    assert max(trial.length for trial in seen) == 4032


def test_detection_of_a_model_that_copies() -> None:
    """ref-mini has one KV head per layer, and answers short trials."""
    found = detect_heads(load("ref-mini", dtype=torch.float32), lengths=(160, 240), depths=(0.0, 0.5), repeats=2)
    assert len(found.trials) == 8
    assert found.retrieval_heads
    assert found.scores.max() > 0.5
