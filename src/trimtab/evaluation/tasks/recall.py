"""In-context recall of key-value records: nearby, and across 1,500 tokens of prose."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import ClassVar

from trimtab.core.errors import ConfigError, did_you_mean
from trimtab.evaluation.base import Document
from trimtab.evaluation.tasks._prose import held_out_prose
from trimtab.evaluation.tasks._world import WorldTask, check_limit, document_of
from trimtab.world import recall
from trimtab.world.split import generator
from trimtab.world.types import Example

__all__ = ["Recall"]

QUESTIONS = 8
_CHARACTERS_PER_TOKEN = 3.5  # of the shipped tokenizer on prose it has not seen, rounded up


class Recall(WorldTask):
    """One of `records` values is asked for.

    exact_match       the question follows the records
    exact_match_far   `distance` tokens of held-out prose (at 3.5 characters each) lie between; eight questions are
                      asked one after another about the same records, and count as one cluster; 0 leaves it out

    value             kind of the values: "word" (one token), "pair" (two words) or "code" (three digits)

    A limit holds for each of the two.
    """

    name: ClassVar[str] = "recall"
    summary: ClassVar[str] = "Values of key-value records in the prompt, nearby and 1,500 tokens back."
    world_task: ClassVar[str] = "recall"
    stops: ClassVar[tuple[str, ...]] = (",", ".", "\n")
    higher_is_better: ClassVar[Mapping[str, bool]] = {
        "exact_match": True,
        "exact_match_far": True,
        "answer_nats": False,
    }
    far_size: ClassVar[int] = 128

    def __init__(self, records: int = 16, distance: int = 1500, value: str = "word") -> None:
        if records < 1 or distance < 0:
            raise ConfigError(f"recall needs records >= 1 and distance >= 0, not {records} and {distance}.")
        if value not in recall.VALUE_KINDS:
            raise ConfigError(f"recall: unknown value '{value}'. {did_you_mean(value, recall.VALUE_KINDS)}")
        self.records, self.distance, self.value = records, distance, value

    def documents(self, limit: int | None, seed: int) -> Sequence[Document]:
        count = check_limit(limit, self.size)
        near = recall.examples("eval", count, seed, records=self.records, value=self.value)
        documents = [document_of(self.name, example, "exact_match", None) for example in near]
        if self.distance:
            far = check_limit(limit, self.far_size)
            documents += self.far(-(-far // QUESTIONS), seed)[:far]
        return documents

    def far(self, contexts: int, seed: int, *, questions: int = QUESTIONS) -> list[Document]:
        """`contexts` times `questions` documents; each prompt begins the next, so a context is read once."""
        prose = held_out_prose()
        rng = generator("recall far", "eval", seed)
        documents = []
        for number in range(contexts):
            filler = _excerpt(rng, prose, round(self.distance * _CHARACTERS_PER_TOKEN))
            spans = recall.document(
                rng, "eval", records=self.records, filler=filler, value=self.value, questions=questions
            )
            prompt = ""
            asking = False
            for span in spans:
                asking |= span.text == recall.FORMS["list"].asking
                if asking and span.role == "answer":
                    example = Example(prompt, span.text, fields={"records": self.records, "filler_chars": len(filler)})
                    documents.append(document_of(self.name, example, "exact_match_far", f"context {number}"))
                prompt += span.text
        return documents


def _excerpt(rng: random.Random, text: str, characters: int) -> str:
    """About this many characters from a random place, from the beginning of a word to the end of one."""
    if len(text) <= characters:
        return text
    begin = rng.randrange(len(text) - characters)
    words = text[begin : begin + characters].split(" ")
    return " ".join(words[1:-1])
