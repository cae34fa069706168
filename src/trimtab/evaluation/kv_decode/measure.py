"""What is measured of a system, the same for all: reading a prompt, then decoding one token after another."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol, TypeVar

from trimtab.core.errors import ConfigError, NumericsError
from trimtab.evaluation.beside.base import Benchmark

T = TypeVar("T")

SHORT = 64
"""Tokens of the short context; what a step costs there is subtracted to leave the attention over the rest."""
PARITY_BOUND = 3e-2
"""Relative RMS error of the logits in bfloat16 against the reference kernels, which round elsewhere: 1.3e-2 for grids
and 2.1e-2 for tables, whose levels are rounded to bfloat16 too, after eight layers. A wrong kernel is far above it."""
_ENOUGH_SECONDS = 20.0


@dataclass(frozen=True, kw_only=True)
class Setting(Benchmark):
    """Model and lengths of one run. Weights are random, in 16 bits; the architecture is Llama's.

    context   tokens of the prompt
    steps     tokens decoded after it; 128 hold one re-quantization of the caches that keep 128 recent tokens exact
    seed      of weights and tokens
    """

    bench: ClassVar[str] = "kv-decode"
    package: ClassVar[str] = "trimtab.evaluation.kv_decode"

    context: int = 8192
    steps: int = 128
    layers: int = 4
    hidden: int = 1024
    query_heads: int = 16
    kv_heads: int = 8
    head_dim: int = 64
    mlp: int = 2816
    vocabulary: int = 4096

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name != "seed" and value < 1:
                raise ConfigError(f"{self.bench}: {name} must be at least 1, but is {value}.")
        if self.context <= SHORT:
            raise ConfigError(
                f"{self.bench}: context must be above the short one of {SHORT} tokens, but is {self.context}."
            )

    @property
    def labels(self) -> dict[str, Any]:
        return {"context": self.context, "steps": self.steps}

    @property
    def positions(self) -> int:
        return self.context + self.steps

    def tokens(self) -> list[int]:
        """The prompt, and after it the tokens of the steps: the same for every system."""
        return random.Random(self.seed).choices(range(self.vocabulary), k=self.positions)


class Session(Protocol):
    """A system with the model loaded, ready to run. Batch size is one."""

    def prefill(self, tokens: Sequence[int]) -> None:
        """Empty the cache and read the prompt."""

    def step(self, token: int) -> None:
        """Decode with one more token; done when its logits are there."""

    def logits(self) -> list[float]:
        """Of the last token that was read."""

    def kv_bytes(self) -> int:
        """What the cache holds now."""

    def reference_step(self, token: int) -> list[float] | None:
        """Logits after one more token by an independent way to compute them, None where there is none."""

    def facts(self) -> dict[str, Any]:
        """More for the entry: how the bytes were counted, the library's version."""


def measure(session: Session, setting: Setting) -> dict[str, Any]:
    """Figures of one system. Raises NumericsError, and gives none, if its logits are not those of its reference.

    decode_ms_median, _mean     one step at the context; the mean holds rare work too, such as quantizing again
    decode_spread               distance of the quartiles / median: above a few percent, the machine was busy
    short_decode_ms_median      one step at SHORT tokens, with as many steps
    attention_ms_median         the difference of the medians: what the context - SHORT further tokens cost
    prefill_s_median            reading the prompt: of `prefills`, one if it takes long and nothing is compared
    kv_bytes                    after the last step; short_kv_bytes likewise
    parity                      relative RMS error of the logits against the reference; None where there is none
    """
    tokens = setting.tokens()
    prompt, following = tokens[: setting.context], tokens[setting.context :]
    session.prefill(prompt[:SHORT])
    short = [seconds(session.step, token) for token in following]
    short_bytes = session.kv_bytes()

    prefills = [seconds(session.prefill, prompt)]
    expected = session.reference_step(following[0])
    if expected is not None or prefills[0] < _ENOUGH_SECONDS:
        prefills.append(seconds(session.prefill, prompt))
    long = [seconds(session.step, following[0])]
    parity = None if expected is None else demand_parity(session.logits(), expected)
    long += [seconds(session.step, token) for token in following[1:]]

    step, short_step = statistics.median(long), statistics.median(short)
    return {
        "decode_ms_median": 1e3 * step,
        "decode_ms_mean": 1e3 * statistics.fmean(long),
        "decode_spread": spread(long),
        "short_decode_ms_median": 1e3 * short_step,
        "attention_ms_median": 1e3 * (step - short_step),
        "prefill_s_median": statistics.median(prefills),
        "prefills": len(prefills),
        "kv_bytes": session.kv_bytes(),
        "short_kv_bytes": short_bytes,
        "parity": parity,
        **session.facts(),
    }


def demand_parity(found: Sequence[float], expected: Sequence[float]) -> float:
    """Relative RMS error. Raises NumericsError above PARITY_BOUND."""
    squares = sum((f - e) ** 2 for f, e in zip(found, expected, strict=True))
    error = float((squares / sum(e**2 for e in expected)) ** 0.5)
    if not error <= PARITY_BOUND:  # NaN is red too
        raise NumericsError(
            f"relative RMS error {error:.2e} of the logits against the reference is above the bound "
            f"{PARITY_BOUND:.0e}; the speed is not reported."
        )
    return error


def spread(seconds: Sequence[float]) -> float:
    """Distance of the quartiles / median."""
    if len(seconds) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(seconds, n=4)
    return (high - low) / middle


def seconds(call: Callable[[T], None], argument: T) -> float:
    """How long one call took."""
    start = time.perf_counter()
    call(argument)
    return time.perf_counter() - start
