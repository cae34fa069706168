"""The plain scores of neurons, each against what it is by definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import trimtab as tt
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.random import random_model
from trimtab.models.statistics import Stats
from trimtab.models.views import BlockView, ModelView
from trimtab.weights import Neurons
from trimtab.weights._pruning.plan import Plan
from trimtab.weights.neurons import RIDGE


@pytest.fixture
def block() -> BlockView:
    return ModelView.of(random_model("llama")).blocks[0]


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    """What gate and up, and down, read: [tokens, width]."""
    generator = torch.Generator().manual_seed(2)
    loud = torch.linspace(0.1, 3, 112)
    return {
        "layers.0.mlp_in": torch.randn(200, 48, generator=generator),
        "layers.0.mlp_out": torch.randn(200, 112, generator=generator) * loud,
    }


def stats_of(inputs: dict[str, Tensor]) -> dict[str, Stats]:
    found = {}
    for site, x in inputs.items():
        gram = x.T @ x / len(x)
        found[site] = Stats(site, len(x), second_moment=gram.diagonal().clone(), gram=gram)
    return found


def weights(block: BlockView) -> dict[str, Tensor]:
    return {linear.role: linear.weight for linear in block.mlp.linears}


def test_row_norm_is_that_of_the_gate(block: BlockView) -> None:
    expected = weights(block)["gate"].square().sum(dim=1).sqrt()
    torch.testing.assert_close(Neurons(score="row_norm").neuron_scores(block, {}), expected)


def test_wanda_adds_up_the_scores_of_all_entries_of_a_neuron(block: BlockView, inputs: dict[str, Tensor]) -> None:
    scores = Neurons(score="wanda").neuron_scores(block, stats_of(inputs))
    own, norms = weights(block), {site: x.square().mean(dim=0).sqrt() for site, x in inputs.items()}
    for i in (0, 17, 111):
        rows = own["gate"][i].abs() + own["up"][i].abs()
        expected = (rows * norms["layers.0.mlp_in"]).sum() + own["down"][:, i].abs().sum() * norms["layers.0.mlp_out"][
            i
        ]
        torch.testing.assert_close(scores[i], expected)


def test_energies_are_those_of_what_down_reads_and_of_what_it_adds(block: BlockView, inputs: dict[str, Tensor]) -> None:
    hidden, down = inputs["layers.0.mlp_out"], weights(block)["down"]
    torch.testing.assert_close(
        Neurons(score="energy").neuron_scores(block, stats_of(inputs)), hidden.square().mean(dim=0)
    )
    added = Neurons(score="energy_down").neuron_scores(block, stats_of(inputs))
    for i in (0, 50):
        torch.testing.assert_close(added[i], torch.outer(hidden[:, i], down[:, i]).square().sum(dim=1).mean())


def test_ridge_is_in_the_order_of_the_leverage_scores(block: BlockView, inputs: dict[str, Tensor]) -> None:
    gram = stats_of(inputs)["layers.0.mlp_out"].gram
    assert gram is not None
    wide = gram.double()
    damped = wide + RIDGE * wide.diagonal().mean() * torch.eye(112, dtype=torch.float64)
    leverage = (wide @ torch.linalg.inv(damped)).diagonal()
    found = Neurons(score="ridge").neuron_scores(block, stats_of(inputs))
    assert torch.equal(found.argsort(), leverage.argsort())


def test_random_neurons_differ_by_block_and_by_seed(calibration: CalibrationSet) -> None:
    def kept(seed: int) -> list[Tensor]:
        model = tt.compress(random_model("llama"), Neurons(score="random"), seed=seed, progress=False)
        return [entry.keep for entry in Plan.of_model(model).entries]

    assert all(torch.equal(a, b) for a, b in zip(kept(0), kept(0), strict=True))
    assert not torch.equal(*kept(0))
    assert not torch.equal(kept(0)[0], kept(1)[0])


@pytest.mark.parametrize(
    ("score", "needs"),
    [
        ("random", set()),
        ("row_norm", set()),
        ("wanda", {"second_moment"}),
        ("energy", {"second_moment"}),
        ("ridge", {"gram"}),
    ],
)
def test_only_what_is_needed_is_gathered(score: str, needs: set[str]) -> None:
    assert Neurons(score=score).needs == needs  # type: ignore[arg-type]
    assert Neurons(score=score, repair="least_squares").needs == needs | {"gram"}  # type: ignore[arg-type]
