"""Fixed ranges of keys before rotary embedding, learnt levels, limits (sheet of KVQuant, arXiv:2401.18079)."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from trimtab.core.errors import ConfigError, NumericsError
from trimtab.kernels.kv_attention.reference import decode, rotary
from trimtab.tensors.kv.codec import KVCodec
from trimtab.tensors.kv.grid import nearest_level
from trimtab.tensors.kv.levels import clipped, fisher_weights, fit_levels, q_norm
from trimtab.tensors.kv.outliers import OutlierRule
from trimtab.tensors.kv.rotary import inverse_rope

from .generator import relative_error, rope_table, synthetic

TRAIN, TEST = synthetic(1024, 4), synthetic(1024, 4, seed=1)


def ranges(x: Tensor, outliers: float) -> tuple[Tensor, Tensor]:
    return x.quantile(outliers / 2, dim=1), x.quantile(1 - outliers / 2, dim=1)


def normalised(x: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    return (x - ((upper + lower) / 2)[:, None]) / ((upper - lower) / 2)[:, None]


def key_codec(x: Tensor, bits: int, outliers: float, *, uniform: bool = False) -> KVCodec:
    lower, upper = ranges(x, outliers)
    z = normalised(x, lower, upper)
    return KVCodec(
        bits=bits,
        levels=torch.linspace(-1, 1, 1 << bits) if uniform else fit_levels(z[z.abs() <= 1], bits),
        minimum=((upper + lower) / 2)[:, None].half(),
        scale=((upper - lower) / 2)[:, None].half(),
        outliers=OutlierRule(lower=lower, upper=upper) if outliers else None,
    )


def error(codec: KVCodec, x: Tensor) -> float:
    return relative_error(decode(codec.encode(x[None])[0]), x)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_keys_are_stored_better_before_rotary_embedding(bits: int) -> None:
    """Sheet: .264, .145, .078 against .326, .174, .093."""
    before, after = (error(key_codec(x, bits, 0.0), x) for x in (TRAIN.pre, TRAIN.post))
    assert before < 0.87 * after


def test_learnt_levels_beat_uniform_ones() -> None:
    """Sheet, 3 bits: .145 against .220, and .115 against .153 with 1 % outliers; so too on other text."""
    for outliers, most in ((0.0, 0.75), (0.01, 0.8)):
        learnt, uniform = (key_codec(TRAIN.pre, 3, outliers, uniform=u) for u in (False, True))
        assert error(learnt, TRAIN.pre) < most * error(uniform, TRAIN.pre)
        assert error(learnt, TEST.pre) < (most + 0.05) * error(uniform, TEST.pre)


def test_limits_per_channel_beat_one_limit() -> None:
    """Sheet, 3 bits uniform, 1 % outliers: .153 against .206."""
    x = TRAIN.pre
    ones = torch.ones(4, 64)
    low, high = (x.flatten().kthvalue(round(x.numel() * q)).values * ones for q in (0.005, 0.995))
    inner_low = torch.maximum(x.amin(1), low)
    inner_high = torch.minimum(x.amax(1), high)
    everywhere = KVCodec(
        bits=3,
        scale=((inner_high - inner_low) / 7)[:, None].half(),
        minimum=inner_low[:, None].half(),
        outliers=OutlierRule(lower=low, upper=high),
    )
    assert error(key_codec(x, 3, 0.01, uniform=True), x) < 0.85 * error(everywhere, x)


def test_fixed_limits_find_the_same_share_on_other_text() -> None:
    """From enough text: topics change slowly, so 1,000 tokens are few."""
    train, test = synthetic(8192, 1), synthetic(4096, 1, seed=1)
    (run,) = key_codec(train.pre, 3, 0.01, uniform=True).encode(test.pre[None])
    assert run.outlier_places is not None
    assert run.outlier_places.numel() / test.pre.numel() == pytest.approx(0.01, abs=0.002)


def test_outliers_by_limits_are_exact_and_all_others_near() -> None:
    x = TEST.pre.bfloat16()
    codec = key_codec(TRAIN.pre, 4, 0.01)
    got = decode(codec.encode(x[None])[0])
    lower, upper = ranges(TRAIN.pre, 0.01)
    outside = (x.float() < lower[:, None]) | (x.float() > upper[:, None])
    assert outside.any()
    assert torch.equal(got[outside], x.float()[outside])
    assert bool(((got - x.float()).abs() <= ((upper - lower) / 4)[:, None] + 0.01)[~outside].all())


def test_a_cap_keeps_the_farthest_of_each_token_and_side() -> None:
    x = TEST.pre.bfloat16()
    lower, upper = ranges(TRAIN.pre, 0.1)
    z = normalised(x.float(), lower, upper).transpose(0, 1).flatten(1)  # [m, H d]
    codec = KVCodec(
        bits=4,
        scale=((upper - lower) / 15)[:, None].half(),
        minimum=lower[:, None].half(),
        outliers=OutlierRule(lower=lower, upper=upper, cap=3),
    )
    (run,) = codec.encode(x[None])
    exact = (decode(run) == x.float()).transpose(0, 1).flatten(1)
    assert run.outlier_places is not None
    counts = [(side > 1).sum(1).clamp(max=3).sum() for side in (z, -z)]
    assert run.outlier_places.numel() == int(sum(counts))
    for side in (z, -z):
        top = side.topk(3, dim=1)
        assert bool(exact.gather(1, top.indices)[top.values > 1].all())


def test_a_range_of_zero_is_exact() -> None:
    """A channel that never moved in the calibration text: its centre, and outliers where it moves."""
    lower, upper = ranges(TRAIN.pre, 0.01)
    lower[0, 5] = upper[0, 5] = 1.5
    scale = ((upper - lower) / 2)[:, None].half()
    codec = KVCodec(
        bits=2,
        levels=torch.tensor([-1.0, -0.3, 0.3, 1.0]),
        scale=scale,
        minimum=((upper + lower) / 2)[:, None].half(),
        outliers=OutlierRule(lower=lower, upper=upper),
    )
    x = TEST.pre[:, :64].half()
    x[0, :, 5] = 1.5
    x[0, 3, 5] = 2.0
    assert torch.equal(decode(codec.encode(x[None])[0])[0, :, 5], x[0, :, 5].float())


@pytest.mark.parametrize(("heads", "dim", "count"), [(32, 128, 21), (8, 64, 3)])
def test_online_ranges_of_values(heads: int, dim: int, count: int) -> None:
    """floor(n / 200) + 1 outliers per side of a token, and the next entry is the limit: 21 and the 22nd of 4096."""
    x = torch.randn(heads, 40, dim).bfloat16()
    x[0, 7, 0] = 2.0**17  # a huge entry moves the mean of its token, but no limit
    codec = KVCodec(
        bits=2,
        group_channels=-1,
        levels=torch.tensor([-1.0, -0.3, 0.3, 1.0]),
        range_rule="quantile",
        outliers=OutlierRule(fraction=0.01, along="channels"),
    )
    (run,) = codec.encode(x[None])
    assert run.outlier_places is not None
    assert run.minimum is not None
    assert run.scale is not None
    assert run.outlier_places.numel() == 2 * count * 40
    ordered = x.float().transpose(0, 1).flatten(1).sort(dim=1).values
    low, high = ordered[:, count], ordered[:, -count - 1]
    torch.testing.assert_close(run.minimum[0, :40].float(), (low + high) / 2, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(run.scale[0, :40].float(), (high - low) / 2, atol=1e-3, rtol=1e-3)
    assert float(decode(run)[0, 7, 0]) == 2.0**17


@pytest.mark.parametrize("bits", [1, 3, 5])
def test_halfway_between_levels_the_lower_one_is_taken(bits: int) -> None:
    """By comparing and by binary search alike."""
    levels = torch.arange(1 << bits).float()
    z = torch.tensor([-5.0, 0.4, 0.5, 0.6, 1e9])
    top = len(levels) - 1
    assert nearest_level(z, levels).tolist() == [0, 0, 0, min(1, top), top]


def test_levels_are_the_best_there_are() -> None:
    """Against all ways to cut sorted numbers into four runs."""
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(40, generator=generator).double().sort().values
        w = torch.rand(40, generator=generator).double()

        def left(part: slice, x: Tensor = x, w: Tensor = w) -> float:
            values, weights = x[part], w[part]
            return float((weights * (values - (weights * values).sum() / weights.sum()).square()).sum())

        cost = {(i, j): left(slice(i, j)) for i in range(40) for j in range(i + 1, 41)}
        best = min(
            cost[0, a] + cost[a, b] + cost[b, c] + cost[c, 40] for a, b, c in itertools.combinations(range(1, 40), 3)
        )
        levels = fit_levels(x, 2, w).double()
        found = float((w * (x - levels[nearest_level(x, levels).int()]).square()).sum())
        assert found == pytest.approx(best, rel=1e-6)


def test_levels_do_not_depend_on_the_size_of_weights_and_are_the_same_again() -> None:
    x, w = torch.randn(5000), torch.rand(5000)
    assert torch.equal(fit_levels(x, 3, w), fit_levels(x, 3, 2 * w))
    assert torch.equal(fit_levels(x, 3), fit_levels(x, 3, torch.full_like(x, 4.0)))
    torch.testing.assert_close(fit_levels(x, 3, w), fit_levels(x.view(50, 100).T, 3, w.view(50, 100).T))


def test_sensitive_entries_get_the_levels() -> None:
    """Weighted error falls, unweighted error rises."""
    x = torch.randn(20000).clamp(-3, 3)
    w = torch.where(x > 1, 20.0, 0.1)
    errors = {}
    for name, weights in (("plain", None), ("weighted", w)):
        levels = fit_levels(x, 2, weights)
        square = (x - levels[nearest_level(x, levels).int()]).square()
        errors[name] = float((w * square).sum()), float(square.sum())
    assert errors["weighted"][0] < 0.6 * errors["plain"][0]
    assert errors["weighted"][1] > 1.2 * errors["plain"][1]


def test_levels_of_many_numbers_are_nearly_the_best() -> None:
    """Heavy tails and very unequal weights, where Lloyd's algorithm from quantiles is 40 % off: better than from any
    of many random starts, up to 1 %."""
    x = (torch.randn(3000) / torch.randn(5, 3000).square().mean(0).sqrt()).clamp(-4, 4)
    w = torch.exp(2 * torch.randn(3000))
    levels = fit_levels(x, 4, w)
    found = float((w * (x - levels[nearest_level(x, levels).int()]).square()).sum())
    best = min(_lloyd(x, w, start) for start in x[torch.randint(0, 3000, (30, 16))])
    assert found < 1.01 * best


def _lloyd(x: Tensor, w: Tensor, levels: Tensor) -> float:
    """Plain k-means from given levels; those that lose all numbers stay."""
    for _ in range(60):
        levels = levels.sort().values
        codes = nearest_level(x, levels).long()
        mass = torch.zeros(16).index_add_(0, codes, w)
        levels = torch.where(mass > 0, torch.zeros(16).index_add_(0, codes, w * x) / mass.clamp(min=1e-9), levels)
    levels = levels.sort().values
    return float((w * (x - levels[nearest_level(x, levels).int()]).square()).sum())


def test_every_level_is_used() -> None:
    """Nearly all numbers are equal; a start from quantiles would lose all levels but one."""
    x = torch.cat([torch.zeros(10000), torch.tensor([-1.0, 0.5, 0.55, 0.6, 0.9, 0.95, 1.0])])
    levels = fit_levels(x, 3)
    assert len(levels.unique()) == 8
    torch.testing.assert_close(levels, torch.tensor([-1.0, 0.0, 0.5, 0.55, 0.6, 0.9, 0.95, 1.0]), atol=1e-6, rtol=0)
    assert fit_levels(torch.ones(100), 3).tolist() == [1.0] * 8


def test_fisher_weights_count_errors_where_they_are_made() -> None:
    gradients = torch.rand(1000)
    scale = torch.full((1000,), 3.0)
    torch.testing.assert_close(fisher_weights(gradients, scale), clipped(9 * gradients))
    assert torch.equal(fisher_weights(gradients, None), clipped(gradients))
    gradients[17] = 1e9
    weights = fisher_weights(gradients, None)
    assert float(weights.max()) <= 1.0
    assert int((weights != gradients).sum()) == 1


def test_q_norm_keeps_mean_and_spread() -> None:
    """Equal mean and deviation after it; squared error slightly up; the correction shrinks with more bits."""
    x = TRAIN.pre
    lower, upper = ranges(x, 0.01)
    z = normalised(x, lower, upper)
    inliers = z[z.abs() <= 1]
    spreads = []
    for bits in (2, 3, 4):
        levels = fit_levels(inliers, bits)
        moved = q_norm(levels, inliers)
        codes = nearest_level(inliers, levels).int()
        plain, normed = levels[codes].double(), moved[codes].double()
        assert float(normed.mean()) == pytest.approx(float(inliers.double().mean()), abs=1e-6)
        assert float(normed.std()) == pytest.approx(float(inliers.double().std()), rel=1e-6)
        rise = float((normed - inliers).square().mean() / (plain - inliers).square().mean())
        assert 1 < rise < 1.1
        spreads.append(float((moved[-1] - moved[0]) / (levels[-1] - levels[0])))
    assert spreads == sorted(spreads, reverse=True)
    assert 1 < spreads[-1] < 1.02 < spreads[0] < 1.15


def test_q_norm_changes_what_is_read_and_no_code() -> None:
    codec = key_codec(TRAIN.pre, 2, 0.01)
    assert codec.levels is not None
    other = KVCodec(
        bits=2,
        levels=codec.levels,
        decode_levels=codec.levels * 1.1,
        scale=codec.scale,
        minimum=codec.minimum,
        outliers=codec.outliers,
    )
    plain, normed = (c.encode(TEST.pre[None])[0] for c in (codec, other))
    assert plain.codes is not None
    assert normed.codes is not None
    assert torch.equal(plain.codes, normed.codes)
    assert normed.levels is other.decode_levels


@pytest.mark.parametrize("scaling", [1.0, 1.3])
@pytest.mark.parametrize("half", [32, 16])
def test_keys_come_back_from_rotary_embedding(scaling: float, half: int) -> None:
    """With a scaling of attention in the table, and with channels that are not rotated."""
    rope = rope_table(500, 2 * half, scaling=scaling)
    keys = TRAIN.pre[:, :300]
    positions = torch.arange(300) + 150
    back = rotary(rotary(keys, rope, positions), inverse_rope(rope), positions)
    torch.testing.assert_close(back, keys, atol=1e-5, rtol=1e-5)


def test_rows_have_positions_of_their_own() -> None:
    rope = rope_table(64, 64)
    keys = torch.stack([TRAIN.pre[:, :20], TEST.pre[:, :20]])
    positions = torch.stack([torch.arange(20), torch.arange(20) + 40])[:, None]
    back = rotary(rotary(keys, rope, positions), inverse_rope(rope), positions)
    torch.testing.assert_close(back, keys, atol=1e-5, rtol=1e-5)


def test_levels_of_what_cannot_be_fitted_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 values for 4 levels"):
        fit_levels(torch.ones(3), 2)
    for values, weights in (
        (torch.tensor([1.0, 2.0, torch.nan, 3.0]), None),
        (torch.ones(4), torch.tensor([1.0, -1.0, 1.0, 1.0])),
        (torch.ones(4), torch.zeros(4)),
    ):
        with pytest.raises(NumericsError, match="finite"):
            fit_levels(values, 2, weights)
