"""What the tasks of the small world share: held-out examples, exact match by teacher forcing, clustered proportions.

Exact match asks whether greedy generation would write the answer and then stop: every token of the answer is the
argmax given the ones before, and so is a stop after it. One forward pass tells; generating the text would tell the same
(up to answers that greedy decoding would spell in other tokens than the tokenizer does).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

from trimtab import world
from trimtab.core.errors import ConfigError
from trimtab.evaluation import statistics
from trimtab.evaluation.base import Document, Estimate, LogLikelihood, Request, Response, Task
from trimtab.world.types import Example


def document_of(task: str, example: Example, metric: str, cluster: str | None) -> Document:
    """The document of an example, with an id made of its text and the version of the world."""
    identity = "\x1f".join((task, str(world.WORLD_VERSION), example.prompt, example.answer))
    fields = {"prompt": example.prompt, "answer": example.answer, "choices": example.choices, "metric": metric}
    return Document(hashlib.sha256(identity.encode()).hexdigest()[:16], {**example.fields, **fields}, cluster)


def check_limit(limit: int | None, default: int) -> int:
    """The number of documents that a limit means (None: the default). Raises ConfigError below 1."""
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1 document, but is {limit}.")
    return limit or default


class WorldTask(Task):
    """Exact match on held-out examples. A document counts for one metric, named by its field "metric".

    world_task   name of the task in trimtab.world
    stops        what may follow an answer, beside the end of the text
    size         documents when no limit is given
    """

    world_task: ClassVar[str]
    stops: ClassVar[tuple[str, ...]] = ("\n",)
    size: ClassVar[int] = 256
    higher_is_better: ClassVar[Mapping[str, bool]] = {"exact_match": True, "answer_nats": False}

    def documents(self, limit: int | None, seed: int) -> Sequence[Document]:
        examples = world.examples(self.world_task, "eval", check_limit(limit, self.size), seed)
        return [document_of(self.name, e, self.metric_of(e), self.cluster_of(e)) for e in examples]

    def metric_of(self, example: Example) -> str:
        """The metric that an example counts for."""
        return "exact_match"

    def cluster_of(self, example: Example) -> str | None:
        return example.cluster

    def requests(self, document: Document) -> Mapping[str, Request]:
        return {"gold": LogLikelihood(document.fields["prompt"], document.fields["answer"], ends=True)}

    def score(self, document: Document, responses: Mapping[str, Response]) -> Mapping[str, float | None]:
        gold = responses["gold"]
        after = gold.next_text or ""
        ended = not after or after.startswith(self.stops)
        return {document.fields["metric"]: float(gold.is_greedy and ended), "answer_nats": -gold.log_prob}

    def estimate(
        self, documents: Sequence[Document], values: Mapping[str, Sequence[float | None]]
    ) -> Mapping[str, Estimate]:
        found = {}
        for metric, column in values.items():
            asked = [d.fields["metric"] == metric or metric == "answer_nats" for d in documents]
            known = [
                (value, document.cluster)
                for value, document, ask in zip(column, documents, asked, strict=True)
                if ask and value is not None
            ]
            if known:
                numbers, clusters = zip(*known, strict=True)
                undefined = sum(asked) - len(known)
                interval = statistics.mean if metric == "answer_nats" else statistics.proportion
                found[metric] = interval(numbers, clusters_or_none(clusters), undefined=undefined)
        return found


def clusters_or_none(clusters: Iterable[str | None]) -> list[str | None] | None:
    """None where no item has a cluster, so that all count as independent."""
    listed = list(clusters)
    return listed if any(cluster is not None for cluster in listed) else None
