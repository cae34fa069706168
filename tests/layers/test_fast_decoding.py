"""Sparse layers in the fused decoder block: the same model, and what was prepared is found anew when it changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import trimtab as tt
from trimtab.kernels import library
from trimtab.kernels.block_step import PreparedBlock
from trimtab.layers import RSparse
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.compressed_linear import CompressedLinear
from trimtab.models.random import random_model

pytestmark = pytest.mark.skipif(library.absent() is not None, reason="there are no native kernels here")

TOKENS = torch.randint(3, 131, (8, 24), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each fused step that is taken."""
    taken: list[int] = []
    before = PreparedBlock.before

    def counted(self: PreparedBlock, x: Tensor, *rotary: Tensor) -> Any:
        taken.append(x.shape[0] * x.shape[1])
        return before(self, x, *rotary)

    monkeypatch.setattr(PreparedBlock, "before", counted)
    return taken


def sparse(family: str, calibration: CalibrationSet, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    model = random_model(family, dtype=dtype)
    return tt.compress(model, RSparse(**options), calibration=calibration, progress=False)


def decoded(model: PreTrainedModel, rows: int) -> Tensor:
    """Logits of the last of 20 tokens, read at once but for three that are decoded."""
    with torch.no_grad():
        cache = model(TOKENS[:rows, :17]).past_key_values
        for place in range(17, 20):
            logits = model(TOKENS[:rows, place : place + 1], past_key_values=cache).logits
    return logits[:, -1].float()


def modules(model: PreTrainedModel, rows: int, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The same by modules, each product by the reference."""
    monkeypatch.setenv("TRIMTAB_KERNELS", "reference")
    found = decoded(model, rows)
    monkeypatch.delenv("TRIMTAB_KERNELS")
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize(
    "options", [{"alpha": 1.0}, {"alpha": 0.7, "factor_dtype": "float16"}], ids=["alone", "low-rank"]
)
def test_logits_are_those_of_the_modules(
    family: str,
    rows: int,
    options: dict[str, Any],
    calibration: CalibrationSet,
    steps: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = sparse(family, calibration, torch.float32, **options)
    expected = modules(model, rows, monkeypatch)
    assert not steps
    found = decoded(model, rows)
    assert steps == [rows] * 6
    # a text in which an input falls on the other side of its threshold by rounding is another text
    near = [torch.allclose(own, other, rtol=5e-3, atol=5e-3) for own, other in zip(found, expected, strict=True)]
    assert sum(near) >= len(near) - len(near) // 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_decode_in_steps_too(dtype: torch.dtype, calibration: CalibrationSet, steps: list[int]) -> None:
    model = sparse("llama", calibration, dtype, alpha=0.7)
    assert bool(torch.isfinite(decoded(model, 2)).all())
    assert steps == [2] * 6


def test_another_threshold_is_seen_at_once(calibration: CalibrationSet, steps: list[int]) -> None:
    model = sparse("llama", calibration, torch.float32, alpha=1.0)
    dense = decoded(random_model("llama"), 1)
    assert not torch.allclose(decoded(model, 1), dense, atol=1e-2)
    for layer in model.modules():
        if isinstance(layer, CompressedLinear):
            layer.get_buffer("part0_threshold").fill_(-1.0)
    torch.testing.assert_close(decoded(model, 1), dense, rtol=1e-4, atol=1e-4)
    assert len(steps) == 12
