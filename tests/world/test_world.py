"""The laws that every task of the small world keeps."""

from __future__ import annotations

import subprocess
import sys
from itertools import islice

import pytest

from trimtab.world import TASKS, annotated_documents, documents, examples
from trimtab.world.mixture import DEFAULT_MIXTURE, WRITERS, Balance
from trimtab.world.split import generator
from trimtab.world.types import text_of


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", ["train", "eval"])
def test_the_same_arguments_give_the_same_examples(task: str, split: str) -> None:
    assert examples(task, split, 20, seed=3) == examples(task, split, 20, seed=3)
    assert examples(task, split, 20, seed=3) != examples(task, split, 20, seed=4)


@pytest.mark.parametrize("task", TASKS)
def test_prompt_and_answer_meet_at_a_token_boundary(task: str) -> None:
    for example in examples(task, "eval", 50):
        assert not example.prompt[-1].isspace()
        assert example.answer.startswith(" ") or task == "arithmetic"
        assert example.answer.strip()


@pytest.mark.parametrize("task", TASKS)
def test_choices_hold_the_answer_once(task: str) -> None:
    for example in examples(task, "eval", 100):
        if example.choices:
            assert example.choices.count(example.answer) == 1
            assert len(example.choices) > 1


@pytest.mark.parametrize("task", TASKS)
def test_no_example_of_one_split_occurs_in_the_other(task: str) -> None:
    """Recall is compared pair by pair in its own test; here whole examples are."""
    train = {e.prompt + e.answer for e in examples(task, "train", 3000, seed=1)}
    held_out = {e.prompt + e.answer for e in examples(task, "eval", 500, seed=1)}
    assert not train & held_out


@pytest.mark.parametrize("task", [task for task in TASKS if task != "recall"])
def test_no_evaluation_example_occurs_in_training_documents(task: str) -> None:
    rng = generator("test", "train", 0)
    text = "\n".join(text_of(WRITERS[task](rng, "train")) for _ in range(3000))
    lines = set(text.splitlines())
    if task == "facts":  # the answer stands on the line after the question
        seen = {part.split("\n")[0] for part in text.split("Question: ")}
        assert not {e.prompt.split("\n")[0].removeprefix("Question: ") for e in examples(task, "eval", 900)} & seen
    else:
        for example in examples(task, "eval", 300):
            whole = example.prompt + example.answer
            if "\n" in whole:
                assert f"{whole}\n" not in text
            else:
                assert whole not in lines


@pytest.mark.parametrize("task", TASKS)
def test_training_documents_end_with_a_line_break_and_hold_an_answer(task: str) -> None:
    document = WRITERS[task](generator("test", "train", 1), "train")
    assert text_of(document).endswith("\n")
    assert any(span.role == "answer" for span in document)


def test_unknown_tasks_splits_options_and_values_are_named() -> None:
    with pytest.raises(ValueError, match="unknown task 'recal'.*recall"):
        examples("recal", "eval", 1)
    with pytest.raises(ValueError, match="unknown split 'test'.*train, eval"):
        examples("facts", "test", 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"unknown option 'record' of task 'recall'.*records"):
        examples("recall", "eval", 1, record=4)
    with pytest.raises(ValueError, match="n must not be negative"):
        examples("facts", "eval", -1)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("recall", {"records": 0}, "records must be in"),
        ("recall", {"form": "table"}, "unknown form 'table'"),
        ("recall", {"value": "long"}, "unknown value 'long'"),
        ("facts", {"relation": "height"}, "unknown relation 'height'"),
        ("openbook", {"relation": "height"}, "unknown relation 'height'"),
        ("openbook", {"facts": 7}, "facts must be in"),
        ("openbook", {"agrees": "yes"}, "agrees must be"),
        ("format", {"operation": "xml"}, "unknown operation 'xml'"),
        ("format", {"words": 9}, "words must be in"),
        ("arithmetic", {"operation": "power"}, "unknown operation 'power'"),
        ("arithmetic", {"digits": 5}, "digits must be in"),
        ("sentiment", {"topic": "film"}, "unknown topic 'film'"),
        ("sentiment", {"kind": "ironic"}, "unknown kind 'ironic'"),
    ],
)
def test_impossible_options_are_refused(task: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        examples(task, "eval", 1, **options)


def test_documents_repeat_themselves_exactly() -> None:
    assert list(islice(documents("train", 5), 50)) == list(islice(documents("train", 5), 50))
    assert list(islice(documents("train", 5), 50)) != list(islice(documents("eval", 5), 50))


def test_the_realised_mixture_is_the_asked_one() -> None:
    amounts = dict.fromkeys(DEFAULT_MIXTURE, 0)
    for document in islice(annotated_documents("train", 0), 5000):
        text = text_of(document)
        task = (
            next(
                name
                for name, opening in {
                    "recall": "Notes:",
                    "openbook": "Context:",
                    "format": "Instruction:",
                    "sentiment": "Review:",
                }.items()
                if text.startswith(opening)
            )
            if text.startswith(("Notes:", "Context:", "Instruction:", "Review:"))
            else ("arithmetic" if text[0].isdigit() else "facts")
        )
        amounts[task] += len(text)
    total, asked = sum(amounts.values()), sum(DEFAULT_MIXTURE.values())
    for task, share in DEFAULT_MIXTURE.items():
        assert amounts[task] / total == pytest.approx(share / asked, abs=0.01)


def test_a_mixture_of_unknown_tasks_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown task 'poetry'"):
        next(documents("train", 0, {"poetry": 1.0}))
    with pytest.raises(ValueError, match="shares must be positive"):
        Balance({"recall": -1.0, "facts": 2.0})


def test_the_world_needs_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, trimtab.world as w; w.examples('facts', 'eval', 1); "
        "sys.exit(bool({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
