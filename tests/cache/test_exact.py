"""The baseline: nothing is lost, and history never moves."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from trimtab.cache import Exact
from trimtab.models.segments import SegmentCache
from trimtab.tensors.kv.codec import KVCodec

from .conftest import feed, tiny, tokens

pytestmark = pytest.mark.usefixtures("no_gradients")
SIZES = [260, 1, 1, 30, 1, 7]


def blocks(cache: SegmentCache) -> list[tuple[int, int]]:
    """Address and length of each block."""
    return [
        (run.exact.data_ptr(), run.tokens)
        for layer in cache.segment_layers
        for side in layer.groups[0].sides
        for run in side.runs[0]
        if run.exact is not None
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_cache_of_transformers(dtype: torch.dtype) -> None:
    model, ids = tiny(dtype=dtype), tokens(2, 300)
    found = feed(model, Exact().new(model), ids, SIZES)
    model.set_attn_implementation("sdpa")
    wanted = feed(model, DynamicCache(), ids, SIZES)
    bound = 1e-5 if dtype == torch.float32 else 0.05
    assert float((found - wanted).norm() / wanted.norm()) < bound


def test_the_comparison_notices_a_cache_of_eight_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    right = KVCodec.encode
    coarse = KVCodec(bits=8, group_channels=-1)
    monkeypatch.setattr(KVCodec, "encode", lambda self, x, **more: right(coarse, x, **more))
    with pytest.raises(AssertionError):
        test_it_is_the_cache_of_transformers(torch.float32)


def test_history_stays_where_it_is() -> None:
    """A block of 256 tokens is written once; bytes are those of the tokens and of the window's room."""
    model = tiny()
    cache = Exact().new(model)
    feed(model, cache, tokens(1, 260), [260])
    before = blocks(cache)
    assert [length for _, length in before] == [256] * 4
    feed(model, cache, tokens(1, 240, seed=2), [1, 239])
    assert blocks(cache) == before
    feed(model, cache, tokens(1, 12, seed=2), [12])
    assert [length for _, length in blocks(cache)] == [256] * 8
    window = 4 * 2 * (256 + 64) * 32 * 4
    assert cache.nbytes() <= 4 * 2 * 512 * 32 * 4 + 2 * window
