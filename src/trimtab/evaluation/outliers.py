"""Function-preserving outlier injection: a clearly labelled stress setting, in which naive quantizers fail.

Networks as small as the reference models grow no outlier channels; large ones do. Here some channels are scaled up at
one place and down at the next, so that every logit stays what it was while the numbers in between become uneven:

    norm gain x s            columns of the linears that read it / s
    rows of v x s            columns of o / s                                  (all query heads of the group)
    rows of up x s           columns of down / s                               (gated MLPs)
    rotary pairs of k x s    the same pairs of q / s                           (gains of k_norm and q_norm if any)

`kind="activations"` does it in this direction: a few input channels are large and their weights small, as in large
language models; rounding then hits the channels that matter most. `kind="weights"` does the inverse (but for rotary
pairs): a few columns are large, and set the scale of every weight that shares their group.

The factor is a power of two, so in binary floating point all products stay exact, in bfloat16 too; only norms that
multiply by 1 + weight (Gemma) round. The function is compared with itself before and after on random tokens.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimtab.core.errors import ConfigError, TargetError
from trimtab.evaluation.client import inference
from trimtab.models import ModelView
from trimtab.models.views import AttentionView, BlockView, LinearView, MlpView

Kind = Literal["activations", "weights"]
_TOLERANCE = 1e-5


@dataclass(slots=True)
class Injection:
    """What was scaled. `channels`: place -> indices there; `unchanged`: place -> why it was left alone."""

    kind: Kind
    scale: float
    seed: int
    channels: dict[str, list[int]] = field(default_factory=dict)
    unchanged: dict[str, str] = field(default_factory=dict)


def inject_outliers(
    model: PreTrainedModel, *, seed: int = 0, scale: float = 16.0, channels: int = 8, kind: Kind = "activations"
) -> Injection:
    """Give the model outlier channels in place, without changing what it computes.

    seed       draws the channels; those of the residual stream are the same in all blocks, as in large models
    scale      factor of a channel, a power of two above 1
    channels   channels per site (pairs of dimensions for keys and queries), at most a quarter of the site

    Raises ConfigError for other values; TargetError if the family is unknown, a linear is already compressed, or the
    logits on random tokens change by more than 1e-5 of their size (the model is then as before).
    """
    if kind not in ("activations", "weights"):
        raise ConfigError(f"inject_outliers: kind is 'activations' or 'weights', not {kind!r}.")
    if scale <= 1 or not math.log2(scale).is_integer():
        raise ConfigError(f"inject_outliers: scale must be a power of two above 1, so that it is exact, not {scale}.")
    if channels < 1:
        raise ConfigError(f"inject_outliers: channels must be at least 1, but is {channels}.")
    view = ModelView.of(model)
    for linear in view.linears:
        _ = linear.weight  # refuses compressed layers before anything is changed
    tokens = _random_tokens(model)
    with inference(model):
        before = model(input_ids=tokens).logits
        work = _Injector(view, Injection(kind, scale, seed), channels)
        work.run()
        after = model(input_ids=tokens).logits
        size = max(1.0, float(before.abs().max()))
        change = float((after - before).abs().max()) / size
        if not change <= max(_TOLERANCE, 4 * torch.finfo(before.dtype).eps if before.dtype != torch.float32 else 0):
            work.undo()
            raise TargetError(
                f"{type(model).__name__} ({before.dtype}): scaling changed the logits by {change:.1e} of their size: "
                "the architecture does not compute what its view says, or it rounds. Load it with dtype=torch.float32. "
                "The model is as before."
            )
    return work.report


def _random_tokens(model: PreTrainedModel) -> Tensor:
    vocabulary = int(model.config.get_text_config().vocab_size)
    return torch.randint(vocabulary, (2, 16), generator=torch.Generator().manual_seed(0)).to(model.device)


class _Injector:
    """Scales the places of one model, and remembers how to undo it."""

    def __init__(self, view: ModelView, report: Injection, channels: int) -> None:
        self.view, self.report, self.channels = view, report, channels
        self.rng = random.Random(f"trimtab outliers {report.seed}")
        self._undo: list[Callable[[], None]] = []
        self._residual: list[int] = []

    def run(self) -> None:
        for block in self.view.blocks:
            attention, mlp = block.attention, block.mlp
            if attention.norm is mlp.norm:
                self.report.unchanged[f"{block.name}.norm"] = "one norm feeds attention and MLP"
            else:
                self._after_norm(block, attention, ("q", "k", "v"))
                self._after_norm(block, mlp, ("gate", "up"))
            self._values(block)
            self._keys(block)
            if mlp.gated:
                self._gated(block)
            else:
                self.report.unchanged[f"{block.name}.mlp"] = "a non-linearity lies between up and down"

    def undo(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _draw(self, place: str, size: int) -> list[int]:
        chosen = sorted(self.rng.sample(range(size), min(self.channels, max(1, size // 4))))
        self.report.channels[place] = chosen
        return chosen

    @property
    def _up(self) -> float:
        """Factor on the activations of a chosen channel."""
        return self.report.scale if self.report.kind == "activations" else 1 / self.report.scale

    def _after_norm(self, block: BlockView, part: AttentionView | MlpView, roles: Sequence[str]) -> None:
        readers = [linear for linear in part.linears if _has(linear, roles)]
        size = readers[0].in_features
        if not self._residual:
            self._residual = self._draw("residual", size)
        self._gain(part.norm, self._residual, self._up)
        for linear in readers:
            self._scale(linear.weight.t(), self._residual, 1 / self._up)

    def _values(self, block: BlockView) -> None:
        attention = block.attention
        dim = attention.head_dim
        values, output = _linear(attention, "v"), _linear(attention, "o")
        chosen = self._draw(f"{block.name}.v", attention.num_kv_heads * dim)
        self._rows(values, "v", chosen, self._up)
        group = attention.num_heads // attention.num_kv_heads
        columns = [(i // dim * group + g) * dim + i % dim for i in chosen for g in range(group)]
        self._scale(output.weight.t(), columns, 1 / self._up)

    def _keys(self, block: BlockView) -> None:
        attention = block.attention
        half = attention.rotary_dim // 2
        dim = attention.head_dim
        period = half or dim
        width = 1 if attention.k_norm is not None else attention.num_kv_heads
        drawn = self._draw(f"{block.name}.k pairs", width * period)
        pairs = [(i // period, j) for i in drawn for j in ((i % period, i % period + half) if half else (i % period,))]
        if attention.k_norm is not None and attention.q_norm is not None:  # gains are shared by all heads
            self._gain(attention.k_norm, [j for _, j in pairs], self.report.scale)
            self._gain(attention.q_norm, [j for _, j in pairs], 1 / self.report.scale)
            return
        group = attention.num_heads // attention.num_kv_heads
        keys = [head * dim + j for head, j in pairs]
        queries = [(head * group + g) * dim + j for head, j in pairs for g in range(group)]
        self._rows(_linear(attention, "k"), "k", keys, self.report.scale)
        self._rows(_linear(attention, "q"), "q", queries, 1 / self.report.scale)

    def _gated(self, block: BlockView) -> None:
        up, down = _linear(block.mlp, "up"), _linear(block.mlp, "down")
        chosen = self._draw(f"{block.name}.up", down.in_features)
        self._rows(up, "up", chosen, self._up)
        self._scale(down.weight.t(), chosen, 1 / self._up)

    def _rows(self, linear: LinearView, role: str, chosen: list[int], factor: float) -> None:
        """Scale output channels, counted within the part of a fused layer that has this role, bias included."""
        rows = torch.arange(linear.out_features)[linear.rows[role]] if role in linear.rows else None
        index = chosen if rows is None else rows[chosen].tolist()
        self._scale(linear.weight, index, factor)
        if linear.bias is not None:
            self._scale(linear.bias, index, factor)

    def _gain(self, norm: nn.Module, chosen: list[int], factor: float) -> None:
        weight, bias = norm.weight, getattr(norm, "bias", None)
        assert isinstance(weight, Tensor)
        if self.view.unit_offset_norms:
            old = weight.detach()[chosen].clone()
            weight.detach()[chosen] = factor * (1 + old) - 1
            self._undo.append(lambda: weight.detach().__setitem__(chosen, old))
        else:
            self._scale(weight.detach(), chosen, factor)
        if isinstance(bias, Tensor):
            self._scale(bias.detach(), chosen, factor)

    def _scale(self, tensor: Tensor, index: list[int], factor: float) -> None:
        """Multiply entries of the first dimension in place. `tensor` is a view of a parameter's storage."""
        tensor[index] = tensor[index] * factor
        self._undo.append(lambda: tensor.__setitem__(index, tensor[index] / factor))


def _has(linear: LinearView, roles: Sequence[str]) -> bool:
    return linear.role in roles or any(role in linear.rows for role in roles)


def _linear(part: AttentionView | MlpView, role: str) -> LinearView:
    for linear in part.linears:
        if _has(linear, (role,)):
            return linear
    raise TargetError(f"{type(part.module).__name__} has no linear layer for '{role}'.")
