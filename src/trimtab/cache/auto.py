"""The best mixture of all components under a byte budget, chosen for keys and values of each head by measurement.

Paper: none; trimtab's own. Its components are those of kivi, gear_l, kvquant and rotatekv; the choice is an integer
program over errors measured on calibration text, weighted by squared gradients as in KVQuant, arXiv:2401.18079.

Every head's keys, and its values, can be kept in some forty ways (see `_auto/candidates.py`): learnt tables with 0 to
2 % outliers, groups of several sizes, a low-rank residual, a rotation, each with 1 to 8 bits. For each of them the
error that it causes in the output of attention is measured on calibration text, and the assignment of least total
error is solved for whose bytes fit `bits_per_element`, in which scales, outliers, sinks and the window count. Heads
with the same choice are stored together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from trimtab.cache._auto.candidates import BLOCK_TOKENS, ROW_TOKENS, Candidate, Kind, candidates
from trimtab.cache._tables import channel_tables, token_tables
from trimtab.cache.base import CacheMethod, Fitted, LayerShape
from trimtab.core.errors import BudgetError, ConfigError, DataError
from trimtab.models.segments import HeadPlan, TensorPlan

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from trimtab.models.calibration_set import CalibrationSet

__all__ = ["Auto"]

EXACT_BITS = 16
MEASURED_ROWS, MEASURED_LENGTH = 4, 512
WINDOWS = (0, 32, 64, 128)
KINDS: tuple[Kind, Kind] = ("keys", "values")


@dataclass(frozen=True, kw_only=True)
class Auto(CacheMethod):
    """Options of the allocator.

    bits_per_element   what a number of the cache may take on average, everything counted, at `context` tokens
    context            length of text for which the budget is reckoned: exact tokens weigh less in a longer one
    sinks              first tokens that stay exact
    window             recent tokens that stay exact; None: that of 0, 32, 64 and 128 with the least error in the budget
    """

    calibrated: ClassVar[bool] = True

    bits_per_element: float = 3.0
    context: int = 2048
    sinks: int = 4
    window: int | None = None

    def check(self) -> None:
        if not 0 < self.bits_per_element <= EXACT_BITS:
            raise ConfigError(f"auto: bits_per_element={self.bits_per_element} must be in (0, {EXACT_BITS}].")
        if self.context < 1 or self.sinks < 0:
            raise ConfigError(f"auto: context={self.context} must be >= 1 and sinks={self.sinks} >= 0.")
        if self.window not in (None, *WINDOWS):
            raise ConfigError(f"auto: window={self.window}; errors are measured for windows of {WINDOWS} tokens.")
        if self.sinks + (self.window or 0) + ROW_TOKENS >= self.context:
            raise ConfigError(
                f"auto: sinks={self.sinks} and window={self.window} leave nothing to encode of context={self.context}."
            )

    def fit_options(self) -> dict[str, object]:
        return {"sinks": self.sinks}

    def fit(self, model: PreTrainedModel, calibration: CalibrationSet) -> dict[str, Tensor]:
        """Tables of all candidates that have some; `errors.keys`, `errors.values` [windows, layers, Hk, candidates]."""
        from trimtab.cache._auto.measuring import candidate_errors, layer_samples
        from trimtab.cache._capture import captured_layers
        from trimtab.models.segments import RopeSource
        from trimtab.models.views import ModelView

        blocks = ModelView.of(model).blocks
        dim = blocks[0].attention.head_dim
        ways = {kind: candidates(kind, dim) for kind in KINDS}
        tables: dict[str, Tensor] = {}
        for layer in captured_layers(model, calibration, fisher=True, skip_first=self.sinks):
            of_layer = {"keys": (layer.keys, layer.keys_fisher), "values": (layer.values, layer.values_fisher)}
            for kind in KINDS:
                x, squared = of_layer[kind]
                ordered = x.sort(dim=0).values
                for way in ways[kind]:
                    for name, tensor in _tables_of(way, x, squared, ordered).items():
                        tables[f"{kind}.{layer.layer}.{way.name}.{name}"] = tensor
        tokens = calibration.tokens[:MEASURED_ROWS, :MEASURED_LENGTH]
        if tokens.shape[1] < 2 * (max(WINDOWS) + BLOCK_TOKENS // 2):
            raise DataError(
                f"auto: calibration texts have {tokens.shape[1]} tokens, of which windows and waiting blocks would "
                f"keep most exactly; give texts of at least {2 * (max(WINDOWS) + BLOCK_TOKENS // 2)} tokens."
            )
        samples = layer_samples(model, tokens)
        ropes = [RopeSource(model, block.index) for block in blocks]
        scalings = [float(getattr(block.attention.module, "scaling", dim**-0.5)) for block in blocks]
        errors = candidate_errors(samples, ropes, ways, tables, scalings, WINDOWS)
        return tables | {f"errors.{kind}": errors[kind] for kind in KINDS}

    def plans(self, layers: Sequence[LayerShape], fitted: Fitted) -> list[tuple[HeadPlan, ...]]:
        ways = {kind: candidates(kind, layers[0].head_dim) for kind in KINDS}
        windows = WINDOWS if self.window is None else (self.window,)
        solved = [found for window in windows if (found := self._solved(layers, fitted, ways, window)) is not None]
        if not solved:
            least = min(self._bits(way, layers[0].head_dim, windows[0]) for kind in KINDS for way in ways[kind])
            raise BudgetError(
                f"auto: no choice keeps {self.bits_per_element:g} bits per element at context={self.context}, "
                f"sinks={self.sinks}; the smallest takes {least:.2f}. Raise bits_per_element or context."
            )
        _, window, chosen = min(solved, key=lambda found: found[0])
        plans = []
        for layer in layers:
            together: dict[tuple[Candidate, Candidate], list[int]] = {}
            for head in layer.all_heads:
                pair = (chosen["keys"][layer.index][head], chosen["values"][layer.index][head])
                together.setdefault(pair, []).append(head)
            plans.append(tuple(self._plan(layer, pair, heads, window, fitted) for pair, heads in together.items()))
        return plans

    def head_plans(self, layer: LayerShape, fitted: Fitted) -> tuple[HeadPlan, ...]:
        raise ConfigError("auto weighs layers against each other; use plans().")

    def _plan(
        self, layer: LayerShape, pair: tuple[Candidate, Candidate], heads: list[int], window: int, fitted: Fitted
    ) -> HeadPlan:
        parts = []
        for kind, way in zip(KINDS, pair, strict=True):
            prefix = f"{kind}.{layer.index}."
            own = {name.removeprefix(prefix): tensor for name, tensor in fitted.items() if name.startswith(prefix)}
            codec = way.codec(own, heads, layer.head_dim)
            parts.append(TensorPlan(codec=codec, window=window, block=way.block, pre_rope=way.pre_rope))
        return HeadPlan(heads=tuple(heads), keys=parts[0], values=parts[1], sinks=self.sinks)

    def _solved(
        self, layers: Sequence[LayerShape], fitted: Fitted, ways: Mapping[Kind, list[Candidate]], window: int
    ) -> tuple[float, int, dict[Kind, list[list[Candidate]]]] | None:
        """The least error with this window, the window, and kind -> layer -> head -> candidate; None if none fits."""
        from trimtab.cache._auto.solving import choose

        dim, heads = layers[0].head_dim, layers[0].kv_heads
        most = max(len(found) for found in ways.values())
        slots, sizes = [], []
        for kind in KINDS:
            own = torch.tensor([self._bits(way, dim, window) for way in ways[kind]])
            errors = fitted[f"errors.{kind}"][WINDOWS.index(window)].flatten(0, 1).double()
            pad = (0, most - len(ways[kind]))
            slots.append(torch.nn.functional.pad(errors, pad, value=float(errors.max()) * 1e3 + 1.0))
            sizes.append(torch.nn.functional.pad(own, pad, value=1e3).expand(len(errors), -1))
        try:
            picked, error = choose(torch.cat(slots), torch.cat(sizes), self.bits_per_element)
        except BudgetError:
            return None
        chosen: dict[Kind, list[list[Candidate]]] = {}
        for number, kind in enumerate(KINDS):
            start = number * len(layers) * heads
            chosen[kind] = [
                [ways[kind][picked[start + layer.index * heads + head]] for head in range(heads)] for layer in layers
            ]
        return error, window, chosen

    def _bits(self, way: Candidate, head_dim: int, window: int) -> float:
        """Bits per element of a text of `context` tokens: exact tokens, and the room of those waiting, included."""
        exact = self.sinks + window + way.block
        return way.bits_per_element(head_dim) * (1 - exact / self.context) + EXACT_BITS * exact / self.context


def _tables_of(way: Candidate, x: Tensor, fisher: Tensor | None, ordered: Tensor) -> dict[str, Tensor]:
    if way.way == "table":
        return channel_tables(x, fisher, bits=way.bits, outliers=way.per_mille / 1000, ordered=ordered)
    if way.way == "token":
        flat = None if fisher is None else fisher.flatten(0, 1)
        return {"levels": token_tables(x.flatten(0, 1), flat, bits=way.bits, outliers=0.0)["levels"]}
    return {}
