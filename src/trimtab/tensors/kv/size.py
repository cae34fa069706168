"""What runs occupy: counted from their tensors, and the formula that the count must equal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from trimtab.kernels.kv_attention.run import Run, tiles

if TYPE_CHECKING:
    from trimtab.tensors.kv.codec import KVCodec

COMPONENTS = {
    "exact": ("exact",),
    "codes": ("codes", "high_codes"),
    "scales": ("scale", "minimum"),
    "outliers": ("outlier_starts", "outlier_places", "outlier_values"),
    "low_rank": ("token_factors", "channel_factors"),
    "codebooks": ("codebook", "levels", "order"),
    "overrides": ("override_tokens", "override_values"),
}
"""Component -> fields of a run."""


def component_bytes(runs: Iterable[Run]) -> dict[str, int]:
    """Bytes of each of COMPONENTS in these runs; what several runs share (codebooks, fixed scales) counts once."""
    owner = {name: component for component, names in COMPONENTS.items() for name in names}
    found = dict.fromkeys(COMPONENTS, 0)
    seen = set()
    for run in runs:
        for name, tensor in run.tensors().items():
            size = tensor.numel() * tensor.element_size()
            place = (tensor.device, tensor.data_ptr(), size)
            if size and place not in seen:
                seen.add(place)
                found[owner[name]] += size
    return found


def nbytes(runs: Iterable[Run]) -> int:
    """Bytes of all tensors of these runs, shared ones once."""
    return sum(component_bytes(runs).values())


def formula_bits(
    codec: KVCodec, heads: int, head_dim: int, tokens: int, *, prefill: bool = False, exact_bits: int = 16
) -> dict[str, float]:
    """Bits per element of a block of so many tokens, by component, as the papers count them.

    Shared tensors (codebooks, tables, fixed scales) are those of the layer divided by this block alone. Exact for
    blocks of whole tiles and groups; others also store what fills up the last tile. Outliers by limits vary with the
    data and are left out, overridden tokens too. `exact_bits` are those of the numbers with bits = 0.
    """
    elements = heads * head_dim * tokens
    bits = dict.fromkeys(COMPONENTS, 0.0)
    if codec.bits == 0:
        return bits | {"exact": float(exact_bits)}
    bits["codes"] = codec.bits / codec.coupled
    if codec.scale is not None:
        bits["scales"] = 32 / tokens
    elif codec.group_tokens:
        bits["scales"] = 32 / (tokens if codec.group_tokens == -1 else codec.group_tokens)
    elif codec.group_channels:
        bits["scales"] = 32 / (heads * head_dim if codec.group_channels == -1 else codec.group_channels)
    rank = codec.rank if codec.prefill_rank is None or not prefill else codec.prefill_rank
    rank = min(rank, head_dim, tokens)
    bits["low_rank"] = 16 * rank * (tokens + head_dim) / (tokens * head_dim)
    rule = codec.outliers
    if rule is not None:
        entries = 0
        if rule.fraction:
            length = tokens if rule.along == "tokens" else heads * head_dim
            side = rule.per_side(length, quantile=codec.range_rule == "quantile")
            entries = (side + min(side, length - side)) * (elements // length)
        pointers = heads * tiles(tokens) + 1
        bits["outliers"] = (entries * (16 + 16) + 32 * pointers) / elements
    shared = [tensor for tensor in (codec.codebook, codec.levels, codec.order) if tensor is not None]
    bits["codebooks"] = sum(8 * tensor.numel() * tensor.element_size() for tensor in shared) / elements
    return bits
