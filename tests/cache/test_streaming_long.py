"""Streaming over long texts: what is kept decides alone, bytes stay, and a planted sink breaks without its token."""

from __future__ import annotations

import pytest
import torch

from trimtab.cache import Streaming
from trimtab.claims._planted_sink import planted_model, planted_text
from trimtab.evaluation.caches import chunked_logits
from trimtab.kernels.kv_attention import Rope
from trimtab.models.segments import RopeSource, SegmentCache

from .conftest import POSITIONS, feed, tiny, tokens

SINKS, WINDOW = 4, 28
pytestmark = pytest.mark.usefixtures("no_gradients")


def stream(cache: SegmentCache, text: torch.Tensor, chunk: int = 64) -> set[int]:
    """Read a text; the bytes that the cache took after each chunk but the first two."""
    sizes = [cache.nbytes() for _ in chunked_logits(cache.model, text.tolist(), cache, chunk=chunk)]
    return set(sizes[2:])


@pytest.mark.parametrize("length", [2_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_text_before_the_window_changes_nothing_and_bytes_stay(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer, whose keys know their own token alone: the same sinks and window give the same logits."""
    model, table = tiny(num_hidden_layers=1), RopeSource.table
    positions = []

    def noted(self: RopeSource, length: int, device: torch.device) -> Rope:
        positions.append(length)
        return table(self, length, device)

    monkeypatch.setattr(RopeSource, "table", noted)
    sinks, window = tokens(1, SINKS), tokens(1, WINDOW + 1, seed=3)
    found = []
    for between in (40, length):
        cache = Streaming(sinks=SINKS, window=WINDOW).new(model)
        sizes = stream(cache, torch.cat([sinks, tokens(1, between, seed=2)], dim=1))
        assert len(sizes) <= 1
        assert cache.tokens == SINKS + WINDOW
        found.append(feed(model, cache, window, [1] * (WINDOW + 1))[:, -1])
    assert length > POSITIONS
    assert max(positions) <= SINKS + WINDOW + 64
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)
    anew = model(torch.cat([sinks, window], dim=1), use_cache=False).logits[:, -1]
    torch.testing.assert_close(found[1], anew, atol=2e-5, rtol=1e-4)


def perplexity(sinks: int, size: int, text: list[int]) -> float:
    """Of what comes after the cache is full."""
    model = planted_model()
    cache = Streaming(sinks=sinks, window=size - sinks).new(model)
    logits = torch.cat([each for _, each in chunked_logits(model, [text], cache, chunk=1)], dim=1)[0]
    return float(torch.nn.functional.cross_entropy(logits[size:-1], torch.tensor(text[size + 1 :])).exp())


def test_a_planted_sink() -> None:
    text = planted_text(120)
    dense = planted_model()(torch.tensor([text]), use_cache=False).logits[0]
    wanted = float(torch.nn.functional.cross_entropy(dense[32:-1], torch.tensor(text[33:])).exp())
    assert wanted < 4
    for sinks in (1, 4):
        assert perplexity(sinks, 32, text) == pytest.approx(wanted, rel=1e-3)
    assert perplexity(0, 32, text) > 10 * wanted
