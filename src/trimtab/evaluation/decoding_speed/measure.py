"""What is measured of a way to decode: tokens per second over a few prompts, and what each target forward brought."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

from trimtab.core.errors import ConfigError, NumericsError
from trimtab.evaluation.beside.base import Benchmark
from trimtab.evaluation.decodings import equal_until
from trimtab.evaluation.kv_decode.measure import spread


@dataclass(frozen=True, kw_only=True)
class Setting(Benchmark):
    """Target: `ref`, widened to so many weights by neurons that change nothing. Draft: `ref-mini`.

    million_weights   of the target
    prompts           beginnings of held-out prose
    prompt            tokens of each
    steps             tokens written after it, greedily
    depth             tokens drafted per round, of all systems with a chain
    """

    bench: ClassVar[str] = "decoding"
    package: ClassVar[str] = "trimtab.evaluation.decoding_speed"

    million_weights: int = 250
    prompts: int = 5
    prompt: int = 64
    steps: int = 96
    depth: int = 5

    @property
    def labels(self) -> dict[str, Any]:
        return {"setting": asdict(self)}

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name != "seed" and value < (2 if name == "prompts" else 1):
                raise ConfigError(f"{self.bench}: {name} is {value}, which is too few.")


@dataclass(frozen=True, slots=True)
class Written:
    """One text: its tokens, the target's forward passes after the prompt, drafted tokens accepted at depth 1, 2, ..."""

    tokens: list[int]
    target_forwards: int
    accepted_by_depth: list[int] | None = None


class Session(Protocol):
    """A way to decode with the models loaded."""

    prompts: list[list[int]]

    def write(self, prompt: list[int]) -> Written:
        """Continue one prompt."""


def measure(session: Session, setting: Setting) -> dict[str, Any]:
    """tokens_per_s_median over the prompts, one untimed text before; tokens_per_target_forward; accepted_by_depth.

    texts   for the comparison with those of other systems
    """
    session.write(session.prompts[0])
    rates, written = [], []
    for prompt in session.prompts:
        start = time.perf_counter()
        written.append(session.write(prompt))
        rates.append(len(written[-1].tokens) / (time.perf_counter() - start))
    tokens = sum(len(text.tokens) for text in written)
    depths = [text.accepted_by_depth for text in written if text.accepted_by_depth is not None]
    return {
        "tokens_per_s_median": statistics.median(rates),
        "spread": spread(rates),
        "tokens_per_target_forward": tokens / sum(text.target_forwards for text in written),
        "accepted_by_depth": _summed(depths) if depths else None,
        "texts": [text.tokens for text in written],
    }


def _summed(counts: list[list[int]]) -> list[int]:
    return [sum(own[i] for own in counts if i < len(own)) for i in range(max(map(len, counts)))]


def demand_same(found: list[list[int]], expected: list[list[int]], least: float) -> float:
    """Share of equal tokens up to the first difference of each text. Raises NumericsError below `least`."""
    same = sum(equal_until(a, b) for a, b in zip(found, expected, strict=True)) / sum(map(len, expected))
    if same < least:
        raise NumericsError(
            f"only {same:.0%} of the tokens are those of plain decoding; the speed of other texts is not reported."
        )
    return same
