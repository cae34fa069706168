"""Which sparse ratio each linear gets: evolution over vectors of ratios, by the loss on calibration sequences.

The paper gives an algorithm and no numbers; these are ours. The first generation is uniform at random in (0, 1), with
one vector of ones (thresholds alone) and one of 0.95 (the uniform default), so that what is found is never worse than
either on the text it is found on. Each following one keeps the best `survivors` as they are and fills up with their
children: every gene from one of two parents at random, and with probability 0.1 moved by a normal step of 0.1. Ratios
are whole percents, from 2 to 100, so that a linear has 99 thresholds, found by sorting its scores once. Thresholds are
those of the original model's inputs.

Weights are not copied, and each one's SVD is computed once and cut: an evaluation is one forward pass with other views.
Every loss is written down as it is found, and the same seed asks for the same ones, so a killed search continues.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trimtab.core import progress as bars
from trimtab.core.errors import NumericsError
from trimtab.core.files import write_text_atomically
from trimtab.layers.rsparse import RSparse, order_statistic
from trimtab.models.calibration import gather_dense
from trimtab.models.compressed_linear import CompressedLinear
from trimtab.models.planning import Planning
from trimtab.models.views import LinearView, ModelView
from trimtab.tensors.compressed import CompressedTensor
from trimtab.tensors.low_rank import svd
from trimtab.tensors.sparse_inputs import SparseInputs, column_norms

if TYPE_CHECKING:
    from trimtab.models.statistics import Stats

SMALLEST = 2
LARGEST = 100
UNIFORM = 95
_MOVED, _STEP = 0.1, 10.0
_CHUNK_TOKENS = 2048

Genes = tuple[int, ...]
"""A ratio in percent for each target, in the order of the model."""


def search(method: RSparse, planning: Planning) -> dict[str, float]:
    """Name of each target -> its ratio. Enters `search` into the metrics of the run."""
    losses = _Losses(method, planning)
    evaluations = method.population + method.generations * (method.population - method.survivors)
    with bars.progress("searching sparse ratios", evaluations, shown=planning.progress) as advance:

        def loss(genes: Genes) -> float:
            found = losses.of(genes)
            advance("")
            return found

        best = evolve(
            len(planning.targets),
            loss,
            population=method.population,
            generations=method.generations,
            survivors=method.survivors,
            seed=planning.seed,
        )
    count = len(planning.targets)
    planning.record.metrics["search"] = {
        "evaluated": len(losses.known),
        "nats_per_token": losses.of(best),
        "nats_per_token_at_100_percent": losses.of((LARGEST,) * count),
        "nats_per_token_at_95_percent": losses.of((UNIFORM,) * count),
    }
    return {linear.name: gene / 100 for linear, gene in zip(planning.targets, best, strict=True)}


def evolve(
    count: int, loss: Callable[[Genes], float], *, population: int, generations: int, survivors: int, seed: int
) -> Genes:
    """The vector of `count` genes with the smallest loss that was seen; of equal ones the first.

    `loss` is called once for each member of the first generation and each child, in an order that the seed decides.
    """
    generator = torch.Generator().manual_seed(seed)
    first: list[Genes] = [(LARGEST,) * count, (UNIFORM,) * count]
    while len(first) < population:
        first.append(_genes(100 * torch.rand(count, generator=generator)))
    ranked = sorted((loss(genes), place, genes) for place, genes in enumerate(first))
    place = population
    for _ in range(generations):
        parents = [genes for _, _, genes in ranked[:survivors]]
        children = [_child(parents, generator) for _ in range(population - survivors)]
        scored = [(loss(genes), place + index, genes) for index, genes in enumerate(children)]
        place += len(children)
        ranked = sorted(ranked[:survivors] + scored)
    return ranked[0][2]


def _child(parents: list[Genes], generator: torch.Generator) -> Genes:
    one, other = torch.randperm(len(parents), generator=generator)[:2].tolist()
    count = len(parents[0])
    mixed = torch.where(
        torch.rand(count, generator=generator) < 0.5,
        torch.tensor(parents[one], dtype=torch.float32),
        torch.tensor(parents[other], dtype=torch.float32),
    )
    moved = torch.rand(count, generator=generator) < _MOVED
    steps = _STEP * torch.randn(count, generator=generator)
    return _genes(torch.where(moved, mixed + steps, mixed))


def _genes(percents: Tensor) -> Genes:
    return tuple(percents.round().clamp(SMALLEST, LARGEST).long().tolist())


@dataclass(frozen=True, slots=True)
class _Choices:
    """What a linear can become: views of its weight and of factors of the largest rank, and a threshold per percent."""

    module: CompressedLinear | nn.Module
    columns: Tensor
    scale: Tensor | None
    left: Tensor
    right: Tensor
    thresholds: Tensor

    @classmethod
    def of(cls, method: RSparse, linear: LinearView, stats: Stats) -> _Choices:
        assert stats.reservoir is not None
        weight = linear.weight
        ascending = method.scores(weight, stats.reservoir.to(weight.device)).flatten().sort().values
        limits = [order_statistic(ascending, 1 - method.share(gene / 100)) for gene in range(SMALLEST, LARGEST + 1)]
        _, rank = method.budget(linear.out_features, linear.in_features, SMALLEST / 100)
        factors = svd(weight.float(), rank, dtype=method.dtype_of(weight))
        scale = column_norms(weight) if method.criterion == "weighted" else None
        return cls(linear.module, weight.t(), scale, factors.left, factors.right, torch.tensor(limits))

    def layer(self, method: RSparse, gene: int) -> CompressedLinear:
        in_features, out_features = self.columns.shape
        kept, rank = method.budget(out_features, in_features, gene / 100)
        left, right = (self.left[:, :rank], self.right[:rank]) if rank else (None, None)
        threshold = self.thresholds[gene - SMALLEST, None].to(self.columns.device)
        part = SparseInputs(self.columns, threshold, self.scale, left, right, kept)
        bias = self.module.bias
        assert bias is None or isinstance(bias, Tensor)
        return CompressedLinear(CompressedTensor((part,)), bias)


class _Losses:
    """The model's loss with given ratios, in nats per token; `known` holds those that were asked for."""

    def __init__(self, method: RSparse, planning: Planning) -> None:
        assert planning.calibration is not None
        self._method = method
        self._planning = planning
        calibration = planning.calibration
        self._text = calibration.take(torch.arange(min(method.search_sequences, len(calibration.tokens))))
        self._file: Path | None = None if planning.directory is None else planning.directory / "search.json"
        self.known: dict[str, float] = {}
        if self._file is not None and self._file.exists():
            self.known = json.loads(self._file.read_text(encoding="utf-8"))
        self._choices: list[_Choices] | None = None

    def of(self, genes: Genes) -> float:
        key = ",".join(map(str, genes))
        if key not in self.known:
            self.known[key] = self._measured(genes)
            if self._file is not None:
                write_text_atomically(self._file, json.dumps(self.known) + "\n")
        return self.known[key]

    def _measured(self, genes: Genes) -> float:
        if self._choices is None:
            self._choices = self._made()
        targets = self._planning.targets
        try:
            for linear, choices, gene in zip(targets, self._choices, genes, strict=True):
                linear.replace(choices.layer(self._method, gene))
            return self._loss()
        finally:
            for linear in targets:
                linear.replace(linear.module)

    def _made(self) -> list[_Choices]:
        planning = self._planning
        assert planning.calibration is not None
        needs = {linear.site: self._method.needs for linear in planning.targets}
        by_block: dict[int, list[LinearView]] = {}
        for linear in planning.targets:
            by_block.setdefault(linear.block, []).append(linear)
        found: list[_Choices] = []
        gathered = gather_dense(ModelView.of(planning.model), planning.calibration, needs, seed=planning.seed)
        for index, stats in enumerate(gathered):
            found += [_Choices.of(self._method, linear, stats[linear.site]) for linear in by_block.get(index, [])]
        return found

    def _loss(self) -> float:
        model, text = self._planning.model, self._text
        training = model.training
        model.train(False)
        total, count = 0.0, 0
        try:
            for rows in torch.split(torch.arange(len(text.tokens)), max(1, _CHUNK_TOKENS // text.length)):
                tokens, mask = text.tokens[rows].to(model.device), text.mask[rows].to(model.device)
                logits = model(input_ids=tokens, attention_mask=mask.long(), use_cache=False).logits
                nats = nn.functional.cross_entropy(
                    logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none"
                )
                scored = mask[:, 1:].flatten()
                total += float(nats[scored].double().sum())
                count += int(scored.sum())
        finally:
            model.train(training)
        if not total < float("inf"):
            raise NumericsError("the loss on the calibration text is not finite while ratios are searched.")
        return total / max(count, 1)
