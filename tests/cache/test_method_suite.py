"""What every method of the cache room must do, on every line of cases.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import trimtab as tt
from trimtab.cache import load, save
from trimtab.cache._making import fit, fitted_key
from trimtab.core.errors import TargetError
from trimtab.core.registry import methods
from trimtab.kernels import library
from trimtab.kernels.kv_attention import Run
from trimtab.kernels.kv_attention.reference import decode
from trimtab.models.info import info_of
from trimtab.models.segments import SegmentCache, layer
from trimtab.tensors.kv.codec import KVCodec
from trimtab.weights import Rtn

from .cases import CASES, FIRST, PROMPT, Case
from .conftest import (
    build,
    calibration_for,
    divergence,
    feed,
    fitted,
    held,
    keys_and_values,
    new_cache,
    same,
    store,
    tiny,
    tokens,
)

pytestmark = pytest.mark.usefixtures("no_gradients")
each = pytest.mark.parametrize("case", CASES, ids=str)
first_of_each = pytest.mark.parametrize("case", FIRST, ids=lambda case: case.name)
WITHOUT_ROPE = ("gpt2", "opt")
SLACK = 64
"""Tokens of room that a window has beyond what it needs."""


def of(case: Case, model: PreTrainedModel) -> SegmentCache:
    return new_cache(model, case.name, case.options)


def codecs(cache: SegmentCache) -> list[KVCodec]:
    return [plan.codec for groups in cache.plan.layers for group in groups for plan in (group.keys, group.values)]  # type: ignore[misc]


def test_every_method_has_a_case() -> None:
    assert {case.name for case in CASES} == {info.name for info in methods().values() if info.room == "cache"}


# Families


@pytest.mark.parametrize(
    ("case", "family"),
    [(case, family) for case in FIRST for family in case.families],
    ids=lambda x: getattr(x, "name", x),
)
def test_reads_every_family_or_says_why_not(case: Case, family: str) -> None:
    """Sliding windows, biases, norms of keys, fused projections, partly rotated heads."""
    model, ids = tiny(family), tokens(1, 140)
    wanted = model(ids).logits
    method = build(case.name, case.options)
    if case.rotary and family in WITHOUT_ROPE:
        with pytest.raises(TargetError, match="no rotary positions.*Use a cache that stores them after"):
            fitted(model, method).new(model)
        return
    cache = fitted(model, method).new(model)
    found = feed(model, cache, ids, [100, 1, 30, 1, 8])
    assert divergence(wanted[:, 100:], found[:, 100:]) < 4 * case.kl
    assert cache.get_seq_length() == 140


# Quality


@each
def test_a_prompt_attends_to_exact_keys_and_values(case: Case) -> None:
    model, ids = tiny(), tokens(2, PROMPT)
    mask = torch.ones_like(ids)
    mask[0, :50] = 0
    for more in ({}, {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}):
        wanted = feed(model, new_cache(model, "exact", {}), ids, [PROMPT], **more)
        assert torch.equal(feed(model, of(case, model), ids, [PROMPT], **more), wanted)


def test_the_check_of_prompts_notices_one_that_reads_its_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As RotateKV's own code does: a prompt attends to keys that are rounded already."""
    right, codec = layer.exact_attention, KVCodec(bits=8, group_channels=-1)

    def rounded(query: Tensor, keys: Tensor, values: Tensor, *more: Any) -> Tensor:
        keys = torch.stack([decode(run) for run in codec.encode(keys)])
        return right(query, keys, values, *more)

    model, ids = tiny(), tokens(2, PROMPT)
    wanted = feed(model, new_cache(model, "exact", {}), ids, [PROMPT])
    monkeypatch.setattr(layer, "exact_attention", rounded)
    assert not torch.equal(feed(model, of(CASES[1], model), ids, [PROMPT]), wanted)


@each
def test_predictions_stay_near_the_exact_ones(case: Case) -> None:
    model, ids = tiny(), tokens(2, 260)
    found = feed(model, of(case, model), ids, [PROMPT, 1, 1, 8, 50])
    assert divergence(model(ids).logits[:, PROMPT:], found[:, PROMPT:]) < case.kl


@each
def test_what_fits_into_the_window_is_exact(case: Case) -> None:
    """And one token more is not."""
    model = tiny()
    for length in (case.exact, case.exact + 1):
        ids, sizes = tokens(2, length + 1), [3, *[1] * (length - 2)]
        found = feed(model, of(case, model), ids, sizes)
        wanted = feed(model, new_cache(model, "exact", {}), ids, sizes)
        equal = torch.allclose(found, wanted, atol=2e-5, rtol=1e-4) if case.moved else torch.equal(found, wanted)
        assert equal == (length == case.exact or case.name == "exact") or (case.bits is None and length > case.exact)


# What is stored does not depend on how it came


@each
def test_cuts_of_the_text_do_not_matter(case: Case) -> None:
    """Bit for bit, but where a block is one by its nature: low rank and groups over it, outliers along it."""
    model, (keys, values) = tiny(), keys_and_values()
    options = {**case.options, "pivots": 0} if case.name == "rotatekv" else case.options  # a prompt has pivots
    whole, parts = (new_cache(model, case.name, options) for _ in range(2))
    store(whole, keys[:2], values[:2], [PROMPT])
    store(parts, keys[:2], values[:2], [1, 29, *[1] * 35, 70, 2, 63])
    by_block = any(codec.rank or codec.prefill_rank or codec.group_tokens == -1 for codec in codecs(whole))
    for row in range(2):
        assert same(held(parts, row), held(whole, row)) != by_block


@each
def test_rows_do_not_know_each_other_nor_their_padding(case: Case) -> None:
    model, (keys, values) = tiny(), keys_and_values()
    padding, sizes = [0, 37, 149], [150, 1, 1, 48]
    batch = of(case, model)
    store(batch, keys, values, sizes, padding)
    for row, pad in enumerate(padding):
        alone = of(case, model)
        own = slice(row, row + 1), slice(None), slice(pad, None)
        store(alone, keys[own], values[own], [150 - pad, 1, 1, 48])
        assert same(held(batch, row), held(alone))


def test_the_check_of_rows_notices_padding_that_is_stored() -> None:
    """Groups of keys that hold padding have another range."""
    model, (keys, values) = tiny(), keys_and_values()
    case = next(case for case in CASES if case.name == "kivi")
    batch, alone = of(case, model), of(case, model)
    store(batch, keys, values, [PROMPT])
    store(alone, keys[1:2, :, 37:], values[1:2, :, 37:], [PROMPT - 37])
    assert not same([x[:, 37:] for x in held(batch, 1)], held(alone))


@each
def test_rows_of_a_model_do_not_know_each_other(case: Case) -> None:
    model, ids = tiny(), tokens(2, 90)
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    more = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    other = ids.clone()
    other[0, :20] = 5
    other[1] = tokens(1, 90, seed=8)
    found, changed = (feed(model, of(case, model), x, [70, 1, 1, 18], **more) for x in (ids, other))
    assert torch.equal(found[0, 20:], changed[0, 20:])
    assert not torch.equal(found[1], changed[1])


# Bytes


@pytest.mark.parametrize("case", [case for case in CASES if case.bits is not None], ids=str)
def test_bytes_are_those_of_the_formula(case: Case) -> None:
    """Allocated bytes = windows, of at most twice their size, + what the paper counts + what depends on the numbers."""
    assert case.bits is not None
    model, rows, width = tiny(), 2, 64 * 4
    cache = of(case, model)
    feed(model, cache, tokens(rows, PROMPT), [PROMPT])
    windows = sum(size for name, size in cache.bytes_by_part().items() if name.startswith("window"))
    least = most = sinks = 0
    for one in cache.segment_layers:
        for group in one.groups:
            share, plan = len(group.plan.heads) / 2, group.plan
            kept = PROMPT if plan.recent is None else plan.sinks + plan.recent
            apart = min(case.sinks, plan.sinks)
            for side, encoded in zip(group.sides, case.encoded, strict=True):
                least += rows * share * width * (kept - encoded - apart)
                usual = max(side.plan.window, plan.recent or 0) + side.plan.block + SLACK
                most += rows * share * width * 2 * usual
                sinks += rows * share * width * apart
    assert least <= windows <= most
    layers = len(cache.segment_layers)
    bits = sum(64 * n * b for n, b in zip(case.encoded, case.bits, strict=True))
    wanted = sinks + layers * (rows * bits / 8 + case.shared)
    overrides = layers * rows * 2 * (case.options.get("pivots", 0) + 1) * (width + 4) * ("pivots" in case.options)
    extra = layers * rows * 64 * case.encoded[0] * case.varying / 8 + overrides
    assert wanted <= cache.nbytes() - windows <= wanted + extra + 1e-6
    assert cache.nbytes() == sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in cache.tensors() if t.numel()}.values()
    )


def test_the_check_of_bytes_notices_numbers_that_are_only_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated quantization: codes are computed, and their decoded numbers stored."""
    right = KVCodec.encode

    def simulated(self: KVCodec, x: Tensor, **more: Any) -> list[Run]:
        runs = right(self, x, **more)
        return right(KVCodec(bits=0), torch.stack([decode(run) for run in runs]))

    monkeypatch.setattr(KVCodec, "encode", simulated)
    with pytest.raises(AssertionError):
        test_bytes_are_those_of_the_formula(CASES[1])


# Generation, transactions, files


@each
def test_generates_what_greedy_steps_give(case: Case) -> None:
    model, prompt = tiny(), tokens(1, 60)
    options: dict[str, Any] = {"max_new_tokens": 45, "min_new_tokens": 45, "do_sample": False, "pad_token_id": 0}
    found = model.generate(prompt, attention_mask=torch.ones_like(prompt), past_key_values=of(case, model), **options)
    cache, text, new = of(case, model), prompt, prompt
    for _ in range(45):
        logits = model(new, past_key_values=cache).logits[:, -1]
        logits[:, 2] = -torch.inf  # the end
        new = logits.argmax(-1, keepdim=True)
        text = torch.cat([text, new], dim=1)
    assert torch.equal(found, text)


@each
def test_drafts_and_forks_leave_no_trace(case: Case) -> None:
    model = tiny()
    cache = of(case, model)
    feed(model, cache, tokens(2, 70), [66, 4])
    twin, before = cache.fork(), [x.clone() for x in held(cache)]
    cache.begin()
    feed(model, cache, tokens(2, 50, seed=2), [20, 1, 29])
    cache.rollback()
    feed(model, cache.fork(), tokens(2, 50, seed=3), [50])
    assert same(held(cache), before)
    after = tokens(2, 40, seed=4)
    assert torch.equal(feed(model, cache, after, [30, 1, 9]), feed(model, twin, after, [30, 1, 9]))


@each
def test_a_loaded_cache_goes_on_the_same(case: Case, tmp_path: Path) -> None:
    model, twin = tiny(), tiny()
    cache = of(case, model)
    feed(model, cache, tokens(2, 100), [98, 2])
    save(cache, tmp_path / "cache")
    fitted(twin, build(case.name, case.options))
    loaded, after = load(tmp_path / "cache", twin), tokens(2, 40, seed=4)
    assert loaded.plan.name == case.name
    assert torch.equal(feed(twin, loaded, after, [1, 35, 4]), feed(model, cache, after, [1, 35, 4]))


@first_of_each
def test_the_same_again(case: Case) -> None:
    """Fitted anew it learns the same, and leaves the model as it is."""
    model, method, ids = tiny(), build(case.name, case.options), tokens(2, 150)
    found = [feed(model, fitted(model, method).new(model), ids, [100, 1, 49]) for _ in range(2)]
    assert torch.equal(found[0], found[1])
    if not method.calibrated or case.name == "retrieval_heads":
        return
    before = {name: p.clone() for name, p in model.named_parameters()}
    learnt = dict(info_of(model).fitted_caches.pop(fitted_key(method)))
    again = fit(method, model, calibration_for(method))
    assert learnt.keys() == again.keys()
    assert all(torch.equal(learnt[name], again[name]) for name in learnt)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(t.requires_grad for t in again.values())


# Kernels and compressed weights


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.float32) for case in CASES] + [(case, torch.bfloat16) for case in FIRST if case.name != "auto"],
    ids=str,
)
def test_the_fused_kernel_computes_what_the_reference_does(
    case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if library.absent():
        pytest.skip("the compiled kernels are not there")
    model, ids = tiny(dtype=dtype), tokens(2, 6, seed=2)
    cache = of(case, model)
    feed(model, cache, tokens(2, PROMPT), [PROMPT])
    found = {}
    for backend in ("native", "reference"):
        monkeypatch.setenv("TRIMTAB_KERNELS", backend)
        fork = cache.fork()
        found[backend] = feed(model, fork, ids, [1, 1, 4]).float()
    bound = (1e-3 if dtype == torch.float32 else 0.03) * float(found["reference"].abs().max())
    assert float((found["native"] - found["reference"]).abs().max()) < bound


@first_of_each
def test_models_with_compressed_weights(case: Case) -> None:
    model, ids = tiny(), tokens(2, 180)
    tt.compress(model, Rtn(bits=4, group_size=16), progress=False)
    cache = of(case, model)
    found = feed(model, cache, ids, [120, 1, 59])
    wanted = model(ids).logits
    exact = feed(model, new_cache(model, "exact", {}), ids, [120, 1, 59])
    torch.testing.assert_close(exact, wanted, atol=1e-4, rtol=1e-3)
    assert torch.equal(found[:, :120], exact[:, :120])
    assert divergence(wanted[:, 120:], found[:, 120:]) < 3 * case.kl
