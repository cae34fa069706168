"""One step of PV-Tuning on one layer: its numbers along their gradients (P), a few of its codes along theirs (V)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trimtab.tensors.base import Part
from trimtab.weights._student import Layer

_EPS = 1e-12


@dataclass(frozen=True, slots=True)
class CodeRules:
    """Which codes may change in one step of one matrix.

    share      tau: the share of code groups that are looked at, those with the longest steps
    trust      rho: the length of all changes together, relative to the norm of the matrix
    decay      delta: how much of what the codes cannot express is dropped after each step (1: all, 0: it adds up, as in
               straight-through estimation)
    force      a group that is looked at takes its best other code, if the nearest is the one it has
    """

    share: float = 1.0
    trust: float = math.inf
    decay: float = 0.0
    force: bool = False


class Direction:
    """Adam's direction of a tensor's gradients, rescaled so that a step of rate 1 is as long as the tensor (LAMB)."""

    def __init__(self, beta1: float, beta2: float) -> None:
        self.beta1, self.beta2 = beta1, beta2
        self.first: Tensor | None = None
        self.second: Tensor | None = None
        self.count = 0

    def step(self, gradient: Tensor, norm: Tensor) -> Tensor:
        """The direction after one more gradient, `norm` long; zero for a gradient that has always been zero."""
        self.count += 1
        if self.second is None:
            self.second = torch.zeros_like(gradient)
        self.second.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        if self.beta1:
            self.first = (
                gradient * (1 - self.beta1) if self.first is None else self.first.lerp(gradient, 1 - self.beta1)
            )
            gradient = self.first / (1 - self.beta1**self.count)
        root = (self.second / (1 - self.beta2**self.count)).sqrt_()
        direction: Tensor = gradient / (root + _EPS)
        return direction.mul_(norm / direction.norm().clamp(min=_EPS))


class NumberStepper:
    """P: moves float32 leaves along their gradients, each relative to its own norm."""

    def __init__(self, leaves: Iterable[Tensor]) -> None:
        self.leaves = [(leaf, Direction(0.9, 0.95)) for leaf in leaves]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for leaf, direction in self.leaves:
            if leaf.grad is not None:
                leaf -= rate * direction.step(leaf.grad, leaf.norm())


class CodeStepper:
    """V: moves the codes of one layer. Call after the numbers have moved and before the next forward."""

    def __init__(self, layer: Layer, rules: CodeRules) -> None:
        self.layer = layer
        self.rules = rules
        self.coded = [index for index, part in enumerate(layer.tensor.parts) if part.code_shape is not None]
        self.direction = Direction(0.0, 0.95)  # momentum would keep pushing codes that have just changed
        with torch.no_grad():
            self.buffer = layer.weight()

    @torch.no_grad()
    def step(self, rate: float) -> int:
        """The number of code groups that changed."""
        layer = self.layer
        layer.keep_positive()
        weight = layer.weight()  # of the previous codes and the new numbers
        norm = weight.norm()
        update = self.buffer - rate * self.direction.step(layer.gradient, norm)
        changed = 0
        for index in self.coded:
            part, numbers = layer.tensor.parts[index], layer.numbers[index]
            rest = weight - part.dense(numbers)
            found, count = choose_codes(part.with_continuous(numbers), update - rest, self.rules)
            layer.tensor = replace(layer.tensor, parts=_exchanged(layer.tensor.parts, index, found))
            weight = rest + found.dense(numbers)
            changed += count
        self.buffer = torch.lerp(update, weight, self.rules.decay)
        return changed


def _exchanged(parts: tuple[Part, ...], index: int, part: Part) -> tuple[Part, ...]:
    return (*parts[:index], part, *parts[index + 1 :])


def choose_codes(part: Part, target: Tensor, rules: CodeRules) -> tuple[Part, int]:
    """`part` with the codes that `rules` let change moved towards the dense `target`, and how many groups changed."""
    shape = part.code_shape
    assert shape is not None
    weight = part.dequantize()
    distance = _by_group(target - weight, shape).flatten()
    chosen = torch.ones_like(distance, dtype=torch.bool)
    order = torch.arange(0)
    if rules.share < 1 or math.isfinite(rules.trust):
        order = distance.topk(math.ceil(rules.share * distance.numel())).indices
        chosen = torch.zeros_like(chosen).index_fill_(0, order, True)
    found = part.project(target, subset=chosen.view(shape), differ=rules.force)
    change = _by_group(found.dequantize() - weight, shape).flatten()
    if math.isfinite(rules.trust):
        moved = change[order].double()
        length = moved.cumsum(0)
        within = (length <= (rules.trust * float(weight.norm())) ** 2) | (length == moved)  # the first always
        chosen[order] = within
        if not bool(within.all()):
            found = part.project(target, subset=chosen.view(shape), differ=rules.force)
    return found, int((change[chosen] > 0).sum())


def _by_group(difference: Tensor, shape: tuple[int, int]) -> Tensor:
    """Squared length of each code group, in the shape of the codes."""
    return difference.square().reshape(*shape, -1).sum(-1)
