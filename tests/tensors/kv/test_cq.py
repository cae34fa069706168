"""One code for several channels (sheet of Coupled Quantization, arXiv:2405.03917)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trimtab.core.errors import ConfigError, NumericsError
from trimtab.kernels.kv_attention.reference import decode
from trimtab.tensors.kv.codebook import fit_codebook, nearest_centroid
from trimtab.tensors.kv.codec import KVCodec
from trimtab.tensors.kv.entropy import joint_and_marginal_entropy
from trimtab.tensors.kv.levels import fit_levels

from .generator import relative_error, synthetic

HEADS = 1
TRAIN, TEST = synthetic(2048, HEADS), synthetic(1024, HEADS, seed=1)


def points(x: Tensor, coupled: int) -> Tensor:
    """[H, n, d] -> [groups, n, c]"""
    return x.unflatten(2, (-1, coupled)).transpose(1, 2).flatten(0, 1)


def codec_for(x: Tensor, coupled: int, bits: int) -> KVCodec:
    found = fit_codebook(points(x, coupled), bits, iterations=10)
    return KVCodec(bits=bits, coupled=coupled, codebook=found.unflatten(0, (HEADS, -1)))


def error(codec: KVCodec, x: Tensor) -> float:
    return relative_error(decode(codec.encode(x[None])[0]), x)


@pytest.fixture(scope="module")
def coded() -> dict[str, KVCodec]:
    gauss = torch.randn(HEADS, 2048, 64, generator=torch.Generator().manual_seed(5))
    sources = {"pre": TRAIN.pre, "post": TRAIN.post, "gauss": gauss}
    shapes = [("pre", 2), ("pre", 4), ("pre", 8), ("post", 8), ("gauss", 2), ("gauss", 8)]
    return {f"{name} {c}": codec_for(sources[name], c, c) for name, c in shapes}


def test_coupling_gains_more_where_channels_depend_on_each_other(coded: dict[str, KVCodec]) -> None:
    """At 1 bit per channel, on held-out text. Sheet: .401, .375, .350 with 2, 4, 8 channels; .605 to .585 on noise."""
    keys = [error(coded[f"pre {c}"], TEST.pre) for c in (2, 4, 8)]
    assert keys == sorted(keys, reverse=True)
    gauss = torch.randn(HEADS, 1024, 64, generator=torch.Generator().manual_seed(6))
    noise = [error(coded[f"gauss {c}"], gauss) for c in (2, 8)]
    assert keys[2] / keys[0] < noise[1] / noise[0] - 0.03


def test_keys_are_coupled_better_before_rotary_embedding(coded: dict[str, KVCodec]) -> None:
    """Sheet: .350 against .445."""
    assert error(coded["pre 8"], TEST.pre) < 0.85 * error(coded["post 8"], TEST.post)


def test_one_channel_per_code_is_a_scalar_table() -> None:
    x = TRAIN.pre[0, :, 7]
    table = fit_codebook(x[None, :, None], 2).float()
    scalar = fit_levels(x, 2)
    codes = nearest_centroid(x[None, :, None], table)
    errors = [float((x - table[0, codes[0], 0]).norm()), float((x[:, None] - scalar).abs().amin(1).norm())]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


def test_sensitive_tokens_get_the_centroids() -> None:
    """Weighted error falls, unweighted error rises; doubling all weights changes nothing."""
    x = points(TRAIN.pre, 4)[:4]
    weights = torch.where(x[..., 0] > x[..., 0].median(1, keepdim=True).values, 10.0, 0.02)
    errors = {}
    for name, w in (("plain", None), ("weighted", weights)):
        table = fit_codebook(x, 4, w, iterations=20).float()
        near = table.gather(1, nearest_centroid(x, table)[..., None].expand(-1, -1, 4))
        square = (x - near).square().sum(2)
        errors[name] = float((weights * square).sum()), float(square.sum())
    assert errors["weighted"][0] < 0.85 * errors["plain"][0]
    assert errors["weighted"][1] > 1.1 * errors["plain"][1]
    assert torch.equal(fit_codebook(x, 4, weights, iterations=20), fit_codebook(x, 4, 2 * weights, iterations=20))


def test_codebooks_are_the_same_again_and_groups_do_not_know_each_other() -> None:
    x = points(TRAIN.pre[:, :512], 8)
    assert torch.equal(fit_codebook(x, 4, iterations=5), fit_codebook(x, 4, iterations=5))
    other = x.clone()
    other[1] = 7 * torch.randn(512, 8)
    assert torch.equal(fit_codebook(x, 4, iterations=3)[0], fit_codebook(other, 4, iterations=3)[0])


def test_first_centroids_are_drawn_far_apart() -> None:
    """Eight far clusters, one with most of the points: uniform draws would put nearly all centroids there."""
    centres = 100 * torch.eye(8)
    owner = torch.cat([torch.arange(8).repeat(10), torch.zeros(920, dtype=torch.long)])
    x = (centres[owner] + torch.randn(1000, 8))[None]
    for seed in range(4):
        table = fit_codebook(x, 3, seed=seed).float()
        near = table[0, nearest_centroid(x, table)[0]]
        assert float((x[0] - near).square().sum(1).mean()) < 10  # 8 if each cluster has its own


def test_centroids_that_lose_all_points_move_to_the_worst(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2, 1000, 2)
    x[0, :7, 0] = torch.arange(1.0, 8.0)
    x[1, :7, 1] = torch.arange(1.0, 8.0) * 3
    monkeypatch.setattr("trimtab.tensors.kv.codebook._first_centroids", lambda *_: torch.zeros(2, 8, 2))
    table = fit_codebook(x, 3).float()
    codes = nearest_centroid(x, table)
    for group in range(2):
        assert len(codes[group].unique()) == 8
        assert torch.equal(table[group, codes[group]], x[group])


def test_the_nearest_centroid_is_found_far_from_zero_and_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    x = 300 + torch.randn(3, 200, 4)
    table = 300 + torch.randn(3, 16, 4)
    wanted = torch.cdist(x.double(), table.double()).argmin(2)
    assert torch.equal(nearest_centroid(x, table), wanted)
    monkeypatch.setattr("trimtab.tensors.kv.codebook._CHUNK_BYTES", 4 * 3 * 16 * 7)
    assert torch.equal(nearest_centroid(x, table), wanted)


@pytest.mark.parametrize("bits", [3, 8, 9, 10, 12])
def test_codes_of_all_widths_name_the_nearest_centroid(bits: int) -> None:
    table = torch.randn(HEADS, 16, 1 << bits, 4).half()
    x = torch.randn(1, HEADS, 40, 64)
    got = decode(KVCodec(bits=bits, coupled=4, codebook=table).encode(x)[0])
    groups = points(x[0], 4)
    flat = table.flatten(0, 1).float()
    wanted = flat.gather(1, torch.cdist(groups, flat).argmin(2)[..., None].expand(-1, -1, 4))
    assert torch.equal(points(got, 4), wanted)


def test_coupled_channels_hold_less_than_one_by_one() -> None:
    """Sheet 4.5: joint entropy below the sum of marginals on keys, about equal when tokens are shuffled per channel."""
    x = synthetic(8192, 1).pre[0, :, :32]
    joint, marginal = joint_and_marginal_entropy(x, 2)
    shuffled = torch.stack([column[torch.randperm(len(x))] for column in x.T], dim=1)
    free, same = joint_and_marginal_entropy(shuffled, 2)
    torch.testing.assert_close(same, marginal)
    assert float((marginal - joint).mean()) > 3 * float((same - free).mean())
    assert float((same - free).max()) < 0.05
    two = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 1.0]])
    assert [float(e[0]) for e in joint_and_marginal_entropy(two, 2)] == pytest.approx([1.0, 2.0])


def test_codebooks_of_what_cannot_be_fitted_are_refused() -> None:
    with pytest.raises(ConfigError, match="15 tokens for 16 centroids"):
        fit_codebook(torch.ones(1, 15, 2), 4)
    bad = torch.ones(1, 16, 2)
    bad[0, 3, 1] = torch.nan
    with pytest.raises(NumericsError, match="finite"):
        fit_codebook(bad, 2)
    with pytest.raises(NumericsError, match="finite"):
        fit_codebook(torch.ones(1, 16, 2), 2, -torch.ones(1, 16))
