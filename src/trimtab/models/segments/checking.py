"""Whether the tensors of a run that was read from somewhere fit each other: kernels trust them."""

from __future__ import annotations

import torch

from trimtab.core.errors import DataError
from trimtab.kernels.kv_attention.run import CODE_BITS, EXACT_DTYPES, TILE, Run, tiles

_FLOAT16 = (torch.float16,)


def check_run(run: Run, heads: int, head_dim: int) -> None:
    """Raise DataError unless `run` holds tokens of so many heads and dimensions, in the layout of run.py."""
    if (run.heads, run.head_dim) != (heads, head_dim) or run.tokens < 1 or run.coupled < 1:
        raise DataError(
            f"a run has {run.tokens} tokens of {run.heads} x {run.head_dim}, the cache {heads} x {head_dim}."
        )
    for name, (shape, dtypes) in _expected(run).items():
        tensor = getattr(run, name)
        if tensor is None or tuple(tensor.shape) != shape or tensor.dtype not in dtypes or not tensor.is_contiguous():
            found = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            raise DataError(f"'{name}' of a run of {run.tokens} tokens should be {list(shape)}, not {found}.")
    if extra := sorted(set(run.tensors()) - set(_expected(run))):
        raise DataError(f"a run has '{extra[0]}', which its kind has no use for.")
    _check_places(run)


def _expected(run: Run) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
    """Name -> shape and dtypes of the tensors that a run with these fields has."""
    heads, tokens, dim, padded = run.heads, run.tokens, run.head_dim, tiles(run.tokens) * TILE
    if run.exact is not None:
        return {"exact": ((heads, tokens, dim), EXACT_DTYPES)}
    low = min(run.bits, 8)
    if low not in CODE_BITS or not 1 <= run.bits <= 16 or dim % run.coupled:
        raise DataError(f"a run has codes of {run.bits} bits for {run.coupled} of {dim} channels.")
    rows = (heads, tiles(tokens), dim // run.coupled)
    found: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {
        "codes": ((*rows, TILE * low // 8), (torch.uint8,))
    }
    if run.coupled > 1:
        found["codebook"] = ((heads, rows[2], 1 << run.bits, run.coupled), _FLOAT16)
        if run.bits > 8:
            found["high_codes"] = ((*rows, TILE * (run.bits - 8) // 8), (torch.uint8,))
    if run.scale is not None or run.minimum is not None:
        if run.group_tokens > 0:
            groups: tuple[int, ...] = (heads, -(-tokens // run.group_tokens), dim)
        elif run.group_channels > 0 and heads * dim % run.group_channels == 0:
            groups = (heads * dim // run.group_channels, padded)
        else:
            raise DataError(f"a run has groups of {run.group_tokens} tokens, {run.group_channels} channels.")
        found |= {name: (groups, _FLOAT16) for name in ("scale", "minimum") if getattr(run, name) is not None}
    if run.levels is not None:
        found["levels"] = ((1 << run.bits,), (torch.float32,))
    if run.token_factors is not None or run.channel_factors is not None:
        found["token_factors"] = ((heads, run.rank, padded), _FLOAT16)
        found["channel_factors"] = ((heads, run.rank, dim), _FLOAT16)
    if run.outlier_starts is not None or run.outlier_values is not None:
        count = 0 if run.outlier_values is None else run.outlier_values.shape[0]
        found["outlier_starts"] = ((heads * tiles(tokens) + 1,), (torch.int32,))
        found["outlier_places"] = ((count,), (torch.int16,))
        found["outlier_values"] = ((count,), (torch.float16, torch.bfloat16))
    if run.order is not None:
        found["order"] = ((heads * dim,), (torch.int16,))
    if run.override_tokens is not None or run.override_values is not None:
        count = 0 if run.override_tokens is None else run.override_tokens.shape[0]
        found["override_tokens"] = ((count,), (torch.int32,))
        found["override_values"] = ((heads, count, dim), EXACT_DTYPES)
    return found


def _check_places(run: Run) -> None:
    """Indices stay inside."""
    channels = run.heads * run.head_dim
    if run.hadamard and (run.hadamard & (run.hadamard - 1) or channels % run.hadamard):
        raise DataError(f"a Hadamard transform of {run.hadamard} does not fit {channels} channels.")
    good = True
    if run.order is not None:
        good &= torch.equal(run.order.long().sort().values, torch.arange(channels))
    if run.outlier_starts is not None and run.outlier_places is not None:
        starts = run.outlier_starts.long()
        good &= int(starts[0]) == 0 and int(starts[-1]) == len(run.outlier_places) and bool((starts.diff() >= 0).all())
        good &= bool(((run.outlier_places.long() & 0xFFFF) < run.head_dim * TILE).all())
    if run.override_tokens is not None and run.override_tokens.numel():
        places = run.override_tokens.long()
        good &= int(places[0]) >= 0 and int(places[-1]) < run.tokens and bool((places.diff() > 0).all())
    if not good:
        raise DataError(f"indices of a run of {run.tokens} tokens point outside of it.")
