"""Bits per element of a cache, counted from the buffers it has allocated, and by the formulas of the papers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from trimtab.core.errors import DataError
from trimtab.tensors.kv.codec import KVCodec
from trimtab.tensors.kv.size import formula_bits

if TYPE_CHECKING:
    from trimtab.models.segments import SegmentCache


@dataclass(frozen=True, slots=True)
class CacheBits:
    """What a cache stores of a text. An element is one number of a key or a value of a token that was read.

    tokens       tokens read, of all rows
    nbytes       allocated by the cache
    bits         8 * nbytes per element read: everything, room that is not filled yet included
    encoded      bits per element that has left the windows; None: there is none
    encoded_fraction   share of the elements read that are encoded; the others are exact, or evicted
    window       bits per element read that windows take
    formula      bits per encoded element by the papers' formula, for whole blocks; None: a codec has none
    parts        name -> bits per element read
    """

    tokens: int
    nbytes: int
    bits: float
    encoded: float | None
    encoded_fraction: float
    window: float
    formula: float | None
    parts: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def cache_bits(cache: SegmentCache) -> CacheBits:
    """Count a cache that has read something. Raises DataError for an empty one."""
    layers = cache.segment_layers
    rows, tokens = layers[0].rows, layers[0].length
    if not rows or not tokens:
        raise DataError("bits per element are those of a cache that has read a text; this one is empty.")
    per_token = 0
    encoded = 0
    weighted: list[tuple[int, float | None]] = []
    for layer in layers:
        for group in layer.groups:
            for side in group.sides:
                heads, head_dim = side.buffer.shape[1], side.buffer.shape[3]
                per_token += heads * head_dim
                held = heads * head_dim * sum(run.tokens for runs in side.runs for run in runs)
                encoded += held
                if held:
                    codec = side.plan.codec
                    exact_bits = 8 * side.buffer.element_size()
                    formula = (
                        sum(formula_bits(codec, heads, head_dim, side.plan.block, exact_bits=exact_bits).values())
                        if isinstance(codec, KVCodec)
                        else None
                    )
                    weighted.append((held, formula))
    elements = per_token * tokens * rows
    parts = {name: 8 * size / elements for name, size in cache.bytes_by_part().items()}
    window = sum(bits for name, bits in parts.items() if name.startswith("window"))
    known = [(held, formula) for held, formula in weighted if formula is not None]
    return CacheBits(
        tokens=tokens * rows,
        nbytes=cache.nbytes(),
        bits=8 * cache.nbytes() / elements,
        encoded=(sum(parts.values()) - window) * elements / encoded if encoded else None,
        encoded_fraction=encoded / elements,
        window=window,
        formula=sum(h * f for h, f in known) / encoded if known and len(known) == len(weighted) else None,
        parts=parts,
    )
