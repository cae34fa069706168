"""The answers of each task are right, computed a second time from the prompt."""

from __future__ import annotations

import re

import pytest

from trimtab.world import RELATIONS, examples, people
from trimtab.world.facts import FORMS, QUESTIONS, STATEMENTS, held_out_form
from trimtab.world.formats import OPERATIONS
from trimtab.world.lexicon import KEYS, VALUES
from trimtab.world.people import PEOPLE
from trimtab.world.people import VALUES as FACT_VALUES
from trimtab.world.recall import FORMS as RECALL_FORMS
from trimtab.world.recall import draw_records
from trimtab.world.split import generator
from trimtab.world.types import Example


def records_of(example: Example) -> dict[str, str]:
    """The records of a recall prompt in list form."""
    listing = example.prompt.split("Notes: ")[1].split(".\n")[0]
    return dict(tuple(record.split(" = ")) for record in listing.split(", "))  # type: ignore[misc]


@pytest.mark.parametrize("value", ["word", "pair", "code"])
@pytest.mark.parametrize("records", [1, 16, 48])
def test_recall_asks_for_what_the_records_say(value: str, records: int) -> None:
    for example in examples("recall", "eval", 20, records=records, value=value, filler=" Some prose. \n"):
        known = records_of(example)
        asked = re.search(r"\nSome prose\.\nAnswers: (\w+) =$", example.prompt)
        assert asked is not None
        assert known[asked[1]] == example.answer.strip()
        assert len(known) == len(set(known.values())) == records == example.fields["records"]
        assert example.fields["filler_chars"] == len("Some prose.")


@pytest.mark.parametrize("form", RECALL_FORMS)
def test_every_form_of_recall_holds_the_asked_record(form: str) -> None:
    for example in examples("recall", "eval", 20, form=form):
        record = example.prompt.split("Answers:")[1] + example.answer
        assert re.search(rf"{record}[.,]", example.prompt)


@pytest.mark.parametrize("kind", ["word", "pair", "code"])
def test_pairs_of_key_and_value_belong_to_one_split(kind: str) -> None:
    drawn = {
        split: {
            (key, value.split()[0])
            for seed in range(60)
            for key, value in draw_records(generator("recall", split, seed), split, 48, kind)  # type: ignore[arg-type]
        }
        for split in ("train", "eval")
    }
    assert not drawn["train"] & drawn["eval"]


def test_keys_values_and_names_do_not_collide() -> None:
    assert not set(KEYS) & set(VALUES)
    assert len(set(KEYS)) == len(KEYS)
    assert len(set(VALUES)) == len(VALUES)
    for values in FACT_VALUES.values():
        assert len(set(values)) == len(values)


def test_there_are_different_people_with_a_fact_for_each_relation() -> None:
    assert len({person.name for person in people()}) == PEOPLE
    for person in people():
        assert all(person.facts[relation] in FACT_VALUES[relation] for relation in RELATIONS)


def test_facts_ask_about_all_people_and_relations_before_any_repeats() -> None:
    asked = [(e.fields["person"], e.fields["relation"]) for e in examples("facts", "eval", PEOPLE * 6)]
    assert len(set(asked)) == PEOPLE * 6


def test_facts_answers_are_those_of_the_table() -> None:
    table = {person.name: person.facts for person in people()}
    for example in examples("facts", "eval", 300):
        facts = table[str(example.fields["person"])]
        assert str(example.fields["person"]) in example.prompt
        assert example.answer == f" {facts[str(example.fields['relation'])]}"


def test_a_reserved_form_is_evaluation_only() -> None:
    reserved = {(p.name, r): held_out_form(p, r) for p in people() for r in RELATIONS}
    for split in ("train", "eval"):
        for task in ("facts", "openbook"):
            for example in examples(task, split, 500):  # type: ignore[arg-type]
                same = reserved[str(example.fields["person"]), str(example.fields["relation"])]
                assert (example.fields["template"] == same) == (split == "eval")


def test_every_relation_has_the_same_number_of_forms() -> None:
    assert set(QUESTIONS) == set(STATEMENTS) == set(RELATIONS)
    assert {len(set(forms)) for forms in QUESTIONS.values()} == {FORMS}


@pytest.mark.parametrize("agrees", [True, False])
def test_openbook_answers_what_the_context_says(agrees: bool) -> None:
    for example in examples("openbook", "eval", 200, agrees=agrees, facts=3):
        context, _ = example.prompt.split("\nQuestion:")
        assert f"{example.answer}." in context
        assert (example.answer.strip() == example.fields["memorised"]) == agrees
        assert example.fields["agrees"] is agrees
        assert example.choices[0] == example.answer
        assert agrees or example.choices[1] == f" {example.fields['memorised']}"


def test_openbook_without_a_wish_agrees_half_of_the_time() -> None:
    assert sum(e.fields["agrees"] is True for e in examples("openbook", "eval", 100)) == 50


@pytest.mark.parametrize("operation", OPERATIONS)
def test_format_answers_hold_the_words(operation: str) -> None:
    for example in examples("format", "eval", 30, operation=operation, words=4):
        said = re.search(r"Words: (.*)\n", example.prompt)
        assert said is not None
        words = re.findall(r"[a-z]+", example.answer)
        wanted = {"twice": said[1].split() * 2, "first": said[1].split()[:1], "last": said[1].split()[-1:]}
        left = [word for word in words if operation != "and" or word != "and"]
        assert left == wanted.get(operation, said[1].split())


@pytest.mark.parametrize("digits", [1, 2])
def test_arithmetic_is_right(digits: int) -> None:
    for example in examples("arithmetic", "eval", 200, digits=digits):
        a, sign, b = re.fullmatch(r"(\d+)([+-])(\d+)=", example.prompt).groups()  # type: ignore[union-attr]
        assert int(example.answer) == (int(a) + int(b) if sign == "+" else int(a) - int(b)) >= 0
        assert max(len(a), len(b)) <= digits


def test_sums_stay_in_their_split_when_turned_around() -> None:
    def numbers(split: str) -> set[frozenset[str]]:
        made = examples("arithmetic", split, 3000, operation="add")  # type: ignore[arg-type]
        return {frozenset(e.prompt.rstrip("=").split("+")) for e in made}

    assert not numbers("train") & numbers("eval")


def test_sentiment_has_as_many_reviews_of_each_label() -> None:
    made = examples("sentiment", "eval", 200)
    assert sum(e.answer == " good" for e in made) == 100
    assert {e.fields["kind"] for e in made} == {"plain", "turned", "denied"}


def test_sentiment_turned_reviews_end_on_their_label() -> None:
    from trimtab.world.sentiment import OPINIONS

    for example in examples("sentiment", "eval", 100, kind="turned"):
        last = re.search(r"was (\w+)\.\nLabel:$", example.prompt)
        assert last is not None
        assert last[1] in OPINIONS[example.answer.strip()]
