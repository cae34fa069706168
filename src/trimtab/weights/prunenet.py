"""Remove the neurons that a policy leaves out which was trained, on weights alone, to keep their singular values.

Paper: Sengupta, Chaudhary, Chakraborty, "You Only Prune Once: Designing Calibration-Free Model Compression With Policy
Learning", ICLR 2025, arXiv:2501.15296.

The state is the first matrix W [n, d] of an MLP (gate; up where there is no gate). One policy for all blocks gives
each row a tendency alpha to be kept, which noise relaxes to kappa; int((1 - sparsity) n) rows are drawn without
replacement with probabilities proportional to kappa. The reward of a block is 1 / KS, KS the Kolmogorov-Smirnov
distance between the singular values of W and of its kept rows. The same share goes from every block: rows of gate and
up, columns of down, whose bias stays. Policy and training are written out in `weights/_pruning/policy.py`.

Departures from the authors' code: everything in float32 with logarithms from logits (theirs: float16, where kappa can
be exactly 0); gradients are clipped before the step (theirs: after it, without effect); the policy that is kept is the
one that drew the best episode (theirs: what that episode's updates made of it). `action=top_k`, `update=on_policy` and
`repair` go beyond the paper.

What it can learn is one direction and one offset, in whose order rows are kept: the norm of a row, by which it adds to
the spectrum, is not among it. The published update raises every alpha until kappa is 1 everywhere and the draw is
uniform. So look at `neurons` with score=row_norm, which keeps more of the spectrum for nothing.

Cost: singular values of every block in every episode; no text, no tokenizer. When it fails: above 10 to 20 % of the
neurons, as all choices without repair; `repair=least_squares` reads text and mends most of it.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from trimtab.core.errors import ConfigError, TargetError
from trimtab.core.progress import progress
from trimtab.weights._pruning.policy import (
    Policy,
    Training,
    Update,
    first_matrix,
    ks_distance,
    log_keep,
    logistic_noise,
    perturbed,
    singular_values,
    train,
)
from trimtab.weights._slicer import NeuronMethod

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trimtab.models.planning import Planning
    from trimtab.models.statistics import Stats
    from trimtab.models.views import BlockView, LinearView
    from trimtab.weights.base import WeightMethod

__all__ = ["PruneNet"]


@dataclass(frozen=True, kw_only=True)
class PruneNet(NeuronMethod):
    """Options of NeuronMethod, and:

    episodes        of training; each passes over all blocks
    learning_rate   of AdamW, which makes one step for each block of an episode
    discount        the reward of the block at depth l counts discount^l
    update          "published", or "on_policy": the gradient of the probability of what was drawn, weighted by how much
                    better than usual the reward was
    prior           weight of the divergence of the tendencies from 1/2
    action          "sample": draw once more (published); "top_k": keep the largest tendencies
    policy          a file with a policy: read if it is there, whatever sparsity it was trained at; else written
    """

    episodes: int = 20
    learning_rate: float = 1e-3
    discount: float = 0.99
    update: Update = "published"
    prior: float = 0.0
    action: Literal["sample", "top_k"] = "sample"
    policy: str | None = None

    def check(self) -> None:
        super().check()
        if self.episodes < 1:
            raise ConfigError(f"PruneNet: option episodes={self.episodes} must be at least 1.")
        if not 0 < self.learning_rate < float("inf"):
            raise ConfigError(f"PruneNet: option learning_rate={self.learning_rate} must be positive.")
        if not 0 < self.discount <= 1:
            raise ConfigError(f"PruneNet: option discount={self.discount} must be above 0 and at most 1.")
        if not 0 <= self.prior < float("inf"):
            raise ConfigError(f"PruneNet: option prior={self.prior} must be zero or positive.")

    def width(self, neurons: int) -> int:
        """int((1 - sparsity) neurons), as the authors count, rounded up to a multiple of `round_to`."""
        kept = int((1 - Fraction(str(self.sparsity))) * neurons)
        return min(neurons, self.round_to * ceil(kept / self.round_to))

    def check_model(self, model: PreTrainedModel, targets: Sequence[LinearView]) -> None:
        super().check_model(model, targets)
        shapes = {name: tuple(state.shape) for name, state in _states(targets).items()}
        first = next(iter(shapes))
        for name, shape in shapes.items():
            if shape != shapes[first]:
                raise TargetError(
                    f"{name} begins with a matrix {list(shape)}, and {first} with {list(shapes[first])}; one policy is "
                    "for one shape. Name blocks of one shape with targets."
                )
        if self.policy is not None and Path(self.policy).exists():
            self._stored(self.policy, shapes[first])

    def prepare(self, planning: Planning) -> WeightMethod:
        method = super().prepare(planning)
        assert isinstance(method, PruneNet)
        states = _states(planning.targets)
        with planning.record.timed("policy"):
            policy = method._policy(planning, states).to(next(iter(states.values())).device)
            scores = method._scores(policy, states, planning.seed)
            planning.record.metrics["mean_ks"] = method._mean_distances(states, scores)
        return _Prepared(**vars(method), scores=scores)

    def _policy(self, planning: Planning, states: Mapping[str, Tensor]) -> Policy:
        """From the file, or from the state of a run that was killed, or trained now."""
        shape = tuple(next(iter(states.values())).shape)
        if self.policy is not None and Path(self.policy).exists():
            return self._stored(self.policy, shape)
        found = planning.remembered_tensors("policy", lambda: self._train(planning, list(states.values())))
        distances = found.pop("distances")
        planning.record.metrics["mean_ks_of_episodes"] = distances.mean(dim=1).tolist()
        policy = Policy(**found)
        if self.policy is not None:
            policy.save(self.policy, {"sparsity": str(self.sparsity), "episodes": str(self.episodes)})
        return policy

    def _train(self, planning: Planning, states: list[Tensor]) -> dict[str, Tensor]:
        training = Training(
            episodes=self.episodes,
            learning_rate=self.learning_rate,
            discount=self.discount,
            update=self.update,
            prior=self.prior,
        )
        generator = torch.Generator().manual_seed(planning.seed)
        counts = [self.width(len(state)) for state in states]
        with progress("training the policy", self.episodes, shown=planning.progress) as advance:
            trained = train(states, counts, training, generator, advance)
        return {**trained.policy.tensors(), "distances": trained.distances}

    @torch.no_grad()
    def _scores(self, policy: Policy, states: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
        """Name of each block -> float64 [n] on the CPU; the rows with the largest are kept."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:action".encode()))
        scores = {}
        for name, state in states.items():
            logits = policy(state).cpu()
            if self.action == "sample":
                logits = perturbed(log_keep(logits, logistic_noise(len(logits), generator)), generator)
            scores[name] = logits.double()
        return scores

    def _mean_distances(self, states: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean over blocks of what training kept small: for what is kept, and for as many of the largest rows."""
        found = {"kept": 0.0, "largest_rows": 0.0}
        for name, state in states.items():
            original, count = singular_values(state), self.width(len(state))
            for key, own in (("kept", scores[name]), ("largest_rows", state.norm(dim=1).cpu())):
                rows = own.topk(count).indices.to(state.device)
                found[key] += ks_distance(original, singular_values(state[rows])) / len(states)
        return found

    def _stored(self, path: str, shape: tuple[int, ...]) -> Policy:
        policy = Policy.load(path)
        if policy.shape != shape:
            raise ConfigError(
                f"PruneNet: option policy={path!r} holds a policy for matrices {list(policy.shape)}, and this model's "
                f"are {list(shape)}. Name another file; it is written if it is not there."
            )
        return policy

    def neuron_scores(self, block: BlockView, stats: Mapping[str, Stats]) -> Tensor:
        raise AssertionError("a policy scores neurons once `prepare` has it")


@dataclass(frozen=True, kw_only=True)
class _Prepared(PruneNet):
    """With the scores of all rows, by name of the block."""

    scores: Any

    def neuron_scores(self, block: BlockView, stats: Mapping[str, Stats]) -> Tensor:
        scores: Tensor = self.scores[_mlp(block.mlp.linears)]
        return scores


def _states(targets: Sequence[LinearView]) -> dict[str, Tensor]:
    """Name of each targeted MLP -> its first matrix."""
    blocks: dict[int, list[LinearView]] = {}
    for linear in targets:
        blocks.setdefault(linear.block, []).append(linear)
    return {_mlp(linears): first_matrix(linears) for linears in blocks.values()}


def _mlp(linears: Sequence[LinearView]) -> str:
    """The part that the names of an MLP's linears have in common."""
    return linears[0].name.rpartition(".")[0]
