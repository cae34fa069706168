"""Compressed models that decode, and copies of them that run module by module."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from trimtab import compress
from trimtab.kernels.block_step import PreparedBlock
from trimtab.models import fast_block, random_model
from trimtab.models.views import ModelView
from trimtab.weights.rtn import Rtn

BLOCKS = 2
"""Of the models made here."""


def native_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of x of every native step from now on; no kernel is chosen from outside."""
    for name in ("TRIMTAB_KERNELS", "TRIMTAB_ISA"):
        monkeypatch.delenv(name, raising=False)
    rows: list[int] = []
    after = PreparedBlock.after

    def counted(self: PreparedBlock, attended: Tensor, x: Tensor) -> Tensor:
        rows.append(x.shape[0] * x.shape[1])
        return after(self, attended, x)

    monkeypatch.setattr(PreparedBlock, "after", counted)
    return rows


def make(family: str = "llama", dtype: torch.dtype = torch.bfloat16, bits: int = 4) -> PreTrainedModel:
    model = random_model(family, dtype=dtype)
    return compress(model, Rtn(bits=bits, group_size=16), progress=False)


def plain(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that runs module by module, with the same tensors."""
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    other = copy.deepcopy(model, memo)
    assert not any(isinstance(block.__dict__.get("forward"), fast_block._FewTokens) for block in blocks(other))
    return other


def blocks(model: PreTrainedModel) -> list[Any]:
    return [block.module for block in ModelView.of(model).blocks]


def prompt(rows: int, length: int = 12) -> Tensor:
    return torch.randint(3, 131, (rows, length), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def decode(model: PreTrainedModel, rows: int = 1, steps: int = 3, cache: Any = None, padding: int = 0) -> Tensor:
    """Logits [rows, steps, vocabulary] of tokens that follow a prompt; `padding` on the left of every other row."""
    ids, mask = prompt(rows), None
    cache = DynamicCache(config=model.config) if cache is None else cache
    if padding:
        mask = torch.ones_like(ids)
        mask[::2, :padding] = 0
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    logits = []
    for step in range(steps):
        if mask is not None:
            mask = torch.cat((mask, torch.ones(rows, 1, dtype=mask.dtype)), 1)
        positions = None if mask is None else mask.cumsum(1)[:, -1:] - 1
        tokens = prompt(rows, 40)[:, 20 + step, None]
        out = model(input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache)
        logits.append(out.logits)
    return torch.cat(logits, 1)


def same(found: Tensor, expected: Tensor) -> None:
    if found.dtype == torch.float32:
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        return
    unit = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.float(), expected.float(), atol=16 * unit, rtol=16 * unit)
    assert (found.float() - expected.float()).norm() < unit * expected.float().norm()
