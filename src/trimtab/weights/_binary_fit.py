"""Fitting `W ~ sum_i alpha_i B_i (+ c)` to a matrix: greedily, by alternating least squares, or by gradients on signs.

Signs are float32 [N, out, in] of -1 and +1 here, scales float32 [N, out], the constant [out] or None.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.tensors.binary import BinaryBases

GRADIENT_STEPS = 300
"""Adam steps for each base."""
_LATENT_RATE = 1e-3
_ALPHA_RATE = 1e-3
_RIDGE = 1e-10


@dataclass(frozen=True, slots=True)
class Bases:
    """N bases of a matrix and their scales."""

    signs: Tensor
    alphas: Tensor
    constant: Tensor | None = None

    def dense(self) -> Tensor:
        """[out, in]."""
        total = torch.einsum("no,noi->oi", self.alphas, self.signs)
        return total if self.constant is None else total + self.constant[:, None]

    def row_errors(self, weight: Tensor) -> Tensor:
        """Squared error of each row, [out]."""
        return (weight - self.dense()).square().sum(dim=1)


def greedy(weight: Tensor, bases: int) -> Bases:
    """Stage 1: `B_i = sign(D_i)` with sign(0) = +1, `alpha_i = mean_j |D_i|` per row, `D_{i+1} = D_i - alpha_i B_i`.

    Each base lowers a row's squared error by exactly `in * alpha_i^2`.
    """
    rest, signs, alphas = weight, [], []
    for _ in range(bases):
        sign = torch.where(rest >= 0, 1.0, -1.0)
        alpha = rest.abs().mean(dim=1)
        rest = rest - alpha[:, None] * sign
        signs.append(sign)
        alphas.append(alpha)
    return Bases(torch.stack(signs), torch.stack(alphas))


def alternate(weight: Tensor, start: Bases, rounds: int, *, constant: bool = False) -> Bases:
    """Least squares for the scales given the signs, then the nearest of all 2^N sign combinations for each weight.

    Neither step raises a row's error, so it never rises; stops early when no sign changes.
    """
    signs = start.signs
    scales = least_squares(weight, signs, constant=constant)
    for _ in range(rounds):
        part = BinaryBases.nearest(weight, scales.alphas, scales.constant)
        codes = part.codes()
        fresh = torch.stack([((codes >> i) & 1).float() * 2 - 1 for i in range(len(signs))])
        if torch.equal(fresh, signs):
            break
        signs = fresh
        scales = least_squares(weight, signs, constant=constant)
    return Bases(signs, scales.alphas, scales.constant)


def least_squares(weight: Tensor, signs: Tensor, *, constant: bool = False) -> Bases:
    """The scales (and the constant) of least squared error for given signs, row by row, in float64.

    Where bases of a row are equal or opposite the solution of least norm is taken, up to a tiny ridge.
    """
    design = torch.cat([signs, torch.ones_like(signs[:1])]) if constant else signs
    gram = torch.einsum("noi,moi->onm", design, design).double() / weight.shape[1]
    right = torch.einsum("noi,oi->on", design, weight).double() / weight.shape[1]
    gram += _RIDGE * torch.eye(len(design), dtype=gram.dtype, device=gram.device)
    solution = torch.linalg.solve(gram, right).float().t()
    return Bases(signs, solution[: len(signs)].contiguous(), solution[-1].contiguous() if constant else None)


def by_gradient(weight: Tensor, start: Bases, *, progressive: bool = True, steps: int = GRADIENT_STEPS) -> Bases:
    """Stage 2 of the paper: Adam on latent weights whose signs are the bases, with straight-through gradients.

    Phase i trains the latent of base i alone, and the scales of all bases; `progressive=False` trains all latents in
    every phase, with the same number of steps (which the paper reports as worse). Latents begin as the residual that
    their base was the sign of, in units of its scale, and gradients pass where |latent| <= 1. A row keeps the best
    bases that it had after any phase, the start included, with scales refitted.
    """
    latents, rest = [], weight
    for sign, alpha in zip(start.signs, start.alphas, strict=True):
        latents.append(rest / alpha.clamp_min(torch.finfo(torch.float32).tiny)[:, None])
        rest = rest - alpha[:, None] * sign
    latent = torch.stack(latents).clamp_(-1, 1)
    alphas = start.alphas.clone()
    best = least_squares(weight, start.signs)
    unit = weight.abs().mean(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    first, second = torch.zeros_like(latent), torch.zeros_like(latent)
    alpha_first, alpha_second = torch.zeros_like(alphas), torch.zeros_like(alphas)
    for phase in range(len(latent)):
        trained = slice(phase, phase + 1) if progressive else slice(None)
        for moment in (first, second, alpha_first, alpha_second):
            moment.zero_()
        for step in range(1, steps + 1):
            signs = torch.where(latent >= 0, 1.0, -1.0)
            error = (torch.einsum("no,noi->oi", alphas, signs) - weight) / unit[:, None]
            alpha_gradient = torch.einsum("oi,noi->no", error, signs)
            gradient = error[None] * (alphas / unit)[trained, :, None] * (latent[trained].abs() <= 1)
            alphas = alphas - _ALPHA_RATE * unit * _adam(alpha_gradient, alpha_first, alpha_second, step)
            latent[trained] -= _LATENT_RATE * _adam(gradient, first[trained], second[trained], step)
            latent[trained].clamp_(-1, 1)
        best = _better_rows(weight, best, least_squares(weight, torch.where(latent >= 0, 1.0, -1.0)))
    return best


def _adam(gradient: Tensor, first: Tensor, second: Tensor, step: int) -> Tensor:
    """The direction of Adam with its usual constants; updates both moments in place."""
    first.lerp_(gradient, 0.1)
    second.lerp_(gradient.square(), 0.001)
    return (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)


def _better_rows(weight: Tensor, old: Bases, new: Bases) -> Bases:
    better = new.row_errors(weight) < old.row_errors(weight)
    return Bases(
        torch.where(better[None, :, None], new.signs, old.signs), torch.where(better[None], new.alphas, old.alphas)
    )
