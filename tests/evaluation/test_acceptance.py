"""Tokens per forward pass of the target, by text."""

from __future__ import annotations

import pytest

from trimtab.decoding import RsdC, Sampling, Spectr, Speculative
from trimtab.evaluation.acceptance import DEPTHS, WIDTHS, acceptance, shapes
from trimtab.models.random import random_model

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
SAMPLING = Sampling(temperature=1.0, max_new_tokens=20)


@pytest.mark.parametrize("method", [Speculative(draft="x", depth=4), Spectr(draft="x", k=3, depth=4)])
def test_the_model_as_its_own_draft_is_always_right(method: Speculative | Spectr) -> None:
    model = random_model("llama")
    found = acceptance(model, method, PROMPTS, SAMPLING, {"x": model})
    assert found.per_text == [5.0] * 3
    assert found.estimate.value == found.ledger.tokens_per_target_forward == 5.0
    assert found.gain(found).value == 0


def test_another_model_is_right_less_often_and_a_tree_more_often_than_a_chain() -> None:
    model, other = random_model("llama"), random_model("llama", seed=1)
    chain = acceptance(model, Speculative(draft="x", depth=2), PROMPTS * 6, SAMPLING, {"x": other})
    tree = acceptance(model, RsdC(draft="x", branching=(8, 2)), PROMPTS * 6, SAMPLING, {"x": other})
    assert 1 <= chain.estimate.value < 3
    assert tree.gain(chain).low > 0
    assert tree.nodes_per_forward > chain.nodes_per_forward
    assert sum(tree.per_text) / 18 == pytest.approx(tree.ledger.tokens_per_target_forward, rel=0.1)


def test_shapes_have_the_sequences_and_depth_that_they_say() -> None:
    found = list(shapes("x"))
    assert len(found) == len(DEPTHS) * (2 + 3 * len(WIDTHS))
    for method, sequences, depth in found:
        options = method.to_dict()
        assert options.get("depth", len(options.get("branching", ()))) == depth
        assert options.get("k", options.get("width", options.get("branching", (1,))[0])) == sequences
