"""Make blocks narrower: fewer neurons, rotary pairs and value directions, more in blocks that change little.

Paper: Lin, Gao, Smith, Patel, Tuli, Shen, Jin, Hsu, "MoDeGPT: Modular Decomposition for Large Language Model
Compression", ICLR 2025, arXiv:2408.09632.

Two matrices with a width between them are a module, and the width is what shrinks; what is left is a smaller dense
model. With C_x = E[x x^T] of what q, k and v read and C_h of what `down` reads, both of the original model:

    mlp    keep the neurons with the largest ridge leverage [C_h (C_h + lambda I)^-1]_ii; `down` becomes the least
           squares solution down C_h[:, S] C_h[S, S]^-1 (Nystrom)
    qk     keep the rotary pairs of a KV head with the largest E_K,p (sum of E_Q,p over its queries), E the energy (CR)
    vo     the best product of that rank for the values of a KV head and the outputs that read it (two SVDs)

With the influence s_l = 1 - E[cos(input, output)] of block l, its widths lose the share
phi_l = L * sparsity * softmax(-s / temperature)_l; what exceeds `cap` goes to the others.

Departures. Selection is by rotary pairs, with biases in their energies (the paper: single dimensions). With grouped
queries the second SVD runs over all outputs of a KV head (`joint_values`); the paper leaves it out. The bias of v goes
into the bias of o, which is exact since attention weights sum to one, and makes one where there was none (Qwen2).
Models that normalise queries and keys keep all rotary pairs, because the norm ties the dimensions of a head together.

Cost: one forward pass for influences (not with allocation=uniform), one for C_x and C_h; for each block one inverse and
one solve of its MLP's width, in float64. When it fails: text unlike the calibration text loses more than it; with fewer
tokens than neurons C_h is singular, and what the text did not show is guessed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from trimtab.core.errors import ConfigError, TargetError
from trimtab.tensors.metric import Metric
from trimtab.weights._pruning.allocation import softmax
from trimtab.weights._pruning.narrow_heads import gram_of, sliced_pairs, sliced_values
from trimtab.weights._pruning.nystrom import energy_scores, ridge_scores
from trimtab.weights._pruning.plan import PlanEntry
from trimtab.weights._pruning.selection import smallest
from trimtab.weights._pruning.units import neurons
from trimtab.weights._slicer import sliced_neurons
from trimtab.weights.base import NarrowLinear, SlicedBlock, SliceMethod, WeightMethod

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trimtab.models.planning import Planning
    from trimtab.models.statistics import Need, Stats
    from trimtab.models.views import BlockView, LinearView, ModelView, Role

__all__ = ["MoDeGpt"]

Part = Literal["mlp", "qk", "vo"]
ROLES: dict[Part, tuple[Role, ...]] = {"mlp": ("gate", "up", "gate_up", "down"), "qk": ("q", "k"), "vo": ("v", "o")}


@dataclass(frozen=True, kw_only=True)
class MoDeGpt(SliceMethod):
    """Options of every method, and:

    sparsity        mean share that the widths of a block lose
    allocation      "softmax": more from blocks of less influence; "uniform": the same from all. None: softmax, or what
                    `export` wants
    temperature     of the softmax; larger is closer to uniform
    cap             no block loses a larger share
    parts           what becomes narrower: mlp, qk, vo. None: all of them, without qk where queries and keys are
                    normalised; or what `export` wants
    score           of neurons: "ridge" leverage; "energy", E[h_i^2]; "energy_down", E[h_i^2] |down_i|^2
    ridge           of the leverage, as a share of the mean energy
    repair          "least_squares": `down` is solved again for the neurons that stay; "none": it keeps their columns
    joint_values    with grouped queries, choose value directions by what reaches the output; else by energy (the paper)
    round_to        widths, of a head too, are rounded up to multiples of this
    export          "uniform": one width for all MLPs and attention as it is, which transformers loads without trimtab
    """

    sparsity: float = 0.3
    allocation: Literal["softmax", "uniform"] | None = None
    temperature: float = 0.1
    cap: float = 0.8
    parts: tuple[Part, ...] | None = None
    score: Literal["ridge", "energy", "energy_down"] = "ridge"
    ridge: float = 1e-2
    repair: Literal["least_squares", "none"] = "least_squares"
    joint_values: bool = True
    round_to: int = 8
    export: Literal["any", "uniform"] = "any"

    def check(self) -> None:
        if not 0 < self.sparsity < 1:
            raise ConfigError(f"MoDeGpt: option sparsity={self.sparsity} must be above 0 and below 1.")
        if not 0 < self.cap < 1:
            raise ConfigError(f"MoDeGpt: option cap={self.cap} must be above 0 and below 1.")
        if self.sparsity > self.cap and self._allocation == "softmax":
            raise ConfigError(
                f"MoDeGpt: option sparsity={self.sparsity} is above cap={self.cap}, the most that any block may lose. "
                "Raise cap, or set allocation=uniform."
            )
        for name in ("temperature", "ridge"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"MoDeGpt: option {name}={getattr(self, name)} must be positive.")
        if self.round_to < 1:
            raise ConfigError(f"MoDeGpt: option round_to={self.round_to} must be at least 1.")
        if self.parts is not None and not len(set(self.parts)) == len(self.parts) > 0:
            raise ConfigError(f"MoDeGpt: option parts={self.parts} must name some of {', '.join(ROLES)}, each once.")
        if self.export == "uniform":
            self._check_export()

    def _check_export(self) -> None:
        wanted = {"parts": (("mlp",), "mlp"), "allocation": ("uniform", "uniform")}
        for name, (value, spelled) in wanted.items():
            if (found := getattr(self, name)) not in (None, value):
                raise ConfigError(
                    f"MoDeGpt: option export=uniform makes a model whose configuration has one width for all MLPs and "
                    f"none for heads; it wants {name}={spelled}, not {found}. Leave one of the two options out."
                )

    @property
    def _allocation(self) -> Literal["softmax", "uniform"]:
        return self.allocation or ("uniform" if self.export == "uniform" else "softmax")

    @property
    def _parts(self) -> tuple[Part, ...]:
        return self.parts or (("mlp",) if self.export == "uniform" else tuple(ROLES))

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"gram", "mean"})

    def targeted(self, view: ModelView) -> tuple[LinearView, ...]:
        """The targets in `parts`. Raises TargetError where targets name a part of a module only, or nothing of any
        part, and where heads of this family cannot become narrower."""
        chosen = view.select(self.targets)
        names = {linear.name for linear in chosen}
        found: set[str] = set()
        for block in view.blocks:
            if set(self._parts) != {"mlp"} and any(linear.name in names for linear in block.attention.linears):
                self._check_heads(view.model, block)
            for part in self._parts_of(block):
                own = {linear.name for linear in block.linears if linear.role in ROLES[part]}
                if own & names and own - names:
                    raise TargetError(
                        f"{block.name}: the widths of '{part}' run through {', '.join(sorted(own))}, and targets "
                        f"leaves out {', '.join(sorted(own - names))}. Name all of them, or choose parts."
                    )
                found |= own & names
        if not found:
            raise TargetError(f"targets={','.join(self.targets)} names nothing of parts={','.join(self._parts)}.")
        return tuple(linear for linear in chosen if linear.name in found)

    def _check_heads(self, model: PreTrainedModel, block: BlockView) -> None:
        from trimtab.models.narrow import check_narrows

        try:
            check_narrows(model, block)
        except TargetError as error:
            raise TargetError(f"{error} Set parts=mlp.") from None
        if self.parts and "qk" in self.parts and _is_normalised(block):
            raise TargetError(
                f"{block.name}: queries and keys are normalised by head, so no rotary pair can go without changing the "
                "others. Leave qk out of parts: parts=mlp,vo."
            )

    def _parts_of(self, block: BlockView) -> tuple[Part, ...]:
        return tuple(part for part in self._parts if not (part == "qk" and _is_normalised(block)))

    def prepare(self, planning: Planning) -> WeightMethod:
        from trimtab.models.block_influence import block_influence
        from trimtab.models.views import ModelView

        indices = sorted({linear.block for linear in planning.targets})
        metrics = planning.record.metrics
        shares = dict.fromkeys(indices, self.sparsity)
        if self._allocation == "softmax":
            view, text = ModelView.of(planning.model), planning.calibration
            assert text is not None
            with planning.record.timed("calibration"):
                found = planning.remembered("influence", lambda: block_influence(view, text))
            names = {view.blocks[index].name: index for index in indices}
            sizes = {name: float(_entries(planning.targets, index)) for name, index in names.items()}
            influence = {name: found[name] for name in names}
            by_name = softmax(influence, sizes, self.sparsity, temperature=self.temperature, cap=self.cap)
            shares = {index: by_name[name] for name, index in names.items()}
            metrics |= {"block_influence": influence, "block_sparsity": by_name}
        metrics["removed_of_targets"] = self._removed(planning.model, planning.targets, shares)
        self._refuse_nothing(metrics["removed_of_targets"])
        planning.record.unchanged = list(self._left_alone(ModelView.of(planning.model), planning.targets, shares))
        return _Prepared(targets=self.targets, method=self, shares=shares)

    def _left_alone(
        self, view: ModelView, targets: Sequence[LinearView], shares: Mapping[int, float]
    ) -> Iterator[dict[str, str]]:
        """The linears that `targets` names and that stay whole, with the reason."""
        cut = {linear.name for linear in targets}
        for linear in view.select(self.targets):
            block = view.blocks[linear.block]
            part = next((part for part, roles in ROLES.items() if linear.role in roles), None)
            if linear.name not in cut:
                normalised = part == "qk" and part in self._parts and _is_normalised(block)
                reason = (
                    "queries and keys are normalised by head"
                    if normalised
                    else f"it is in none of the parts {', '.join(self._parts)}"
                )
                yield {"module": linear.name, "reason": reason}
                continue
            assert part is not None
            share = shares[linear.block]
            kept, of = self._widths(block, [x for x in targets if x.block == linear.block], share)[part]
            if kept == of:
                reason = f"a share of {share:.3g} of {of} rounds to nothing with round_to={self.round_to}"
                yield {"module": linear.name, "reason": reason}

    def slice_block(self, block: BlockView, linears: Sequence[LinearView], stats: Mapping[str, Stats]) -> SlicedBlock:
        return self.sliced(block, linears, stats, self.sparsity)

    def sliced(
        self, block: BlockView, linears: Sequence[LinearView], stats: Mapping[str, Stats], share: float
    ) -> SlicedBlock:
        """`slice_block`, for a block whose widths lose `share`."""
        widths = {part: (kept, of) for part, (kept, of) in self._widths(block, linears, share).items() if kept < of}
        by_role = {linear.role: linear for linear in linears}
        made: dict[str, NarrowLinear] = {}
        plan, pairs, value_dim = [], None, None
        if "mlp" in widths:
            own, entry = self._neurons(block, by_role, stats, widths["mlp"][0])
            made |= own
            plan.append(entry)
        if "qk" in widths:
            own, entry, pairs = sliced_pairs(block, by_role, stats, widths["qk"][0])
            made |= own
            plan.append(entry)
        if "vo" in widths:
            value_dim = widths["vo"][0]
            made |= sliced_values(block, by_role, stats, value_dim, self.joint_values)
        noted = {linear.name: _noted(made[linear.name], linear, widths) for linear in linears if linear.name in made}
        from trimtab.models.narrow import HeadGeometry

        heads = None if pairs is None and value_dim is None else HeadGeometry(pairs, value_dim)
        return SlicedBlock(noted, heads, tuple(plan))

    def _neurons(
        self, block: BlockView, linears: Mapping[Role, LinearView], stats: Mapping[str, Stats], count: int
    ) -> tuple[dict[str, NarrowLinear], PlanEntry]:
        down, units = linears["down"], neurons(block)
        weight = down.weight
        gram = gram_of(stats, down)
        if self.score == "ridge":
            scores = ridge_scores(gram, self.ridge)
        else:
            scores = energy_scores(gram, weight if self.score == "energy_down" else None)
        keep = ~smallest(scores[None], units.count - count)[0].cpu()
        own = [linear for role, linear in linears.items() if role in ROLES["mlp"]]
        made = sliced_neurons(own, units, keep, gram if self.repair == "least_squares" else None)
        whole = torch.zeros_like(weight)
        whole[:, keep.to(weight.device)] = made[down.name].weight
        error = Metric.gram(gram, name=down.site).relative_error(weight, whole)
        made[down.name] = dataclasses.replace(made[down.name], notes={"relative_error": error})
        return made, PlanEntry.of(units, keep)

    def _widths(self, block: BlockView, linears: Sequence[LinearView], share: float) -> dict[Part, tuple[int, int]]:
        """How many neurons, pairs and value directions stay, and of how many, of the parts among `linears`."""
        attention = block.attention
        steps = math.lcm(2, self.round_to) // 2
        named = {linear.role for linear in linears}
        found: dict[Part, tuple[int, int]] = {}
        if "down" in named:
            width = next(linear.in_features for linear in linears if linear.role == "down")
            found["mlp"] = _kept(width, share, self.round_to), width
        if "q" in named:
            found["qk"] = _kept(attention.rotary_dim // 2, share, steps), attention.rotary_dim // 2
        if "v" in named:
            found["vo"] = _kept(attention.value_dim, share, self.round_to), attention.value_dim
        return found

    def _removed(self, model: PreTrainedModel, targets: Sequence[LinearView], shares: Mapping[int, float]) -> float:
        """The share of the targets' entries that goes, after rounding."""
        from trimtab.models.views import ModelView

        blocks, gone = ModelView.of(model).blocks, 0.0
        for index, share in shares.items():
            own = [linear for linear in targets if linear.block == index]
            for part, (kept, of) in self._widths(blocks[index], own, share).items():
                inside = [linear for linear in own if linear.role in ROLES[part]]
                gone += (1 - kept / of) * _entries(inside, index)
        return gone / sum(_entries(targets, index) for index in shares)

    def _refuse_nothing(self, removed: float) -> None:
        if removed == 0:
            raise TargetError(
                f"sparsity={self.sparsity} with round_to={self.round_to} removes nothing from any block. Choose a "
                "larger sparsity or a smaller round_to."
            )


@dataclass(frozen=True, kw_only=True)
class _Prepared(SliceMethod):
    """A MoDeGpt that knows what share each block loses, by its index."""

    method: Any
    shares: Mapping[int, Any]

    @property
    def needs(self) -> frozenset[Need]:
        needs: frozenset[Need] = self.method.needs
        return needs

    def slice_block(self, block: BlockView, linears: Sequence[LinearView], stats: Mapping[str, Stats]) -> SlicedBlock:
        if not linears:  # a block that targets leave out has no share
            return SlicedBlock({})
        sliced: SlicedBlock = self.method.sliced(block, linears, stats, self.shares[block.index])
        return sliced


def _noted(made: NarrowLinear, linear: LinearView, widths: Mapping[Part, tuple[int, int]]) -> NarrowLinear:
    kept, of = next(widths[part] for part, roles in ROLES.items() if linear.role in roles)
    return dataclasses.replace(
        made, notes={"kept_width": kept, "of_width": of, "sparsity": 1 - kept / of, **made.notes}
    )


def _kept(width: int, share: float, multiple: int) -> int:
    """ceil((1 - share) width), rounded up to a multiple, at most all."""
    wanted = math.ceil((1 - share) * width - 1e-9)
    return min(width, multiple * math.ceil(wanted / multiple))


def _is_normalised(block: BlockView) -> bool:
    return block.attention.q_norm is not None or block.attention.k_norm is not None


def _entries(linears: Sequence[LinearView], block: int) -> int:
    return sum(linear.out_features * linear.in_features for linear in linears if linear.block == block)
