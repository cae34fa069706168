"""Drafting is left out where it does not pay, and taken up again where it does. Times are made up."""

from __future__ import annotations

import random

import pytest

from trimtab.decoding import Decoder, Sampling, Speculative
from trimtab.decoding._controller import ALLOWED_LOSS, CREDIT_ROUNDS, Controller
from trimtab.models.random import random_model

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


def test_a_draft_that_pays_on_average_goes_on_after_bad_luck() -> None:
    """Most rounds lose, some win much."""
    random_, controller, seconds, written = random.Random(0), Controller(), 0.0, 0.0
    while written < 500:
        drafted = controller.wants_draft()
        taken, new = (1.5, 6.0 if random_.random() < 0.3 else 1.0) if drafted else (PLAIN, 1.0)
        controller.note(taken, new, drafted=drafted)
        seconds, written = seconds + taken, written + new
    assert seconds < 0.75 * 500 * PLAIN


def test_the_allowance_is_a_share_of_the_time() -> None:
    """Without it a draft that once lost would never be tried again."""
    _, short = simulate(3.0, 1.0, 100)
    _, long = simulate(3.0, 1.0, 2000)
    assert 1 <= short < long <= 1 + (CREDIT_ROUNDS + 2000 * ALLOWED_LOSS) / 2 * 1.1


def test_good_times_earn_no_credit_for_bad_ones() -> None:
    controller = Controller()
    for _ in range(1000):
        controller.note(
            1.5 if (drafted := controller.wants_draft()) else PLAIN, 3.0 if drafted else 1.0, drafted=drafted
        )
    lost = 0.0
    for _ in range(300):
        drafted = controller.wants_draft()
        controller.note(2.0 if drafted else PLAIN, 1.0, drafted=drafted)
        lost += drafted
    # the average has to turn first
    assert lost <= 300 * ALLOWED_LOSS + CREDIT_ROUNDS + 15


def test_a_decoder_remembers_what_it_found() -> None:
    """Useless drafts are tried in the first generation, and hardly in the ones that follow."""
    model, other = random_model("llama"), random_model("llama", seed=1)
    decoder = Decoder(model, [Speculative(draft="other", depth=3)], drafts={"other": other})
    drafted = []
    for _ in range(6):
        ledger = decoder.generate([[5, 6, 7]], Sampling(max_new_tokens=40)).ledger
        drafted.append(ledger.rounds - ledger.plain_rounds)
    assert drafted[0] >= 1
    assert sum(drafted[1:]) <= 2 * drafted[0] + 5


def test_fixed_choices_are_kept() -> None:
    for fixed in (True, False):
        controller = Controller(fixed=fixed)
        for _ in range(5):
            assert controller.wants_draft() is fixed
            controller.note(100.0, 1.0, drafted=fixed)
