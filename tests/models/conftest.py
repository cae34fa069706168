"""Fixtures of the models room."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from trimtab.models.random import ALL_FAMILIES, random_model


@pytest.fixture(params=ALL_FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(family: str) -> PreTrainedModel:
    return random_model(family)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 131, (2, 40), generator=torch.Generator().manual_seed(1))
