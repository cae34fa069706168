"""HeadScores: derived from the trials alone, exact through a file, refused where they do not fit; and their picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.cache.retrieval_toy import toy_model
from trimtab.cache._retrieval.picture import draw
from trimtab.cache._retrieval.scores import HeadScores, TrialScore, head_layout, stability
from trimtab.core.errors import CheckpointError, ConfigError, DataError, OutputError
from trimtab.models.random import random_model


def trial(answered: bool, *copies: tuple[int, int, int], length: int = 100, span: int = 4) -> TrialScore:
    return TrialScore(length=length, depth=0.5, span=span, answered=answered, copies=copies)


def scores_of(*trials: TrialScore, layers: int = 2, heads: int = 4, kv_heads: int = 2) -> HeadScores:
    return HeadScores(
        model="toy",
        fingerprint="f",
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        threshold=0.1,
        trials=trials,
    )


SCORES = scores_of(
    trial(True, (0, 1, 4), (1, 2, 1)),
    trial(False, (0, 0, 4), length=200),
    trial(True, (0, 1, 2), (1, 3, 1), length=200),
    trial(True, (0, 1, 3), (1, 2, 1), length=300),
)


def test_mean_over_the_trials_that_count() -> None:
    expected = torch.zeros(2, 4, dtype=torch.float64)
    expected[0, 1], expected[1, 2], expected[1, 3] = 0.75, 0.5 / 3, 0.25 / 3
    torch.testing.assert_close(SCORES.scores, expected)
    assert SCORES.ranking[:4] == ((0, 1), (1, 2), (1, 3), (0, 0))
    assert SCORES.retrieval_heads == ((0, 1), (1, 2))
    first, second = SCORES.halves()
    assert [t.length for t in first.trials] == [100, 300]
    assert [t.length for t in second.trials] == [200]
    assert list(SCORES.by_length()) == [100, 200, 300]
    assert SCORES.by_length()[200].scores[1, 3] == 0.25


def test_kv_heads_are_as_important_as_their_best_reader() -> None:
    torch.testing.assert_close(SCORES.kv_scores, torch.tensor([[0.75, 0.0], [0.0, 0.5 / 3]], dtype=torch.float64))
    assert SCORES.kv_ranking == ((0, 0), (1, 1), (0, 1), (1, 0))
    # equal best readers: the sum decides
    tied = scores_of(trial(True, (0, 0, 2), (1, 0, 2), (1, 1, 1)))
    assert tied.kv_ranking[:2] == ((1, 0), (0, 0))


def test_round_trip(tmp_path: Path) -> None:
    SCORES.save(tmp_path / "heads.json")
    assert HeadScores.load(tmp_path / "heads.json") == SCORES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "something else"}, "does not hold retrieval scores"),
        ({"version": 2}, "of version 2; this trimtab reads 1"),
        ({"layers": 1}, "damaged.*do not fit 1 layers"),
        ({"heads": 3}, "damaged.*must divide"),
        ({"scores": [[0.0] * 4] * 2}, "its scores are not those of its trials"),
        ({"trials": []}, "damaged.*undefined"),
        ({"trials": [{"length": 3}]}, "damaged.*KeyError"),
        ({"threshold": None}, "damaged.*TypeError"),
    ],
)
def test_damaged_files_are_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    SCORES.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        HeadScores.load(path)


def test_truncated_and_missing_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    SCORES.save(path)
    whole = path.read_bytes()
    for size in (0, 1, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="cannot be read"):
            HeadScores.load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="cannot be read"):
        HeadScores.load(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        HeadScores.load(tmp_path / "none.json")


def test_scores_of_another_model_are_refused(tmp_path: Path) -> None:
    model = toy_model()
    layout = head_layout(model)
    own = HeadScores(
        model="toy",
        fingerprint=layout.fingerprint,
        layers=layout.layers,
        heads=layout.heads,
        kv_heads=layout.kv_heads,
        threshold=0.1,
        trials=(trial(True, (1, 1, 1)),),
    )
    own.save(tmp_path / "heads.json")
    assert HeadScores.load(tmp_path / "heads.json", model) == own
    assert HeadScores.load(tmp_path / "heads.json", model.bfloat16()) == own
    with pytest.raises(ConfigError, match="scores are of toy .*not of a LlamaForCausalLM with"):
        HeadScores.load(tmp_path / "heads.json", random_model("llama"))


def test_undefined_scores_do_not_exist() -> None:
    with pytest.raises(DataError, match="answered none of 1 trials"):
        scores_of(trial(False, (0, 0, 1)))
    with pytest.raises(DataError, match="answered none of 0 trials"):
        SCORES.where(lambda t: t.length > 1000)
    with pytest.raises(ConfigError, match="5 of 4 positions"):
        scores_of(trial(True, (0, 0, 5)))


def test_stability() -> None:
    assert stability(SCORES, SCORES, None) == pytest.approx(1.0)
    swapped = scores_of(trial(True, (0, 1, 1), (1, 2, 2), (1, 3, 3)), trial(True, (1, 3, 4), (1, 2, 1)))
    assert stability(SCORES, swapped, 3) < 0
    with pytest.raises(ConfigError, match="do not compare"):
        stability(SCORES, scores_of(trial(True), layers=1))
    with pytest.raises(ConfigError, match="undefined"):
        stability(SCORES, scores_of(trial(True)))


def test_picture(tmp_path: Path) -> None:
    draw(SCORES, tmp_path / "heads.png")
    assert (tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")
    draw(SCORES, tmp_path / "heads.svg")
    once = (tmp_path / "heads.svg").read_bytes()
    assert b"retrieval score" in once
    draw(SCORES, tmp_path / "heads.svg")
    assert (tmp_path / "heads.svg").read_bytes() == once
    assert sorted(p.name for p in tmp_path.iterdir()) == ["heads.png", "heads.svg"]
    with pytest.raises(ConfigError, match=r"not as 'heads\.gif'"):
        draw(SCORES, tmp_path / "heads.gif")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be written"):
        draw(SCORES, tmp_path / "file" / "heads.png")
