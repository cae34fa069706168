"""Claims are found by file name, state a rule, and their verdicts have the form that programs read."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from trimtab.claims import _run, claim_names, claims_of, run_claims
from trimtab.claims.base import Claim, Outcome
from trimtab.core.errors import ConfigError, NumericsError
from trimtab.core.registry import methods

KEYS = ["system", "paper", "claim", "experiment", "measured", "baseline", "holds", "seconds"]


def test_every_claim_belongs_to_a_method_and_states_its_rule() -> None:
    assert set(claim_names()) == set(methods())
    for name in claim_names():
        claims = claims_of(name)
        assert claims
        for claim in claims:
            assert claim.system == name
            assert "Holds if" in claim.experiment
            assert claim.claim.endswith(".")
        assert any(claim.paper == methods()[name].paper for claim in claims)
        assert len({claim.claim for claim in claims}) == len(claims)


def test_unknown_system_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"'gtpq'. Did you mean 'gptq'"):
        run_claims("gtpq")


def outcome(value: float, holds: bool) -> Claim:
    return Claim(
        "rtn", "a paper", f"a claim of {value}.", "Holds if so.", lambda: Outcome({"a": value}, {"b": 1}, holds)
    )


@pytest.fixture
def two_claims(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_run, "claims_of", lambda name: (outcome(1, True), outcome(2, False)))
    return


@pytest.mark.usefixtures("two_claims")
def test_a_claim_that_does_not_hold_is_a_verdict() -> None:
    verdicts = run_claims("rtn")
    assert [verdict.holds for verdict in verdicts] == [True, False]
    for verdict in verdicts:
        data = json.loads(json.dumps(verdict.to_dict()))
        assert list(data) == KEYS
        assert data["seconds"] >= 0
        assert all(isinstance(value, float) for value in [*data["measured"].values(), *data["baseline"].values()])


def test_nan_is_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_run, "claims_of", lambda name: (outcome(float("nan"), True),))
    with pytest.raises(NumericsError, match="NaN for a"):
        run_claims(["rtn"])


NEGATIVE = (
    "A policy trained on weights alone keeps more of the spectrum",
    "Without calibration text it is closer to the original model than removing random",
    "At 50 % GBLM stays closer to the original model than Wanda",
    "At 4:8 GBLM stays closer to the original model than Wanda",
    "Window attention breaks as soon",
    "Retrieval heads are sparse",
    "At equal bytes the low-rank part lowers",
    "Levels learnt by k-means weighted",
    "At 2 bits PV-Tuning beats straight-through estimation",
    "At equal bytes the correction is worth more",
    "Untrained, it is closer to the original than GPTQ",
    "Without data it competes with methods that calibrate",
    "At equal depth, a tree of constant branching writes more tokens per forward pass than SpecTr",
    "At equal depth, a stochastic beam writes more tokens per forward pass than SpecTr",
    "Contrasting the last layer with an early one",
    "Choosing the early layer for each token",
    "Searching by chunks beats adding",
    "Large inputs exactly and the rest through a low-rank copy",
    "At 50 % the model is comparable to the dense one",
    "Scoring neurons by what they add to the output",
    "Every metric has a best answer of its own",
)
"""How those claims begin that do not hold on models as small as the reference ones; the journal says why."""


@pytest.mark.slow
@pytest.mark.parametrize("name", claim_names())
def test_claims_hold_on_the_reference_model_but_for_those_known_not_to(name: str) -> None:
    for verdict in run_claims(name):
        expected = not verdict.claim.startswith(NEGATIVE)
        assert verdict.holds == expected, f"{verdict.claim} measured {verdict.measured} against {verdict.baseline}"
        assert verdict.baseline
