"""Splitting and merging channels: what is exact, what is stored, what is refused."""

from __future__ import annotations

import pytest
import torch

from trimtab.core.errors import CheckpointError, ConfigError
from trimtab.tensors.reindex import Reindex

SPLIT = [([0], 1), ([1], 3), ([1], 3), ([1], 3), ([2], 1)]
MERGED = [([0, 2], 1), ([1], 2), ([1], 2), ([3], 1)]


def test_splitting_alone_changes_no_output() -> None:
    reindex = Reindex.of(3, SPLIT)
    x, weight = torch.randn(7, 3), torch.randn(4, 3)
    assert torch.allclose(reindex.apply(x) @ reindex.expand(weight).t(), x @ weight.t(), atol=1e-5)
    assert torch.allclose(reindex.apply(x)[:, 1], x[:, 1] / 3)
    assert torch.allclose(reindex.fold(reindex.expand(weight)), weight, atol=1e-6)


def test_rows_are_shares_or_means_and_columns_are_sums() -> None:
    reindex = Reindex.of(4, MERGED)
    assert reindex.width == 4
    matrix = reindex.apply(torch.eye(4)).t()  # P
    assert torch.equal(matrix.sum(1), torch.tensor([1.0, 0.5, 0.5, 1.0]))
    assert torch.equal(matrix[0], torch.tensor([0.5, 0.0, 0.5, 0.0]))
    weight = torch.randn(5, 4)
    assert torch.equal(reindex.expand(weight)[:, 0], weight[:, 0] + weight[:, 2])
    assert torch.allclose(reindex.fold(torch.eye(4)), matrix)


def test_half_inputs_are_averaged_in_float32() -> None:
    x = torch.tensor([[60000.0, 0.0, 60000.0, 0.0]], dtype=torch.float16)
    assert float(Reindex.of(4, MERGED).apply(x)[0, 0]) == 60000


def test_stored_and_checked() -> None:
    reindex = Reindex.of(4, MERGED)
    again = Reindex.from_state(reindex.spec(), reindex.state())
    x = torch.randn(2, 4)
    assert torch.equal(again.apply(x), reindex.apply(x))
    assert reindex.nbytes == 5 * 4 + 5 * 4 + 4 * 2
    with pytest.raises(CheckpointError, match="wanted"):
        Reindex.from_state({**reindex.spec(), "width": 5}, reindex.state())
    with pytest.raises(CheckpointError, match="no reindexing"):
        Reindex.buffers({"size": 4})
    for name, place, value, words in (
        ("columns", 0, 9, "columns 1 .. 9"),
        ("offsets", 1, 0, "do not rise"),
        ("splits", 0, 0, "least number"),
    ):
        state = {key: tensor.clone() for key, tensor in reindex.state().items()}
        state[name][place] = value
        with pytest.raises(CheckpointError, match=words):
            Reindex.from_state(reindex.spec(), state).check()
    with pytest.raises(ConfigError, match="must be int32"):
        Reindex(4, reindex.columns.long(), reindex.offsets, reindex.splits)
