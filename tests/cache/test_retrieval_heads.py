"""Full history for some heads, sinks and recent tokens for the others: what is kept, and that the bytes are saved."""

from __future__ import annotations

import pytest
import torch

from trimtab.cache import Exact, Kivi, RetrievalHeads
from trimtab.cache._making import fitted_key
from trimtab.models.info import info_of
from trimtab.models.segments import SegmentCache

from .conftest import feed, held, keys_and_values, same, store, tiny, tokens

pytestmark = pytest.mark.usefixtures("no_gradients")
SCORES = torch.tensor([[0.1, 0.9], [0.0, 0.4]])


def with_scores(scores: torch.Tensor = SCORES, **options: object) -> SegmentCache:
    """A cache for the random Llama whose heads have these scores."""
    model, method = tiny(), RetrievalHeads(sinks=4, recent=28, **options)  # type: ignore[arg-type]
    info_of(model).fitted_caches[fitted_key(method)] = {"scores": scores, "sums": scores}
    cache = method.new(model)
    cache.test_model = model  # type: ignore[attr-defined]
    return cache


def kept(cache: SegmentCache) -> list[dict[int, int]]:
    """For each layer, the tokens that each KV head holds."""
    return [
        {head: group.tokens(0) for group in layer.groups for head in group.plan.heads} for layer in cache.segment_layers
    ]


def filled(cache: SegmentCache) -> SegmentCache:
    feed(cache.test_model, cache, tokens(1, 400), [300, 1, 99])  # type: ignore[attr-defined]
    return cache


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
    assert kept(filled(with_scores(full_fraction=fraction))) == wanted


def test_with_all_heads_it_is_the_exact_cache() -> None:
    ids, model = tokens(2, 300), tiny()
    cache = with_scores(full_fraction=1.0)
    found = feed(cache.test_model, cache, ids, [280, 1, 19])  # type: ignore[attr-defined]
    assert torch.equal(found, feed(model, Exact().new(model), ids, [280, 1, 19]))


def test_streaming_heads_keep_their_positions_in_the_text() -> None:
    """Keys are the exact ones of the first and last tokens, as the model rotated them."""
    (keys, values), cache = keys_and_values(), with_scores(full_fraction=0.25)
    store(cache, keys[:1], values[:1], [100, 1, 99])
    full_keys, full_values, part_keys, part_values = held(cache)
    for found, x in ((full_keys, keys), (full_values, values)):
        assert torch.equal(found[0], x[0, 1])
    for found, x in ((part_keys, keys), (part_values, values)):
        assert torch.equal(found[0], torch.cat([x[0, 0, :4], x[0, 0, -28:]]))


def saved(cache: SegmentCache) -> bool:
    """Whether three of four heads take only the room of their own tokens, with at most 100 tokens of slack each."""
    per_token = 2 * 32 * 4
    full, part = 400 + 256 + 64, 4 + 2 * (28 + 65)
    return cache.nbytes() <= per_token * (full + 3 * part)


def test_bytes_are_those_of_what_each_head_holds() -> None:
    assert saved(filled(with_scores(full_fraction=0.25)))


def test_the_check_of_bytes_notices_a_cache_that_only_masks() -> None:
    """Heads that hide evicted tokens without dropping them, as a dense cache must."""
    assert not saved(filled(with_scores(full_fraction=1.0)))


def test_full_heads_may_be_quantized() -> None:
    (keys, values), cache = keys_and_values(), with_scores(full_fraction=0.5, bits=4)
    kivi = Kivi(bits=4).new(tiny())
    for each in (cache, kivi):
        store(each, keys[:1], values[:1], [150, 1, 49])
    wanted = [x[1:] for x in held(kivi)]
    assert same(held(cache)[:2], wanted)
    assert not same(wanted, [keys[0, 1:], values[0, 1:]])
