"""Retrieval scores of a model's heads: what detection found in each trial, and what follows from it.

Everything that is derived (scores, ranks, stability) is computed from the trials, so nothing can disagree with them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy.stats import spearmanr
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.core.errors import CheckpointError, ConfigError, DataError, TargetError
from trimtab.core.files import write_text_atomically
from trimtab.models import ModelView

HEAD_THRESHOLD = 0.1
SCORES_VERSION = 1
_KIND = "trimtab retrieval head scores"

Head = tuple[int, int]
"""(layer, query head), or (layer, KV head) where that is said."""


class HeadLayout(NamedTuple):
    """The heads of a model. `fingerprint` is a hex digest of its family and sizes, the same for all its dtypes."""

    layers: int
    heads: int
    kv_heads: int
    fingerprint: str


def head_layout(model: PreTrainedModel) -> HeadLayout:
    """Raises TargetError if the layers have different numbers of heads."""
    view = ModelView.of(model)
    attentions = [block.attention for block in view.blocks]
    shapes = {(a.num_heads, a.num_kv_heads, a.head_dim, a.rotary_dim) for a in attentions}
    if len(shapes) != 1:
        raise TargetError(f"{type(model).__name__}: its layers have different heads {sorted(shapes)}.")
    config = model.config.get_text_config()
    heads, kv_heads, head_dim, rotary_dim = shapes.pop()
    identity = [view.family, len(attentions), heads, kv_heads, head_dim, rotary_dim, config.vocab_size]
    identity += [linear.out_features for linear in view.linears]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    return HeadLayout(len(attentions), heads, kv_heads, digest)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialScore:
    """What detection saw in one trial.

    length     tokens of the prompt
    depth      of the needle, 0 to 1
    span       tokens of the answer
    answered   the model gave the answer; other trials do not count
    copies     (layer, head, distinct answer positions copied), without the heads that copied none
    """

    length: int
    depth: float
    span: int
    answered: bool
    copies: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, length: int, depth: float, answered: bool, copied: Tensor) -> TrialScore:
        """From `copied` [layers, heads, answer tokens] bool."""
        counts = copied.sum(dim=-1)
        copies = tuple((layer, head, int(counts[layer, head])) for layer, head in counts.nonzero().tolist())
        return cls(length=length, depth=depth, span=int(copied.shape[-1]), answered=answered, copies=copies)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadScores:
    """Retrieval scores of every query head.

    model         what the model was loaded from, as given
    fingerprint   of the model's family and sizes, see `head_layout`; other weights of these sizes have the same
    layers, heads, kv_heads
                  layers, and heads in each
    threshold     score above which a head is called a retrieval head
    trials        at least one of which was answered, else no score is defined: DataError
    """

    model: str
    fingerprint: str
    layers: int
    heads: int
    kv_heads: int
    threshold: float
    trials: tuple[TrialScore, ...]

    def __post_init__(self) -> None:
        if min(self.layers, self.heads, self.kv_heads) < 1 or self.heads % self.kv_heads:
            raise ConfigError(
                f"retrieval scores of {self.layers} layers with {self.heads} query and {self.kv_heads} KV heads: "
                "there must be some, and the KV heads must divide the query heads."
            )
        for trial in self.trials:
            for layer, head, count in trial.copies:
                if not (0 <= layer < self.layers and 0 <= head < self.heads and 0 < count <= trial.span):
                    raise ConfigError(
                        f"retrieval scores: {count} of {trial.span} positions copied by head {head} of layer {layer} "
                        f"do not fit {self.layers} layers of {self.heads} heads."
                    )
        if not any(trial.answered for trial in self.trials):
            raise DataError(
                f"retrieval scores of {self.model} are undefined: it answered none of {len(self.trials)} trials. "
                "Make shorter or easier trials; a model that cannot retrieve has no retrieval heads."
            )

    @property
    def counted(self) -> tuple[TrialScore, ...]:
        """The trials that were answered."""
        return tuple(trial for trial in self.trials if trial.answered)

    @property
    def scores(self) -> Tensor:
        """[layers, heads] float64 in [0, 1]: mean over the counted trials of the share of the answer copied."""
        total = torch.zeros(self.layers, self.heads, dtype=torch.float64)
        for trial in self.counted:
            for layer, head, count in trial.copies:
                total[layer, head] += count / trial.span
        return total / len(self.counted)

    @property
    def ranking(self) -> tuple[Head, ...]:
        """All query heads, the highest score first; of equal ones the earlier first."""
        return ranked(self.scores)

    @property
    def retrieval_heads(self) -> tuple[Head, ...]:
        """The query heads above the threshold, the highest first."""
        scores = self.scores
        return tuple(head for head in ranked(scores) if scores[head] > self.threshold)

    @property
    def kv_scores(self) -> Tensor:
        """[layers, KV heads]: the highest score in each group, for a KV head matters as much as its best reader."""
        return self._grouped.amax(dim=-1)

    @property
    def kv_sums(self) -> Tensor:
        """[layers, KV heads]: the sum over each group, by which ties of `kv_scores` are broken."""
        return self._grouped.sum(dim=-1)

    @property
    def kv_ranking(self) -> tuple[Head, ...]:
        """All KV heads, the highest score first; ties by the sum over the group, then the earlier first."""
        return ranked(self.kv_scores, self.kv_sums)

    @property
    def _grouped(self) -> Tensor:
        return self.scores.view(self.layers, self.kv_heads, -1)

    def where(self, keep: Callable[[TrialScore], bool]) -> HeadScores:
        """The scores over some of the trials. Raises DataError if none of them was answered."""
        return dataclasses.replace(self, trials=tuple(trial for trial in self.trials if keep(trial)))

    def halves(self) -> tuple[HeadScores, HeadScores]:
        """Over the 1st, 3rd, 5th, ... and over the 2nd, 4th, ... counted trial."""
        counted = self.counted
        first, second = (dataclasses.replace(self, trials=counted[start::2]) for start in (0, 1))
        return first, second

    def by_length(self) -> dict[int, HeadScores]:
        """Prompt length -> the scores over its trials, without lengths at which no trial was answered."""
        lengths = sorted({trial.length for trial in self.counted})
        counted = self.counted
        return {at: dataclasses.replace(self, trials=tuple(t for t in counted if t.length == at)) for at in lengths}

    def check_model(self, model: PreTrainedModel) -> None:
        """Raise ConfigError if these are the scores of a model of another family or other sizes."""
        layout = head_layout(model)
        if layout.fingerprint != self.fingerprint:
            raise ConfigError(
                f"these retrieval scores are of {self.model} ({self.layers} layers, {self.heads} query and "
                f"{self.kv_heads} KV heads, fingerprint {self.fingerprint}), not of a {type(model).__name__} with "
                f"{layout.layers} layers, {layout.heads} and {layout.kv_heads} heads, {layout.fingerprint}. "
                "Detect the heads of this model."
            )

    def save(self, path: str | Path) -> None:
        """Write as JSON, atomically. Raises OutputError."""
        body = dataclasses.asdict(self) | {"scores": self.scores.tolist()}
        write_text_atomically(path, json.dumps({"kind": _KIND, "version": SCORES_VERSION} | body) + "\n")

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel | None = None) -> HeadScores:
        """Read what `save` wrote, for `model` if one is given.

        Raises CheckpointError for a file that is missing, damaged, of another kind or of a newer version, ConfigError
        for another model's.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"retrieval scores {path} cannot be read: {error}") from None
        if not isinstance(data, dict) or data.get("kind") != _KIND:
            raise CheckpointError(f"{path} does not hold retrieval scores.")
        if data.get("version") != SCORES_VERSION:
            raise CheckpointError(
                f"retrieval scores {path} are of version {data.get('version')}; this trimtab reads {SCORES_VERSION}."
            )
        try:
            scores, stated = cls._from_dict(data), data["scores"]
        except (ConfigError, DataError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"retrieval scores {path} are damaged: {error!r}") from None
        if stated != scores.scores.tolist():
            raise CheckpointError(f"retrieval scores {path} are damaged: its scores are not those of its trials.")
        if model is not None:
            scores.check_model(model)
        return scores

    @classmethod
    def _from_dict(cls, data: dict[str, Any]) -> HeadScores:
        trials = tuple(
            TrialScore(
                length=int(trial["length"]),
                depth=float(trial["depth"]),
                span=int(trial["span"]),
                answered=bool(trial["answered"]),
                copies=tuple((int(layer), int(head), int(count)) for layer, head, count in trial["copies"]),
            )
            for trial in data["trials"]
        )
        return cls(
            model=str(data["model"]),
            fingerprint=str(data["fingerprint"]),
            layers=int(data["layers"]),
            heads=int(data["heads"]),
            kv_heads=int(data["kv_heads"]),
            threshold=float(data["threshold"]),
            trials=trials,
        )


def stability(one: HeadScores, other: HeadScores, top: int | None = 20) -> float:
    """Spearman's rank correlation of two sets of scores of the same heads, over the `top` by their sum (None: all).

    Raises ConfigError for other heads, or if one set gives all those heads the same score (then it is undefined).
    """
    if (one.layers, one.heads) != (other.layers, other.heads):
        raise ConfigError(
            f"scores of {one.layers} x {one.heads} and {other.layers} x {other.heads} heads do not compare."
        )
    a, b = one.scores, other.scores
    layers, heads = zip(*ranked(a + b)[:top], strict=True)
    a, b = a[list(layers), list(heads)], b[list(layers), list(heads)]
    if bool((a == a[0]).all()) or bool((b == b[0]).all()):
        raise ConfigError(f"the rank correlation of {len(a)} heads is undefined: one side scores them all alike.")
    return float(spearmanr(a.numpy(), b.numpy()).statistic)


def ranked(scores: Tensor, ties: Tensor | None = None) -> tuple[Head, ...]:
    """Indices of a [layers, heads] tensor, the highest first; ties by another such tensor, then the earlier first."""
    second = torch.zeros_like(scores) if ties is None else ties
    indices = [(layer, head) for layer in range(scores.shape[0]) for head in range(scores.shape[1])]
    return tuple(sorted(indices, key=lambda at: (-float(scores[at]), -float(second[at]), at)))
