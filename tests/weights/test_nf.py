"""NormalFloat as a method: the paper's formula, idempotence, bytes. The table itself: tests/tensors/test_table.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trimtab.models.views import LinearView
from trimtab.tensors import table
from trimtab.tensors.table import LevelTable
from trimtab.weights.nf import Nf

Make = Callable[[Tensor], LinearView]
LEVELS = {2: [-1, 0, 0.3379152, 1], 3: [-1, -0.4786292, -0.2171418, 0, 0.1609302, 0.3379152, 0.5626170, 1]}


def part_of(linear: LinearView, method: Nf) -> LevelTable:
    tensor, notes = method.compress(linear, None)
    assert notes == {}
    (part,) = tensor.parts
    assert isinstance(part, LevelTable)
    return part


def by_flat_blocks(weight: Tensor, bits: int, block: int) -> Tensor:
    """The paper's blocks of consecutive weights of the flattened matrix, one by one."""
    levels, rounded = torch.tensor(LEVELS[bits]), []
    for values in weight.flatten().split(block):
        scale = values.abs().max()
        distance = (values[:, None] / scale - levels).abs()
        rounded.append(scale * levels[distance.argmin(dim=1)])  # the lower of two equally near
    return torch.cat(rounded).reshape(weight.shape)


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("group_size", [16, 64])
def test_is_the_papers_quantizer_of_the_flattened_matrix(linear_of: Make, bits: int, group_size: int) -> None:
    weight = torch.randn(12, 64, generator=torch.Generator().manual_seed(bits))
    found = part_of(linear_of(weight), Nf(bits=bits, group_size=group_size, scale_dtype="float32"))
    torch.testing.assert_close(found.dequantize(), by_flat_blocks(weight, bits, group_size), rtol=1e-6, atol=1e-6)


def test_the_formula_check_notices_even_levels(linear_of: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "normal_float", lambda bits: torch.linspace(-1, 1, 1 << bits))
    with pytest.raises(AssertionError):
        test_is_the_papers_quantizer_of_the_flattened_matrix(linear_of, 3, 64)


@pytest.mark.parametrize("scale_dtype", ["float16", "float32", "bfloat16"])
def test_compressing_the_result_again_changes_nothing(linear_of: Make, scale_dtype: str) -> None:
    """The ends of the table are -1 and 1, so the largest weight of a group is its scale, exactly."""
    weight = torch.randn(12, 64, generator=torch.Generator().manual_seed(0))
    method = Nf(bits=4, group_size=16, scale_dtype=scale_dtype)  # type: ignore[arg-type]
    once = part_of(linear_of(weight), method)
    again = part_of(linear_of(once.dequantize()), method)
    assert torch.equal(again.codes(), once.codes())
    assert torch.equal(again.scales, once.scales)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_double_quantization_halves_the_overhead_and_hardly_changes_the_error(linear_of: Make, bits: int) -> None:
    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    plain, double = (part_of(linear_of(weight), Nf(bits=bits, double_quant=d)) for d in (False, True))
    assert plain.nbytes * 8 / weight.numel() == bits + 0.25
    assert double.nbytes * 8 / weight.numel() == pytest.approx(bits + 0.127, abs=2e-4)
    errors = [float((part.dequantize() - weight).square().sum()) for part in (plain, double)]
    assert errors[1] == pytest.approx(errors[0], rel=0.01)
