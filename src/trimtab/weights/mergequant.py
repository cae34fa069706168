"""Whole-number inputs with fixed steps per channel: the steps move into the norm before and the weights behind.

Paper: Wang, Wang, Sun, Yang, Zhuang, Ning, Yin, Qi, Liao, "MergeQuant: Accurate 4-bit Static Quantization of Large
Language Models by Channel-wise Calibration", 2025, arXiv:2503.07654.

Linears that read a norm (q, k, v; gate, up) get static inputs, by *quantization step migration*: with the step
`s_j = c_j max_t |x_tj| / (2^(b-1) - 1)` of channel j,

    norm    g'_j = g_j / s_j         X = clip(round(norm(h)))        nothing is measured at run time
    weight  W'_oj = W_oj s_j ~ w_o W_int,oj                          y_o = w_o sum_j W_int,oj X_j

Steps differ by orders of magnitude, and with them the columns of W', so the few largest set the scale of every row.
*Dimension reconstruction* splits these strong channels: X_j is repeated k_j = ceil(s_j / T) times and each copy gets
the column W'_j / k_j, which is exact. T = mean(s) + alpha std(s), alpha searched. *Adaptive clipping* chooses c_j.
*Compensation* adds a low-rank change to W' that repairs what the rounding of inputs does, before W' is rounded.

o, down and linears whose norm has readers that are no targets get inputs rounded per token (symmetric, dynamic), behind
a Hadamard rotation unless `rotate=False`; compensation and rounding are the same. The run record says which is which
(`activations`).

The authors have published no code. Reconstructed by us:
  - alpha is taken from `alphas`, the least joint error |x W^T - X Q(W')^T|^2 over 512 tokens; more channels than
    `max_widening` allows are not tried. The width is rounded up to a multiple of `multiple`, and the room that is left
    goes to further copies, one by one of the channel whose s_j / k_j is then largest.
  - c: 20 ratios from 1 to 0.5 for clusters of channels, the strongest first (1/64 of all channels, 1/64, 1/32, ...
    1/2), each cluster in turn until three ratios did not help, with the same joint error. Then alpha is chosen again.
  - Compensation is the reduced-rank regression of the residual on the rounded inputs, in closed form instead of
    training; W' with it is then rounded by GPTQ on the second moment of the rounded inputs (act-order, grid of the
    uncorrected weight).
  - With `keep_width` the channels that matter least are removed for the copies (Optimal Brain Surgeon on W').
  - One step per channel for all readers of the norm; inputs of o and down per token, rotated as in QuaRot
    (arXiv:2404.00456).
  - Position 0 can be left out of steps and moments (`skip_first`), for models whose first token is an outlier of its
    own; that token is then clipped.

Cost: `sequences` of text in memory per site; per norm about 50 products of 512 tokens for the clipping.
When it fails: if the text in use drives a channel beyond its step, it is clipped (`saturation`). Without outlier
channels per-token rounding is as good, and needs no text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from trimtab.core.errors import ConfigError
from trimtab.models.folding import NormFold, fold_of
from trimtab.tensors.activations import ActivationGrid
from trimtab.tensors.compressed import CompressedTensor
from trimtab.tensors.grid import GridFormat, GroupGrid, column_codes, column_values, grid_parameters
from trimtab.tensors.metric import Metric
from trimtab.tensors.rotation import Rotation
from trimtab.tensors.transform import Chain, Transform
from trimtab.weights import _step_migration as migration
from trimtab.weights._step_migration import Copies
from trimtab.weights.base import BlockMethod, Compressed, CompressedBlock, Notes
from trimtab.weights.gptq import Gptq

if TYPE_CHECKING:
    from trimtab.models.statistics import Stats
    from trimtab.models.views import BlockView, LinearView
    from trimtab.weights._block_run import BlockRun

__all__ = ["Mergequant"]

SEARCH_TOKENS = 512
CLIP_RATIOS = tuple(1 - 0.5 * step / 19 for step in range(20))
CLIP_PATIENCE = 3
DAMP = 0.01


@dataclass(frozen=True, slots=True)
class StaticInput:
    """What was found for one norm: steps [in], copies, the stacked W' [out, in] of its readers, and notes."""

    steps: Tensor
    copies: Copies
    weight: Tensor
    notes: Notes


@dataclass(frozen=True, kw_only=True)
class Mergequant(BlockMethod):
    """MergeQuant. Weights are symmetric with one scale per row.

    bits               of the weights: 2, 3, 4 or 8; whole-number products need 4 or 8
    activation_bits    of the inputs: 4, 6 or 8
    split              dimension reconstruction; without it, `adaptive_clip`, `rank` and `gptq` this is plain migration
    alphas             thresholds to try, in standard deviations above the mean step
    max_widening       how much wider the split input may be, as a share, before rounding up to `multiple`
    multiple           of which the width of a split input is one
    keep_width         remove as many channels as were added, instead of widening
    adaptive_clip      choose the c_j; without: 1
    rank               of the compensation; 0 = none
    gptq               round by GPTQ; without: to nearest
    rotate             rotate the inputs of o and down (a Hadamard transform at run time)
    skip_first         leave position 0 out of what is learnt about the inputs
    sequences          calibration sequences from which everything but the steps is learnt; those are from all text
    scale_dtype        stored dtype of the row scales
    """

    bits: Literal[2, 3, 4, 8] = 4
    activation_bits: Literal[4, 6, 8] = 4
    split: bool = True
    alphas: tuple[float, ...] = (0.5, 1.0, 2.0, 3.0, 5.0)
    max_widening: float = 0.25
    multiple: int = 64
    keep_width: bool = False
    adaptive_clip: bool = True
    rank: int = 16
    gptq: bool = True
    rotate: bool = True
    skip_first: bool = False
    sequences: int = 32
    scale_dtype: Literal["float16", "float32", "bfloat16"] = "float16"

    def check(self) -> None:
        for name, fits, allowed in (
            ("alphas", self.alphas and min(self.alphas) > 0, "positive, at least one"),
            ("max_widening", 0 <= self.max_widening <= 1, "in 0 .. 1"),
            ("multiple", self.multiple >= 1, "at least 1"),
            ("rank", self.rank >= 0, "at least 0"),
            ("sequences", self.sequences >= 1, "at least 1"),
        ):
            if not fits:
                raise ConfigError(f"Mergequant: option {name}={getattr(self, name)} must be {allowed}.")

    @property
    def needs_text(self) -> bool:
        return True

    def check_linear(self, linear: LinearView) -> None:
        """Every linear will do."""

    @property
    def format(self) -> GridFormat:
        return GridFormat(bits=self.bits, group_size=-1, symmetric=True, scale_dtype=self.scale_dtype)

    @property
    def levels(self) -> int:
        """The largest whole number of an input."""
        return (1 << (self.activation_bits - 1)) - 1

    def compress_block(
        self, block: BlockView, linears: Sequence[LinearView], stats: Mapping[str, Stats], run: BlockRun
    ) -> CompressedBlock:
        names = {linear.name for linear in linears}
        done: dict[str, Compressed] = {}
        dense: dict[str, Tensor] = {}
        for site in dict.fromkeys(linear.site for linear in linears):
            if any(linear.name in done for linear in block.sites[site]):
                continue  # read the norm of an earlier site
            fold = fold_of(run.view, block, site, names)
            if isinstance(fold, NormFold):
                done |= self._static(site, fold, run, dense)
            else:
                reason = fold if isinstance(fold, str) else "a linear makes it, no norm"
                members = [linear for linear in block.sites[site] if linear.name in names]
                done |= self._dynamic(members, reason, run)
        return CompressedBlock(done, dense)

    # Linears behind a norm

    def _static(self, site: str, fold: NormFold, run: BlockRun, dense: dict[str, Tensor]) -> dict[str, Compressed]:
        (largest,) = [s.abs_max for s in run.gather({site: {"abs_max"}}, first=int(self.skip_first)).values()]
        assert largest is not None
        x = self._inputs(fold.consumers[0], run)
        sample = _sample(x, run.seed)
        stacked = torch.cat([linear.weight.float() for linear in fold.consumers])
        found = self.static_input(sample, stacked, largest, lambda steps: fold.stored(steps))
        dense |= fold.divided(found.steps)
        whole = migration.integers(x, found.steps, self.levels)
        notes: Notes = {
            "activations": "static",
            **found.notes,
            "saturation": migration.saturation(x, found.steps, self.levels),
        }
        return self._rounded(fold.consumers, x, whole, found, notes)

    def static_input(
        self, x: Tensor, weight: Tensor, largest: Tensor, stored: Callable[[Tensor], Tensor] = lambda s: s
    ) -> StaticInput:
        """Steps and copies for inputs x [tokens, in] of the stacked `weight` [out, in]; max |x_j| in all text [in].

        `stored` is what the norm can hold of steps that are wanted.
        """
        full = migration.steps_for(largest, self.levels)
        wanted = x @ weight.T
        size = float(wanted.square().sum()) or 1.0

        def error(steps: Tensor, copies: Copies) -> float:
            wide = copies.widen(weight * steps)
            scales, zeros = grid_parameters(wide, self.format)
            rounded = copies.fold(
                column_values(column_codes(wide, scales, zeros, self.format), scales, zeros, self.format)
            )
            found = migration.integers(x, steps, self.levels) @ rounded.T
            return float((found - wanted).square().sum()) / size

        alpha, copies = self._reconstruct(full, error)
        notes: Notes = {"joint_error_unclipped": error(full, copies)}
        steps = stored(full)
        if self.adaptive_clip:
            ratios = migration.descend(
                lambda c: error(full * c.to(full), copies),
                migration.clusters(full),
                list(CLIP_RATIOS),
                len(full),
                CLIP_PATIENCE,
            )
            steps = stored(full * ratios.to(full))
            alpha, copies = self._reconstruct(steps, error)
            notes["mean_clip"] = float(ratios.mean())
        notes |= {"alpha": alpha, "joint_error": error(steps, copies)}
        migrated = weight * steps
        if self.keep_width and (extra := int(copies.count.sum()) - len(steps)):
            integers = migration.integers(x, steps, self.levels)
            migrated, copies = migration.remove(migrated, integers.T @ integers / len(x), copies, extra, DAMP)
        notes["width"] = int(copies.count.sum())
        return StaticInput(steps, copies, migrated, notes)

    def _reconstruct(self, steps: Tensor, error: Callable[[Tensor, Copies], float]) -> tuple[float | str, Copies]:
        """The alpha of least joint error with its copies; "none" if no split is allowed, or better."""
        alpha: float | str = "none"
        best = Copies(torch.ones_like(steps, dtype=torch.int64))
        if not self.split:
            return alpha, best
        least = error(steps, best)
        room = self._padded(int(len(steps) * (1 + self.max_widening)))
        for candidate in self.alphas:
            copies = migration.split(steps, migration.threshold_of(steps, candidate))
            width = int(copies.count.sum())
            if width > room:
                continue
            if not self.keep_width and width > len(steps):
                copies = migration.fill(copies, steps, self._padded(width))
            if (found := error(steps, copies)) < least:
                alpha, best, least = candidate, copies, found
        return alpha, best

    def _padded(self, width: int) -> int:
        return -(-width // self.multiple) * self.multiple

    # Linears whose input no norm makes

    def _dynamic(self, linears: Sequence[LinearView], reason: str, run: BlockRun) -> dict[str, Compressed]:
        x = self._inputs(linears[0], run)
        size = x.shape[1]
        grid = ActivationGrid(size, self.activation_bits, "token")
        rotation = Rotation(size) if self.rotate else None
        transform: Transform = grid if rotation is None else Chain((rotation, grid))
        stacked = torch.cat([linear.weight.float() for linear in linears])
        migrated = stacked if rotation is None else rotation.apply(stacked)
        one = Copies(torch.ones(size, dtype=torch.int64, device=x.device))
        found = StaticInput(torch.ones_like(x[0]), one, migrated, {})
        notes: Notes = {"activations": f"per token: {reason}"}
        return self._rounded(linears, x, transform.apply(x), found, notes, transform)

    # Both

    def _inputs(self, linear: LinearView, run: BlockRun) -> Tensor:
        """What `linear` reads, float32 [tokens, in]."""
        rows = []
        for call in run.capture(linear.module, sequences=self.sequences):
            mask = call.mask.clone()
            mask[:, : int(self.skip_first)] = False
            hidden = call.hidden.reshape(*mask.shape, -1)  # OPT's MLP reads rows without the shape of the batch
            rows.append(hidden[mask].float())
        return torch.cat(rows)

    def _rounded(
        self,
        linears: Sequence[LinearView],
        x: Tensor,
        rounded: Tensor,
        found: StaticInput,
        notes: Notes,
        transform: Transform | None = None,
    ) -> dict[str, Compressed]:
        """Compensate and round W' of each linear, for its inputs x and what stands for them, both [tokens, in].

        `transform` None: static whole numbers.
        """
        index = found.copies.index
        plain = bool((found.copies.count == 1).all())
        gram, cross = _moment(rounded, rounded), _moment(rounded, x)
        original = _moment(x, x)
        wide = gram[index.long()][:, index.long()]
        done: dict[str, Compressed] = {}
        start = 0
        for linear in linears:
            weight = linear.weight.float()
            migrated = found.weight[start : start + len(weight)]
            start += len(weight)
            if self.rank:
                residual = weight @ cross.T - migrated @ gram
                kept = found.copies.count > 0
                change = torch.zeros_like(migrated)
                change[:, kept] = migration.compensation(
                    migrated[:, kept], gram[kept][:, kept], residual[:, kept], self.rank, DAMP
                )
                migrated = migrated + change
            grid, more = self._grid(found.copies.widen(migrated), wide, linear.name)
            own = transform or ActivationGrid(
                x.shape[1], self.activation_bits, "static", index=None if plain else index.clone()
            )
            tensor = CompressedTensor((grid,), own)
            folded = tensor.dequantize() / found.steps
            outputs = x @ weight.T
            error = (rounded @ found.copies.fold(grid.dequantize()).T - outputs).square().sum()
            errors: Notes = {
                "relative_weight_error": Metric.identity().relative_error(weight, folded),
                "relative_error": Metric.gram(original, name=linear.site).relative_error(weight, folded),
                "output_error": float(error / outputs.square().sum().clamp(min=torch.finfo(torch.float32).tiny)),
            }
            done[linear.name] = Compressed(tensor, {**notes, **more, **errors})
        return done

    def _grid(self, weight: Tensor, gram: Tensor, name: str) -> tuple[GroupGrid, Notes]:
        if not self.gptq:
            return GroupGrid.quantize(weight, self.format), {}
        method = Gptq(
            bits=self.bits,
            group_size=-1,
            symmetric=True,
            act_order=True,
            percdamp=DAMP,
            scale_dtype=self.scale_dtype,
        )
        return method.rounded(weight, gram, f"the integers of {name}")


def _moment(a: Tensor, b: Tensor) -> Tensor:
    """E[a b^T], float32 [a's width, b's width]."""
    return a.T @ b / len(a)


def _sample(x: Tensor, seed: int) -> Tensor:
    """At most SEARCH_TOKENS rows, drawn with the seed."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return x[order[:SEARCH_TOKENS].sort().values.to(x.device)]
