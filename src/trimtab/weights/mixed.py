"""Spend a number of bytes where they matter most: for each matrix its own bits, group size, symmetry and sparsity.

Paper: none of its own; the integer program over configurations per matrix is that of Guo, Greengard, Xing, Kim,
"LQ-LoRA", ICLR 2024, arXiv:2311.12023.

    minimise  sum_i cost_i(c_i)    subject to    bytes of the whole model <= budget

The budget counts everything in the file: embeddings, norms and the head, which stay as they are, scales and zero
points. Every candidate is made once with statistics of the original model. Ours, not the paper's, are the costs: what a
matrix's error does to the predictions is measured, see `_mixture.py`, since a sum of layer errors says little of it. At
least three quarters of the calibration sequences serve for statistics, the others for measuring; no evaluation text is
read.

The expectation (`expected_kl_nats_per_token` in the record's `plan`) is KL(original || compressed) on text like the
calibration text.

Cost: all candidates of all matrices are made, and two passes over 32 x 128 tokens per matrix are run. When it fails:
with calibration text unlike the text in use; near the smallest possible budget, where there is nothing to choose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from trimtab.core.errors import BudgetError, ConfigError, TargetError
from trimtab.tensors.compressed import CompressedTensor
from trimtab.weights._budget import Budget
from trimtab.weights.base import LinearMethod, Notes, WeightMethod
from trimtab.weights.gptq import Gptq
from trimtab.weights.rtn import Rtn
from trimtab.weights.sparsegpt import Sparsegpt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from trimtab.models.planning import Planning
    from trimtab.models.statistics import Need, Stats
    from trimtab.models.views import LinearView
    from trimtab.weights._mixture import CostTable

__all__ = ["Mixed"]

Bits = Literal[2, 3, 4, 8]
Candidate = Gptq | Rtn | Sparsegpt
_METHODS: dict[str, type[Gptq] | type[Rtn]] = {"gptq": Gptq, "rtn": Rtn}


@dataclass(frozen=True, kw_only=True)
class Mixed(LinearMethod):
    """A configuration for each matrix.

    budget         share of the bytes of the whole model in bfloat16 (0.3, "30%"), or a size ("400MB", "1.5GiB", bytes)
    quantizer      how each matrix is quantized: gptq or rtn
    widths         bits per code to choose from
    group_sizes    group sizes to choose from; those that do not divide a matrix's width are no candidates for it
    sparsities     shares, or n:m, to prune by (sparsegpt); what is kept as it is, and rounded to 4 bits, are candidates
    zero_points    "either": asymmetric and symmetric grids are candidates; "always" or "never": one of the two
    costs          file that keeps the measured costs, for other budgets of the same model, text and candidates; made if
                   it does not exist
    """

    budget: float | str
    quantizer: Literal["gptq", "rtn"] = "gptq"
    widths: tuple[int, ...] = (2, 3, 4, 8)
    group_sizes: tuple[int, ...] = (32, 64, 128, -1)
    sparsities: tuple[float | str, ...] = ()
    zero_points: Literal["either", "always", "never"] = "either"
    costs: str | None = None

    def check(self) -> None:
        Budget.of(self.budget)
        for name in ("widths", "group_sizes"):
            if not getattr(self, name):
                raise ConfigError(f"Mixed: option {name} is empty; give at least one.")
        self.candidates()  # each checks itself

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset(need for method in self.candidates().values() for need in method.needs)

    @property
    def needs_text(self) -> bool:
        return True

    def candidates(self) -> dict[str, Candidate]:
        """Label -> method of all configurations."""
        return {**self._grids(), **self._sparse()}

    def _sparse(self) -> dict[str, Candidate]:
        values: tuple[Literal[4] | None, ...] = (None, 4)
        return {
            f"sparsegpt-{sparsity}{'' if bits is None else f'-{bits}bit'}": Sparsegpt(
                sparsity=sparsity, value_bits=bits
            )
            for sparsity in self.sparsities
            for bits in values
        }

    def _grids(self) -> dict[str, Candidate]:
        kinds = {"either": (False, True), "always": (False,), "never": (True,)}[self.zero_points]
        return {
            f"{self.quantizer}-{bits}-{'row' if size == -1 else size}{'-symmetric' if symmetric else ''}": _METHODS[
                self.quantizer
            ](bits=cast(Bits, bits), group_size=size, symmetric=symmetric)
            for bits in self.widths
            for size in self.group_sizes
            for symmetric in kinds
        }

    def candidates_of(self, linear: LinearView) -> dict[str, Candidate]:
        """The candidates that fit `linear`: their groups divide its width. Raises TargetError if there is none."""
        fitting = {label: method for label, method in self.candidates().items() if _fits(method, linear)}
        if not fitting:
            raise TargetError(
                f"{linear.name} (role {linear.role}) is {linear.in_features} wide, which none of the group sizes "
                f"{list(self.group_sizes)} divides. Add -1 (one group per row), or a divisor, to group_sizes."
            )
        return fitting

    def check_linear(self, linear: LinearView) -> None:
        self.candidates_of(linear)

    def check_model(self, model: PreTrainedModel, targets: Sequence[LinearView]) -> None:
        frame = _Frame.of(model, targets)
        budget = frame.budget(self.budget)
        least = frame.fixed_bytes + sum(
            min(_nbytes(linear, method) for method in self.candidates_of(linear).values()) for linear in targets
        )
        if least > budget:
            share = math.ceil(1e4 * least / frame.bfloat16_bytes) / 1e4
            raise BudgetError(
                f"budget {self.budget!r} is {budget:,} bytes, of the {frame.bfloat16_bytes:,} that the model takes in "
                f"bfloat16; the smallest possible one is {share:.4f} ({least:,} bytes). {frame.fixed_bytes:,} bytes "
                "are not compressed (embeddings, norms, head, linears outside `targets`); the candidates take at least "
                f"{least - frame.fixed_bytes:,}."
            )

    def prepare(self, planning: Planning) -> WeightMethod:
        frame = _Frame.of(planning.model, planning.targets)
        budget = frame.budget(self.budget)
        room = budget - frame.fixed_bytes
        if self.sparsities:  # each row of 4-bit codes ends with a whole byte, and how long it is depends on the inputs
            room -= sum(-(-linear.out_features // 2) for linear in planning.targets)
        plan = planning.remembered("plan", lambda: self._plan(planning, room))
        planning.record.metrics["plan"] = {
            "budget_bytes": budget,
            "planned_bytes": plan["nbytes"] + frame.fixed_bytes,
            "fixed_bytes": frame.fixed_bytes,
            "bfloat16_bytes": frame.bfloat16_bytes,
            **plan,
        }
        candidates = self.candidates()
        return _Planned(targets=self.targets, chosen={name: candidates[x] for name, x in plan["choices"].items()})

    def _plan(self, planning: Planning, budget: int) -> dict[str, Any]:
        table = self._table(planning)
        chosen = table.allocate(budget)
        picked = {m.name: (m, choice) for m, choice in zip(table.matrices, chosen.choices, strict=True)}
        return {
            "choices": {name: matrix.labels[choice] for name, (matrix, choice) in picked.items()},
            "nbytes": chosen.size,
            "sum_of_costs": chosen.cost,
            "expected_kl_nats_per_token": table.expected(chosen),
            "gap": chosen.gap,
        }

    def _table(self, planning: Planning) -> CostTable:
        """The costs, measured now or read from the file that `costs` names."""
        from trimtab.weights._mixture import cost_table, kept_in

        def measure() -> CostTable:
            return cost_table(planning, self.candidates_of)

        return (
            measure() if self.costs is None else kept_in(Path(self.costs), planning, list(self.candidates()), measure)
        )

    def compress(self, linear: LinearView, stats: Stats | None) -> tuple[CompressedTensor, Notes]:
        raise ConfigError("Mixed compresses once it is planned: call trimtab.compress, which does both.")


@dataclass(frozen=True, kw_only=True)
class _Planned(LinearMethod):
    """chosen    name of a linear -> the method that compresses it"""

    chosen: Mapping[str, Any]

    def check(self) -> None:
        """Nothing: the candidates have checked themselves."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset(need for method in self.chosen.values() for need in method.needs)

    def check_linear(self, linear: LinearView) -> None:
        self.chosen[linear.name].check_linear(linear)

    def compress(self, linear: LinearView, stats: Stats | None) -> tuple[CompressedTensor, Notes]:
        method = self.chosen[linear.name]
        tensor, notes = method.compress(linear, stats)
        if isinstance(method, Sparsegpt):
            return tensor, notes
        grid = {"bits": method.bits, "group_size": method.group_size, "symmetric": str(method.symmetric).lower()}
        return tensor, {**grid, **notes}


@dataclass(frozen=True, slots=True)
class _Frame:
    """What a model takes beside its targets, and what all of it would take in bfloat16."""

    fixed_bytes: int
    bfloat16_bytes: int

    @classmethod
    def of(cls, model: PreTrainedModel, linears: Sequence[LinearView]) -> _Frame:
        from trimtab.models.info import stored_tensors

        stored = stored_tensors(model).values()
        total = sum(t.numel() * t.element_size() for t in stored)
        targets = sum(linear.weight.numel() * linear.weight.element_size() for linear in linears)
        halves = sum(t.numel() * (2 if t.is_floating_point() else t.element_size()) for t in stored)
        return cls(total - targets, halves)

    def budget(self, budget: float | str) -> int:
        return Budget.of(budget).resolve(self.bfloat16_bytes)


def _fits(method: Candidate, linear: LinearView) -> bool:
    try:
        method.check_linear(linear)
    except TargetError:
        return False
    return True


def _nbytes(linear: LinearView, method: Candidate) -> int:
    """What `linear` takes by `method`, without doing it; a sparse one takes a few bytes less or more."""
    from trimtab.tensors.bitmap import Bitmap
    from trimtab.tensors.grid import GroupGrid
    from trimtab.tensors.sparse_grid import SparseGrid

    shape = [linear.out_features, linear.in_features]
    if not isinstance(method, Sparsegpt):
        buffers = GroupGrid.buffers({"shape": shape, **method.format.to_dict()})
    else:
        kept = math.prod(shape) - int(math.prod(shape) * method.amount.share)
        if method.value_bits is None:
            dtype = str(linear.weight.dtype).removeprefix("torch.")
            buffers = Bitmap.buffers({"shape": shape, "dtype": dtype, "entries": kept})
        else:
            buffers = SparseGrid.buffers({"shape": shape, "bytes": kept // 2, "group_size": method.value_group})
    return sum(dtype.itemsize * math.prod(shape) for shape, dtype in buffers.values())
