"""Which codes of additive codebooks are best: beam search, for single vectors or for rows of a weight in a metric.

A vector of g weights is `sum_m C_m[code_m]`. Source: AQLM (arXiv:2401.06118) section 3; for one codebook the search is
the nearest centroid. Departure: the beam runs over the codebooks of one vector, and its best is settled before the next
vector of the row; the authors keep the beam along the whole row. The objective never rises either way.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK_BYTES = 64 << 20


def sum_of_codes(codes: Tensor, codebooks: Tensor) -> Tensor:
    """codes [..., M] integers, codebooks [M, K, g] -> [..., g]; differentiable in the codebooks."""
    index = codes.long()
    parts = [torch.nn.functional.embedding(index[..., m], table) for m, table in enumerate(codebooks)]
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


def best_codes(
    target: Tensor, codes: Tensor, codebooks: Tensor, *, gram: Tensor | None = None, beam: int = 1, differ: bool = False
) -> Tensor:
    """Codes int64 [n, M] of small v H v^T - 2 v t^T, v their sum.

    target      t [n, g]. With H the identity: the vectors to be near to; else such that the objective is right
    codes       [n, M], where the search begins; the result is never worse
    codebooks   [M, K, g], float32
    gram        H [g, g], symmetric; None: the identity
    beam        candidates kept while one codebook after the other is searched
    differ      each result must differ from `codes`: the best other one
    """
    hypotheses = max(1, beam) if len(codebooks) > 1 else 1
    size = max(1, _CHUNK_BYTES // (4 * hypotheses * codebooks.shape[1]))
    curved = codebooks if gram is None else codebooks @ gram
    norms = (codebooks * curved).sum(-1)
    if len(target) <= size:
        return _best_codes(target, codes.long(), codebooks, curved, norms, hypotheses, differ)
    return torch.cat(
        [
            _best_codes(t, c.long(), codebooks, curved, norms, hypotheses, differ)
            for t, c in zip(torch.split(target, size), torch.split(codes, size), strict=True)
        ]
    )


def _best_codes(
    target: Tensor, old: Tensor, codebooks: Tensor, curved: Tensor, norms: Tensor, beam: int, differ: bool
) -> Tensor:
    count, size = len(codebooks), codebooks.shape[1]
    states = old[:, None]  # [n, hypotheses, M]
    scores = target.new_zeros(len(target), 1)  # of the hypotheses without the codebook that is next, below
    kept = sum_of_codes(states, codebooks)
    rows = torch.arange(len(target), device=target.device)[:, None]
    for m in range(count):
        last = m == count - 1
        rest = kept - codebooks[m][states[..., m]] if count > 1 else torch.zeros_like(kept)
        if count > 1:
            rest_curved = sum_of_codes(states, curved) - curved[m][states[..., m]]
            scores = (rest * (rest_curved - 2 * target[:, None])).sum(-1)
            wanted = target[:, None] - rest_curved
        else:
            wanted = target[:, None]
        # score of exchanging code m: |C_m[c]|^2 in H, less what it explains of what the others leave
        found = scores[..., None] + norms[m] - 2 * (wanted @ codebooks[m].T)
        if last and differ:
            same = (states[..., :-1] == old[:, None, :-1]).all(-1)
            here = found.gather(2, old[:, None, -1:].expand(-1, found.shape[1], -1))
            found.scatter_(
                2, old[:, None, -1:].expand(-1, found.shape[1], -1), here.masked_fill(same[..., None], torch.inf)
            )
        flat = found.flatten(1)
        top = (
            flat.argmin(1, keepdim=True) if last else flat.topk(min(beam, flat.shape[1]), dim=1, largest=False).indices
        )
        states = states[rows, top // size]
        states = torch.cat([states[..., :m], (top % size)[..., None], states[..., m + 1 :]], dim=-1)
        if not last:
            kept = sum_of_codes(states, codebooks)
    return states[:, 0]


def best_codes_of_rows(
    target: Tensor, codes: Tensor, codebooks: Tensor, matrix: Tensor, *, beam: int = 1, subset: Tensor | None = None
) -> Tensor:
    """Codes int64 [out, in / g, M] of small tr(D H D^T), D = target - W~, one vector of every row after the other.

    target     [out, in], divided by the scale of its row; rows are independent, so a row's scale does not matter
    matrix     H [in, in], or [in] if it is diagonal
    subset     bool [out, in / g]: where codes may change
    """
    width = codebooks.shape[2]
    codes = codes.long().clone()
    error = target - sum_of_codes(codes, codebooks).flatten(1)
    slope = error @ matrix if matrix.ndim == 2 else error * matrix
    for j in range(codes.shape[1]):
        chosen = slice(None) if subset is None else subset[:, j].nonzero()[:, 0]
        here = slice(j * width, (j + 1) * width)
        gram = matrix[here, here] if matrix.ndim == 2 else matrix[here].diag()
        old_codes = codes[chosen, j]
        old = sum_of_codes(old_codes, codebooks)
        wanted = slope[chosen, here] + old @ gram
        new_codes = best_codes(wanted, old_codes, codebooks, gram=gram, beam=beam)
        codes[chosen, j] = new_codes
        moved = old - sum_of_codes(new_codes, codebooks)
        if matrix.ndim == 2:
            slope[chosen] += moved @ matrix[here]
    return codes
