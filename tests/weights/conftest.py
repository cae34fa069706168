"""Fixtures of the weights room: small calibration data, and linears outside a model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.statistics import Stats
from trimtab.models.views import LinearView

from .kill_server import small_calibration


@pytest.fixture(scope="session")
def calibration() -> CalibrationSet:
    return small_calibration()


@pytest.fixture(scope="session")
def linear_of() -> Callable[[Tensor], LinearView]:
    """A LinearView of a weight [out, in]."""

    def make(weight: Tensor) -> LinearView:
        parent = nn.Module()
        parent.up = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        parent.up.weight = nn.Parameter(weight.clone())
        return LinearView("block.up", "up", "layers.0.mlp_in", 0, parent.up, parent)

    return make


@pytest.fixture(scope="session")
def correlated() -> tuple[Tensor, Stats]:
    """A weight [96, 128] and statistics of correlated inputs with four outlier channels."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 128, generator=generator)
    x = torch.randn(2048, 128, generator=generator) @ torch.randn(128, 128, generator=generator) * 0.3
    x[:, [3, 30, 64, 100]] *= 10
    return weight, stats_of(x)


def stats_of(x: Tensor) -> Stats:
    """The exact statistics of inputs [tokens, in]."""
    gram = x.double().T @ x.double() / len(x)
    return Stats("layers.0.mlp_in", len(x), second_moment=gram.diagonal().float(), gram=gram.float())
