"""What holds for every composition: shapes, rows, chunks, bytes, overrides, extremes, refusals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trimtab.core.errors import ConfigError, NumericsError
from trimtab.kernels.kv_attention.codes import pack_rows, unpack_rows
from trimtab.kernels.kv_attention.reference import decode
from trimtab.kernels.kv_attention.run import TILE, Run
from trimtab.tensors.kv.codec import KVCodec
from trimtab.tensors.kv.outliers import OutlierRule
from trimtab.tensors.kv.size import COMPONENTS, component_bytes, formula_bits, nbytes

from .generator import relative_error, rope_table, synthetic

H, D = 4, 64
BLOCK = synthetic(256, H, D)
TABLE = torch.tensor([-1.0, -0.3, 0.2, 1.0])
ORDER = torch.randperm(H * D, generator=torch.Generator().manual_seed(1)).to(torch.int16)


def _fixed(bits: int, levels: Tensor | None = None, cap: int | None = None) -> KVCodec:
    lower, upper = BLOCK.pre.quantile(0.01, dim=1), BLOCK.pre.quantile(0.99, dim=1)
    scale = (upper - lower) / (2 if levels is not None else (1 << bits) - 1)
    minimum = (upper + lower) / 2 if levels is not None else lower
    return KVCodec(
        bits=bits,
        levels=levels,
        scale=scale[:, None].half(),
        minimum=minimum[:, None].half(),
        outliers=OutlierRule(lower=lower, upper=upper, cap=cap),
    )


def _codebook(bits: int, coupled: int) -> Tensor:
    return torch.randn(H, D // coupled, 1 << bits, coupled, generator=torch.Generator().manual_seed(2)).half()


SPARSE_TOKENS = OutlierRule(fraction=0.04)
SPARSE_CHANNELS = OutlierRule(fraction=0.04, along="channels")
CODECS = {
    "exact": KVCodec(bits=0),
    "tokens 1": KVCodec(bits=1, group_tokens=16),
    "tokens 2": KVCodec(bits=2, group_tokens=32),
    "tokens 3": KVCodec(bits=3, group_tokens=48),
    "tokens 4": KVCodec(bits=4, group_tokens=64),
    "tokens all": KVCodec(bits=4, group_tokens=-1),
    "channels 2": KVCodec(bits=2, group_channels=32),
    "channels 3": KVCodec(bits=3, group_channels=128),
    "channels all": KVCodec(bits=8, group_channels=-1),
    "channels table": KVCodec(bits=2, group_channels=64, levels=TABLE),
    "gear keys": KVCodec(bits=2, group_tokens=64, outliers=SPARSE_TOKENS, rank=2, prefill_rank=4),
    "gear values": KVCodec(bits=2, group_channels=64, outliers=SPARSE_CHANNELS, rank=2),
    "kvquant keys": _fixed(2, TABLE),
    "kvquant keys capped": _fixed(2, TABLE, cap=2),
    "kvquant keys uniform": _fixed(4),
    "kvquant values": KVCodec(
        bits=2,
        group_channels=-1,
        levels=TABLE,
        decode_levels=TABLE * 1.05,
        outliers=SPARSE_CHANNELS,
        range_rule="quantile",
    ),
    "coupled 8": KVCodec(bits=8, coupled=8, codebook=_codebook(8, 8)),
    "coupled 10": KVCodec(bits=10, coupled=4, codebook=_codebook(10, 4)),
    "coupled 3": KVCodec(bits=3, coupled=2, codebook=_codebook(3, 2)),
    "rotated": KVCodec(bits=2, group_channels=64, hadamard=256, order=ORDER, clip=0.8),
    "everything": KVCodec(
        bits=3, group_channels=32, levels=None, hadamard=64, order=ORDER, outliers=SPARSE_TOKENS, rank=3, clip=0.9
    ),
}
IN_BLOCK = {"tokens all", "gear keys", "gear values", "everything"}  # components that belong to the whole block
each_codec = pytest.mark.parametrize("codec", [pytest.param(c, id=name) for name, c in CODECS.items()])


def _same(left: Run, right: Run) -> bool:
    a, b = left.tensors(), right.tensors()
    return left.spec() == right.spec() and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@each_codec
@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 100])
def test_runs_have_the_layout_that_they_say(codec: KVCodec, tokens: int) -> None:
    (run,) = codec.encode(BLOCK.pre[None, :, :tokens])
    tiles = -(-tokens // TILE)
    channels = D // codec.coupled
    low = min(codec.bits, 8)
    shapes = {
        "exact": (H, tokens, D),
        "codes": (H, tiles, channels, 4 * low),
        "high_codes": (H, tiles, channels, 4 * (codec.bits - low)),
        "codebook": (H, channels, 1 << codec.bits, codec.coupled),
        "token_factors": (H, run.rank, TILE * tiles),
        "channel_factors": (H, run.rank, D),
        "outlier_starts": (H * tiles + 1,),
        "levels": (1 << codec.bits,),
        "order": (H * D,),
    }
    if run.group_tokens:
        shapes["scale"] = shapes["minimum"] = (H, -(-tokens // run.group_tokens), D)
    elif run.group_channels:
        shapes["scale"] = shapes["minimum"] = (H * D // run.group_channels, TILE * tiles)
    for name, tensor in run.tensors().items():
        assert tensor.is_contiguous(), name
        if name in shapes:
            assert tuple(tensor.shape) == shapes[name], name
    if run.outlier_starts is not None and run.outlier_places is not None and run.outlier_values is not None:
        assert int(run.outlier_starts[0]) == 0
        assert int(run.outlier_starts[-1]) == len(run.outlier_places) == len(run.outlier_values)
        assert bool((run.outlier_starts.diff() >= 0).all())
    for rows, bits in ((run.codes, low), (run.high_codes, codec.bits - low)):
        if rows is not None:
            assert not unpack_rows(rows, bits, TILE * tiles)[:, tokens:].any()  # what fills up the tile is code zero
    assert decode(run).shape == (H, tokens, D)
    assert bool(torch.isfinite(decode(run)).all())


@each_codec
def test_a_run_is_rebuilt_from_its_spec_and_tensors(codec: KVCodec) -> None:
    (run,) = codec.encode(BLOCK.pre[None, :, :70])
    again = Run.from_state(run.spec(), run.tensors())
    assert _same(run, again)
    assert torch.equal(decode(run), decode(again))


@each_codec
def test_rows_do_not_know_each_other(codec: KVCodec) -> None:
    x = torch.stack([BLOCK.pre[:, :100], BLOCK.values[:, :100], BLOCK.pre[:, 100:200] * 3])
    together = codec.encode(x)
    for row in range(3):
        (alone,) = codec.encode(x[row : row + 1])
        assert _same(together[row], alone), row


@each_codec
def test_encoding_twice_gives_the_same_and_leaves_its_input(codec: KVCodec) -> None:
    x = BLOCK.pre[None, :, :96].contiguous()
    first = codec.encode(x)
    assert torch.equal(x, BLOCK.pre[None, :, :96])
    assert _same(first[0], codec.encode(x)[0])
    before = decode(first[0]).clone()
    x.zero_()
    assert torch.equal(decode(first[0]), before)


@each_codec
def test_strided_input_is_the_same_as_contiguous(codec: KVCodec) -> None:
    x = BLOCK.pre[None, :, :64].transpose(1, 2).contiguous().transpose(1, 2)
    assert not x.is_contiguous()
    assert _same(codec.encode(x)[0], codec.encode(x.contiguous())[0])


@pytest.mark.parametrize("name", [name for name in CODECS if name not in IN_BLOCK])
@pytest.mark.parametrize("cuts", [(96, 96), (96, 192, 96)])
def test_block_by_block_is_the_same_as_at_once(name: str, cuts: tuple[int, ...]) -> None:
    codec, x = CODECS[name], synthetic(sum(cuts), H, D, seed=3).pre[None]
    if codec.group_tokens and cuts[0] % codec.group_tokens:
        codec = dataclasses.replace(codec, group_tokens=32)
    (whole,) = codec.encode(x)
    parts = [codec.encode(part)[0] for part in x.split(cuts, dim=2)]
    assert torch.equal(torch.cat([decode(part) for part in parts], dim=1), decode(whole))
    for field, dim in (("codes", 1), ("high_codes", 1), ("scale", 1), ("minimum", 1)):
        found = getattr(whole, field)
        if found is not None and codec.scale is None:
            assert torch.equal(torch.cat([getattr(part, field) for part in parts], dim=dim), found), field


@each_codec
def test_bytes_are_those_of_the_buffers_and_of_the_formula(codec: KVCodec) -> None:
    x = synthetic(192, H, D, seed=4).pre[None].bfloat16()
    (run,) = codec.encode(x, prefill=True)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in run.tensors().values()}
    counted = component_bytes([run])
    assert sum(counted.values()) == nbytes([run])
    limits = codec.outliers is not None and codec.outliers.lower is not None
    if not limits:
        formula = formula_bits(codec, H, D, 192, prefill=True)
        assert {name: 8 * size / x.numel() for name, size in counted.items()} == pytest.approx(formula)
    owned = [t for name, t in run.tensors().items() if name not in ("codebook", "levels", "order", "scale", "minimum")]
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in owned if t.numel()), storages
    assert set(counted) == set(COMPONENTS)


def test_bytes_of_kivi_are_those_of_the_paper() -> None:
    """Sheet 1: n d b / 8 + 4 d n / g bytes of keys per head, 4 n d / g of values; 2 bits and g = 32 are 3.0 bits."""
    n, g = 128, 32
    for codec in (KVCodec(bits=2, group_tokens=g), KVCodec(bits=2, group_channels=g)):
        assert nbytes(codec.encode(BLOCK.post[None, :, :n])) == H * (n * D * 2 // 8 + 4 * n * D // g)
        assert sum(formula_bits(codec, H, D, n).values()) == 3.0


def test_what_runs_share_counts_once() -> None:
    for name in ("coupled 8", "kvquant keys", "rotated"):
        codec = CODECS[name]
        runs = codec.encode(torch.stack([BLOCK.pre, BLOCK.values])) + codec.encode(BLOCK.pre[None])
        one = component_bytes(runs[:1])
        all_three = component_bytes(runs)
        assert all_three["codebooks"] == one["codebooks"] > 0
        assert all_three["codes"] == 3 * one["codes"]
    assert component_bytes(CODECS["kvquant keys"].encode(BLOCK.pre[None]) * 2)["scales"] == 2 * 2 * H * D


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_rows_have_the_layout_that_their_page_says(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (2, 41, 3), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    packed = pack_rows(codes, bits)
    assert packed.shape == (2, 2, 3, 4 * bits)
    for j in range(32):
        words = packed[1, 0, 2].view(torch.int32).tolist()
        if bits == 3:
            found = words[j % 2] >> 2 * (j // 2) & 3 | (words[2] >> j & 1) << 2
        else:
            found = words[j % bits] >> bits * (j // bits) & (1 << bits) - 1
        assert found == int(codes[1, j, 2])
    assert torch.equal(unpack_rows(packed, bits, 41), codes)


@each_codec
def test_overridden_tokens_are_exact_and_spoil_nothing(codec: KVCodec) -> None:
    """Two rows with different ones; a huge overridden token changes no other token."""
    x = torch.stack([BLOCK.pre[:, :96], BLOCK.values[:, :96]]).bfloat16()
    at = torch.tensor([0, 40])
    wild = x.clone()
    wild[0][:, at] = 1e4
    runs = codec.encode(wild, override_tokens=[at, None])
    assert torch.equal(decode(runs[0])[:, at], wild[0][:, at].float())
    assert runs[1].override_tokens is None
    assert _same(runs[1], codec.encode(x)[1])
    tame = codec.encode(x, override_tokens=[at, None])[0]
    others = [n for n in range(96) if n not in at]
    assert torch.equal(decode(runs[0])[:, others], decode(tame)[:, others])
    (alone,) = codec.encode(wild[:1, :, :2], override_tokens=[torch.tensor([0, 1])])
    assert torch.equal(decode(alone), wild[0, :, :2].float())


def test_overrides_of_keys_before_rotary_embedding_are_given_rotated() -> None:
    rope = rope_table(64, D)
    at = torch.tensor([3])
    codec = CODECS["rotated"]
    exact = BLOCK.post[:, at]
    (run,) = codec.encode(BLOCK.pre[None, :, :32], first_position=[5], override_tokens=[at], override_values=[exact])
    assert run.first_position == 5
    assert torch.equal(decode(run, rope)[:, at], exact)
    with pytest.raises(ConfigError, match="override_values, rotated"):
        codec.encode(BLOCK.pre[None, :, :32], first_position=[5], override_tokens=[at])
    with pytest.raises(ConfigError, match=r"row 0 have shape \[4, 1, 63\], not \[4, 1, 64\]"):
        codec.encode(BLOCK.pre[None, :, :32], override_tokens=[at], override_values=[exact[..., 1:]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_exact_storage_is_bit_identical(dtype: torch.dtype) -> None:
    x = BLOCK.values[None].to(dtype)
    (run,) = KVCodec(bits=0).encode(x)
    assert run.exact is not None
    assert torch.equal(run.exact, x[0])


GROUPED = [name for name, c in CODECS.items() if c.bits and c.scale is None and c.coupled == 1]


@pytest.mark.parametrize("name", [name for name in GROUPED if name not in ("rotated", "everything")])
@pytest.mark.parametrize("value", [0.0, 3.7, -250.0, 6e4, 1e-7])
def test_constant_groups_are_their_minimum(name: str, value: float) -> None:
    x = torch.full((1, H, 64, D), value).half()
    (run,) = CODECS[name].encode(x)
    assert torch.equal(decode(run), x[0].float())
    if run.levels is None:
        assert run.codes is not None
        assert run.scale is not None
        assert not run.codes.any()
        assert bool((run.scale == 1).all())


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("size", [1e-9, 1e-5, 300.0, 3e4])
def test_no_size_of_numbers_breaks_the_grid(name: str, size: float) -> None:
    codec = CODECS[name]
    x = BLOCK.pre[None, :, :64] / BLOCK.pre.abs().max() * size
    got = decode(codec.encode(x)[0])
    assert bool(torch.isfinite(got).all())
    if size > 1e-4:  # below, float16 minima round to nothing
        usual = relative_error(decode(codec.encode(BLOCK.pre[None, :, :64])[0]), BLOCK.pre[:, :64])
        assert relative_error(got, x[0]) < 1.1 * usual + 0.01


def test_a_large_mean_costs_what_float16_costs() -> None:
    """Scales are computed from the rounded minimum, so no value falls off the top of the grid."""
    x = 2000.2 + torch.rand(1, H, 64, D)  # float16 has whole numbers there: the minimum is 2000
    (run,) = KVCodec(bits=8, group_tokens=32).encode(x)
    assert float((decode(run) - x[0]).abs().max()) < 0.01


def test_codes_are_nearest_for_the_stored_scales() -> None:
    """Broken if scales are rounded after codes are chosen."""
    x = BLOCK.post[None, :, :64] * 37
    for codec in (KVCodec(bits=8, group_tokens=32), KVCodec(bits=8, group_channels=32)):
        (run,) = codec.encode(x)
        assert run.codes is not None
        got = decode(run)
        for step in (-1, 1):
            codes = unpack_rows(run.codes, 8, 64).int() + step
            other = decode(dataclasses.replace(run, codes=pack_rows(codes.clamp(0, 255).to(torch.uint8), 8)))
            assert bool(((got - x[0]).abs() <= (other - x[0]).abs() + 1e-4).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none_are_refused(bad: float) -> None:
    x = BLOCK.pre[None, :, :40].clone()
    x[0, 1, 2, 3] = bad
    with pytest.raises(NumericsError, match=r"\[1, 4, 40, 64\].*NaN or infinite"):
        CODECS["tokens 2"].encode(x)


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "no grouping": (lambda: KVCodec(bits=2), "choose exactly one"),
    "two groupings": (lambda: KVCodec(bits=2, group_tokens=32, group_channels=32), "choose exactly one"),
    "bits": (lambda: KVCodec(bits=5, group_tokens=32), "bits=5"),
    "group": (lambda: KVCodec(bits=2, group_tokens=20), "group_tokens=20"),
    "exact with groups": (lambda: KVCodec(bits=0, group_tokens=32), "group_tokens means nothing"),
    "levels": (lambda: KVCodec(bits=3, group_tokens=32, levels=TABLE), r"\[4\]; want float32 \[8\]"),
    "descending": (lambda: KVCodec(bits=2, group_tokens=32, levels=TABLE.flip(0)), "must ascend"),
    "q-norm alone": (lambda: KVCodec(bits=2, group_tokens=32, decode_levels=TABLE), "without levels"),
    "half of fixed": (lambda: KVCodec(bits=2, scale=torch.ones(4, 1, 64).half()), "both scale and minimum"),
    "wide fixed": (lambda: KVCodec(bits=2, scale=torch.ones(4, 1, 64), minimum=torch.ones(4, 1, 64)), "float32; it is"),
    "hadamard": (lambda: KVCodec(bits=2, group_channels=32, hadamard=48), "hadamard=48"),
    "order": (lambda: KVCodec(bits=2, group_channels=32, order=torch.zeros(64).to(torch.int16)), "no permutation"),
    "clip": (lambda: KVCodec(bits=2, group_channels=32, clip=1.2), "clip=1.2"),
    "quantile": (lambda: KVCodec(bits=2, group_channels=-1, range_rule="quantile"), "give such outliers"),
    "rule": (lambda: KVCodec(bits=2, group_channels=-1, range_rule="max"), "range_rule='max'"),
    "rank": (lambda: KVCodec(bits=2, group_channels=-1, rank=-1), "rank=-1"),
    "coupled alone": (lambda: KVCodec(bits=8, coupled=4), "need a codebook"),
    "coupled groups": (lambda: KVCodec(bits=8, coupled=8, codebook=_codebook(8, 8), rank=1), "rank means nothing"),
    "coupled bits": (lambda: KVCodec(bits=7, coupled=8, codebook=_codebook(7, 8)), "not 7"),
    "fraction": (lambda: OutlierRule(fraction=1.5), "1.5"),
    "no outliers": (lambda: OutlierRule(), "0.0 outliers"),
    "axis": (lambda: OutlierRule(fraction=0.1, along="heads"), "along 'heads'"),
    "one limit": (lambda: OutlierRule(lower=torch.zeros(4, 64)), "give both"),
    "cap": (lambda: OutlierRule(fraction=0.1, cap=3), "cap=3"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_exclude_each_other_are_refused(name: str) -> None:
    build, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        build()


@pytest.mark.parametrize(
    ("codec", "heads", "dim", "message"),
    [
        (CODECS["channels 3"], 3, 32, "groups of 128 channels do not divide 3 KV heads of size 32 = 96"),
        (CODECS["rotated"], 2, 64, "Hadamard transform of 256 does not divide 2 KV heads of size 64"),
        (CODECS["coupled 8"], 4, 60, "8 coupled channels do not divide the head size 60"),
        (CODECS["coupled 8"], 2, 64, r"codebook has shape \[4, 8, 256, 8\]; 2 KV heads of size 64 need \[2, 8"),
        (CODECS["kvquant keys"], 2, 64, r"scale has shape \[4, 1, 64\]; 2 KV heads of size 64 need \[2, 1, 64\]"),
        (KVCodec(bits=2, group_tokens=32, rank=65), 4, 64, "rank 65 exceeds the head size 64"),
        (CODECS["gear keys"], 1, 4096, "head size of at most 2048, not 4096"),
    ],
)
def test_shapes_that_do_not_fit_are_named(codec: KVCodec, heads: int, dim: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        codec.check_shape(heads, dim)
    with pytest.raises(ConfigError, match=message):
        codec.encode(torch.zeros(1, heads, 32, dim))


def test_input_that_is_no_block_is_refused() -> None:
    for x in (torch.zeros(4, 32, 64), torch.zeros(1, 4, 0, 64)):
        with pytest.raises(ConfigError, match="at least one of each"):
            CODECS["tokens 2"].encode(x)
    with pytest.raises(ConfigError, match="not torch.float64"):
        CODECS["tokens 2"].encode(torch.zeros(1, 4, 32, 64, dtype=torch.float64))


@pytest.mark.parametrize("dim", [64, 80, 96, 128])
@pytest.mark.parametrize("heads", [1, 8])
def test_other_shapes(heads: int, dim: int) -> None:
    x = torch.randn(2, heads, 70, dim)
    for codec in (
        KVCodec(bits=8, group_tokens=32),
        KVCodec(bits=8, group_channels=16),
        KVCodec(bits=8, group_channels=-1, hadamard=16),
        KVCodec(bits=8, group_tokens=-1, outliers=OutlierRule(fraction=0.1), rank=2),
    ):
        codec.check_shape(heads, dim)
        assert relative_error(torch.stack([decode(run) for run in codec.encode(x)]), x) < 0.02
