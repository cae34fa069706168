"""One query over dense keys and values: the kernel of runs against torch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trimtab.kernels import library
from trimtab.kernels.bench import RMS_BOUND
from trimtab.kernels.kv_attention import dense

from .conftest import relative_rms

pytestmark = pytest.mark.skipif(
    library.absent() is not None or library.machine_isas() == ("scalar",), reason="no native kernel is used here"
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def qkv(
    rows: int, heads: int, kv_heads: int, tokens: int, dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = (rows, heads, 1, dim), (rows, kv_heads, tokens, dim), (rows, kv_heads, tokens, dim)
    query, key, value = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return query, key, value


def expected(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    exact = torch.nn.functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), scale=scale, enable_gqa=True
    )
    return exact.transpose(1, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8, 2, 300, 64), (3, 6, 2, 257, 24), (2, 4, 4, 256, 80), (1, 12, 1, 1025, 128)])
def test_parity(dtype: torch.dtype, shape: tuple[int, int, int, int, int]) -> None:
    query, key, value = qkv(*shape, dtype)
    found = dense.one_query(query, key, value, 0.3)
    assert dense.takes(query, key, value)
    assert found.dtype == dtype
    assert found.shape == (shape[0], 1, shape[1], shape[4])
    assert found.is_contiguous()
    assert relative_rms(found, expected(query, key, value, 0.3)) < RMS_BOUND[dtype]


def test_tensors_are_read_where_they_lie() -> None:
    """Keys in a buffer with room for more, values token by token, a query of one token out of several."""
    query, key, value = qkv(2, 6, 2, 300, 32, torch.float32)
    room = torch.full((2, 2, 400, 32), torch.nan)
    room[:, :, 50:350] = key
    found = dense.one_query(
        torch.cat((query, query + 1), 2)[:, :, :1],
        room[:, :, 50:350],
        value.transpose(1, 2).contiguous().transpose(1, 2),
        0.2,
    )
    assert torch.equal(found, dense.one_query(query, key, value, 0.2))


def test_what_it_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = qkv(1, 4, 2, 300, 32, torch.float32)
    assert dense.takes(query, key, value)
    assert not dense.takes(query, key[:, :, :255], value[:, :, :255])
    assert not dense.takes(query.expand(1, 4, 2, 32), key, value)
    assert not dense.takes(query, key, value.bfloat16())
    assert not dense.takes(query, key.double(), value.double())
    assert not dense.takes(query, key, value[:, :1])
    assert not dense.takes(query[:, :3], key, value)
    assert not dense.takes(query, key.transpose(2, 3).contiguous().transpose(2, 3), value)
    assert not dense.takes(query.clone().requires_grad_(), key, value)
    with torch.no_grad():
        assert dense.takes(query.clone().requires_grad_(), key, value)
    monkeypatch.setenv("TRIMTAB_KERNELS", "reference")
    assert not dense.takes(query, key, value)
