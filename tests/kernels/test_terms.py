"""The terms that are added to a product: parity with the reference on every instruction set, in place, rounded once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trimtab.core.errors import ConfigError, KernelUnavailable
from trimtab.kernels import library
from trimtab.kernels.op import KERNELS_VARIABLE
from trimtab.kernels.terms import low_rank_add, sparse_add
from trimtab.kernels.terms.native import low_rank_refuses, sparse_refuses
from trimtab.kernels.terms.reference import low_rank_add_reference, sparse_add_reference

pytestmark = pytest.mark.skipif(library.absent() is not None, reason="the native library is not built")

X_DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FACTORS = [torch.float16, torch.bfloat16]
ISAS = [*library.machine_isas()] if library.absent() is None else []
TOLERANCE = {torch.float32: 2e-3, torch.float16: 2e-3, torch.bfloat16: 8e-3}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def sparse(rows: int, columns: int, share: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    dense = draw(rows, columns) * (torch.rand(rows, columns, generator=torch.Generator().manual_seed(1)) < share)
    dense[rows // 2] = 0
    places = dense.nonzero()
    offsets = torch.cat([torch.zeros(1), (dense != 0).sum(1).cumsum(0)])
    return dense[dense != 0].to(dtype), places[:, 1].int(), offsets.int()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("dtype", X_DTYPES)
@pytest.mark.parametrize(
    ("rows", "out", "width", "rank"), [(1, 96, 64, 16), (1, 33, 71, 3), (8, 130, 257, 64), (3, 5, 7, 1)]
)
def test_low_rank_on_every_instruction_set(
    rows: int,
    out: int,
    width: int,
    rank: int,
    dtype: torch.dtype,
    factors: torch.dtype,
    isa: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(library.ISA_VARIABLE, isa)
    monkeypatch.setenv(KERNELS_VARIABLE, "native")
    x, left, right = (
        draw(rows, width, dtype=dtype),
        draw(out, rank, seed=1, dtype=factors),
        draw(rank, width, seed=2, dtype=factors),
    )
    before = draw(rows, out, seed=3, dtype=dtype)
    expected = low_rank_add_reference(before, x, left, right)
    given = before.clone()
    found = low_rank_add(given, x, left, right)
    assert found is given
    assert relative(found, expected) < TOLERANCE[torch.bfloat16 if factors == torch.bfloat16 else dtype]


@pytest.mark.parametrize("scale", [1e-6, 1e6, 3e30])
def test_inputs_beyond_the_factors_range_are_brought_into_it(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KERNELS_VARIABLE, "native")
    x = draw(2, 64) * scale
    x[1] *= 1e-3
    left, right = draw(24, 4, seed=1, dtype=torch.float16), draw(4, 64, seed=2, dtype=torch.float16)
    found = low_rank_add(torch.zeros(2, 24), x, left, right)
    expected = low_rank_add_reference(torch.zeros(2, 24), x, left, right)
    for row in range(2):
        assert relative(found[row], expected[row]) < 2e-3


def test_what_is_not_finite_shows_in_its_row_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KERNELS_VARIABLE, "native")
    x = draw(3, 64)
    x[1, 5] = torch.nan
    left, right = draw(24, 4, seed=1, dtype=torch.float16), draw(4, 64, seed=2, dtype=torch.float16)
    found = low_rank_add(torch.zeros(3, 24), x, left, right)
    assert bool(torch.isnan(found[1]).all())
    assert bool(torch.isfinite(found[[0, 2]]).all())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("values", X_DTYPES)
@pytest.mark.parametrize("dtype", X_DTYPES)
@pytest.mark.parametrize(("rows", "out", "width", "share"), [(1, 96, 64, 0.05), (4, 33, 71, 0.4), (8, 9, 300, 1.0)])
def test_sparse_on_every_instruction_set(
    rows: int,
    out: int,
    width: int,
    share: float,
    dtype: torch.dtype,
    values: torch.dtype,
    isa: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(library.ISA_VARIABLE, isa)
    monkeypatch.setenv(KERNELS_VARIABLE, "native")
    term = sparse(out, width, share, values)
    x, before = draw(rows, width, seed=4, dtype=dtype), draw(rows, out, seed=3, dtype=dtype)
    expected = sparse_add_reference(before, x, *term)
    given = before.clone()
    found = sparse_add(given, x, *term)
    assert found is given
    assert torch.allclose(found.float(), expected.float(), rtol=1e-2 if dtype == torch.bfloat16 else 2e-3, atol=1e-3)
    empty = out // 2
    assert torch.equal(found[:, empty], before[:, empty])


def test_threads_and_other_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KERNELS_VARIABLE, "native")
    x, left, right = (
        draw(5, 2048, dtype=torch.bfloat16),
        draw(3000, 32, dtype=torch.bfloat16),
        draw(32, 2048, dtype=torch.bfloat16),
    )
    term = sparse(3000, 2048, 0.01, torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(low_rank_add(torch.zeros(5, 3000).bfloat16(), x, left, right))
            found.append(sparse_add(torch.zeros(5, 3000).bfloat16(), x, *term))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[i], found[i % 2]) for i in range(6))
    assert torch.equal(low_rank_add(torch.zeros(1, 3000).bfloat16(), x[2:3], left, right), found[0][2:3])


def test_what_native_kernels_refuse() -> None:
    x, left, right = draw(1, 64), draw(8, 2, dtype=torch.float16), draw(2, 64, dtype=torch.float16)
    out = torch.zeros(1, 8)
    assert "float32" in str(low_rank_refuses(out, x, left.float(), right.float()))
    assert "more than 8 rows" in str(low_rank_refuses(torch.zeros(9, 8), draw(9, 64), left, right))
    assert "contiguous" in str(low_rank_refuses(out, x, left.t().contiguous().t(), right))
    assert "gradient" in str(low_rank_refuses(out, x.clone().requires_grad_(), left, right))
    values, columns, offsets = sparse(8, 64, 0.2, torch.float16)
    assert "columns torch.int64" in str(sparse_refuses(out, x, values, columns.long(), offsets))
    assert low_rank_refuses(out, x, left, right) is None
    assert sparse_refuses(out, x, values, columns, offsets) is None


def test_shapes_that_do_not_fit_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    x, left, right = draw(1, 64), draw(8, 2, dtype=torch.float16), draw(2, 64, dtype=torch.float16)
    with pytest.raises(ConfigError, match=r"do not give \[1, 9\]"):
        low_rank_add(torch.zeros(1, 9), x, left, right)
    with pytest.raises(ConfigError, match="do not take"):
        sparse_add(torch.zeros(1, 9), x, *sparse(8, 64, 0.2, torch.float16))
    wanted = x.clone().requires_grad_()
    low_rank_add(torch.zeros(1, 8), wanted, left, right).sum().backward()
    assert wanted.grad is not None
    monkeypatch.setenv(KERNELS_VARIABLE, "native")
    with pytest.raises(KernelUnavailable, match="more than 8 rows"):
        low_rank_add(torch.zeros(9, 8), draw(9, 64), left, right)
