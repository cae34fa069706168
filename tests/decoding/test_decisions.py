"""Every rule does as well as the best decision that can be found by trying all of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from trimtab.core.errors import DataError
from trimtab.decoding._decisions import pools, rules
from trimtab.decoding._decisions.metrics import Rule
from trimtab.decoding._decisions.outcomes import Outcomes, number_in, value_in
from trimtab.decoding._decisions.rules import Array

SEEDS = range(20)
CLOSE = 1e-9


def belief(seed: int, *, low: float = 0.5, high: float = 9.0, count: int = 7) -> tuple[Array, Array]:
    """Values above 0, no two alike, and weights."""
    random = np.random.default_rng(seed)
    return random.uniform(low, high, count), random.dirichlet([0.6] * count)


def grades(seed: int, prompts: int) -> list[tuple[Array, Array]]:
    """Beliefs over the grades 0 to 3 of several prompts."""
    random = np.random.default_rng(seed)
    return [(np.arange(4.0), random.dirichlet([0.7] * 4)) for _ in range(prompts)]


Loss = Callable[[Array, Array], Array]
"""(answers [n], decisions [m, 1]) -> losses [m, n]."""
LOSSES: dict[str, tuple[Callable[[Array, Array], float], Loss]] = {
    "squared_error": (rules.mean, lambda y, v: (y - v) ** 2),
    "absolute_error": (rules.median, lambda y, v: np.abs(y - v)),
    "pinball_0.1": (
        lambda y, w: rules.quantile(y, w, 0.1),
        lambda y, v: np.maximum(0.1 * (y - v), (0.1 - 1) * (y - v)),
    ),
    "pinball_0.8": (
        lambda y, w: rules.quantile(y, w, 0.8),
        lambda y, v: np.maximum(0.8 * (y - v), (0.8 - 1) * (y - v)),
    ),
    "squared_log_error": (rules.log_mean, lambda y, v: (np.log1p(y) - np.log1p(v)) ** 2),
    "mape": (rules.relative_median, lambda y, v: np.abs(y - v) / np.abs(y)),
}


def expected(name: str, values: Array, weights: Array, decisions: float | Array) -> float:
    """The least expected loss of these decisions."""
    return float((LOSSES[name][1](values, np.atleast_1d(decisions)[:, None]) @ weights).min())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("seed", SEEDS)
def test_closed_form_is_the_best_of_a_fine_grid(name: str, seed: int) -> None:
    values, weights = belief(seed)
    found = expected(name, values, weights, LOSSES[name][0](values, weights))
    grid = np.concatenate([np.linspace(values.min(), values.max(), 20_001), values])
    assert found <= expected(name, values, weights, grid) + CLOSE


@pytest.mark.parametrize("name", LOSSES)
def test_no_other_rule_does_as_well(name: str) -> None:
    """The check above can fail: each of the other rules is worse on some belief."""
    for other in LOSSES.keys() - {name}:
        losses = []
        for seed in SEEDS:
            values, weights = belief(seed)
            own, wrong = (LOSSES[rule][0](values, weights) for rule in (name, other))
            losses.append(expected(name, values, weights, wrong) - expected(name, values, weights, own))
        assert max(losses) > 1e-3, other


def test_weights_need_not_sum_to_one_and_their_values_may_come_in_any_order() -> None:
    values, weights = belief(3)
    order = np.random.default_rng(0).permutation(values.size)
    for rule, _ in LOSSES.values():
        assert rule(values[order], 7 * weights[order]) == pytest.approx(rule(values, weights), abs=CLOSE)


def test_a_level_reached_by_rounded_weights_counts_as_reached() -> None:
    thirds = [0.1] * 10  # their sums miss 0.3 and 0.7 by a rounding
    assert rules.quantile(range(10), thirds, 0.3) == 2
    assert rules.quantile(range(10), thirds, 0.7) == 6
    assert rules.median([1, 2], [0.5, 0.5]) == 1


@pytest.mark.parametrize("seed", SEEDS)
def test_the_mode_counts_equal_values_together(seed: int) -> None:
    random = np.random.default_rng(seed)
    values = random.integers(0, 4, 9).tolist()
    weights = random.dirichlet([1.0] * 9)
    totals = {v: sum(w for y, w in zip(values, weights, strict=True) if y == v) for v in values}
    assert totals[rules.mode(values, weights)] >= max(totals.values()) - CLOSE


def test_exact_match_takes_the_mode_where_mean_and_median_are_elsewhere() -> None:
    values, weights = [1.0, 7.0, 8.0, 9.0], [0.4, 0.2, 0.2, 0.2]
    assert rules.mode(values, weights) == 1
    assert rules.median(values, weights) == 7
    assert rules.mean(values, weights) == pytest.approx(5.2)


@pytest.mark.parametrize("seed", SEEDS)
def test_kappa_takes_the_label_of_least_squared_error(seed: int) -> None:
    values, weights = grades(seed, 1)[0]
    losses = [float(weights @ (values - v) ** 2) for v in values]
    assert losses[int(rules.nearest_to_mean(values, weights, values.tolist()))] <= min(losses) + CLOSE


def orders(count: int) -> Sequence[tuple[int, ...]]:
    """All rankings: the rank of each of so many prompts."""
    return list(itertools.permutations(range(count)))


def ranks_of(scores: Sequence[float] | Array) -> tuple[int, ...]:
    return tuple(np.argsort(np.argsort(scores, kind="stable"), kind="stable").tolist())


def pairs_won(pool: list[tuple[Array, Array]], ranks: Sequence[int], *, by_difference: bool) -> float:
    """Expected pairs of different answers that are in the right order, at the cost of their difference or of 1."""
    won = 0.0
    for (y, w), rank in zip(pool, ranks, strict=True):
        for (other_y, other_w), other_rank in zip(pool, ranks, strict=True):
            if rank > other_rank:
                above = np.maximum(y[:, None] - other_y[None], 0)
                won += float(w @ (above if by_difference else above > 0) @ other_w)
    return won


def discounted_gain(pool: list[tuple[Array, Array]], ranks: Sequence[int]) -> float:
    places = len(pool) - np.array(ranks)
    return float(sum(w @ (2**y - 1) / np.log2(1 + place) for (y, w), place in zip(pool, places, strict=True)))


@pytest.mark.parametrize("seed", SEEDS)
def test_rankings_are_the_best_of_all_orders(seed: int) -> None:
    pool = grades(seed, 5)
    binary = [(np.array([0.0, 1.0]), np.array([1 - w[3], w[3]])) for _, w in pool]
    by_probability = ranks_of([w[1] for _, w in binary])
    assert pairs_won(binary, by_probability, by_difference=False) >= (
        max(pairs_won(binary, order, by_difference=False) for order in orders(5)) - CLOSE
    )
    by_mean = ranks_of([rules.mean(y, w) for y, w in pool])
    assert pairs_won(pool, by_mean, by_difference=True) >= (
        max(pairs_won(pool, order, by_difference=True) for order in orders(5)) - CLOSE
    )
    by_gain = ranks_of([rules.gain(y, w) for y, w in pool])
    assert discounted_gain(pool, by_gain) >= max(discounted_gain(pool, order) for order in orders(5)) - CLOSE


def marginal_ranks(pool: list[tuple[Array, Array]]) -> Array:
    """Of the grades, in the mixture of the pool, written out: below, and half of the equal ones."""
    marginal = np.mean([w for _, w in pool], axis=0)
    return np.array([marginal[:k].sum() + marginal[k] / 2 for k in range(4)])


@pytest.mark.parametrize("seed", SEEDS)
def test_mid_ranks_order_by_the_greatest_expected_covariance_of_ranks(seed: int) -> None:
    pool = grades(seed, 5)
    wanted = marginal_ranks(pool)

    def covariance(ranks: Sequence[int]) -> float:
        return float(sum(rank * (w @ wanted) for rank, (_, w) in zip(ranks, pool, strict=True)))

    found = pools.mid_ranks(pool)
    np.testing.assert_allclose(found, [w @ wanted for _, w in pool], atol=CLOSE)
    assert covariance(ranks_of(found)) >= max(map(covariance, orders(5))) - CLOSE
    assert found.mean() == pytest.approx(0.5)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_mean_has_the_greatest_correlation_of_all_decisions(seed: int) -> None:
    pool = grades(seed, 6)
    means = np.array([rules.mean(y, w) for y, w in pool])
    spread = np.sqrt(np.mean([w @ y**2 for y, w in pool]) - means.mean() ** 2)

    def correlation(decisions: Array) -> float:
        centred = decisions - decisions.mean()
        return float(np.mean(centred * means) / (np.sqrt(np.mean(centred**2)) * spread))

    random = np.random.default_rng(seed)
    for scale in np.repeat([1e-3, 0.1, 1.0, 10.0], 500):
        assert correlation(means) >= correlation(means + scale * random.normal(size=6)) - CLOSE


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_threshold_of_f_is_the_best_of_all_subsets_and_so_of_all_constant_thresholds(
    seed: int, beta: float
) -> None:
    probabilities = np.random.default_rng(seed).beta(0.5, 1.5, size=9)
    threshold = pools.f_beta_threshold(probabilities, beta)

    def f_of(decisions: Array) -> float:
        tp, positives, decided = probabilities @ decisions, probabilities.sum(), decisions.sum()
        precision, recall = (tp / decided if decided else 0.0), tp / positives
        return float((1 + beta**2) * precision * recall / (beta**2 * precision + recall)) if tp else 0.0

    found = f_of((probabilities > threshold).astype(float))
    assert found >= max(f_of(np.array(s)) for s in itertools.product([0.0, 1.0], repeat=9)) - CLOSE
    assert threshold == pytest.approx(found / (1 + beta**2), abs=CLOSE)
    assert all(found >= f_of((probabilities > t).astype(float)) - CLOSE for t in np.linspace(0, 1, 101))
    other = (probabilities > 0.5).astype(float)
    assert f_of(other) == pytest.approx(pools.expected_f_beta(probabilities, other, beta), abs=CLOSE)


def test_f_of_a_pool_without_positives_decides_nothing() -> None:
    assert pools.f_beta_threshold([0.0, 0.0]) == 0
    assert pools.expected_f_beta(np.zeros(2), np.zeros(2)) == 0


WORDS = ("a red house", "the red house", "a red barn", "the old mill", "red house")


@pytest.mark.parametrize("seed", SEEDS)
def test_minimum_bayes_risk_is_the_best_candidate(seed: int) -> None:
    weights = np.random.default_rng(seed).dirichlet([0.8] * len(WORDS))
    found = rules.minimum_bayes_risk(WORDS, weights, WORDS, rules.token_f1)
    scores = {v: sum(w * rules.token_f1(y, v) for y, w in zip(WORDS, weights, strict=True)) for v in WORDS}
    assert scores[found] >= max(scores.values()) - CLOSE
    assert rules.minimum_bayes_risk(WORDS, weights, WORDS, lambda y, v: float(y == v)) == rules.mode(WORDS, weights)


def test_minimum_bayes_risk_finds_what_answers_have_in_common() -> None:
    """The likeliest answer shares too few words with the others."""
    weights = [0.2, 0.2, 0.15, 0.3, 0.15]
    assert rules.mode(WORDS, weights) == "the old mill"
    assert rules.minimum_bayes_risk(WORDS, weights, WORDS, rules.token_f1) == "the red house"


def test_the_metric_is_asked_for_the_answer_first() -> None:
    asked = []

    def metric(answer: str, decision: str) -> float:
        asked.append((answer, decision))
        return 0.0

    rules.minimum_bayes_risk(["answer"], [1.0], ["decision"], metric)
    assert asked == [("answer", "decision")]


@pytest.mark.parametrize(
    ("one", "other", "wanted"),
    [("A red house", "a red house", 1.0), ("a a b", "a b b", 2 / 3), ("x", "y", 0.0), ("", "", 1.0), ("", "y", 0.0)],
)
def test_token_f1(one: str, other: str, wanted: float) -> None:
    assert rules.token_f1(one, other) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda: rules.mean([1.0, 2.0], [1.0]), "2 values"),
        (lambda: rules.mean([], []), "0 values"),
        (lambda: rules.mean([1.0], [-1.0]), "not negative"),
        (lambda: rules.mean([1.0, 2.0], [0.0, 0.0]), "not all zero"),
        (lambda: rules.median([np.nan], [1.0]), "finite"),
        (lambda: rules.log_mean([-1.0], [1.0]), "values above -1"),
        (lambda: rules.relative_median([0.0, 1.0], [0.5, 0.5]), "percentage of 0"),
        (lambda: rules.minimum_bayes_risk([1.0], [1.0], [], lambda y, v: 0.0), "no candidate"),
        (lambda: pools.f_beta_threshold([1.5]), "probabilities"),
        (lambda: pools.f_beta_threshold([]), "probabilities"),
    ],
)
def test_what_is_no_belief_is_refused(rule: Callable[[], object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        rule()


def test_a_percentage_of_a_zero_that_cannot_come_is_no_matter() -> None:
    assert rules.relative_median([0.0, 1.0, 4.0], [0.0, 0.5, 0.5]) == 1.0


def test_texts_of_one_value_count_together_and_are_written_as_the_likeliest_of_them() -> None:
    own = Outcomes.of(["7", "07", "eight", "8", " 7.0"], np.array([0.2, 0.25, 0.1, 0.3, 0.15]), number_in, mass=0.9)
    assert own.values == (7.0, 8.0)
    assert own.texts == ("07", "8")
    np.testing.assert_allclose(own.weights, [2 / 3, 1 / 3])
    assert own.dropped == 1
    assert Rule("exact_match").decide([own])[0] == [7.0]
    strings = Outcomes.of(["7", "07", "8"], np.array([0.3, 0.3, 0.4]), str, mass=1.0)
    assert Rule("exact_match").decide([strings])[0] == ["8"], "the mode over strings is another one"


@pytest.mark.parametrize(
    ("text", "value"), [(" 3\n", 3.0), ("-2.5e1", -25.0), (".5", 0.5), ("3 or 4", None), ("nan", None), ("", None)]
)
def test_numbers_are_whole_texts(text: str, value: float | None) -> None:
    assert number_in(text) == value


def test_values_are_numbers_or_else_words() -> None:
    assert [value_in(text) for text in (" 07", " a  b ", " \n")] == [7.0, "a b", None]


def test_no_answer_at_all_is_an_error() -> None:
    with pytest.raises(DataError, match=r"none of 2 texts is an answer: 'one', 'two'"):
        Outcomes.of(["one", "two"], np.ones(2), number_in, mass=0.0)


def test_metrics_of_numbers_refuse_words() -> None:
    own = Outcomes.of(["good", "bad"], np.ones(2), value_in, mass=1.0)
    with pytest.raises(DataError, match="squared_error is for numbers, but 'good' is an answer"):
        Rule("squared_error").decide([own])


def test_each_metric_has_its_own_rule() -> None:
    pool = [
        Outcomes.of(["1", "2", "5"], np.array([0.45, 0.25, 0.3]), number_in, mass=1.0),
        Outcomes.of(["1", "4", "5"], np.array([0.2, 0.45, 0.35]), number_in, mass=1.0),
    ]
    first = {
        "exact_match": 1.0,
        "squared_error": 2.45,
        "absolute_error": 2.0,
        "pinball": 5.0,
        "squared_log_error": 2**0.45 * 3**0.25 * 6**0.3 - 1,
        "mape": 1.0,
        "pearson": 2.45,
        "auc": 0.45,
        "ndcg": 0.45 * 1 + 0.25 * 3 + 0.3 * 31,
        "kappa": 2.0,
    }
    for metric, wanted in first.items():
        decided, threshold = Rule(metric, level=0.8).decide(pool)  # type: ignore[arg-type]
        assert decided[0] == pytest.approx(wanted), metric
        assert threshold is None
    decided, threshold = Rule("f_beta", beta=0.5).decide(pool)
    assert decided == [1.0, 0.0]
    assert threshold == pytest.approx(pools.f_beta_threshold([0.45, 0.2], 0.5))
    assert Rule("f_beta", threshold=0.1).decide(pool) == ([1.0, 1.0], 0.1)
    low, high = Rule("spearman").decide(pool)[0]
    assert float(low) < float(high)
    assert Rule("gain", gain=lambda y, v: -abs(float(y) - float(v))).decide(pool)[0] == [2.0, 4.0]
