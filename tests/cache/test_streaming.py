"""StreamingLLM as a method; its invariants on single layers are in tests/models/segments/test_streaming.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from trimtab.cache import Exact, Streaming
from trimtab.core.errors import DataError
from trimtab.models.segments import RopeSource, SegmentCache

from .conftest import POSITIONS, feed, held, tiny, tokens

pytestmark = pytest.mark.usefixtures("no_gradients")


def test_bytes_and_positions_stay_within_sinks_and_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a text longer than the model's positions, which no other cache takes."""
    model, asked = tiny(), []
    table = RopeSource.table

    def spy(self: RopeSource, length: int, device: torch.device):  # type: ignore[no-untyped-def]
        asked.append(length)
        return table(self, length, device)

    monkeypatch.setattr(RopeSource, "table", spy)
    cache, sizes = Streaming(sinks=4, window=28).new(model), set()
    for part in tokens(1, POSITIONS + 100).split([200, *[1] * 30, 150, *[1] * 10, 222], dim=1):
        feed(model, cache, part, [part.shape[1]])
        if cache.get_seq_length() > 200:
            sizes.add(cache.nbytes())
            assert cache.tokens == 32
    assert len(sizes) == 1
    assert max(asked) <= 4 + 28 + 222  # a chunk attends to itself before it is evicted
    with pytest.raises(DataError, match="grown to 612 tokens.*positions for 512.*'streaming'"):
        feed(model, Exact().new(model), tokens(1, POSITIONS + 100), [POSITIONS + 100])


def test_it_holds_the_first_and_the_last_tokens() -> None:
    """Keys and values of the first layer depend on their token alone; what is between leaves no trace."""
    model, ids = tiny(), tokens(1, 120)
    cache, exact = Streaming(sinks=4, window=28).new(model), Exact().new(model)
    for each in (cache, exact):
        feed(model, each, ids, [50, 1, 40, *[1] * 29])
    values, wanted = held(cache)[1], held(exact)[1]
    torch.testing.assert_close(values, torch.cat([wanted[:, :4], wanted[:, -28:]], dim=1))


def test_without_sinks_it_is_a_window() -> None:
    model, ids = tiny(num_hidden_layers=1), tokens(1, 90)
    found = feed(model, Streaming(sinks=0, window=20).new(model), ids, [10, *[1] * 80])[:, -1]
    wanted = model(ids[:, -21:], use_cache=False).logits[:, -1]
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


def loss(model: PreTrainedModel, cache: SegmentCache, ids: Tensor) -> float:
    """Nats per token of what follows 100 tokens."""
    logits = feed(model, cache, ids, [20, *[10] * ((ids.shape[1] - 20) // 10)])[:, 100:-1]
    return float(cross_entropy(logits.flatten(0, 1), ids[:, 101:].flatten()))


def test_a_trained_model_goes_on_as_with_the_full_cache(mini: PreTrainedModel, prose: Tensor) -> None:
    """Far beyond the window, nats per token rise by little. (The small model needs no sinks: see the claims.)"""
    full = loss(mini, Exact().new(mini), prose[:2])
    assert loss(mini, Streaming(sinks=4, window=60).new(mini), prose[:2]) < full + 0.15
