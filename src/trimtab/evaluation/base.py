"""The contract of evaluation: a task turns documents into requests and their responses into values with intervals."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class Document:
    """One evaluation item. `id` is a stable hash of its content and the generator's version."""

    id: str
    fields: Mapping[str, Any]
    cluster: str | None = None


@dataclass(frozen=True, slots=True)
class LogLikelihood:
    """Log-probability of `continuation` after `context`, encoded jointly.

    ends   also report, as `Response.next_text`, the token that greedy decoding would put after the continuation;
           with it, `is_greedy` tells what greedy generation of a fixed answer would have written, in one forward pass
    """

    context: str
    continuation: str
    ends: bool = False


@dataclass(frozen=True, slots=True)
class Generate:
    """Greedy text after `prompt` until a stop string or `max_new_tokens`."""

    prompt: str
    max_new_tokens: int
    stop: tuple[str, ...] = ("\n",)


@dataclass(frozen=True, slots=True)
class Score:
    """Log-likelihood of a whole text by sliding window, each token scored once."""

    text: str


Request = LogLikelihood | Generate | Score


@dataclass(frozen=True, slots=True)
class Response:
    """What the model answered.

    log_prob    natural log, summed over `tokens`
    tokens      tokens scored, or generated
    is_greedy   every token was the argmax
    text        generated text, without the stop string
    next_text   text of the most likely token after the continuation, "" for end of text; None if it was not asked for
    """

    log_prob: float = 0.0
    tokens: int = 0
    is_greedy: bool = False
    text: str = ""
    next_text: str | None = None


@dataclass(frozen=True, slots=True)
class Estimate:
    """A statistic with its 95 % interval, from n documents (undefined: documents without a value).

    The interval of fewer than two independent documents is infinite, and null in JSON.
    """

    value: float
    low: float
    high: float
    n: int
    undefined: int = 0

    def to_dict(self) -> dict[str, float | int | None]:
        low, high = (bound if math.isfinite(bound) else None for bound in (self.low, self.high))
        return {"value": self.value, "low": low, "high": high, "n": self.n, "undefined": self.undefined}


class Task(ABC):
    """A named set of documents with metrics. Subclass, one file per task in evaluation/tasks/, named as the task.

    higher_is_better   metric -> direction; its keys are the names of all metrics, in the order of importance
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    higher_is_better: ClassVar[Mapping[str, bool]]

    @abstractmethod
    def documents(self, limit: int | None, seed: int) -> Sequence[Document]:
        """At most `limit` documents (None: as many as the task finds right), the same for the same seed."""

    @abstractmethod
    def requests(self, document: Document) -> Mapping[str, Request]:
        """Role ("gold", "choice/0", ...) -> request."""

    @abstractmethod
    def score(self, document: Document, responses: Mapping[str, Response]) -> Mapping[str, float | None]:
        """Values of this document, by metric name; None = undefined."""

    @abstractmethod
    def estimate(
        self, documents: Sequence[Document], values: Mapping[str, Sequence[float | None]]
    ) -> Mapping[str, Estimate]:
        """Metrics with intervals, from the values of all documents, in their order."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One metric of a model against that of its reference, document by document.

    difference   model minus reference, paired
    recovery     share of the reference's figure that is kept: model / reference, or its inverse where lower is better
                 (1: nothing lost); None if the reference's figure is zero or below
    gained       documents that the model has right and the reference has not; None for other than zeros and ones
    lost         the other way round
    p_value      exact McNemar for zeros and ones, else a paired t-test
    p_holm       p_value adjusted for the number of comparisons made at once
    detectable   smallest true difference that these documents would show four times in five
    """

    task: str
    metric: str
    higher_is_better: bool
    difference: Estimate
    recovery: Estimate | None
    gained: int | None
    lost: int | None
    p_value: float
    p_holm: float
    detectable: float

    def to_dict(self) -> dict[str, Any]:
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        data["difference"] = self.difference.to_dict()
        data["recovery"] = self.recovery.to_dict() if self.recovery else None
        data["detectable"] = self.detectable if math.isfinite(self.detectable) else None
        return data


@dataclass(frozen=True, slots=True)
class TaskResult:
    """What a task measured of one model.

    metrics       name -> estimate
    ids           the documents, in their order
    values        name -> per-document values (None: undefined, or of another condition), for paired comparison
    clusters      cluster of each document
    comparisons   against the reference, if one was given
    """

    task: str
    metrics: Mapping[str, Estimate]
    ids: tuple[str, ...]
    values: Mapping[str, tuple[float | None, ...]]
    clusters: tuple[str | None, ...]
    higher_is_better: Mapping[str, bool]
    comparisons: tuple[Comparison, ...] = ()
