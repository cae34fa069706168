"""Split the few input channels that are much larger than the others and merge similar ones, then round both sides.

Paper: Liu, Gong, Wei, Dong, Cai, Zhuang, "QLLM: Accurate and Efficient Low-Bitwidth Quantization for Large Language
Models", ICLR 2024, arXiv:2310.08041.

A token whose activations are rounded to one grid loses all small channels to a few large ones. In front of q, k, v, of
gate and up, and of down:

1. Disassembly: channel j becomes T_j = ceil(max|x_j| / t) equal shares x_j / T_j, its weight column T_j times. Exact.
2. Assembly: as many of the other channels are merged, two into their mean, so that the width stays. A merged pair errs
   by `(x_i - x_j)(w_i - w_j)^T / 2`; partners are found by bipartite soft matching on its squared norm.
3. The threshold t of each input is searched from max|x| downwards, until `channel_ratio` of the width is added, for the
   least squared error of what the layers lead to (attention in front of o, act(gate) up, the output of down) with
   weights and activations rounded.
4. Error correction: block after block in units of four, low-rank terms on all weights and the norms' weights are
   trained so that the unit's output on the compressed model's hidden states comes near the original's on its own
   (_error_correction.py). The terms are merged into the weights; nothing is added to the model.

Weights are asymmetric integers per output row by default, activations asymmetric integers per token.

Departures from the authors' code:
  - Pairs are scored by the squared norm of what merging them errs by. The code's score adds weights' sums instead of
    taking the norm of their difference.
  - Step 4 trains what is stored, the rounding of the corrected weight, with straight-through gradients; the code trains
    the corrected rounding and then merges, which moves the result off what was trained.
  - A unit keeps its uncorrected weights if training did not lower its error on the calibration text.
  - Queries, keys and values themselves are not rounded: a KV cache method of trimtab does that. No bias is added to the
    last norm: norms of today's models have none.

Cost: one run of the attention or MLP for each number of split channels tried, then ten epochs of training.
When it fails: below 4 bits of activations; with calibration text whose large channels are not those in use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from trimtab.core.errors import ConfigError
from trimtab.models.captured_call import CapturedCall
from trimtab.models.compressed_linear import CompressedLinear
from trimtab.tensors.activations import ActivationGrid
from trimtab.tensors.compressed import CompressedTensor
from trimtab.tensors.grid import GroupGrid
from trimtab.tensors.reindex import Reindex
from trimtab.tensors.transform import Chain
from trimtab.weights._grid import GridMethod
from trimtab.weights._reassembly import pair_costs, reassembled, shares, thresholds
from trimtab.weights.base import BlockMethod, Compressed, CompressedBlock, Notes

if TYPE_CHECKING:
    from trimtab.models.statistics import Need, Stats
    from trimtab.models.views import BlockView, LinearView
    from trimtab.weights._block_run import BlockRun
    from trimtab.weights._tuning import Tuning

__all__ = ["Qllm"]


@dataclass(frozen=True, kw_only=True)
class Qllm(GridMethod, BlockMethod):
    """QLLM on the grids of GridMethod, with its options and:

    group_size          -1, one group per output row, as in the paper
    activation_bits     of the inputs of all layers, per token
    channel_ratio       most channels that splitting may add, as a share of the width; 0: steps 1 to 3 are left out
    search_sequences    calibration sequences on which thresholds are compared, at least; whole chunks are run
    rank                of the low-rank terms of step 4; 0: step 4 is left out
    alpha               their scaling is alpha / rank
    epochs              of step 4 over the calibration text
    learning_rate       of step 4: AdamW, linear decay
    unit_blocks         blocks that are trained together
    """

    group_size: int = -1
    activation_bits: Literal[4, 6, 8] = 4
    channel_ratio: float = 0.2
    search_sequences: int = 4
    rank: int = 4
    alpha: float = 1.0
    epochs: int = 10
    learning_rate: float = 5e-4
    unit_blocks: int = 4

    def check(self) -> None:
        super().check()
        if not 0 <= self.channel_ratio <= 0.5:
            raise ConfigError(
                f"Qllm: option channel_ratio={self.channel_ratio} must be in [0, 0.5]: at most half of the channels "
                "can be merged."
            )
        for name in ("search_sequences", "epochs", "unit_blocks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"Qllm: option {name}={getattr(self, name)} must be at least 1.")
        if self.rank < 0 or not self.learning_rate > 0 or not self.alpha > 0:
            raise ConfigError(
                f"Qllm: options rank={self.rank}, learning_rate={self.learning_rate} and alpha={self.alpha} must be "
                "at least 0, above 0 and above 0."
            )

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"abs_max", "reservoir"})

    @property
    def tunes(self) -> bool:
        return self.rank > 0

    def compress_block(
        self, block: BlockView, linears: Sequence[LinearView], stats: Mapping[str, Stats], run: BlockRun
    ) -> CompressedBlock:
        done: dict[str, Compressed] = {}
        for site, found in stats.items():
            members = [linear for linear in linears if linear.site == site]
            reindex, notes = self._search(block, members, found, run)
            for linear in members:
                done[linear.name] = Compressed(self.rounded(linear.weight.float(), reindex), notes)
        return CompressedBlock(done)

    def rounded(self, weight: Tensor, reindex: Reindex | None) -> CompressedTensor:
        """A weight [out, in] behind a reindexing, and its input, rounded."""
        grid = self.grid(weight if reindex is None else reindex.expand(weight))
        activations = ActivationGrid(grid.shape[1], self.activation_bits, "token", symmetric=False)
        return CompressedTensor((grid,), activations if reindex is None else Chain((reindex, activations)))

    def grid(self, weight: Tensor) -> GroupGrid:
        """`weight` [out, width] rounded, ranges taken from it."""
        return GroupGrid.quantize(weight, self.format, self.search)

    def tune(self, tuning: Tuning) -> Notes:
        from trimtab.weights._error_correction import correct_errors

        return correct_errors(self, tuning)

    def _search(
        self, block: BlockView, members: Sequence[LinearView], stats: Stats, run: BlockRun
    ) -> tuple[Reindex | None, Notes]:
        """The reindexing of least error in front of `members`, which share an input; None if none is better."""
        largest, tokens = stats.abs_max, stats.reservoir
        if members[0].role == "o" or self.channel_ratio == 0 or largest is None or tokens is None:
            return None, {}
        costs = pair_costs(tokens, torch.cat([linear.weight.float() for linear in members]))
        error = self._error(block, members, tokens, run)
        plain = least = error(None)
        best, best_threshold, last = None, float(largest.max()), 0
        for threshold in thresholds(largest.double()).tolist():
            added = int((shares(largest, threshold) - 1).sum())
            if added > self.channel_ratio * len(largest):
                break
            if added == last:
                continue
            last = added
            reindex = reassembled(largest, threshold, costs)
            if reindex is not None and (found := error(reindex)) < least:
                best, best_threshold, least = reindex, threshold, found
        added = 0 if best is None else int((shares(largest, best_threshold) - 1).sum())
        return best, {
            "split_threshold": best_threshold,
            "added_channels": added,
            "search_error": least,
            "search_error_unsplit": plain,
        }

    def _error(
        self, block: BlockView, members: Sequence[LinearView], tokens: Tensor, run: BlockRun
    ) -> Callable[[Reindex | None], float]:
        """Reindexing -> mean squared error of what `members` lead to."""
        if members[0].role == "down":
            weights = [linear.weight.float() for linear in members]

            def of_outputs(reindex: Reindex | None) -> float:
                errors = [tokens @ weight.t() - self.rounded(weight, reindex).matmul(tokens) for weight in weights]
                return float(torch.stack([error.square().mean() for error in errors]).mean())

            return of_outputs
        part = block.attention if any(linear in block.attention.linears for linear in members) else block.mlp
        reader = next(linear for linear in part.linears if linear.role in ("o", "down"))
        calls = run.capture(part.module, sequences=self.search_sequences)
        original = inputs_of(reader, calls)

        def of_inputs(reindex: Reindex | None) -> float:
            for linear in members:
                linear.replace(CompressedLinear(self.rounded(linear.weight.float(), reindex), linear.bias))
            try:
                found = inputs_of(reader, calls)
            finally:
                for linear in members:
                    linear.replace(linear.module)
            return float((found - original).square().mean())

        return of_inputs


class _Seen(Exception):
    """A signal, not an error: the input that was wanted has been seen."""


@torch.no_grad()
def inputs_of(linear: LinearView, calls: Sequence[CapturedCall]) -> Tensor:
    """What `linear` reads when the calls are run anew, float32 [tokens, in], padding left out."""
    seen: list[Tensor] = []

    def take(_: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen.append(arguments[0].float())
        raise _Seen

    handle = linear.module.register_forward_pre_hook(take)
    try:
        for call in calls:
            try:
                call.run()
            except _Seen:
                seen[-1] = seen[-1].reshape(*call.mask.shape, -1)[call.mask.to(seen[-1].device)]
    finally:
        handle.remove()
    return torch.cat(seen)
