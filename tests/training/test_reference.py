"""The training of the reference models, on tiny configurations."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from trimtab.core.errors import DataError
from trimtab.training.reference import __main__ as command
from trimtab.training.reference.data import RowOptions, Rows, sources_of, training_books
from trimtab.training.reference.loop import Run
from trimtab.training.reference.model import TrainingLoss, build
from trimtab.training.reference.publish import manifest, write_curve
from trimtab.training.reference.stages import LATER_MIXTURE, MIXTURE, STAGES, Stage
from trimtab.training.reference.texts import HELD_OUT, write_texts
from trimtab.training.reference.tokenizer import VOCAB_SIZE, world_words
from trimtab.world import TASKS, examples
from trimtab.world.types import Span

ASSETS = Path(command.__file__).parents[2] / "assets"

TINY = (
    Stage("copy", 4, 4, 32, (1e-3, 1e-3), {"copy": 1.0}, RowOptions(copy_ids=50), muon=False),
    Stage("mixed", 6, 4, 48, (1e-3, 0.0), {"prose": 0.5, "facts": 0.25, "recall": 0.25}, RowOptions(gaps=0.5)),
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(ASSETS / "ref")


@pytest.fixture(scope="module")
def rows(tokenizer: PreTrainedTokenizerFast) -> Rows:
    return Rows(tokenizer, np.arange(5000) % 3000 + 3)


def tiny_run(rows: Rows, out: Path) -> Run:
    return Run(build("ref-mini", 0), TINY, rows, out, compiled=False, save_every=3)


class Killed(Exception):
    pass


@pytest.mark.parametrize("killed_after", [2, 3, 5, 9])
def test_a_killed_run_continues_to_the_same_weights(
    killed_after: int, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny_run(rows, tmp_path / "whole")
    whole.train()

    done = 0
    step = Run.step

    def step_until_killed(run: Run, stage: Stage) -> float:
        nonlocal done
        if done == killed_after:
            raise Killed
        done += 1
        return step(run, stage)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, "step", step_until_killed)
        tiny_run(rows, tmp_path / "killed").train()
    continued = tiny_run(rows, tmp_path / "killed")
    assert continued.place.tokens < whole.place.tokens
    continued.train()

    for (name, one), other in zip(whole.model.state_dict().items(), continued.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert continued.place.tokens == whole.place.tokens


def test_a_finished_run_does_nothing_more(rows: Rows, tmp_path: Path) -> None:
    run = tiny_run(rows, tmp_path)
    run.train()
    before = run.place.tokens
    again = tiny_run(rows, tmp_path)
    again.train()
    assert again.place.tokens == before


def test_a_stage_ends_early_when_its_loss_is_reached(rows: Rows, tmp_path: Path) -> None:
    stages = [replace(TINY[0], steps=200, until_loss=1e9), TINY[1]]
    run = Run(build("ref-mini", 0), stages, rows, tmp_path, compiled=False)
    run.train()
    assert run.place.tokens == 51 * 4 * 32 + 6 * 4 * 48


def test_a_loss_that_is_not_a_number_stops_the_run(rows: Rows, tmp_path: Path) -> None:
    run = tiny_run(rows, tmp_path)
    with torch.no_grad():
        run.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="stage copy, step 0"):
        run.train()


def test_training_loss_is_that_of_the_plain_model() -> None:
    model = build("ref-mini", 1)
    ids = torch.randint(3, VOCAB_SIZE, (2, 301))
    positions = torch.arange(301).repeat(2, 1)
    positions[:, 100:] += 500
    weights = torch.rand(2, 301)
    ours = TrainingLoss(model, compiled=False)(ids, weights, positions)
    with torch.no_grad():
        logits = model(ids[:, :-1], position_ids=positions[:, :-1]).logits
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    wanted = (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
    torch.testing.assert_close(ours, wanted, rtol=2e-4, atol=0)


@pytest.mark.parametrize("mixture", [MIXTURE, LATER_MIXTURE])
def test_the_realised_mixture_is_the_asked_one(mixture: dict[str, float]) -> None:
    drawn = Counter(source for step in range(100) for source in sources_of("stage", step, 16, mixture))
    for source, share in mixture.items():
        assert drawn[source] / 1600 == pytest.approx(share / sum(mixture.values()), abs=0.005)


@pytest.mark.parametrize("source", ["prose", "copy", *TASKS])
def test_rows_are_full_and_repeatable(source: str, rows: Rows) -> None:
    options = RowOptions(gaps=1.0, recall_filler=100)
    ids, weights, positions = rows.row(source, random.Random(1), 257, options)
    again = rows.row(source, random.Random(1), 257, options)
    for one, other in zip((ids, weights, positions), again, strict=True):
        np.testing.assert_array_equal(one, other)
        assert len(one) == 257
    assert weights.max() > 0.5
    assert (np.diff(positions) > 0).all()
    assert positions[-1] < 2048


def test_copy_rows_weigh_only_what_was_there_before(rows: Rows) -> None:
    ids, weights, _ = rows.row("copy", random.Random(0), 65, RowOptions(copy_lengths=(8, 8)))
    np.testing.assert_array_equal(ids[8:], ids[:-8])
    assert (weights > 0).sum() == 65 - 9


def test_no_stage_of_a_shipped_model_is_longer_than_its_context() -> None:
    for stages in STAGES.values():
        assert stages[-1].rate[1] == 0.0
        assert len({stage.name for stage in stages}) == len(stages)
        for stage in stages:
            assert max(stage.shape(step)[1] for step in range(20)) <= 2048


def test_held_out_books_are_never_training_books(tmp_path: Path) -> None:
    for name in ("a-book", *HELD_OUT):
        (tmp_path / f"{name}.txt").write_text("One paragraph.\n\nAnother one.\n", encoding="utf-8")
    assert [book.stem for book in training_books(tmp_path, HELD_OUT)] == ["a-book"]
    write_texts(tmp_path, tmp_path / "out")
    assert (tmp_path / "out" / "prose_calibration.txt").read_text(encoding="utf-8").count("Another one.") == 1
    splits = {entry["file"]: entry["split"] for entry in manifest(tmp_path)["books"]}
    assert splits["a-book.txt"] == "train"
    assert set(splits.values()) == {"train", "held out"}


def test_a_folder_without_books_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="no training book"):
        training_books(tmp_path, HELD_OUT)
    assert command.main(["--text", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "no training book" in capsys.readouterr().err


def test_the_curve_is_drawn_from_the_log(rows: Rows, tmp_path: Path) -> None:
    stages = [replace(TINY[0], steps=20), replace(TINY[1], steps=10)]
    run = Run(build("ref-mini", 0), stages, rows, tmp_path, compiled=False)
    run.train()
    write_curve(tmp_path / "log.jsonl", tmp_path)
    lines = json.loads((tmp_path / "loss_curve.json").read_text(encoding="utf-8"))
    assert [line["step"] for line in lines] == [10, 20, 10]
    assert (tmp_path / "loss_curve.png").stat().st_size > 1000


@given(text=st.text())
def test_the_tokenizer_gives_every_text_back(text: str, tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize("task", TASKS)
def test_prompt_and_answer_tokenize_alike_together_and_apart(task: str, tokenizer: PreTrainedTokenizerFast) -> None:
    for example in examples(task, "eval", 50):
        together = tokenizer.encode(example.prompt + example.answer)
        apart = tokenizer.encode(example.prompt) + tokenizer.encode(example.answer, add_special_tokens=False)
        assert together == apart


def test_every_word_of_the_world_is_one_token(tokenizer: PreTrainedTokenizerFast, rows: Rows) -> None:
    assert len(tokenizer) == VOCAB_SIZE
    for word in world_words():
        assert len(rows.encode(Span(f" {word}"))) == 1
    assert len(rows.encode(Span(" 2024"))) == 5
