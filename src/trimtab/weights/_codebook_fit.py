"""Fitting codebooks to one matrix: residual k-means, then rounds of Adam and beam search on the error of the output."""

from __future__ import annotations

import torch
from torch import Tensor

from trimtab.core.errors import NumericsError
from trimtab.tensors.codebook import Codebook, code_dtype
from trimtab.tensors.kv.codebook import fit_codebook, nearest_centroid
from trimtab.tensors.metric import Metric

DAMPING = 0.01
_HALF_MAX = torch.finfo(torch.float16).max


def initial_codebook(
    weight: Tensor,
    diagonal: Tensor | None,
    *,
    count: int,
    bits: int,
    width: int,
    iterations: int,
    name: str,
) -> tuple[Codebook, float]:
    """`count` codebooks of 2^bits vectors of `width` weights by residual k-means, and the relative error they leave.

    weight      [out, in] float32
    diagonal    E[x^2] of its inputs, [in]; None: all count alike
    name        for errors

    Raises NumericsError if the norm of a row does not fit float16.
    """
    out_features, in_features = weight.shape
    norms = weight.norm(dim=1)
    if float(norms.max()) > _HALF_MAX:
        raise NumericsError(f"{name}: a row of norm {float(norms.max()):.3g} has no float16 scale.")
    scales = norms.half()
    divided = weight / torch.where(scales == 0, 1.0, scales.float())[:, None]
    left = divided.reshape(1, -1, width)
    column = torch.ones(in_features, device=weight.device) if diagonal is None else diagonal.to(weight.device)
    column = column + DAMPING * column.mean()
    if not bool((column > 0).any()):  # inputs that are never active
        column = torch.ones_like(column)
    odds = (scales.float().square()[:, None] * column.view(1, -1, width).mean(-1)).reshape(1, -1)
    if not bool((odds > 0).any()):  # a zero matrix
        odds = torch.ones_like(odds)
    tables, codes = [], []
    for _ in range(count):
        table = fit_codebook(left, bits, odds, iterations=iterations)
        codes.append(nearest_centroid(left, table.float()))
        left = left - table[0].float()[codes[-1]]
        tables.append(table)
    stacked = torch.stack(codes, dim=-1).view(out_features, in_features // width, count)
    part = Codebook(stacked.to(code_dtype(bits)), torch.cat(tables), scales)
    return part, Metric.identity().relative_error(weight, part.dequantize())


def fit_layer(
    part: Codebook, weight: Tensor, metric: Metric, *, steps: int, lr: float, tolerance: float, beam: int
) -> tuple[Codebook, int]:
    """Lower tr((W~ - W) H (W~ - W)^T) until a round gains less than `tolerance`; the part and the number of rounds.

    A round is `steps` of Adam on codebooks and scales, then a beam search of the codes. The error never rises.
    """
    assert metric.matrix is not None
    damped = metric.matrix.float().clone()
    damped.diagonal().add_(DAMPING * damped.diagonal().mean())
    objective = Metric.gram(damped, metric.name)
    best = objective.squared_norm(part.dequantize() - weight)
    rounds = 0
    while best > 0:
        rounds += 1
        tuned = _tuned(part, weight, damped, steps, lr)
        found = tuned.project(weight, objective, beam=beam)
        error = objective.squared_norm(found.dequantize() - weight)
        gained = error < best * (1 - tolerance)
        if error < best:
            part, best = found, error
        if not gained:
            break
    return part, rounds


def _tuned(part: Codebook, weight: Tensor, gram: Tensor, steps: int, lr: float) -> Codebook:
    """Codes kept; Adam (no momentum, as the authors have it) on codebooks and scales, each at its own scale."""
    with torch.enable_grad():
        leaves = {name: value.float().clone().requires_grad_() for name, value in part.continuous().items()}
        groups = [
            {"params": [leaf], "lr": lr * max(float(leaf.detach().square().mean().sqrt()), 1e-12)}
            for leaf in leaves.values()
        ]
        optimizer = torch.optim.Adam(groups, betas=(0.0, 0.95), amsgrad=True)
        for _ in range(steps):
            dense = part.dense(leaves)
            slope = (dense.detach() - weight) @ gram  # half the gradient; Adam does not see its scale
            gradients = torch.autograd.grad(dense, list(leaves.values()), slope)
            for leaf, gradient in zip(leaves.values(), gradients, strict=True):
                leaf.grad = gradient
            optimizer.step()
    return part.with_continuous(leaves)
