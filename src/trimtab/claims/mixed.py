"""Claims of a budget spent matrix by matrix: within the bytes, closer than any uniform choice, as close as was said."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedModel

from trimtab.claims._reference import MEASURED, predictions
from trimtab.claims.base import Claim, Outcome
from trimtab.core.registry import method_info
from trimtab.evaluation import Divergence, divergence
from trimtab.models import load, tokenizer_of
from trimtab.models.calibration import CalibrationSet
from trimtab.models.compression import compress
from trimtab.models.info import info_of
from trimtab.weights import Gptq, Mixed, Rtn
from trimtab.weights.base import WeightMethod

__all__ = ["CLAIMS"]

BUDGETS = (0.27, 0.29, 0.32, 0.36, 0.40)
GROUPS = (32, 64, -1)
SEQUENCES, LENGTH = 96, 128
UNIFORM = tuple(Gptq(bits=bits, group_size=size) for bits in (2, 3, 4) for size in GROUPS)


@functools.cache
def _costs() -> tempfile.TemporaryDirectory[str]:
    """A directory for the file of costs, which all budgets share; removed with the process."""
    return tempfile.TemporaryDirectory()


def _mixed(budget: float) -> Mixed:
    file = str(Path(_costs().name) / "costs.json")
    return Mixed(budget=budget, widths=(2, 3, 4), group_sizes=GROUPS, zero_points="always", costs=file)


@functools.cache
def _compressed(method: WeightMethod) -> tuple[PreTrainedModel, Divergence]:
    """`ref` in bfloat16, as it ships, compressed; its predictions are computed in float32."""
    model = load("ref")
    text = CalibrationSet.from_text(None, tokenizer_of(model), sequences=SEQUENCES, length=LENGTH)
    compress(model, method, calibration=text, mode="dense", progress=False)
    return model, divergence(torch.nn.Module.float(model), predictions())


def _at_rest(model: PreTrainedModel) -> int:
    record = info_of(model).record
    assert record is not None
    return int((record.ledger or {})["bytes_at_rest"])


def _kl(moved: Divergence) -> float:
    return moved.estimates()["kl_nats_per_token"].value


@functools.cache
def _uniform_sizes() -> dict[WeightMethod, int]:
    """Bytes of the whole model by each uniform choice, increasing; grids of rtn are as large and made in no time."""
    rounded = {m: Rtn(bits=m.bits, group_size=m.group_size) for m in UNIFORM}
    sizes = {m: _at_rest(compress(load("ref"), rtn, progress=False)) for m, rtn in rounded.items()}
    return dict(sorted(sizes.items(), key=lambda item: item[1]))


def beats_uniform() -> Outcome:
    found: dict[str, float] = {}
    baseline: dict[str, float] = {}
    holds = True
    for budget in BUDGETS:
        model, moved = _compressed(_mixed(budget))
        record = info_of(model).record
        assert record is not None
        allowed = record.metrics["plan"]["budget_bytes"]
        fitting = [method for method, size in _uniform_sizes().items() if size <= allowed]
        rivals = {method: _compressed(method)[1] for method in fitting[-2:]}
        best = min(rivals, key=lambda method: _kl(rivals[method]))
        name = f"budget_{round(100 * budget)}_percent"
        found[f"kl_nats_per_token_{name}"] = _kl(moved)
        found[f"kl_difference_high_{name}"] = moved.kl_difference(rivals[best]).high
        found[f"bytes_at_rest_{name}"] = _at_rest(model)
        baseline[f"best_uniform_kl_nats_per_token_{name}"] = _kl(rivals[best])
        baseline[f"budget_bytes_{name}"] = allowed
        holds &= found[f"kl_difference_high_{name}"] < 0 and _at_rest(model) <= allowed
    return Outcome(found, baseline, holds)


def loses_what_it_expects() -> Outcome:
    found: dict[str, float] = {}
    baseline: dict[str, float] = {}
    holds = True
    for budget in BUDGETS:
        model, moved = _compressed(_mixed(budget))
        record = info_of(model).record
        assert record is not None
        plan, name = record.metrics["plan"], f"budget_{round(100 * budget)}_percent"
        found[f"expected_kl_nats_per_token_{name}"] = plan["expected_kl_nats_per_token"]
        found[f"kl_nats_per_token_{name}"] = _kl(moved)
        baseline[f"sum_of_costs_{name}"] = plan["sum_of_costs"]
        holds &= abs(plan["expected_kl_nats_per_token"] / _kl(moved) - 1) <= 0.25
    return Outcome(found, baseline, holds)


_PAPER = method_info("mixed").paper
_SETTING = (
    f"ref at {', '.join(f'{100 * budget:.0f} %' for budget in BUDGETS)} of its bytes in bfloat16, embeddings included, "
    f"gptq at 2, 3 and 4 bits in groups of 32, 64 or a row, on {SEQUENCES} x {LENGTH} tokens of other prose, {MEASURED}"
)

CLAIMS = (
    Claim(
        "mixed",
        _PAPER,
        "A configuration for each matrix is closer to the original than one for all in as many bytes.",
        f"{_SETTING}. Holds if at each budget the file is within it and the paired 95 % interval of the difference in "
        "KL to the better of the two largest uniform choices that fit lies below zero.",
        beats_uniform,
    ),
    Claim(
        "mixed",
        _PAPER,
        "What it expects to lose, from text it was calibrated on, is what it loses on other text.",
        f"{_SETTING}. Holds if at each budget the expectation is within 25 % of what is measured.",
        loses_what_it_expects,
    ),
)
