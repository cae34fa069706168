"""Equal prompts are read once, and every text goes on as if it had been read alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from trimtab.decoding._decoder import exact_cache
from trimtab.decoding._ledger import DecodingLedger
from trimtab.decoding._reader import ModelReader
from trimtab.models import random_model

PROMPTS = [[5, 6, 7], [8, 9], [5, 6, 7], [], [8, 9], [5, 6, 7]]


def test_equal_prompts_are_read_once_and_all_go_on_from_theirs() -> None:
    model = random_model("llama")
    shapes: list[tuple[int, ...]] = []

    def note(module: nn.Module, given: tuple[object, ...], named: dict[str, Tensor]) -> None:
        shapes.append(tuple(named["input_ids"].shape))

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    reader = ModelReader(model, len(PROMPTS), exact_cache)
    reader.prefill(PROMPTS)
    hook.remove()
    assert shapes == [(3, 3)]
    assert reader.texts == PROMPTS
    found = reader.read([[1, 2]] * len(PROMPTS), [[-1, 0]] * len(PROMPTS))
    for prompt, rows in zip(PROMPTS, found, strict=True):
        with torch.inference_mode():
            alone = model(torch.tensor([[*prompt, 1, 2]]), use_cache=False).logits[0, -2:]
        torch.testing.assert_close(rows.logits, alone.float(), rtol=1e-4, atol=1e-5)
    reader.commit([[0, 1], [0], [], [0, 1], [0], [0]])
    assert reader.texts[0] == [5, 6, 7, 1, 2]
    assert reader.texts[2] == [5, 6, 7]


def test_the_ledger_counts_prompts_that_are_read() -> None:
    ledger = DecodingLedger()
    ledger.note_prompts([[5, 6, 7], [5, 6, 7], [5, 6, 8], [9], [1, 2]])
    assert (ledger.prompts, ledger.prompt_tokens) == (2, 3), "last tokens are left to the first round"


@pytest.mark.parametrize("count", [1, 3])
def test_costs_of_several_generations_add_up(count: int) -> None:
    ledger = DecodingLedger()
    ledger.note_prompts([[1, 2, 3]])
    total = DecodingLedger.sum([ledger] * count)
    assert (total.prompts, total.prompt_tokens) == (count, 2 * count)
