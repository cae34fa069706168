"""Where the input channels of linears can be rescaled for nothing: in what produces them.

A linear computes the same from x / s if its columns are multiplied by s. The division is free where it can be made in
the parameters of the producer:

    attention_in, mlp_in    the norm's gain (and bias) divided by s
    attention_out           the rows of v divided by s, if every query head has a value head of its own
    mlp_out                 the rows of up divided by s, in a gated MLP

Everything that reads a norm must be rescaled with it, so a norm with a reader that stays as it is cannot take part.
Methods: AWQ, MergeQuant and QLLM, each in its file under trimtab.weights.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.core.errors import NumericsError, TargetError
from trimtab.models.views import BlockView, LinearView, ModelView, Rows

__all__ = ["Fold", "NormFold", "RowFold", "fold_of"]


@dataclass(frozen=True, slots=True)
class Fold:
    """A producer whose output channels can be divided, and `consumers`, all linears that read them."""

    consumers: tuple[LinearView, ...]

    def divided(self, scale: Tensor) -> dict[str, Tensor]:
        """Parameter name -> its values, in its shape and dtype, once channel j is divided by `scale` [channels] > 0.

        Raises NumericsError if a value leaves the parameter's dtype.
        """
        raise NotImplementedError

    def stored(self, scale: Tensor) -> Tensor:
        """What the channels are really divided by, float32: `scale` after the rounding of the producer's parameters.

        Multiply the columns of the consumers by this.
        """
        return scale.float()


@dataclass(frozen=True, slots=True)
class NormFold(Fold):
    """Divides the gain of a norm, and its bias if it has one.

    name      of the norm module
    offset    1 if the norm multiplies by 1 + weight (Gemma), else 0
    """

    norm: nn.Module
    name: str
    offset: float

    @property
    def gain(self) -> Tensor:
        """What the norm multiplies by, float32 [channels]."""
        return self._weight.float() + self.offset

    def divided(self, scale: Tensor) -> dict[str, Tensor]:
        weight = self._weight
        name = f"{self.name}.weight"
        values = {name: _cast(self.gain / scale - self.offset, weight.dtype, name)}
        bias = getattr(self.norm, "bias", None)
        if isinstance(bias, Tensor):
            name = f"{self.name}.bias"
            values[name] = _cast(bias.detach().float() / self.stored(scale), bias.dtype, name)
        return values

    def stored(self, scale: Tensor) -> Tensor:
        weight = self._weight
        divided = _cast(self.gain / scale - self.offset, weight.dtype, f"{self.name}.weight").float() + self.offset
        return torch.where(divided == 0, scale.float(), self.gain / divided)

    @property
    def _weight(self) -> Tensor:
        weight = self.norm.weight
        assert isinstance(weight, Tensor)
        return weight.detach()


@dataclass(frozen=True, slots=True)
class RowFold(Fold):
    """Divides rows of a linear, and its bias there: those that make value heads, or the up half of a gated MLP."""

    linear: LinearView
    rows: Rows

    def rescaled(self, weight: Tensor, scale: Tensor) -> Tensor:
        """`weight` [out, ...] of the producer, a copy, with its rows divided."""
        result = weight.clone()
        result[self.rows] /= scale.to(result).reshape(-1, *[1] * (weight.ndim - 1))
        return result

    def divided(self, scale: Tensor) -> dict[str, Tensor]:
        name = f"{self.linear.name}.weight"
        weight = _cast(self.rescaled(self.linear.weight.float(), scale), self.linear.weight.dtype, name)
        values = {name: weight.t() if self.linear.transposed else weight}
        return values | self.divided_bias(scale)

    def divided_bias(self, scale: Tensor) -> dict[str, Tensor]:
        """The bias alone, for a producer whose weight is replaced; empty if it has none."""
        bias, name = self.linear.bias, f"{self.linear.name}.bias"
        return {} if bias is None else {name: _cast(self.rescaled(bias.float(), scale), bias.dtype, name)}


def fold_of(view: ModelView, block: BlockView, site: str, changed: Collection[str]) -> Fold | str:
    """The fold in front of `site`, or in words why there is none.

    `changed` are the names of the linears that may be rescaled; all that share the producer must be among them, and
    so must a producer that is a linear. Raises TargetError for a site that the block does not have.
    """
    if site not in block.sites:
        raise TargetError(f"block {block.name} has no site '{site}'. Sites: {', '.join(block.sites)}.")
    consumers = block.sites[site]
    roles = {linear.role for linear in consumers}
    if roles & {"o"}:
        return _values(block, consumers, changed)
    if roles & {"down"}:
        return _gated(block, consumers, changed)
    part = block.attention if consumers[0] in block.attention.linears else block.mlp
    readers = tuple(
        linear
        for candidate in (block.attention, block.mlp)
        if candidate.norm is part.norm
        for linear in candidate.linears
        if linear.role not in ("o", "down")
    )
    name = next(name for name, module in view.model.named_modules() if module is part.norm)
    if fixed := [linear.name for linear in readers if linear.name not in changed]:
        return f"{name} is also read by {', '.join(fixed)}, which must stay as it is"
    if not isinstance(getattr(part.norm, "weight", None), Tensor):
        return f"{name} has no gain to divide"
    return NormFold(readers, part.norm, name, 1.0 if view.unit_offset_norms else 0.0)


def _values(block: BlockView, consumers: tuple[LinearView, ...], changed: Collection[str]) -> Fold | str:
    attention = block.attention
    if attention.num_heads != attention.num_kv_heads:
        return f"{attention.num_heads} query heads share {attention.num_kv_heads} value heads"
    return _rows(attention.linears, "v", consumers, changed)


def _gated(block: BlockView, consumers: tuple[LinearView, ...], changed: Collection[str]) -> Fold | str:
    if not block.mlp.gated:
        return "a non-linearity lies between up and down"
    return _rows(block.mlp.linears, "up", consumers, changed)


def _rows(
    linears: tuple[LinearView, ...], role: str, consumers: tuple[LinearView, ...], changed: Collection[str]
) -> Fold | str:
    producer = next(linear for linear in linears if linear.role == role or role in linear.rows)
    if fixed := [linear.name for linear in (producer, *consumers) if linear.name not in changed]:
        return f"{', '.join(fixed)} must stay as it is"
    return RowFold(consumers, producer, producer.rows.get(role, slice(None)))


def _cast(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    stored = values.to(dtype)
    if not bool(torch.isfinite(stored).all()):
        raise NumericsError(
            f"{name}: dividing by the channels' scales gives values up to {float(values.abs().max()):.3g}, which "
            f"{dtype} cannot hold. Load the model in a wider dtype (bfloat16 or float32)."
        )
    return stored
