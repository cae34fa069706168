"""What every kind of part owes to training and projection, and every transform to storage: one line per kind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trimtab.core.errors import CheckpointError, ConfigError, NumericsError
from trimtab.tensors import (
    ActivationGrid,
    BinaryBases,
    Bitmap,
    Chain,
    Codebook,
    CompressedTensor,
    GridFormat,
    GroupGrid,
    LevelTable,
    NestedFormat,
    Part,
    Rotation,
    SparseGrid,
    SparseInputs,
    SparseOutliers,
    TableFormat,
    svd,
)

WEIGHT = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))


def _grid(bits: int = 3, **options: object) -> GroupGrid:
    return GroupGrid.quantize(WEIGHT, GridFormat(bits=bits, group_size=16, **options))  # type: ignore[arg-type]


def _alphas() -> Tensor:
    return torch.tensor([0.8, 0.42, 0.23], dtype=torch.float16)[:, None].repeat(1, 6)


def _codebook(size: int, count: int) -> Codebook:
    """`count` codebooks of `size` vectors of 4 weights, drawn from the weight and then from random vectors."""
    drawn = (
        torch.randn(count, size, 4, generator=torch.Generator().manual_seed(2))
        / torch.arange(1, count + 1)[:, None, None]
    )
    codes = torch.zeros(6, 8, count, dtype=torch.uint8 if size <= 256 else torch.int16)
    return Codebook(codes, drawn.half(), torch.linspace(0.5, 2, 6).half()).project(WEIGHT)


PARTS: dict[str, Callable[[], Part]] = {
    "codebook": lambda: _codebook(16, 1),
    "codebook-additive": lambda: _codebook(16, 3),
    "codebook-wide": lambda: _codebook(512, 1),
    "grid": lambda: _grid(),
    "grid-asymmetric": lambda: _grid(symmetric=False),
    "grid-fractional": lambda: _grid(symmetric=False, zero_dtype="float16"),
    "table": lambda: LevelTable.quantize(WEIGHT, TableFormat(bits=3, group_size=16)),
    "table-nested": lambda: LevelTable.quantize(
        WEIGHT, TableFormat(group_size=8, nested=NestedFormat(bits=4, block_size=5, dtype="float16"))
    ),
    "table-stored": lambda: LevelTable.quantize(
        WEIGHT, TableFormat(bits=2, group_size=16, levels="stored"), torch.tensor([-1.0, 0.3, -0.2, 1.0])
    ),
    "binary": lambda: BinaryBases.nearest(WEIGHT, _alphas()),
    "binary-constant": lambda: BinaryBases.nearest(WEIGHT, _alphas(), torch.full((6,), 0.1, dtype=torch.float16)),
    "sparse_inputs": lambda: SparseInputs.of(WEIGHT.half(), 0.4, 9, rank=2),
    "sparse_inputs-plain": lambda: SparseInputs.of(WEIGHT.half(), 0.4, 9, weighted=False, prefill="dense"),
    "low_rank": lambda: svd(WEIGHT, 2, dtype=torch.float16),
    "sparse": lambda: SparseOutliers.select(WEIGHT, 0.1),
    "bitmap": lambda: Bitmap.from_dense(WEIGHT, WEIGHT > 0.3, torch.float16),
    "sparse_grid": lambda: SparseGrid.from_dense(WEIGHT, WEIGHT > 0.3),
}


@pytest.fixture(params=PARTS)
def part(request: pytest.FixtureRequest) -> Part:
    return PARTS[request.param]()


def test_dense_of_the_stored_numbers_is_the_weight(part: Part) -> None:
    assert torch.equal(part.dense(part.continuous()), part.dequantize())
    assert part.continuous().keys() <= part.state().keys()


def test_numbers_have_gradients_and_can_be_put_back(part: Part) -> None:
    numbers = {name: value.float().requires_grad_() for name, value in part.continuous().items()}
    gradient = torch.randn(part.shape)
    part.dense(numbers).backward(gradient)
    for name, value in numbers.items():
        assert value.grad is not None
        step = torch.randn_like(value) * 1e-3
        moved = part.dense({**numbers, name: value.detach() + step}) - part.dense(numbers)
        assert float((moved.detach() * gradient).sum()) == pytest.approx(float((value.grad * step).sum()), rel=2e-2)
    changed = part.with_continuous({name: value.detach() * 1.25 for name, value in numbers.items()})
    assert changed.spec() == part.spec()
    assert not torch.equal(changed.dequantize(), part.dequantize())
    with pytest.raises(NumericsError, match="cannot hold|positive"):
        stored = {name: value.dtype for name, value in part.continuous().items()}
        beyond = {name: 2 * torch.full_like(value, torch.finfo(stored[name]).max) for name, value in numbers.items()}
        part.with_continuous(beyond)


def test_projection_of_itself_changes_nothing_and_differ_changes_every_chosen_code(part: Part) -> None:
    shape = part.code_shape
    if shape is None:
        with pytest.raises(ConfigError, match="no codes"):
            part.project(WEIGHT, differ=True)
        return
    assert torch.equal(part.project(part.dequantize()).dequantize(), part.dequantize())
    subset = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.3
    changed = part.project(part.dequantize(), subset=subset, differ=True)
    spread = subset.repeat_interleave(part.shape[1] // shape[1], dim=1)
    moved = changed.dequantize() != part.dequantize()
    assert not bool(moved[~spread].any())
    assert bool(moved.reshape(*shape, -1).any(-1)[subset].all())


def test_differ_takes_the_second_nearest_level_of_a_grid() -> None:
    part = _grid(symmetric=False)
    levels = torch.arange(8.0)
    other = part.project(WEIGHT, differ=True)
    scales, zeros = (
        value.repeat_interleave(16, dim=1).float() for value in (part.scales, part.zeros) if value is not None
    )
    distance = (WEIGHT[..., None] - scales[..., None] * (levels - zeros[..., None])).abs()
    second = distance.argsort(dim=-1)[..., 1]
    assert torch.equal(other.codes().long(), second)


# Transforms


def _index(*places: int) -> Tensor:
    return torch.tensor(places, dtype=torch.int32)


def test_static_integers_depend_on_no_other_token_and_repeat_exactly() -> None:
    grid = ActivationGrid(4, mode="static", index=_index(0, 1, 1, 2, 3))
    x = torch.tensor([[0.5, 1.5, -9.0, 2.4], [100.0, 0.0, 0.0, 0.0]])
    assert torch.equal(grid.apply(x)[0], torch.tensor([0.0, 2.0, 2.0, -7.0, 2.0]))
    assert torch.equal(grid.apply(x)[:1], grid.apply(x[:1]))


@pytest.mark.parametrize("symmetric", [True, False])
def test_integers_per_token_are_within_half_a_step(symmetric: bool) -> None:
    x = torch.randn(5, 64) + (0 if symmetric else 2)
    grid = ActivationGrid(64, bits=4, symmetric=symmetric)
    _, step, _ = grid.integers(x)
    assert step is not None
    # both ends of an asymmetric range lose up to half a step to the rounded zero point
    assert bool(((grid.apply(x) - x).abs() <= step * (0.5 if symmetric else 1.0) + 1e-6).all())
    assert torch.equal(grid.apply(torch.zeros(1, 64)), torch.zeros(1, 64))


def test_a_transform_with_buffers_is_stored_folded_and_checked() -> None:
    chain = Chain((Rotation(4, 3), ActivationGrid(4, bits=8, index=_index(3, 0, 1, 2, 2))))
    part = GroupGrid.quantize(torch.randn(6, 5), GridFormat(bits=8, group_size=-1))
    tensor = CompressedTensor((part,), chain)
    assert tensor.shape == (6, 4)
    assert tensor.nbytes == part.nbytes + 5 * 4
    x = torch.randn(3, 4)
    assert torch.allclose(tensor.matmul(x), x @ tensor.dequantize().T, atol=0.1)
    again = CompressedTensor.from_state(tensor.spec(), tensor.state())
    assert torch.equal(again.matmul(x), tensor.matmul(x))
    assert CompressedTensor.buffers(tensor.spec())["transform.1.index"] == ((5,), torch.int32)
    broken = CompressedTensor.from_state(tensor.spec(), {**tensor.state(), "transform.1.index": _index(0, 1, 2, 3, 9)})
    with pytest.raises(CheckpointError, match=r"0 \.\. 9 for 4 inputs"):
        broken.check()
    part_state = {f"0.{name}": value for name, value in part.state().items()}
    with pytest.raises(CheckpointError, match="unknown kind 'fourier'"):
        CompressedTensor.from_state({**tensor.spec(), "transform": {"kind": "fourier"}}, part_state)


def test_widths_of_a_chain_must_follow() -> None:
    with pytest.raises(ConfigError, match="do not follow"):
        Chain((Rotation(4), Rotation(8)))
    with pytest.raises(ConfigError, match="static activation grid is symmetric"):
        ActivationGrid(4, mode="static", symmetric=False)
