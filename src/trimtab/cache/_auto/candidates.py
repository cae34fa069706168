"""The ways to keep the keys, or the values, of some heads among which `auto` chooses.

A candidate is a name from which everything follows, so that a file can hold it:

    group-B-G      B bits, groups of G tokens of a channel (keys) or G channels of a token (values), as kivi
    lowrank-B-G-R  the same, and a residual of rank R for each block, as gear_l
    turned-B-G     values rotated by a Hadamard matrix before group-B-G, as rotatekv
    table-B-P      learnt levels with limits fixed for each channel, P per mille of outliers; keys before rotary
                   embedding, as kvquant's keys
    token-B        values with learnt levels and limits of their own for each token of a head, as kvquant's values
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from trimtab.tensors.kv.codec import KVCodec
from trimtab.tensors.kv.outliers import OutlierRule

Kind = Literal["keys", "values"]

BLOCK_TOKENS = 128
"""Tokens that are encoded together where a group of keys or a block of factors wants so many."""
ROW_TOKENS = 32
"""Tokens that are encoded together by candidates without groups of tokens."""

_KEYS = (
    *(f"table-{b}-{p}" for b in (1, 2, 3, 4) for p in (0, 10, 20)),
    *(f"group-{b}-{g}" for b in (2, 3, 4) for g in (32, 64, 128)),
    *(f"lowrank-{b}-128-1" for b in (2, 3)),
    "group-8-128",
)
_VALUES = (
    *(f"table-{b}-{p}" for b in (1, 2, 3, 4) for p in (0, 10, 20)),
    *(f"group-{b}-{g}" for b in (2, 3, 4) for g in (32, 64)),
    *(f"turned-{b}-64" for b in (2, 3, 4)),
    *(f"token-{b}" for b in (1, 2, 3, 4)),
    "group-8-64",
)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way, read from its name.

    bits, group, rank, per_mille   0 where the kind of candidate has none
    """

    kind: Kind
    name: str
    way: str
    bits: int
    group: int = 0
    rank: int = 0
    per_mille: int = 0

    @classmethod
    def of(cls, kind: Kind, name: str) -> Candidate:
        way, *numbers = name.split("-")
        bits, *rest = map(int, numbers)
        if way == "table":
            return cls(kind, name, way, bits, per_mille=rest[0])
        if way == "lowrank":
            return cls(kind, name, way, bits, group=rest[0], rank=rest[1])
        return cls(kind, name, way, bits, group=rest[0] if rest else 0)

    @property
    def pre_rope(self) -> bool:
        return self.kind == "keys" and self.way == "table"

    @property
    def block(self) -> int:
        """Tokens that are encoded together."""
        return BLOCK_TOKENS if self.kind == "keys" and self.way in ("group", "lowrank") else ROW_TOKENS

    def bits_per_element(self, head_dim: int) -> float:
        """Bits for each number of a long history: codes, scales, outliers and their index, factors."""
        share = self.per_mille / 1000
        sparse = share * 32 + (32 / (32 * head_dim) if share else 0)
        if self.way == "table":
            return self.bits + sparse
        group = head_dim if self.way == "token" else min(self.group, head_dim if self.kind == "values" else self.group)
        factors = 16 * self.rank * (self.block + head_dim) / (self.block * head_dim)
        return self.bits + 32 / group + factors

    def codec(self, tables: Mapping[str, Tensor], heads: Sequence[int], head_dim: int) -> KVCodec:
        """For these heads of a layer. `tables`: what was learnt for this layer and kind, as `CANDIDATE.NAME`."""
        chosen = list(heads)
        if self.way == "table":
            learnt = {n: tables[f"{self.name}.{n}"] for n in ("scale", "minimum", "lower", "upper", "levels")}
            cap = int(self.per_mille / 2000 * len(chosen) * head_dim) + 1
            return KVCodec(
                bits=self.bits,
                levels=learnt["levels"],
                scale=learnt["scale"][chosen],
                minimum=learnt["minimum"][chosen],
                outliers=OutlierRule(lower=learnt["lower"][chosen], upper=learnt["upper"][chosen], cap=cap)
                if self.per_mille
                else None,
            )
        if self.way == "token":
            return KVCodec(bits=self.bits, group_channels=head_dim, levels=tables[f"{self.name}.levels"])
        if self.kind == "keys":
            return KVCodec(bits=self.bits, group_tokens=self.group, rank=self.rank)
        turned = head_dim if self.way == "turned" else 0
        return KVCodec(bits=self.bits, group_channels=min(self.group, head_dim), hadamard=turned)


def candidates(kind: Kind, head_dim: int) -> list[Candidate]:
    """All that fit the head dimension."""
    found = [Candidate.of(kind, name) for name in (_KEYS if kind == "keys" else _VALUES)]
    power = head_dim & (head_dim - 1) == 0
    fits = [c for c in found if kind == "keys" or c.way in ("table", "token") or head_dim % min(c.group, head_dim) == 0]
    return [c for c in fits if c.way != "turned" or power]
