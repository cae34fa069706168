"""Outliers and low rank on top of groups (sheet of GEAR, arXiv:2403.05527)."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from trimtab.kernels.kv_attention.reference import decode
from trimtab.kernels.kv_attention.run import Run
from trimtab.tensors.kv.codec import KVCodec
from trimtab.tensors.kv.low_rank import low_rank
from trimtab.tensors.kv.outliers import OutlierRule, outlier_rows
from trimtab.tensors.kv.size import formula_bits

from .generator import relative_error, synthetic

BLOCK = synthetic(512)
KEYS = OutlierRule(fraction=0.02, along="tokens")
VALUES = OutlierRule(fraction=0.02, along="channels")


def run_of(codec: KVCodec, x: Tensor) -> Run:
    return codec.encode(x[None])[0]


def outlier_mask(run: Run) -> Tensor:
    """Where outliers are, [H, m, d]."""
    assert run.outlier_values is not None
    marked = dataclasses.replace(run, outlier_values=torch.full_like(run.outlier_values, torch.inf))
    return decode(marked).isinf()


@pytest.mark.parametrize("grouping", [{"group_tokens": 64}, {"group_tokens": -1}, {"group_channels": 64}])
@pytest.mark.parametrize("outliers", [None, KEYS, VALUES])
def test_error_falls_with_rank_and_vanishes_at_full_rank(
    grouping: dict[str, int], outliers: OutlierRule | None
) -> None:
    x = BLOCK.post[:2, :96]
    codec = KVCodec(bits=2, outliers=outliers, **grouping)
    errors = [relative_error(decode(run_of(dataclasses.replace(codec, rank=r), x)), x) for r in (0, 1, 2, 4, 16, 64)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.2
    assert errors[-1] < 2e-3  # float16 of factors and outliers


def test_without_outliers_and_rank_it_is_kivi_bit_for_bit() -> None:
    """And with them, where no outlier and no rank remain."""
    x = BLOCK.values[:, :64]
    for grouping in ({"group_tokens": 64}, {"group_tokens": -1}, {"group_channels": 64}, {"group_channels": -1}):
        plain = run_of(KVCodec(bits=2, **grouping), x)
        none = run_of(KVCodec(bits=2, outliers=KEYS, rank=0, prefill_rank=4, **grouping), x)  # 64 * .02 / 2 < 1
        assert none.outlier_places is not None
        assert none.outlier_places.numel() == 0
        for name, tensor in plain.tensors().items():
            assert torch.equal(tensor, getattr(none, name)), name


def test_a_prompt_may_have_another_rank() -> None:
    codec = KVCodec(bits=2, group_tokens=32, rank=2, prefill_rank=4)
    assert [codec.encode(BLOCK.post[None], prefill=p)[0].rank for p in (False, True)] == [2, 4]
    assert codec.encode(BLOCK.post[None, :, :1])[0].rank == 1


@pytest.mark.parametrize("rule", [KEYS, VALUES])
def test_outliers_are_the_extremes_of_each_vector_and_exact(rule: OutlierRule) -> None:
    x = BLOCK.values.bfloat16()
    run = run_of(KVCodec(bits=2, group_tokens=64, outliers=rule, rank=4), x)
    mask = outlier_mask(run)
    vectors = x.transpose(1, 2).flatten(0, 1) if rule.along == "tokens" else x.transpose(0, 1).flatten(1)
    found = mask.transpose(1, 2).flatten(0, 1) if rule.along == "tokens" else mask.transpose(0, 1).flatten(1)
    k = rule.per_side(vectors.shape[1], quantile=False)
    assert k == int(vectors.shape[1] * 0.01)
    assert bool((found.sum(1) == 2 * k).all())
    beyond = torch.where(found, torch.inf, vectors.float())
    assert bool((torch.where(found, vectors, -torch.inf).amax(1) >= vectors.amax(1)).all())
    inner_low, inner_high = beyond.amin(1, keepdim=True), torch.where(found, -torch.inf, vectors.float()).amax(1, True)
    outside = vectors.float()
    assert not bool((found & (outside > inner_low) & (outside < inner_high)).any())
    assert torch.equal(decode(run)[mask], x[mask].float())


@pytest.mark.parametrize("rule", [KEYS, VALUES])
def test_the_residual_is_what_codes_leave_and_zero_at_outliers(
    rule: OutlierRule, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Tensor] = []

    def watched(error: Tensor, rank: int, iterations: int) -> tuple[Tensor, Tensor]:
        given.append(error.clone())
        return low_rank(error, rank, iterations)

    monkeypatch.setattr("trimtab.tensors.kv.codec.low_rank", watched)
    x = BLOCK.values[:, :130]
    run = run_of(KVCodec(bits=2, group_channels=64, outliers=rule, rank=4), x)
    mask = outlier_mask(run)
    backbone = decode(dataclasses.replace(run, token_factors=None, channel_factors=None, outlier_starts=None))
    error = given[0].transpose(1, 2)
    assert not error[mask].any()
    torch.testing.assert_close(error[~mask], (x - backbone)[~mask], atol=1e-5, rtol=1e-4)


def test_an_outlier_in_the_last_token_of_an_incomplete_group_widens_nothing() -> None:
    x = BLOCK.post[:, :200].clone()
    x[:, -1] = 500.0
    (run,) = KVCodec(bits=2, group_tokens=64, outliers=KEYS).encode(x[None])
    assert run.scale is not None
    assert torch.equal(decode(run)[:, -1], x[:, -1])
    assert float(run.scale[:, -1].max()) < 10


def test_outliers_of_a_constant_vector_are_counted_once() -> None:
    """Top-k and bottom-k of equal numbers may name the same entry; adding kernels would count it twice."""
    x = torch.ones(1, 2, 64, 64)
    (run,) = KVCodec(bits=2, group_tokens=64, outliers=OutlierRule(fraction=0.5)).encode(x)
    assert run.outlier_places is not None
    assert run.outlier_starts is not None
    owner = torch.repeat_interleave(torch.arange(4), run.outlier_starts.diff())
    pairs = torch.stack([owner, run.outlier_places.long() & 0xFFFF])
    assert pairs.unique(dim=1).shape == pairs.shape
    assert torch.equal(decode(run), x[0])


def test_rows_of_outliers_are_sorted_and_unsigned() -> None:
    flat = torch.tensor([2047 * 64 + 63, 5, 64, 33])
    values = torch.tensor([1.0, 2.0, 1e6, 3.0])
    starts, places, kept = outlier_rows(flat, values, (1, 1, 2048, 64), 2, torch.float16)
    assert starts[0].tolist() == [0, 2, 4]
    assert (places[0].int() & 0xFFFF).tolist() == [5, 32, 1, 2047 * 32 + 31]
    assert kept[0].tolist() == [2.0, 65504.0, 3.0, 1.0]


def test_all_entries_as_outliers_are_the_identity() -> None:
    x = BLOCK.post[:, :100].bfloat16()
    for along in ("tokens", "channels"):
        codec = KVCodec(bits=1, group_tokens=-1, outliers=OutlierRule(fraction=1.0, along=along))
        assert torch.equal(decode(run_of(codec, x)), x.float())


def test_outliers_per_vector_beat_as_many_of_the_whole_tensor() -> None:
    """Sheet 2.3 and 3.3: a few channels take all of a global budget."""
    x = BLOCK.post
    local = relative_error(decode(run_of(KVCodec(bits=2, group_tokens=-1, outliers=KEYS), x)), x)
    k = int(x.numel() * 0.01)
    low, high = x.flatten().kthvalue(k).values, x.flatten().kthvalue(x.numel() - k + 1).values
    limits = torch.ones(8, 64)
    taken = OutlierRule(lower=limits * low, upper=limits * high)
    mask = (x < low) | (x > high)
    inner = torch.where(mask, x.mean(), x)
    least, most = inner.amin(1, keepdim=True).half(), inner.amax(1, keepdim=True)
    scale = ((most - least) / 3).clamp(min=1e-3).half()
    codec = KVCodec(bits=2, scale=scale, minimum=least, outliers=taken)
    everywhere = relative_error(decode(run_of(codec, x)), x)
    assert local < 0.9 * everywhere


def test_outliers_help_where_tails_are_heavy() -> None:
    """Sheet: values, .389 at 3.14 bits with 2 % outliers against .447 at 3.0 bits with groups of 32."""
    x = BLOCK.values
    sparse = KVCodec(bits=2, group_channels=64, outliers=VALUES)
    plain = KVCodec(bits=2, group_channels=32)
    sizes = [sum(formula_bits(c, 8, 64, 512).values()) for c in (sparse, plain)]
    assert sizes[0] < sizes[1] + 0.25
    assert relative_error(decode(run_of(sparse, x)), x) < 0.93 * relative_error(decode(run_of(plain, x)), x)


def test_power_iteration_is_near_the_truncated_svd() -> None:
    """Within 3 % at three passes; one pass is visibly worse; factors are orthogonal and in the range of float16."""
    x = BLOCK.post
    codec = KVCodec(bits=2, group_tokens=64)
    error = (x - decode(run_of(codec, x))).transpose(1, 2)  # [H, d, m]

    def left(iterations: int) -> float:
        a, b = low_rank(error, 4, iterations)
        return float((error - b.float().transpose(1, 2) @ a.float()).norm())

    singular = torch.linalg.svdvals(error)
    best = float(singular[:, 4:].norm())
    assert best <= left(3) < 1.03 * best
    assert left(1) > 1.01 * left(3)
    a, b = low_rank(error * 1e4, 4, 3)
    gram = a.float() @ a.float().transpose(1, 2)
    torch.testing.assert_close(gram, torch.eye(4).expand(8, 4, 4) * 2.0**8, atol=0.5, rtol=0)
    assert bool(torch.isfinite(b).all())


def test_low_rank_helps_attention_more_than_smaller_groups() -> None:
    """Sheet 2.4, d = 128, equal bytes: attention averages noise away, not what tokens have in common.

    g = 64 with rank 4 has the larger squared error and the smaller error of the attention output.
    """
    block = synthetic(2048, 2, 128)
    low = KVCodec(bits=2, group_tokens=64, rank=4)
    fine = KVCodec(bits=2, group_tokens=32)
    sizes = [sum(formula_bits(c, 2, 128, 2048).values()) for c in (low, fine)]
    assert sizes[0] < sizes[1] + 0.05
    keys = block.post
    chosen = torch.randperm(2048, generator=torch.Generator().manual_seed(0))[:256]
    queries = (keys[:, chosen] - keys.mean(1, keepdim=True)) * 0.25

    def output(k: Tensor) -> Tensor:
        return torch.softmax(queries @ k.transpose(1, 2) / 128**0.5, dim=-1) @ block.values

    exact = output(keys)
    errors = [relative_error(output(decode(run_of(c, keys))), exact) for c in (low, fine)]
    assert errors[0] < 0.85 * errors[1], errors
