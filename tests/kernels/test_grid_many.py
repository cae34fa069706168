"""Several weights of one input in one call, and prepared once for many calls."""

from __future__ import annotations

import pytest
import torch

from trimtab.core.errors import ConfigError
from trimtab.kernels.bench import RMS_BOUND
from trimtab.kernels.grid_matmul import grid_matmul, grid_matmul_many
from trimtab.kernels.grid_matmul.prepared import prepared_grids
from trimtab.kernels.prepared import MAX_ROWS

from .conftest import Grid, inputs, make_grid, needs_native, relative_rms

# query, key and value of grouped heads; and weights that share no layout
ALIKE = [(64, 4, 32, "zeros"), (16, 4, 32, "zeros"), (17, 4, 32, "zeros")]
MIXED = [
    (9, 3, -1, "row_levels"),
    (40, 8, 32, "fractional"),
    (1, 4, 16, "levels"),
    (23, 4, 64, "symmetric"),
    (5, 2, 64, "zeros"),
]


def grids_of(layout: list[tuple[int, int, int, str]], width: int = 704) -> list[Grid]:
    return [make_grid(out, width, bits, group, kind, seed=seed) for seed, (out, bits, group, kind) in enumerate(layout)]


@needs_native
@pytest.mark.parametrize("layout", [ALIKE, MIXED], ids=["alike", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_call_is_bit_identical_to_several(
    isa: str, layout: list[tuple[int, int, int, str]], dtype: torch.dtype
) -> None:
    grids = grids_of(layout)
    weights = [grid.given for grid in grids]
    prepared = prepared_grids(weights)
    before = torch.get_num_threads()
    try:
        for rows in (1, 2, 7, 8, 40, 66):
            x = inputs(rows, 704, dtype).reshape(1, rows, 704)
            for threads in (1, 2, 3):  # of which torch's product of many rows is not independent
                torch.set_num_threads(threads)
                alone = [grid_matmul_many(x, [weight])[0] for weight in weights]
                for grid, result in zip(grids, alone, strict=True):
                    assert relative_rms(result, x.double() @ grid.weight().T) <= RMS_BOUND[dtype]
                ways = [grid_matmul_many(x, weights)] + ([prepared.run(x)] if rows <= MAX_ROWS else [])
                for together in ways:
                    for a, b in zip(alone, together, strict=True):
                        assert a.shape == b.shape
                        assert torch.equal(a, b), (rows, threads)
    finally:
        torch.set_num_threads(before)


def test_the_reference_is_separate_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_KERNELS", "reference")
    grids = grids_of(MIXED)
    x = inputs(3, 704, torch.float32)
    for grid, result in zip(grids, grid_matmul_many(x, [grid.given for grid in grids]), strict=True):
        assert relative_rms(result, x.double() @ grid.weight().T) <= RMS_BOUND[torch.float32]
        assert torch.equal(result, grid_matmul(x, **vars(grid.given)))


def test_weights_of_different_inputs_are_refused() -> None:
    weights = [make_grid(4, width, 4, 32).given for width in (64, 96)]
    for call in (prepared_grids, lambda weights: grid_matmul_many(torch.zeros(1, 64), weights)):
        with pytest.raises(ConfigError, match=r"equal in_features, not \[64, 96\]"):
            call(weights)
        with pytest.raises(ConfigError, match="no weights"):
            call([])
    with pytest.raises(ConfigError, match=r"x ends in \[63\]"):
        grid_matmul_many(torch.zeros(1, 63), weights[:1])
    with pytest.raises(ConfigError, match=r"x ends in \[\]"):
        grid_matmul_many(torch.tensor(1.0), weights[:1])
