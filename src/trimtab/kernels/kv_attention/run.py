"""How cached keys and values lie in memory: runs of tokens, in the layout that the kernels read and files store.

A *run* is a number of consecutive tokens of some KV heads, either their keys or their values. It never changes once it
is made. Its value is put together in this order, and every step may be absent:

    main        exact numbers, codes of one channel (uniform or table levels), or codes of coupled channels
    + A B^T     low rank, per head
    outliers    single entries that replace what main and A B^T give
    rotation    undo the permutation, then the Hadamard transform (it is its own inverse)
    rope        keys stored before rotary embedding are rotated to positions first_position + 0, 1, ...
    overrides   whole tokens that replace everything, rotated already

Codes. Tokens come in tiles of 32; the last is filled up with code zero. A *row* is the 32 codes of one channel in one
tile: `bits` little-endian 32-bit words, code j in word j % bits at bits [bits * (j // bits), ...). At 3 bits words 0
and 1 hold the low two bits as a 2-bit row, word 2 the high bit as a 1-bit row. Keys and values have the same layout:
channel by channel, tokens side by side, so that one register holds tokens of one channel.

Letters: H heads of the run, m tokens, T tiles, d head dimension, g group size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TILE = 32
"""Tokens in a tile."""
CODE_BITS = (1, 2, 3, 4, 8)
"""Widths of a row of codes. Coupled channels have codes of other widths too: 8 bits, and a second row for the rest."""
EXACT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def tiles(tokens: int) -> int:
    """Tiles that hold so many tokens."""
    return -(-tokens // TILE)


@dataclass(frozen=True, eq=False, kw_only=True)
class Run:
    """Keys or values of m consecutive tokens of H heads. Immutable; tensors may be shared with other runs.

    tokens, heads, head_dim     m, H, d
    first_position              position of the first token if these are keys before rotary embedding, else None

    exact        [H, m, d] float32, float16 or bfloat16, last dimension contiguous; or None, and then there are codes
    codes        uint8 [H, T, d / coupled, row bytes], contiguous
    bits         width of a code; 0 if exact
    coupled      channels per code
    high_codes   uint8 [H, T, d / coupled, bytes of a row of bits - 8]: bits above the eighth; for coupled > 1
    codebook     [H, d / coupled, 2^bits, coupled] float16: the values, for coupled > 1

    A code of one channel stands for minimum + scale * levels[code], or minimum + scale * code without levels:
    scale, minimum   float16; None: 1 and 0. Their groups run
                     over tokens (group_tokens = g > 0, a multiple of 16):     [H, ceil(m / g), d]
                     over channels (group_channels = g > 0, divides H d, rows in the order they are stored, heads one
                     after the other, so a group may span heads):              [H d / g, 32 T]
    levels           [2^bits] float32

    token_factors, channel_factors      A [H, r, 32 T] float16 and B [H, r, d] float16
    outlier_starts                      int32 [H T + 1]; outliers of head h, tile t: starts[h T + t] up to the next
    outlier_places                      int16, read as unsigned: stored row of the head * 32 + token in the tile
    outlier_values                      float16 or bfloat16; added to no rotation: they are in the stored basis
    hadamard, order                     size of the Hadamard blocks over the H d channels (0: none), a power of two;
                                        order int16 [H d]: stored row r of the H d is rotated channel order[r]
    override_tokens, override_values    int32 [p] ascending, and [H, p, d] in a dtype of `exact`
    """

    tokens: int
    heads: int
    head_dim: int
    first_position: int | None = None
    exact: Tensor | None = None
    codes: Tensor | None = None
    bits: int = 0
    coupled: int = 1
    high_codes: Tensor | None = None
    codebook: Tensor | None = None
    scale: Tensor | None = None
    minimum: Tensor | None = None
    group_tokens: int = 0
    group_channels: int = 0
    levels: Tensor | None = None
    token_factors: Tensor | None = None
    channel_factors: Tensor | None = None
    outlier_starts: Tensor | None = None
    outlier_places: Tensor | None = None
    outlier_values: Tensor | None = None
    hadamard: int = 0
    order: Tensor | None = None
    override_tokens: Tensor | None = None
    override_values: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Field name -> tensor, those that are there."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def spec(self) -> dict[str, Any]:
        """The fields that are no tensors, as JSON values."""
        return {name: getattr(self, name) for name in _PLAIN}

    @classmethod
    def from_state(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Run:
        """The inverse of `spec` and `tensors`; checks neither names nor shapes."""
        fields: dict[str, Any] = {**spec, **tensors}
        return cls(**fields)

    @property
    def rank(self) -> int:
        return 0 if self.token_factors is None else int(self.token_factors.shape[1])

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors().values())).device


_PLAIN = (
    "tokens",
    "heads",
    "head_dim",
    "first_position",
    "bits",
    "coupled",
    "group_tokens",
    "group_channels",
    "hadamard",
)


@dataclass(frozen=True, eq=False)
class Rope:
    """Rotary embedding of one layer: channels j and j + half of the leading 2 * half are rotated together.

    cos, sin   float32 [positions, half], as the model computes them, its own scaling included
    """

    cos: Tensor
    sin: Tensor

    @property
    def positions(self) -> int:
        return int(self.cos.shape[0])


@dataclass(frozen=True, eq=False)
class Lane:
    """All cached tokens of some KV heads of one row of the batch. Heads of a lane have the same tokens.

    row             row of the batch
    heads           KV heads, ascending; head i of each run is the KV head heads[i]
    keys, values    runs, oldest first; both cover the same tokens, but not with the same cuts. The last runs are
                    usually exact: the window of recent tokens
    """

    row: int
    heads: tuple[int, ...]
    keys: tuple[Run, ...]
    values: tuple[Run, ...]

    @property
    def tokens(self) -> int:
        return sum(run.tokens for run in self.keys)
