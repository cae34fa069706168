"""Values and output of one KV head through fewer directions: the best of a rank on E[x x^T] (MoDeGPT's type III).

With z = V x the values of a head, G = E[z z^T] = R R^T and O the output's columns of all queries that read it, stacked,
the map O V x of rank k with the least error over x is

    (O R Q) (Q^T R^-1 V)        Q: the k leading right singular vectors of O R

and its error is the sum of the other squared singular values. That is MoDeGPT's pair of SVDs, of C^1/2 V and of what
is left times O, written so that nothing larger than [head_dim, head_dim] is decomposed twice and C is never inverted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_NEGLIGIBLE = 1e-12  # of the largest eigenvalue: directions that no token reaches


@dataclass(frozen=True, slots=True)
class ValueFactors:
    """values    [k, in] float64: of the new values
    outputs      [out, k] float64: of the stacked outputs
    error        E|O z - outputs values x|^2 on the Gram matrix given
    scale        E|O z|^2, to compare it with
    """

    values: Tensor
    outputs: Tensor
    error: float
    scale: float


def value_factors(values: Tensor, outputs: Tensor, gram: Tensor, rank: int, *, by_output: bool = True) -> ValueFactors:
    """Factors of one KV head.

    values       V [head_dim, in]
    outputs      O [queries * out, head_dim]: the output's columns of each query of the head, one above the other
    gram         E[x x^T] [in, in]
    by_output    choose directions by what reaches the output; else by the energy of the values alone, as the paper does
                 for grouped queries

    A direction without energy on the text is dropped first, and is lost if all others are kept too: add a ridge to
    `gram` to keep it.
    """
    v, o = values.double(), outputs.double()
    second = v @ gram.double() @ v.T
    eigenvalues, vectors = torch.linalg.eigh((second + second.T) / 2)
    eigenvalues, vectors = eigenvalues.flip(0).clamp(min=0), vectors.flip(1)
    root = eigenvalues.sqrt()
    inverse = torch.where(eigenvalues > _NEGLIGIBLE * eigenvalues[0], 1 / root, 0.0)
    whitened = o @ (vectors * root)
    if by_output:
        basis = torch.linalg.svd(whitened, full_matrices=False).Vh[:rank].T
    else:
        basis = torch.eye(len(root), dtype=torch.float64, device=v.device)[:, :rank]
    kept = whitened @ basis
    narrowed = (basis.T * inverse) @ (vectors.T @ v)
    error = (whitened - kept @ basis.T).square().sum()
    return ValueFactors(narrowed, kept, float(error), float(whitened.square().sum()))
