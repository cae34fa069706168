"""The part that reads the columns of large inputs: storage, counts, dtypes, gradients, damage."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from trimtab.core.errors import CheckpointError
from trimtab.kernels.gather_matmul import MAX_ROWS
from trimtab.tensors.base import part_from_state
from trimtab.tensors.sparse_inputs import SparseInputs

WEIGHT = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))


def made(**options: Any) -> SparseInputs:
    return SparseInputs.of(WEIGHT, 3.0, 13, **{"rank": 3, **options})


@pytest.mark.parametrize("options", [{}, {"rank": 0}, {"weighted": False, "prefill": "dense"}])
def test_is_stored_and_rebuilt_without_copying(options: dict[str, Any]) -> None:
    part = made(**options)
    again = part_from_state(part.spec(), part.state())
    assert isinstance(again, SparseInputs)
    assert again.spec() == part.spec()
    assert all(again.state()[name] is tensor for name, tensor in part.state().items())
    x = torch.randn(20, 40)
    assert torch.equal(again.matmul(x), part.matmul(x))
    assert SparseInputs.buffers(part.spec()) == {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in part.state().items()
    }
    assert torch.equal(part.dequantize(), WEIGHT)
    part.check()


def test_bytes_and_operations_of_an_average_token() -> None:
    part = made(factor_dtype=torch.float16)
    factors, norms, threshold = 2 * 3 * (24 + 40), 4 * 40, 4
    assert part.nbytes == 4 * 24 * 40 + factors + norms + threshold
    assert part.read_bytes == 4 * 24 * 13 + factors + norms + threshold
    assert part.macs == 13 * 24 + 3 * (24 + 40)
    assert made(rank=0, weighted=False).read_bytes == 4 * 24 * 13 + 4


@pytest.mark.parametrize("rows", [1, MAX_ROWS, MAX_ROWS + 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_are_those_of_the_chosen_columns(rows: int, dtype: torch.dtype) -> None:
    part = made()
    x = torch.randn(rows, 40, dtype=dtype, requires_grad=True)
    y = part.matmul(x)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert x.grad is not None
    assert part.left is not None
    assert part.right is not None
    large = (x.detach().float().abs() * WEIGHT.norm(dim=0)) > 3.0
    expected = torch.where(large, WEIGHT.sum(dim=0), (part.left @ part.right).sum(dim=0))
    assert torch.allclose(x.grad.float(), expected, atol=0.2 if dtype == torch.bfloat16 else 1e-4)
    with torch.no_grad():
        assert torch.allclose(part.matmul(x).float(), y.float(), atol=0.1 if dtype == torch.bfloat16 else 1e-4)


def test_nan_counts_so_that_it_shows() -> None:
    for rows in (1, 20):
        x = torch.zeros(rows, 40)
        x[0, 3] = torch.nan
        found = made().matmul(x)
        assert bool(found[0].isnan().all())
        assert not bool(found[1:].isnan().any())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kept": 41}, "'kept' must be a count up to 40, not 41"),
        ({"kept": -1}, "'kept' must be a count"),
        ({"kept": True}, "'kept' must be a count"),
        ({"rank": 25}, "'rank' must be a count up to 24, not 25"),
        ({"prefill": "half"}, "'prefill' is sparse or dense.*'half'"),
        ({"weighted": 1}, "'weighted' true or false"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"factor_dtype": None}, "unknown dtype None"),
        ({"rank": 0}, r"unexpected buffers \['left', 'right'\]"),
        ({"weighted": False}, r"unexpected buffers \['scale'\]"),
        ({"shape": [40, 24]}, "buffer 'columns' is"),
    ],
)
def test_a_spec_that_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    part = made()
    with pytest.raises(CheckpointError, match=message):
        part_from_state({**part.spec(), **changes}, part.state())


@pytest.mark.parametrize("name", ["columns", "threshold", "scale", "left", "right"])
def test_damaged_numbers_are_named(name: str) -> None:
    part = made()
    broken = part.state()[name].clone()
    broken.view(-1)[0] = torch.nan
    with pytest.raises(CheckpointError, match=f"'{name}' has NaN or infinity"):
        dataclasses.replace(part, **{name: broken}).check()
    assert part.scale is not None
    with pytest.raises(CheckpointError, match="below 0"):
        dataclasses.replace(part, scale=-part.scale).check()
