"""Which heads keep everything for given scores, and what the others hold. Logits, bytes: test_retrieval_cache.py."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from trimtab.cache import Kivi, RetrievalHeads
from trimtab.cache._making import fitted_key
from trimtab.models.info import info_of
from trimtab.models.segments import SegmentCache

from .conftest import feed, held, keys_and_values, same, store, tiny, tokens

pytestmark = pytest.mark.usefixtures("no_gradients")
SCORES = torch.tensor([[0.1, 0.9], [0.0, 0.4]])


def with_scores(model: PreTrainedModel, **options: object) -> SegmentCache:
    """A cache for a model whose heads have the scores above."""
    method = RetrievalHeads(sinks=4, recent=28, **options)  # type: ignore[arg-type]
    info_of(model).fitted_caches[fitted_key(method)] = {"scores": SCORES, "sums": SCORES}
    return method.new(model)


def kept(cache: SegmentCache) -> list[dict[int, int]]:
    """For each layer, the tokens that each KV head holds."""
    return [
        {head: group.tokens(0) for group in layer.groups for head in group.plan.heads} for layer in cache.segment_layers
    ]


@pytest.mark.parametrize(
    ("fraction", "wanted"),
    [
        (0.0, [{0: 32, 1: 32}, {0: 32, 1: 32}]),
        (0.25, [{0: 32, 1: 400}, {0: 32, 1: 32}]),
        (0.5, [{0: 32, 1: 400}, {0: 32, 1: 400}]),
        (0.75, [{0: 400, 1: 400}, {0: 32, 1: 400}]),
        (1.0, [{0: 400, 1: 400}, {0: 400, 1: 400}]),
    ],
)
def test_the_best_heads_of_the_model_keep_everything(fraction: float, wanted: list[dict[int, int]]) -> None:
    model = tiny()
    cache = with_scores(model, full_fraction=fraction)
    feed(model, cache, tokens(1, 400), [300, 1, 99])
    assert kept(cache) == wanted


def test_streaming_heads_keep_their_positions_in_the_text() -> None:
    """Keys are the exact ones of the first and last tokens, as the model rotated them."""
    (keys, values), cache = keys_and_values(), with_scores(tiny(), full_fraction=0.25)
    store(cache, keys[:1], values[:1], [100, 1, 99])
    full_keys, full_values, part_keys, part_values = held(cache)
    for found, x in ((full_keys, keys), (full_values, values)):
        assert torch.equal(found[0], x[0, 1])
    for found, x in ((part_keys, keys), (part_values, values)):
        assert torch.equal(found[0], torch.cat([x[0, 0, :4], x[0, 0, -28:]]))


def test_full_heads_may_be_quantized() -> None:
    (keys, values), cache = keys_and_values(), with_scores(tiny(), full_fraction=0.5, bits=4)
    kivi = Kivi(bits=4).new(tiny())
    for each in (cache, kivi):
        store(each, keys[:1], values[:1], [150, 1, 49])
    wanted = [x[1:] for x in held(kivi)]
    assert same(held(cache)[:2], wanted)
    assert not same(wanted, [keys[0, 1:], values[0, 1:]])
