"""What caches have learnt travels with the checkpoint, and with no other."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import trimtab as tt
from trimtab.core.errors import CheckpointError
from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.fitted_caches import FILE
from trimtab.models.info import info_of
from trimtab.models.random import random_model

METHOD = tt.cache.Kvquant(bits=2)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = random_model("llama")
    tokens = torch.randint(3, 131, (4, 64), generator=torch.Generator().manual_seed(0))
    tt.cache.fit(METHOD, model, CalibrationSet.from_tokens(tokens))
    return tt.save(model, tmp_path / "saved")


def test_a_loaded_model_has_what_was_learnt(saved: Path) -> None:
    model = tt.load(saved, dtype=torch.float32)
    (learnt,) = info_of(model).fitted_caches.values()
    assert learnt["keys.0.levels"].shape == (4,)
    cache = METHOD.new(model)  # nothing is fitted again: there is no tokenizer to fit with
    with torch.inference_mode():
        model(torch.arange(3, 60)[None], past_key_values=cache)
    assert cache.nbytes() > 0


def test_a_model_without_any_has_no_such_file(tmp_path: Path) -> None:
    assert not (tt.save(random_model("llama"), tmp_path / "saved") / FILE).exists()


def test_tables_of_another_model_are_refused(saved: Path, tmp_path: Path) -> None:
    other = tt.save(random_model("llama", 1), tmp_path / "other")
    shutil.copy(saved / FILE, other / FILE)
    with pytest.raises(CheckpointError, match="fitted for another model"):
        tt.load(other)


def test_a_truncated_file_is_refused(saved: Path) -> None:
    whole = (saved / FILE).read_bytes()
    (saved / FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        tt.load(saved)
