"""Run tasks on a model: `evaluate`, and the JSON form of what it returns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trimtab.core.errors import ConfigError
from trimtab.evaluation.base import Comparison, Document, Request, Response, Task, TaskResult
from trimtab.evaluation.caches.named import cache_method
from trimtab.evaluation.client import LocalClient
from trimtab.evaluation.comparison import compare
from trimtab.evaluation.tasks import task, task_names
from trimtab.models import load, tokenizer_of

if TYPE_CHECKING:
    from trimtab.cache.base import CacheMethod

Results = Mapping[str, TaskResult]


def evaluate(
    model: PreTrainedModel | str,
    tasks: Sequence[str | Task] | str | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    limit: int | None = None,
    seed: int = 0,
    reference: PreTrainedModel | str | Results | None = None,
    text: str | Path | None = None,
    batch_tokens: int = 2048,
    cache: CacheMethod | str | None = None,
) -> dict[str, TaskResult]:
    """Ask the model the documents of some tasks; metrics come with 95 % intervals.

    tasks         names (also as "prose,recall"), or Task objects with options of their own; None: all tasks
    tokenizer     default: that of the model
    limit         most documents per task; None: each task's own number
    seed          draws the documents; the same seed asks the same ones
    reference     the uncompressed model, or what `evaluate` returned for it with the same limit, seed and text: every
                  result then holds paired comparisons with it, recovery included
    text          a UTF-8 file for the task "prose" instead of the shipped prose
    batch_tokens  tokens per forward pass; changes speed and memory, not results
    cache         a method of the cache room, or its name for its default options: keys and values are kept by it and
                  texts are read in chunks (see `evaluation/caches/decoding.py`). The reference has no cache

    Returns results by task name, in the order asked. Raises ConfigError for an unknown task, or a `text` that no task
    reads; DataError for text that cannot be used; BudgetError for documents that do not fit the model's context.
    """
    chosen = _tasks(tasks, text)
    subject = load(model) if isinstance(model, str) else model
    base: Results | None = None
    if isinstance(reference, Mapping):
        base = reference
    elif reference is not None:
        base = evaluate(reference, chosen, tokenizer=tokenizer, limit=limit, seed=seed, batch_tokens=batch_tokens)
    method = cache_method(cache) if isinstance(cache, str) else cache
    client = LocalClient(subject, tokenizer or tokenizer_of(subject), batch_tokens=batch_tokens, cache=method)
    results = ask(client, {one.name: (one, one.documents(limit, seed)) for one in chosen})
    if base is None:
        return results
    against: dict[str, list[Comparison]] = defaultdict(list)
    for comparison in compare(base, results):
        against[comparison.task].append(comparison)
    return {name: replace(result, comparisons=tuple(against[name])) for name, result in results.items()}


def _tasks(tasks: Sequence[str | Task] | str | None, text: str | Path | None) -> list[Task]:
    names = task_names() if tasks is None else tasks.split(",") if isinstance(tasks, str) else tasks
    chosen = []
    for name in names:
        if isinstance(name, Task):
            chosen.append(name)
        else:
            own = {"text": text} if text is not None and name.strip() == "prose" else {}
            chosen.append(task(name.strip(), **own))
    if not chosen:
        raise ConfigError(f"no task to evaluate. Known: {', '.join(task_names())}.")
    if text is not None and not any(one.name == "prose" for one in chosen):
        raise ConfigError(f"text {text} is read by the task 'prose' only; add it to the tasks.")
    if len({one.name for one in chosen}) < len(chosen):
        raise ConfigError(f"a task is asked for twice: {', '.join(one.name for one in chosen)}.")
    return chosen


def ask(client: LocalClient, work: Mapping[str, tuple[Task, Sequence[Document]]]) -> dict[str, TaskResult]:
    """All requests of all documents in one go, so that rows of similar length share batches, then scores."""
    requests: list[Request] = []
    roles: list[tuple[str, int, str]] = []
    for name, (one, documents) in work.items():
        for number, document in enumerate(documents):
            for role, request in one.requests(document).items():
                requests.append(request)
                roles.append((name, number, role))
    answers: dict[tuple[str, int], dict[str, Response]] = defaultdict(dict)
    for (name, number, role), response in zip(roles, client.run(requests, "evaluate"), strict=True):
        answers[name, number][role] = response
    return {
        name: _result(one, documents, [answers[name, number] for number in range(len(documents))])
        for name, (one, documents) in work.items()
    }


def _result(one: Task, documents: Sequence[Document], answers: Sequence[Mapping[str, Response]]) -> TaskResult:
    scores = [one.score(document, answer) for document, answer in zip(documents, answers, strict=True)]
    names = dict.fromkeys(name for score in scores for name in score)
    values = {name: tuple(score.get(name) for score in scores) for name in names}
    estimates = one.estimate(documents, values)
    order = [name for name in one.higher_is_better if name in estimates]
    return TaskResult(
        task=one.name,
        metrics={name: estimates[name] for name in order},
        ids=tuple(document.id for document in documents),
        values=values,
        clusters=tuple(document.cluster for document in documents),
        higher_is_better=one.higher_is_better,
    )


def to_json(results: Results) -> dict[str, Any]:
    """`{"tasks": {task: {metric: {value, low, high, n, undefined}}}}`, and "comparisons" where there is a reference.

    A comparison is {task, metric, difference, recovery, gained, lost, p_value, p_holm, ...}. All values are JSON.
    """
    data: dict[str, Any] = {
        "tasks": {
            name: {metric: estimate.to_dict() for metric, estimate in result.metrics.items()}
            for name, result in results.items()
        }
    }
    comparisons = [comparison.to_dict() for result in results.values() for comparison in result.comparisons]
    return data | ({"comparisons": comparisons} if comparisons else {})
