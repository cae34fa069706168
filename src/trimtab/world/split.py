"""How train and evaluation instances are kept apart, for every task.

An instance is identified by the things that make it what it is (a key and its value, a pair of
numbers, a person with a relation and a question form). A hash of that identity decides, once and
for all and whatever the seed, to which split it belongs; a generator that draws an instance of the
other split draws again. So the splits are disjoint by construction, not by bookkeeping.
"""

from __future__ import annotations

import random
from hashlib import blake2b

from trimtab.world.types import SPLITS, Split

HELD_OUT_ONE_IN = 8


def bucket(count: int, *identity: object) -> int:
    """A number in [0, count) that depends on the identity alone."""
    text = "\x1f".join(map(str, identity))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") % count


def belongs(split: Split, *identity: object) -> bool:
    """Whether the instance with this identity is of this split (one in eight is held out)."""
    return (bucket(HELD_OUT_ONE_IN, *identity) == 0) == (split == "eval")


def generator(task: str, split: Split, seed: int) -> random.Random:
    """The source of randomness of one task, split and seed; the same on every machine."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; there are: {', '.join(SPLITS)}")
    return random.Random(f"trimtab world {task} {split} {seed}")
