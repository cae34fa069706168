"""Recall by distance: values of key-value records are asked for when prose lies in between, read through a cache.

The task is `evaluation/tasks/recall.py`: held-out records, prose, then questions one after another. Exact match says
whether greedy decoding would write the value and stop. Harder settings are there because a model may be at its ceiling
on few records of one word, where a cache that loses something would still look perfect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trimtab.evaluation._evaluate import ask
from trimtab.evaluation.base import TaskResult
from trimtab.evaluation.caches.decoding import CHUNK
from trimtab.evaluation.client import LocalClient
from trimtab.evaluation.tasks.recall import Recall
from trimtab.models import tokenizer_of

if TYPE_CHECKING:
    from trimtab.cache.base import CacheMethod

METRIC = "exact_match_far"


@dataclass(frozen=True, slots=True)
class RecallSetting:
    """distance: tokens of prose between records and questions; value: "word", "pair" or "code" (three digits)."""

    distance: int
    records: int = 16
    value: str = "word"

    @property
    def label(self) -> str:
        return f"{self.records} {self.value}s at {self.distance}"

    def prompt_tokens(self, questions: int) -> int:
        """Tokens of a prompt with its questions, at most."""
        per_record = {"word": 5, "pair": 6, "code": 8}[self.value]
        return self.distance + (self.records + min(questions, self.records)) * per_record + 16


SETTINGS = (
    RecallSetting(128),
    RecallSetting(512),
    RecallSetting(1024),
    RecallSetting(1500),
    RecallSetting(1024, records=48),
    RecallSetting(1024, value="code"),
)


def recall_by_distance(
    model: PreTrainedModel,
    method: CacheMethod | None,
    settings: Sequence[RecallSetting] = SETTINGS,
    *,
    contexts: int = 8,
    questions: int = 16,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    chunk: int = CHUNK,
) -> dict[RecallSetting, TaskResult]:
    """Exact match (metric `exact_match_far`) in each setting, `questions` about each of `contexts`, which are clusters.

    method   None: without a cache, in one forward pass

    Results of two methods with the same arguments are of the same documents: `evaluation.compare` pairs them.
    Raises BudgetError if a context does not fit the model.
    """
    client = LocalClient(model, tokenizer or tokenizer_of(model), cache=method, chunk=chunk)
    work = {}
    for setting in settings:
        task = Recall(records=setting.records, distance=setting.distance, value=setting.value)
        asked = min(questions, setting.records)
        work[setting.label] = task, task.far(contexts, seed, questions=asked)
    results = ask(client, work)
    return {setting: results[setting.label] for setting in settings}
