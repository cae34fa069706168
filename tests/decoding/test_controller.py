"""Drafting is left out where it does not pay, and taken up again where it does. Times are made up."""

from __future__ import annotations

import random

import pytest

from trimtab.decoding._controller import ALLOWED_LOSS, Controller

PLAIN = 1.0


def simulate(draft_cost: float, tokens: float, total: int, *, noise: float = 0.0, seed: int = 0) -> tuple[float, int]:
    """Seconds for so many tokens, and the number of rounds with drafts. A round with a draft takes `draft_cost`."""
    random_ = random.Random(seed)
    controller = Controller()
    seconds, written, drafts = 0.0, 0.0, 0
    while written < total:
        drafted = controller.wants_draft()
        taken = (draft_cost if drafted else PLAIN) * (1 + noise * (2 * random_.random() - 1))
        new = tokens if drafted else 1.0
        controller.note(taken, new, drafted=drafted)
        seconds, written, drafts = seconds + taken, written + new, drafts + drafted
    return seconds, drafts


@pytest.mark.parametrize(("draft_cost", "tokens"), [(2.0, 1.0), (6.0, 1.5), (1.5, 1.4), (20.0, 2.0)])
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_a_draft_that_does_not_pay_costs_at_most_five_percent(draft_cost: float, tokens: float, noise: float) -> None:
    total = 500
    seconds, drafts = simulate(draft_cost, tokens, total, noise=noise)
    assert seconds <= (1.05 + noise / 10) * total * PLAIN
    assert drafts >= 1


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_a_draft_that_pays_is_used(noise: float) -> None:
    seconds, _ = simulate(1.5, 3.0, 500, noise=noise)
    assert seconds < 0.6 * 500 * PLAIN


def test_the_allowance_is_a_share_of_the_time() -> None:
    """Without it a draft that once lost would never be tried again."""
    _, short = simulate(3.0, 1.0, 100)
    _, long = simulate(3.0, 1.0, 2000)
    assert 1 <= short < long <= 1 + 2000 * ALLOWED_LOSS / 2 * 1.1


def test_fixed_choices_are_kept() -> None:
    for fixed in (True, False):
        controller = Controller(fixed=fixed)
        for _ in range(5):
            assert controller.wants_draft() is fixed
            controller.note(100.0, 1.0, drafted=fixed)
