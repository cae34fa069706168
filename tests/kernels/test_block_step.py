"""block_step: every instruction set against plain PyTorch between the same products."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from trimtab.core.errors import ConfigError
from trimtab.kernels import library
from trimtab.kernels.block_step import (
    MAX_ROWS,
    Block,
    Layer,
    LowRankTerm,
    Norm,
    PreparedBlock,
    SparseTerm,
    after_reference,
    before_reference,
    reference,
    refuses,
)
from trimtab.kernels.grid_matmul import GridWeight, native
from trimtab.kernels.packing import pack
from trimtab.kernels.sparse_matmul import SparseWeight
from trimtab.kernels.sparse_matmul import native as sparse_kernels
from trimtab.kernels.terms import native as term_kernels

from .conftest import inputs, make_grid
from .test_sparse_matmul import CODES, sparse

HERE = library.machine_isas() if library.absent() is None else ()
pytestmark = pytest.mark.skipif(not HERE, reason=str(library.absent()))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MOSTLY = 0.97  # numbers of 16 bits that are the same; where a rounding was left out, two thirds are
HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER = 6, 2, 24, 80, 112


@pytest.fixture
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param not in HERE:
        pytest.skip(f"this machine has {', '.join(HERE)}")
    monkeypatch.setenv("TRIMTAB_ISA", request.param)
    return str(request.param)


every_isa = pytest.mark.parametrize("isa", library.ISAS, indirect=True)


@pytest.fixture(autouse=True)
def same_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared is all that stands between the products and terms: those have suites of their own."""
    monkeypatch.setattr(reference, "grid_matmul_reference", native.grid_matmul_native)
    monkeypatch.setattr(reference, "sparse_matmul_reference", sparse_kernels.sparse_matmul_native)
    monkeypatch.setattr(reference, "low_rank_add_reference", term_kernels.low_rank_add_native)
    monkeypatch.setattr(reference, "sparse_add_reference", term_kernels.sparse_add_native)


def layer(out: int, width: int, dtype: torch.dtype, seed: int, *, bias: bool, bits: int = 4) -> Layer:
    given = make_grid(out, width, bits, 16, seed=seed).given
    given = replace(given, scales=given.scales * (3 / 2**bits * width**-0.5))
    return Layer(given, inputs(1, out, dtype, seed=seed)[0] * 0.3 if bias else None)


def terms(out: int, width: int, dtype: torch.dtype, seed: int) -> tuple[LowRankTerm | SparseTerm, ...]:
    """A low-rank term with factors of `dtype`, a sparse one, and another low-rank one."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.randint(0, 3, (out + 1,), generator=generator, dtype=torch.int32)
    offsets[0] = 0
    offsets = offsets.cumsum(0).int()
    columns = torch.randint(0, width, (int(offsets[-1]),), generator=generator, dtype=torch.int32)
    values = torch.randn(len(columns), generator=generator)
    ranks = [
        LowRankTerm(0.3 * inputs(out, rank, dtype, seed), 0.3 * inputs(rank, width, dtype, seed)) for rank in (3, 2)
    ]
    return ranks[0], SparseTerm(values, columns, offsets), ranks[1]


def with_terms(block: Block, dtype: torch.dtype, names: tuple[str, ...] = ("q", "v", "o", "up", "down")) -> Block:
    """The block with terms in some layers."""
    changed = {}
    for name in names:
        one = block.layers()[name]
        more = terms(one.weight.out_features, one.weight.in_features, dtype, sum(map(ord, name)))
        changed[name] = replace(one, terms=more if name != "v" else more[:1])
    return replace(block, **changed)


def sparsified(block: Block, names: tuple[str, ...]) -> Block:
    """The block with bitmaps in some layers: numbers and codes in turn. Terms and biases stay."""
    changed = {}
    for place, name in enumerate(names):
        one = block.layers()[name]
        width = one.weight.in_features
        dtype = (torch.bfloat16, CODES)[place % 2]
        weight = sparse(one.weight.out_features, width, 0.5, dtype, seed=place)[1]
        if weight.scales is None:
            weight = replace(weight, values=weight.values * width**-0.5)
        else:
            weight = replace(weight, scales=weight.scales * (0.2 * width**-0.5))
        changed[name] = replace(one, weight=weight)
    return replace(block, **changed)


def norm(width: int, dtype: torch.dtype, seed: int) -> Norm:
    return Norm((1 + 0.2 * inputs(1, width, torch.float32, seed)[0]).to(dtype), 1e-3)


def make_block(dtype: torch.dtype, *, bias: bool = False, head_norms: bool = False) -> Block:
    shapes = {
        "q": (HEADS * HEAD_DIM, HIDDEN),
        "k": (KV_HEADS * HEAD_DIM, HIDDEN),
        "v": (KV_HEADS * HEAD_DIM, HIDDEN),
        "o": (HIDDEN, HEADS * HEAD_DIM),
        "gate": (INNER, HIDDEN),
        "up": (INNER, HIDDEN),
        "down": (HIDDEN, INNER),
    }
    layers = {
        name: layer(*shape, dtype, place, bias=bias, bits=(2, 3, 4, 8)[place % 4])
        for place, (name, shape) in enumerate(shapes.items())
    }
    return Block(
        **layers,
        attention_norm=norm(HIDDEN, dtype, 20),
        mlp_norm=norm(HIDDEN, dtype, 21),
        q_norm=norm(HEAD_DIM, dtype, 22) if head_norms else None,
        k_norm=norm(HEAD_DIM, dtype, 23) if head_norms else None,
        head_dim=HEAD_DIM,
    )


def tensors(rows: int, tokens: int, dtype: torch.dtype, tables: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, cos, sin and attended values."""
    x = 0.1 * inputs(rows * tokens, HIDDEN, torch.float32)
    angles = 7 * inputs(tables * tokens, HEAD_DIM, torch.float32, seed=2).view(tables, tokens, HEAD_DIM)
    attended = inputs(rows * tokens, HEADS * HEAD_DIM, dtype, seed=3)
    return (
        x.to(dtype).view(rows, tokens, HIDDEN),
        angles.cos().to(dtype),
        angles.sin().to(dtype),
        attended.view(rows, tokens, -1),
    )


def agree(found: Tensor, expected: Tensor) -> bool:
    """Most numbers are the same, and none is far off: roundings fall the other way only where float32 sums differ."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    if found.dtype == torch.float32:
        return torch.allclose(found, expected, atol=1e-5, rtol=1e-5)
    unit = torch.finfo(found.dtype).eps
    near = torch.allclose(found.double(), expected.double(), atol=8 * unit, rtol=8 * unit)
    return near and float((found == expected).double().mean()) > MOSTLY


def parity(block: Block, made: Block, rows: int = 1, tokens: int = 1, tables: int = 1) -> bool:
    """Whether the native step of `made` is the reference's of `block`."""
    x, cos, sin, attended = tensors(rows, tokens, block.attention_norm.weight.dtype, tables)
    prepared = PreparedBlock(made)
    found = [*prepared.before(x, cos, sin), prepared.after(attended, x)]
    expected = [*before_reference(block, x, cos, sin), after_reference(block, attended, x)]
    return all(agree(f, e) for f, e in zip(found, expected, strict=True))


@every_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"head_norms": True}], ids=str)
def test_native_parity(isa: str, dtype: torch.dtype, options: dict[str, bool]) -> None:
    block = make_block(dtype, **options)
    assert refuses(block) is None
    for rows in range(1, MAX_ROWS + 1):
        assert parity(block, block, rows), rows
        assert parity(block, block, rows, tables=rows), rows
    for rows, tokens, tables in ((1, 5, 1), (2, 3, 1), (2, 4, 2)):
        assert parity(block, block, rows, tokens, tables), (rows, tokens, tables)


@every_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float16])
def test_native_parity_with_terms(isa: str, dtype: torch.dtype, factors: torch.dtype) -> None:
    block = with_terms(make_block(dtype, bias=True), factors)
    assert refuses(block) is None
    for rows in (1, 3, MAX_ROWS):
        assert parity(block, block, rows), rows
    for name, one in block.layers().items():
        for place in range(len(one.terms)):
            fewer = replace(one, terms=one.terms[:place] + one.terms[place + 1 :])
            assert not parity(block, replace(block, **{name: fewer})), (name, place)


@every_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("names", [("q", "k", "v", "o", "gate", "up", "down"), ("k", "up", "o")], ids=["all", "some"])
def test_native_parity_with_bitmaps(isa: str, dtype: torch.dtype, names: tuple[str, ...]) -> None:
    """Also beside grids that read the same input, and with terms and biases behind them."""
    plain = sparsified(make_block(dtype, bias=True), names)
    for block in (plain, with_terms(plain, torch.bfloat16)):
        assert refuses(block) is None
        for rows in (1, 3, MAX_ROWS):
            assert parity(block, block, rows), rows
    other = replace(plain, k=replace(plain.k, weight=plain.v.weight))
    assert not parity(plain, other)


def test_bitmaps_that_cannot_be_read_are_refused() -> None:
    block = sparsified(make_block(torch.bfloat16), ("k",))
    assert isinstance(block.k.weight, SparseWeight)
    double = replace(block.k.weight, values=block.k.weight.values.double())
    assert "values is torch.float64" in str(refuses(replace(block, k=replace(block.k, weight=double))))
    with pytest.raises(ConfigError, match="bitmap is"):
        wrong = replace(block.k.weight, bitmap=block.k.weight.bitmap[:, :1].contiguous())
        refuses(replace(block, k=replace(block.k, weight=wrong)))


def test_empty_terms_are_nothing() -> None:
    block = make_block(torch.bfloat16)
    out, width = block.up.weight.out_features, block.up.weight.in_features
    half = torch.empty(0).bfloat16()
    none = LowRankTerm(half.view(out, 0), half.view(0, width)), SparseTerm(half, half.int(), torch.zeros(out + 1).int())
    assert parity(block, replace(block, up=replace(block.up, terms=none)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", ["attention_norm", "mlp_norm", "q_norm", "k_norm"])
def test_another_epsilon_is_no_parity(dtype: torch.dtype, part: str) -> None:
    block = make_block(dtype, head_norms=True)
    own: Norm = getattr(block, part)
    assert parity(block, block)
    assert not parity(block, replace(block, **{part: replace(own, epsilon=100 * own.epsilon)}))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_part_too_few_is_no_parity(dtype: torch.dtype) -> None:
    block = make_block(dtype, bias=True, head_norms=True)
    for name, one in block.layers().items():
        assert not parity(block, replace(block, **{name: replace(one, bias=None)})), name
    for name in ("q_norm", "k_norm"):
        assert not parity(block, replace(block, **{name: None})), name
    assert not parity(block, replace(block, gate=block.up, up=block.gate))


def test_the_activation_is_that_of_torch_everywhere() -> None:
    """Through a block whose other parts are the identity: x, and from it gate(x) * 1."""
    size = 64
    eye = torch.eye(size, dtype=torch.int64)

    def weight(matrix: Tensor) -> GridWeight:
        return GridWeight(pack((matrix + 2).to(torch.uint8), 2), torch.ones(size, 1), None, 2, -1, size)

    zero, one = Layer(weight(0 * eye)), Layer(weight(eye))
    values = torch.cat((torch.linspace(-120, 120, 60), torch.tensor([0.0, 89.5, -1e-30, 1e-30])))
    block = Block(
        q=zero,
        k=zero,
        v=zero,
        o=zero,
        gate=Layer(weight(0 * eye), values),
        up=Layer(weight(0 * eye), torch.ones(size)),
        down=one,
        attention_norm=Norm(torch.ones(size), 1e-5),
        mlp_norm=Norm(torch.ones(size), 1e-5),
        head_dim=16,
    )
    x = torch.zeros(1, 1, size)
    found = PreparedBlock(block).after(x, x)[0, 0]
    torch.testing.assert_close(found, torch.nn.functional.silu(values), atol=1e-30, rtol=4e-7)


@every_isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_depends_on_neither_batch_nor_threads(isa: str, dtype: torch.dtype) -> None:
    block = with_terms(make_block(dtype, bias=True, head_norms=True), torch.bfloat16, ("k", "o"))
    wide = replace(block, gate=layer(4096, HIDDEN, dtype, 1, bias=False), up=layer(4096, HIDDEN, dtype, 2, bias=False))
    wide = replace(wide, down=layer(HIDDEN, 4096, dtype, 3, bias=True))
    x, cos, sin, attended = tensors(MAX_ROWS, 1, dtype, MAX_ROWS)
    prepared = PreparedBlock(wide)
    alone = [
        [
            *prepared.before(x[row : row + 1], cos[row : row + 1], sin[row : row + 1]),
            prepared.after(attended[row : row + 1], x[row : row + 1]),
        ]
        for row in range(MAX_ROWS)
    ]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            together = [*prepared.before(x, cos, sin), prepared.after(attended, x)]
            for place, found in enumerate(together):
                assert torch.equal(found, torch.cat([one[place] for one in alone])), (threads, place)
    finally:
        torch.set_num_threads(before)


def test_what_does_not_fit_is_refused_in_words() -> None:
    block = make_block(torch.bfloat16, bias=True)
    assert "mlp_norm is torch.float32" in str(refuses(replace(block, mlp_norm=norm(HIDDEN, torch.float32, 1))))
    half = replace(block.up, bias=torch.ones(INNER).half())
    assert "bias of up is torch.float16" in str(refuses(replace(block, up=half)))
    wide = layer(168, HIDDEN, torch.bfloat16, 0, bias=False)
    assert "o is [80, 144] where [80, 168]" in str(refuses(replace(block, q=wide)))
    assert "the bias of k is [3]" in str(refuses(replace(block, k=replace(block.k, bias=torch.ones(3).bfloat16()))))
    assert "mlp_norm is [81]" in str(refuses(replace(block, mlp_norm=norm(81, torch.bfloat16, 1))))
    assert "not heads of 36" in str(refuses(replace(block, head_dim=36)))
    few = LowRankTerm(torch.ones(INNER, 2).bfloat16(), torch.ones(2, 3).bfloat16())
    assert "a term of it {'left': [112, 2], 'right': [2, 3]}" in str(
        refuses(replace(block, up=replace(block.up, terms=(few,))))
    )
    exact = LowRankTerm(torch.ones(INNER, 2), torch.ones(2, HIDDEN))
    assert "up: factors are torch.float32" in str(refuses(replace(block, up=replace(block.up, terms=(exact,)))))
    spread = torch.ones(HIDDEN, 2).bfloat16()[:, 0]
    assert "not contiguous" in str(refuses(replace(block, mlp_norm=Norm(spread, 1e-5))))
    assert "on meta" in str(refuses(replace(block, mlp_norm=Norm(spread.contiguous().to("meta"), 1e-5))))


def test_moved_memory_is_seen() -> None:
    block = make_block(torch.bfloat16)
    prepared = PreparedBlock(block)
    block.mlp_norm.weight.mul_(2)
    assert not prepared.moved()
    assert parity(block, block)
    block.mlp_norm.weight.data = block.mlp_norm.weight.data.clone()
    assert prepared.moved()
