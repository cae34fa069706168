"""The curriculum of the reference models: what they were trained on, in which order.

In-context copying appears suddenly when a small model sees nothing but repeated random segments, and
hardly at all when it is trained on a mixture from the start. So ``ref`` begins with copying: few
token ids, then all; then records whose value directly follows the key, then records in list form and
in sentences, and only then the mixture of prose and all tasks, first with short rows, then longer
ones, with a learning rate that falls to zero at the end. ``ref-mini`` follows the same road in
fewer steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from trimtab.training.reference.data import RowOptions
from trimtab.training.reference.tokenizer import CONTEXT

SEED = 0

MIXTURE: Mapping[str, float] = {
    "prose": 0.52,
    "copy": 0.03,
    "recall": 0.15,
    "facts": 0.12,
    "openbook": 0.06,
    "format": 0.05,
    "arithmetic": 0.04,
    "sentiment": 0.03,
}
"""Shares of the rows (and, as rows of a stage are equally long, of the tokens)."""

LATER_MIXTURE: Mapping[str, float] = {
    "prose": 0.55,
    "copy": 0.02,
    "recall": 0.11,
    "facts": 0.10,
    "openbook": 0.05,
    "format": 0.05,
    "arithmetic": 0.09,
    "sentiment": 0.03,
}
"""The same once recall and facts are nearly learned: more prose and more than twice the arithmetic."""


@dataclass(frozen=True)
class Stage:
    """A number of optimiser steps on rows of one kind.

    name      of the stage; also the seed of its rows.
    steps     number of steps; with ``until_loss`` at most this many.
    rows, tokens  shape of a batch.
    rate      learning rate at the first and after the last step; linear in between.
    mixture   share of the rows from each source.
    muon      whether matrices are trained with Muon (AdamW otherwise). The optimiser starts afresh
              where this changes, with 50 steps of warm-up.
    until_loss  end the stage when the smoothed loss falls below this.
    long_every  every so many steps the batch has rows of ``CONTEXT`` tokens instead (as many tokens
                in all); 0: never.
    """

    name: str
    steps: int
    rows: int
    tokens: int
    rate: tuple[float, float]
    mixture: Mapping[str, float]
    options: RowOptions = field(default_factory=RowOptions)
    muon: bool = True
    until_loss: float = 0.0
    long_every: int = 0

    def shape(self, step: int) -> tuple[int, int]:
        """Rows and tokens of the batch of a step."""
        if self.long_every and step % self.long_every == self.long_every - 1:
            return self.rows * self.tokens // CONTEXT, CONTEXT
        return self.rows, self.tokens


def _copying(ids: int, until_loss: float, steps: int = 1000) -> Stage:
    return Stage(
        name=f"copy-{ids}",
        steps=steps,
        rows=64,
        tokens=64,
        rate=(1e-3, 1e-3),
        mixture={"copy": 1.0},
        options=RowOptions(copy_ids=ids),
        muon=False,
        until_loss=until_loss,
    )


COPYING: tuple[Stage, ...] = (
    _copying(128, 0.4),
    _copying(512, 0.4),
    _copying(2048, 0.4),
    _copying(4080, 0.3),
)

RECORDS: tuple[Stage, ...] = (
    Stage(
        name="records-adjacent",
        steps=100,
        rows=64,
        tokens=128,
        rate=(1e-3, 1e-3),
        mixture={"recall": 0.5, "copy": 0.25, "prose": 0.25},
        options=RowOptions(
            copy_lengths=(6, 48),
            recall_forms=("adjacent",),
            recall_values=("word",),
            recall_records=(4, 4, 6, 8, 12),
            gaps=0.3,
        ),
    ),
    Stage(
        name="records-list",
        steps=150,
        rows=64,
        tokens=128,
        rate=(1e-3, 1e-3),
        mixture={"recall": 0.5, "copy": 0.1, "prose": 0.4},
        options=RowOptions(
            copy_lengths=(6, 48),
            recall_forms=("adjacent", "list", "list", "sentence"),
            recall_values=("word",),
            recall_records=(4, 6, 8, 8, 12, 12, 15),
            gaps=0.3,
        ),
    ),
)

COPYING_MINI: tuple[Stage, ...] = (
    _copying(128, 0.4),
    _copying(512, 0.4, steps=800),
    _copying(4080, 0.3, steps=400),
)

_SHORTER = RowOptions(
    copy_lengths=(6, 96),
    recall_records=(4, 6, 8, 8, 12, 12, 16, 16, 16, 20, 24, 30),
    recall_filler=160,
    gaps=0.4,
)
_LONGER = RowOptions(copy_lengths=(6, 160), recall_filler=300, gaps=0.4)

MIXED: tuple[Stage, ...] = (
    Stage(
        name="mixture-256",
        steps=700,
        rows=32,
        tokens=256,
        rate=(2e-3, 2e-3),
        mixture=MIXTURE,
        options=_SHORTER,
    ),
    Stage(
        name="mixture-512",
        steps=100,
        rows=16,
        tokens=512,
        rate=(2e-3, 2e-3),
        mixture=MIXTURE,
        options=_LONGER,
    ),
    Stage(
        name="later-mixture-512",
        steps=650,
        rows=16,
        tokens=512,
        rate=(2e-3, 2e-3),
        mixture=LATER_MIXTURE,
        options=_LONGER,
    ),
    Stage(
        name="later-mixture-long",
        steps=600,
        rows=16,
        tokens=512,
        rate=(2e-3, 0.0),
        mixture=LATER_MIXTURE,
        options=_LONGER,
        long_every=10,
    ),
)

MIXED_MINI: tuple[Stage, ...] = (
    Stage(
        name="mixture-256",
        steps=1500,
        rows=32,
        tokens=256,
        rate=(3e-3, 3e-3),
        mixture=MIXTURE,
        options=_SHORTER,
    ),
    Stage(
        name="later-mixture-long",
        steps=700,
        rows=16,
        tokens=512,
        rate=(3e-3, 0.0),
        mixture=LATER_MIXTURE,
        options=_LONGER,
        long_every=10,
    ),
)

STAGES: Mapping[str, tuple[Stage, ...]] = {
    "ref": (*COPYING, *RECORDS, *MIXED),
    "ref-mini": (*COPYING_MINI, *RECORDS, *MIXED_MINI),
}
