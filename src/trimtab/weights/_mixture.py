"""What each configuration of each matrix costs, measured on text: the table that a budget is spent by.

The layer error of a matrix, tr(D H D^T), says how a matrix's configurations compare, not how matrices do: the same
relative error costs a hundred times more in one place than in another. So each matrix alone is exchanged for its
smallest and for a middle candidate in a copy of the model, and the divergence of the predictions is measured; the other
candidates lie on the power law of the layer error through the two. Divergences of single matrices do not simply add up
at low bits, so a few mixtures along the way from small to large are put together and measured as a whole: the curve
from the sum to the truth, by which the expectation is corrected.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from trimtab.core import progress as bars
from trimtab.core.errors import ConfigError
from trimtab.core.files import write_text_atomically
from trimtab.models.calibration import gather_dense
from trimtab.models.planning import Planning
from trimtab.models.run_state import model_sha256
from trimtab.models.statistics import Need, Stats
from trimtab.models.views import LinearView, ModelView
from trimtab.tensors.compressed import CompressedTensor
from trimtab.tensors.metric import Metric
from trimtab.weights._allocation import Allocation, allocate, smallest, undominated
from trimtab.weights._rehearsal import Rehearsal, split
from trimtab.weights.base import LinearMethod

CURVE_POINTS = 6
_LEAST = 1e-12  # nats; a divergence of nothing, for logarithms


@dataclass(frozen=True, slots=True)
class Matrix:
    """One linear's undominated candidates, by increasing size.

    labels      names of the configurations
    sizes       bytes
    errors      tr(D H D^T) / tr(W H W^T), inputs of the original model
    costs       nats per token that the model is expected to move if this matrix alone is exchanged
    """

    name: str
    labels: tuple[str, ...]
    sizes: tuple[int, ...]
    errors: tuple[float, ...]
    costs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class CostTable:
    """curve: (sum of costs, measured divergence) of mixtures, both in nats per token, by increasing sum."""

    matrices: tuple[Matrix, ...]
    curve: tuple[tuple[float, float], ...]

    def allocate(self, budget: int) -> Allocation:
        """The best choice of at most `budget` bytes for these matrices."""
        return allocate([m.costs for m in self.matrices], [m.sizes for m in self.matrices], budget)

    def expected(self, allocation: Allocation) -> float:
        """Nats per token that the model moves by this choice: the sum of its costs, corrected by the curve."""
        points = [(math.log(max(a, _LEAST)), math.log(max(b, _LEAST))) for a, b in self.curve]
        x = math.log(max(allocation.cost, _LEAST))
        if len(points) == 1 or x <= points[0][0]:  # small errors add up
            return math.exp(x - points[0][0] + points[0][1])
        low, high = next((pair for pair in pairwise(points) if x <= pair[1][0]), (points[-2], points[-1]))
        return math.exp(low[1] + (x - low[0]) * (high[1] - low[1]) / (high[0] - low[0]))

    def to_dict(self) -> dict[str, Any]:
        return {
            "matrices": [asdict(matrix) for matrix in self.matrices],
            "curve": [list(point) for point in self.curve],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CostTable:
        matrices = [
            Matrix(m["name"], *(tuple(m[key]) for key in ("labels", "sizes", "errors", "costs")))
            for m in data["matrices"]
        ]
        return cls(tuple(matrices), tuple((float(a), float(b)) for a, b in data["curve"]))


def cost_table(planning: Planning, configurations: Callable[[LinearView], Mapping[str, LinearMethod]]) -> CostTable:
    """Try the configurations of every target; `configurations` gives those that fit a linear, label -> method.

    Memory beyond the model: a float32 copy, the logits of the rehearsal, and the undominated candidates in packed form
    (with the default configurations about as much as the model in bfloat16).
    """
    assert planning.calibration is not None
    statistics, rehearsed = split(planning.calibration)
    rehearsal = Rehearsal(planning.model, rehearsed)
    targets = {linear.name for linear in planning.targets}
    view = ModelView.of(planning.model)
    needs: dict[str, set[Need]] = {linear.site: {"gram"} for linear in planning.targets}
    matrices: list[Matrix] = []
    tensors: dict[str, dict[str, CompressedTensor]] = {}
    bar = bars.progress("measuring candidates", len(targets), shown=planning.progress)
    with bar as advance:
        for block, stats in zip(view.blocks, gather_dense(view, statistics, needs, seed=planning.seed), strict=True):
            linears = [linear for linear in block.linears if linear.name in targets]
            if linears:
                rehearsal.go_to(block.index)
            for linear in linears:
                found, tried = _try(linear, stats[linear.site], configurations(linear), rehearsal)
                matrices.append(found)
                tensors[linear.name] = tried
                advance(linear.name)
    rehearsal.go_to(0)
    table = CostTable(tuple(matrices), ())
    return CostTable(table.matrices, tuple(_curve(table, tensors, rehearsal)))


def _try(
    linear: LinearView, stats: Stats, configurations: Mapping[str, LinearMethod], rehearsal: Rehearsal
) -> tuple[Matrix, dict[str, CompressedTensor]]:
    assert stats.gram is not None
    metric, weight = Metric.gram(stats.gram, name=f"the input of {linear.name}"), linear.weight.float()
    made = {label: method.compress(linear, stats)[0] for label, method in configurations.items()}
    errors = {label: metric.relative_error(weight, tensor.dequantize()) for label, tensor in made.items()}
    labels = list(made)
    kept = [labels[i] for i in undominated([errors[x] for x in labels], [made[x].nbytes for x in labels])]
    made = {label: made[label] for label in kept}
    own = [errors[label] for label in kept]
    probes = sorted({0, (len(kept) - 1) // 2})
    moved = [rehearsal.divergence({linear.name: made[kept[i]].dequantize()}) for i in probes]
    costs = _power_law([own[i] for i in probes], moved, own)
    sizes = tuple(tensor.nbytes for tensor in made.values())
    return Matrix(linear.name, tuple(kept), sizes, tuple(own), tuple(costs)), made


def _power_law(errors: Sequence[float], moved: Sequence[float], wanted: Sequence[float]) -> list[float]:
    """Divergences for the errors `wanted`, on the power law through what was measured at `errors`.

    Its exponent is kept within 0.5 .. 1.5; 1 is the law of small errors, taken where there is one measurement.
    """
    first, last = (max(errors[0], _LEAST), max(moved[0], _LEAST)), (max(errors[-1], _LEAST), max(moved[-1], _LEAST))
    exponent = 1.0
    if first[0] > last[0]:
        exponent = min(1.5, max(0.5, math.log(first[1] / last[1]) / math.log(first[0] / last[0])))
    return [0.0 if error == 0 else last[1] * (error / last[0]) ** exponent for error in wanted]


def _curve(
    table: CostTable, tensors: Mapping[str, Mapping[str, CompressedTensor]], rehearsal: Rehearsal
) -> list[tuple[float, float]]:
    """Sums and true divergences of mixtures at sizes evenly spread (in their logarithm) over the possible ones."""
    least = smallest([matrix.sizes for matrix in table.matrices])
    most = sum(matrix.sizes[-1] for matrix in table.matrices)
    points: dict[float, float] = {}
    for step in range(CURVE_POINTS):
        chosen = table.allocate(int(least * (most / least) ** (step / (CURVE_POINTS - 1))))
        if chosen.cost in points:
            continue
        weights = {
            matrix.name: tensors[matrix.name][matrix.labels[choice]].dequantize()
            for matrix, choice in zip(table.matrices, chosen.choices, strict=True)
        }
        points[chosen.cost] = rehearsal.divergence(weights)
    return sorted(points.items())


def kept_in(path: Path, planning: Planning, labels: Sequence[str], measure: Callable[[], CostTable]) -> CostTable:
    """The table in the file `path`, or `measure()`, which is then written there.

    Raises ConfigError if the file is of another model, text, seed, set of targets or of candidates, or is no table.
    """
    assert planning.calibration is not None
    belongs_to = {
        "model": model_sha256(planning.model),
        "text": planning.calibration.sha256,
        "seed": planning.seed,
        "targets": [linear.name for linear in planning.targets],
        "candidates": list(labels),
    }
    if not path.exists():
        table = measure()
        write_text_atomically(path, json.dumps({"belongs_to": belongs_to, **table.to_dict()}) + "\n")
        return table
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        found, table = dict(data["belongs_to"]), CostTable.from_dict(data)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no table of costs ({error}). Name a file that does not exist yet.") from None
    if different := [key for key, value in belongs_to.items() if found.get(key) != value]:
        raise ConfigError(
            f"the costs in {path} were measured with another {' and another '.join(different)}. Name another file, or "
            "remove it."
        )
    return table
