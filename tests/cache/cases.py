"""One line per method and set of options; the shared suite runs every check on every line.

The models of `conftest.tiny` have heads of 32 channels, and 2 KV heads where the family allows; sizes here are those of
its Llama after a prompt of PROMPT tokens, so C = 64 channels in 2 heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trimtab.models.random import ALL_FAMILIES

PROMPT = 200
C = 64
TILES = 6
"""Tiles of 32 tokens among the 192 that most methods encode of a prompt."""
POINTERS = 32 * (2 * TILES + 1) / (C * 192)
"""Bits per element of where the outliers of each head and tile begin."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a method must satisfy with these options.

    exact     the longest text of which it encodes and evicts nothing
    kl        nats by which it may change the predictions of the random Llama after a prompt, on average
    encoded   keys and values of the prompt that are encoded, in tokens
    bits      of an encoded element of keys and of values, by the paper's formula; None: the method chooses
    varying   bits per element of keys that depend on the numbers, at most: outliers by limits
    shared    bytes of tables of a layer, which all rows share
    sinks     tokens that are kept in a run of their own
    rotary    it keeps keys before rotary embedding
    moved     keys are rotated anew, or runs are cut anew, before anything is encoded: exact only to rounding
    families  those it is tried on; the others cost too much to fit
    """

    name: str
    options: dict[str, Any]
    exact: int
    kl: float
    encoded: tuple[int, int] = (192, 192)
    bits: tuple[float, float] | None = (0.0, 0.0)
    varying: float = 0.0
    shared: int = 0
    sinks: int = 0
    rotary: bool = False
    moved: bool = False
    families: tuple[str, ...] = ALL_FAMILIES

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{name}={value}" for name, value in self.options.items())])


def low_rank(rank: int) -> float:
    """Factors of 192 tokens of a head of 32."""
    return 16 * rank * (192 + 32) / (192 * 32)


CASES = [
    Case(name="exact", options={}, exact=50, kl=1e-07, encoded=(0, 0)),
    Case(
        name="kivi",
        options={"bits": 2, "group_size": 16, "window": 32},
        exact=31,
        kl=0.13,
        encoded=(192, 160),
        bits=(2 + 32 / 16, 2 + 32 / 16),
    ),
    Case(
        name="kivi",
        options={"bits": 4, "value_bits": 3, "group_size": 32, "window": 64},
        exact=63,
        kl=0.02,
        encoded=(192, 128),
        bits=(4 + 32 / 32, 3 + 32 / 32),
    ),
    Case(
        name="gear_l",
        options={"bits": 2, "group_size": 16, "buffer": 32},
        exact=31,
        kl=0.13,
        bits=(2 + 32 / 16 + low_rank(4), 2 + 32 / 16 + low_rank(4)),
    ),
    Case(
        name="gear_l",
        options={"bits": 4, "backbone": "kcvt", "buffer": 32, "prefill_rank_keys": 3, "prefill_rank_values": 0},
        exact=31,
        kl=0.012,
        bits=(4 + 32 / 192 + low_rank(3), 4 + 32 / C),
    ),
    Case(
        name="gear",
        options={"bits": 2, "group_size": 32, "buffer": 32, "outliers_keys": 0.1, "outliers_values": 0.1},
        exact=31,
        kl=0.08,
        # 9 per side of the 192 tokens of a channel, 3 per side of the 64 channels of a token
        bits=(
            2 + 32 / 32 + low_rank(4) + 32 * 18 / 192 + POINTERS,
            2 + 32 / 32 + low_rank(4) + 32 * 6 / C + POINTERS,
        ),
    ),
    Case(
        name="kvquant",
        options={"bits": 3, "sinks": 2},
        exact=33,
        kl=0.045,
        # values: one outlier per side of a token
        bits=(3 + POINTERS, 3 + 32 / C + 32 * 2 / C + POINTERS),
        varying=32 * 2 / C,
        shared=4 * C + 2 * 4 * 8,
        sinks=2,
        rotary=True,
    ),
    Case(
        name="kvquant",
        options={"bits": 2, "outliers": 0.0, "fisher": False, "q_norm": False},
        exact=32,
        kl=0.2,
        bits=(2, 2 + 32 / C),
        shared=4 * C + 2 * 4 * 4,
        sinks=1,
        rotary=True,
    ),
    Case(
        name="cq",
        options={"channels": 4, "bits": 8, "window": 8, "iterations": 5},
        exact=39,
        kl=0.01,
        bits=(8 / 4, 8 / 4),
        shared=2 * C * 256 * 2,
        rotary=True,
    ),
    Case(
        name="cq",
        options={"channels": 8, "bits": 9, "fisher": False, "iterations": 2},
        exact=31,
        kl=0.02,
        bits=(9 / 8, 9 / 8),
        shared=2 * C * 512 * 2,
        rotary=True,
    ),
    Case(
        name="cq",
        options={"channels": 1, "bits": 2, "iterations": 5},
        exact=31,
        kl=0.2,
        bits=(2, 2),
        shared=2 * C * 16 * 2,
        rotary=True,
    ),
    Case(
        name="rotatekv",
        options={"bits": 2, "group_size": 32, "heads_per_rotation": 2, "pivots": 5},
        exact=31,
        kl=0.18,
        bits=(2 + 32 / 32, 2 + 32 / 32),
        shared=2 * C,
        rotary=True,
    ),
    Case(
        name="rotatekv",
        options={"bits": 4, "group_size": 64, "heads_per_rotation": 1, "pivots": 0, "reorder": False},
        exact=31,
        kl=0.012,
        bits=(4 + 32 / 64, 4 + 32 / 32),
        rotary=True,
    ),
    Case(
        name="streaming",
        options={"sinks": 4, "window": 28},
        exact=32,
        kl=0.8,
        encoded=(0, 0),
        sinks=4,
        rotary=True,
        moved=True,
    ),
    Case(
        name="retrieval_heads",
        options={"full_fraction": 0.5, "sinks": 4, "recent": 28},
        exact=32,
        kl=0.6,
        encoded=(0, 0),
        sinks=4,
        moved=True,
    ),
    Case(
        name="auto",
        options={"bits_per_element": 6.0, "context": 1024, "window": 0},
        exact=35,
        kl=0.01,
        bits=None,
        sinks=4,
        rotary=True,
        families=("llama", "gpt2", "opt"),
    ),
]
FIRST = list({case.name: case for case in reversed(CASES)}.values())
"""One for each method."""
