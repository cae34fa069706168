"""Labels of short reviews: the likelier of the two."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from trimtab.evaluation.base import Document, LogLikelihood, Request, Response
from trimtab.evaluation.tasks._world import WorldTask
from trimtab.world.types import Example

__all__ = ["Sentiment"]


class Sentiment(WorldTask):
    """Accuracy of choosing the label by log-likelihood."""

    name: ClassVar[str] = "sentiment"
    summary: ClassVar[str] = "Reviews labelled good or bad, chosen by log-likelihood."
    world_task: ClassVar[str] = "sentiment"
    higher_is_better: ClassVar[Mapping[str, bool]] = {"accuracy": True, "answer_nats": False}

    def metric_of(self, example: Example) -> str:
        return "accuracy"

    def cluster_of(self, example: Example) -> None:
        """The four topics are all there are, not a sample of topics, so reviews count as independent."""

    def requests(self, document: Document) -> Mapping[str, Request]:
        fields = document.fields
        return {f"choice/{i}": LogLikelihood(fields["prompt"], choice) for i, choice in enumerate(fields["choices"])}

    def score(self, document: Document, responses: Mapping[str, Response]) -> Mapping[str, float | None]:
        choices: tuple[str, ...] = document.fields["choices"]
        log_probs = [responses[f"choice/{i}"].log_prob for i in range(len(choices))]
        gold = choices.index(document.fields["answer"])
        chosen = max(range(len(choices)), key=lambda i: log_probs[i])
        return {"accuracy": float(chosen == gold), "answer_nats": -log_probs[gold]}
