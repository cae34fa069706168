"""Fixtures of the layers room."""

from __future__ import annotations

import pytest
import torch

from trimtab.models.calibration_set import CalibrationSet


@pytest.fixture(scope="session")
def calibration() -> CalibrationSet:
    """8 sequences of 24 tokens for the random models (131 tokens)."""
    tokens = torch.randint(3, 131, (8, 24), generator=torch.Generator().manual_seed(7))
    return CalibrationSet.from_tokens(tokens, source="random tokens")
