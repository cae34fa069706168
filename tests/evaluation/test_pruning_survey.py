"""The survey of pruning compares at equal sizes, and its tables show what was measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trimtab.core.registry import method_class
from trimtab.evaluation import pruning_survey
from trimtab.evaluation.pruning_survey import GROUPS, TASKS, settings
from trimtab.models import ledger_of, load, tokenizer_of
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.compression import compress

SETTINGS = settings("ref-mini")


def test_every_setting_is_a_method_with_its_options() -> None:
    assert {group for group, _, _ in SETTINGS} == set(GROUPS)
    for _, name, options in SETTINGS:
        method_class(name)(**options)
    structured = [name for group, name, _ in SETTINGS if group == "structured"]
    assert {structured.count(name) % 3 for name in set(structured)} == {0}  # the same at each share


@pytest.mark.slow
@pytest.mark.parametrize("share", pruning_survey.SHARES)
def test_structured_settings_remove_the_same_share_of_the_whole_model(share: float) -> None:
    """To within a hundredth of the model: heads are small, and widths of them are whole."""
    whole = load("ref-mini", dtype=torch.float32)
    text = CalibrationSet.from_text(None, tokenizer_of(whole), sequences=4, length=64)
    before = ledger_of(whole).bytes_at_rest
    for name, options in pruning_survey._structured("ref-mini", share):
        model = load("ref-mini", dtype=torch.float32)
        compress(model, method_class(name)(**options), calibration=text, progress=False)
        assert 1 - ledger_of(model).bytes_at_rest / before == pytest.approx(share, abs=0.012), (name, options)


def entry(group: str, label: str, kl: float, runs: int = 2) -> dict[str, Any]:
    figures = [{"prose": {"kl_nats_per_token": {"value": kl + seed}}} for seed in range(runs)]
    common = {"condition": "plain", "seconds": 3.0, "bytes_at_rest": 70, "bytes_read_per_token": 50}
    return {
        "group": group,
        "label": label,
        "method": label.split()[0],
        "runs": [{**common, "texts": texts} for texts in figures],
        "tasks": {task: {"value": 0.45} for task in TASKS},
    }


def test_a_table_shows_seeds_sizes_and_recovery() -> None:
    from results_tables import TABLES

    document = {
        "uncompressed": {task: {"value": 0.9} for task in TASKS},
        "uncompressed_ledger": {"bytes_at_rest": 100, "bytes_read_per_token": 100},
        "entries": [entry("structured", "modegpt sparsity=0.1", 1.0), entry("inputs", "rsparse", 3.0, runs=1)],
        "second_text": None,
        "machine": {"cpu": "cpu", "cores": 1},
        "versions": {"torch": "2"},
        "date": "day",
        "file": "file",
    }
    table = TABLES["pruning"](document, "structured")
    assert "rsparse" not in table
    (row,) = [line for line in table.splitlines() if line.startswith("| modegpt")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:5] == ["modegpt sparsity=0.1", "70.0%", "50.0%", "3.0 s", "1.5 (1 to 2)"]
    assert cells[-1] == "50%"
    assert TABLES["pruning"](document, "rsparse").count("| rsparse |") == 1
    assert TABLES["pruning"](document, "none of them") == ""
