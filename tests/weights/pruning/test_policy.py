"""PruneNet's policy: its network, what it draws, what it is rewarded for, and its training."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from trimtab.core.errors import CheckpointError, OutputError
from trimtab.weights._pruning import policy as module
from trimtab.weights._pruning.policy import (
    Policy,
    Training,
    draw_rows,
    ks_distance,
    log_keep,
    log_probability,
    logistic_noise,
    reward,
    singular_values,
    train,
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows_that_differ(width: int = 60, inputs: int = 12, layers: int = 2) -> list[Tensor]:
    """Half of the rows are loud, and point to one side, so that a direction tells them from the others."""
    generator = seeded(7)
    loud = (torch.arange(width) % 2)[:, None]
    return [(0.3 + loud) * torch.randn(width, inputs, generator=generator) + 1.5 * loud for _ in range(layers)]


# The network


def test_scores_are_those_of_the_published_network() -> None:
    """Every row embedded against all of P, then weighed by rho: an n x n matrix, which is not made here."""
    policy, state = Policy.draw(20, 8, seeded(0)), torch.randn(20, 8, generator=seeded(1))
    embedded = state @ policy.embedding.T + policy.bias
    torch.testing.assert_close(policy(state), embedded @ policy.mixing)
    assert policy.shape == (20, 8)
    assert bool((policy.embedding.abs() <= 8**-0.5).all())
    mixing = policy.tensors()["mixing"]
    assert 0 <= float(mixing.min()) < 0.2 < 0.8 < float(mixing.max()) < 1


def test_relaxation_is_the_published_one_and_stays_finite_where_that_is_not() -> None:
    logits, noise = torch.tensor([-2.0, 0.5, 3.0]), torch.tensor([0.3, -0.7, 1.2])
    alpha, uniform = torch.sigmoid(logits), torch.sigmoid(noise)
    kappa = torch.sigmoid(uniform.log() - (1 - uniform).log() + alpha.log() - (1 - alpha).log())
    torch.testing.assert_close(log_keep(logits, noise), kappa.log())
    extreme = torch.tensor([-3e4, 3e4], requires_grad=True)
    log_keep(extreme, noise[:2]).sum().backward()  # type: ignore[no-untyped-call]
    assert extreme.grad is not None
    assert bool(torch.isfinite(log_keep(extreme, noise[:2])).all() and torch.isfinite(extreme.grad).all())
    assert bool(torch.isfinite(logistic_noise(100_000, seeded(3))).all())


# What it draws


def test_rows_are_drawn_one_after_the_other_without_replacement() -> None:
    """Frequencies of ordered pairs against p_i p_j / (1 - p_i)."""
    weights = torch.tensor([0.5, 0.3, 0.15, 0.05])
    generator = seeded(0)
    draws = 8_000
    found = [tuple(draw_rows(weights.log(), 2, generator).tolist()) for _ in range(draws)]
    for i, j in itertools.permutations(range(4), 2):
        expected = float(weights[i] * weights[j] / (1 - weights[i]))
        spread = (expected * (1 - expected) / draws) ** 0.5
        assert abs(found.count((i, j)) / draws - expected) < 5 * spread


@given(width=st.integers(1, 40), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_exactly_as_many_different_rows_as_asked(width: int, share: float, seed: int) -> None:
    count = int(share * width)
    order = draw_rows(torch.randn(width, generator=seeded(seed)) * 30, count, seeded(seed))
    assert len(set(order.tolist())) == len(order) == count


def test_probabilities_of_all_ordered_draws_add_up_to_one() -> None:
    log_weights = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64))
    for count in (1, 2, 4):
        orders = [torch.tensor(order) for order in itertools.permutations(range(4), count)]
        total = torch.stack([log_probability(log_weights, order) for order in orders]).exp().sum()
        assert float(total) == pytest.approx(1)
    pair = log_probability(log_weights, torch.tensor([2, 0])).exp()
    assert float(pair) == pytest.approx(0.15 * 0.5 / 0.85)


# What it is rewarded for


@given(width=st.integers(2, 24), inputs=st.integers(2, 24), seed=st.integers(0, 99), share=st.floats(0.1, 1))
def test_singular_values_shrink_one_by_one(width: int, inputs: int, seed: int, share: float) -> None:
    generator = seeded(seed)
    weight = torch.randn(width, inputs, generator=generator)
    kept = weight[torch.randperm(width, generator=generator)[: max(1, int(share * width))]]
    own = singular_values(kept).flip(0)
    assert bool((own <= singular_values(weight).flip(0)[: len(own)] + 1e-5).all())


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (16, 16)])
def test_singular_values_are_those_of_an_svd(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=seeded(2))
    expected = torch.linalg.svdvals(weight.double()).flip(0)
    torch.testing.assert_close(singular_values(weight), expected, rtol=1e-6, atol=1e-6)


def test_a_rank_that_is_missing_is_zero_and_not_noise() -> None:
    low = torch.randn(30, 3, generator=seeded(0)) @ torch.randn(3, 12, generator=seeded(1))
    assert singular_values(low)[:9].tolist() == [0.0] * 9
    assert float(singular_values(low)[9]) > 0.1
    assert ks_distance(singular_values(low), singular_values(low * 1.0)) == 0


@given(seed=st.integers(0, 99), first=st.integers(1, 30), second=st.integers(1, 30))
def test_distance_is_the_largest_gap_between_the_distribution_functions(seed: int, first: int, second: int) -> None:
    generator = seeded(seed)
    ours, theirs = (torch.randint(12, (n,), generator=generator).double().sort().values for n in (first, second))
    gaps = [abs(float((ours <= x).double().mean()) - float((theirs <= x).double().mean())) for x in range(12)]
    assert ks_distance(ours, theirs) == pytest.approx(max(gaps))


def test_keeping_all_rows_is_no_distance_and_values_come_in_steps() -> None:
    weight = torch.randn(30, 12, generator=seeded(0))
    assert ks_distance(singular_values(weight), singular_values(weight)) == 0
    assert reward(0.0) == 99999
    assert reward(0.25) == 4
    steps = ks_distance(singular_values(weight), singular_values(weight[:20])) * 12
    assert steps == pytest.approx(round(steps))


# Training


def test_training_is_deterministic_and_does_not_touch_the_weights() -> None:
    states = rows_that_differ()
    before = [state.clone() for state in states]
    first, second = (train(states, [40, 40], Training(episodes=3), seeded(5)) for _ in range(2))
    assert torch.equal(first.distances, second.distances)
    assert all(torch.equal(first.policy.tensors()[k], v) for k, v in second.policy.tensors().items())
    assert all(torch.equal(a, b) for a, b in zip(states, before, strict=True))
    other = train(states, [40, 40], Training(episodes=3), seeded(6))
    assert not torch.equal(first.distances, other.distances)


@pytest.mark.parametrize("update", ["published", "on_policy"])
def test_the_policy_that_is_kept_is_the_one_that_drew_the_best_episode(update: module.Update) -> None:
    """Not the last one, and not what the updates of that episode made of it."""
    states = rows_that_differ()
    one = train(states, [40, 40], Training(episodes=1, update=update), seeded(5)).policy.tensors()
    assert all(torch.equal(one[k], v) for k, v in Policy.draw(60, 12, seeded(5)).tensors().items())
    whole = train(states, [40, 40], Training(episodes=12, update=update, learning_rate=0.01), seeded(2))
    totals = (1 / whole.distances).sum(dim=1)
    assert whole.best_episode == int(totals.argmax())
    assert 0 < whole.best_episode < 11
    until = Training(episodes=whole.best_episode + 1, update=update, learning_rate=0.01)
    shorter = train(states, [40, 40], until, seeded(2)).policy.tensors()
    assert all(torch.equal(shorter[k], v) for k, v in whole.policy.tensors().items())


def test_gradients_are_clipped_before_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipped to nothing, the first episode leaves a policy that only decays."""
    monkeypatch.setattr(module, "GRADIENT_NORM", 0.0)
    rising = iter(range(1, 100))  # so that the last episode is the best
    monkeypatch.setattr(module, "reward", lambda distance: next(rising))
    states = rows_that_differ()
    found = train(states, [40, 40], Training(episodes=2, learning_rate=0.1), seeded(5)).policy.tensors()
    decayed = (1 - 0.1 * 0.01) ** 2
    for name, value in Policy.draw(60, 12, seeded(5)).tensors().items():
        torch.testing.assert_close(found[name], value * decayed)


def test_the_on_policy_update_learns_which_rows_hold_the_spectrum() -> None:
    """Rows half of which are loud: mean KS of 40 draws, against random rows and against the loudest."""
    states = rows_that_differ()
    originals = [singular_values(state) for state in states]

    def mean_distance(orders: list[Tensor]) -> float:
        pairs = zip(originals, states, orders, strict=True)
        return sum(ks_distance(own, singular_values(state[order])) for own, state, order in pairs) / len(states)

    chance = torch.tensor(
        [mean_distance([torch.randperm(60, generator=seeded(2 * i + j))[:40] for j in (0, 1)]) for i in range(100)]
    )
    training = Training(episodes=150, update="on_policy")
    policy = train(states, [40, 40], training, seeded(0)).policy
    with torch.no_grad():
        learnt = mean_distance([policy(state).topk(40).indices for state in states])
    loudest = mean_distance([state.norm(dim=1).topk(40).indices for state in states])
    assert learnt < float(chance.mean() - 2 * chance.std())
    assert loudest < float(chance.mean() - 2 * chance.std())


# Files


def test_a_policy_on_disk_is_the_policy(tmp_path: Path) -> None:
    policy = Policy.draw(20, 8, seeded(0))
    policy.save(tmp_path / "policy.safetensors", {"sparsity": "0.3"})
    again = Policy.load(tmp_path / "policy.safetensors")
    assert all(torch.equal(again.tensors()[k], v) for k, v in policy.tensors().items())
    assert [file.name for file in tmp_path.iterdir()] == ["policy.safetensors"]


def test_files_that_are_no_policy_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    with pytest.raises(CheckpointError, match="cannot be read"):
        Policy.load(path)
    save_file({"weight": torch.ones(3)}, path)
    with pytest.raises(CheckpointError, match=r"is not a policy of version 1 \(found None\)"):
        Policy.load(path)
    save_file({"embedding": torch.ones(3, 2), "bias": torch.ones(3)}, path, metadata={"trimtab_policy": "1"})
    with pytest.raises(CheckpointError, match="cannot be read"):
        Policy.load(path)
    wrong = {"embedding": torch.ones(3, 2), "bias": torch.ones(3), "mixing": torch.ones(4)}
    save_file(wrong, path, metadata={"trimtab_policy": "1"})
    with pytest.raises(CheckpointError, match="do not fit"):
        Policy.load(path)
    path.write_bytes(b"\x05")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Policy.load(path)
    with pytest.raises(OutputError):
        Policy.draw(3, 2, seeded(0)).save(path / "inside", {})
