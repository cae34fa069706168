"""What is measured of a system: the time that compressing takes, and the memory it needs at most."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from trimtab.core.errors import ConfigError, NumericsError
from trimtab.evaluation.beside.base import Benchmark
from trimtab.evaluation.beside.child import memory


@dataclass(frozen=True, kw_only=True)
class Setting(Benchmark):
    """What is compressed, to 4 bits in groups of 64 or to half of the weights.

    model        "random": a Llama of 369 million random weights, in bfloat16, calibrated on random tokens;
                 "ref": the reference model, calibrated on prose
    sequences    of `length` tokens each: the calibration text of the methods that need one
    rank         of LoftQ's factors; iterations: its turns (peft makes one unless asked for more)
    """

    bench: ClassVar[str] = "compress"
    package: ClassVar[str] = "trimtab.evaluation.compress_time"

    model: Literal["random", "ref"] = "random"
    sequences: int = 32
    length: int = 512
    rank: int = 16
    iterations: int = 1
    group_size: int = 64

    def __post_init__(self) -> None:
        for name in ("sequences", "length", "rank", "iterations"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{self.bench}: {name} must be at least 1, but is {getattr(self, name)}.")

    @property
    def labels(self) -> dict[str, Any]:
        return {"model": self.model}


class Session(Protocol):
    """A system with the model loaded.

    largest_error    what `weight_error` may be, of a result that is what was asked for
    """

    largest_error: float

    def compress(self) -> None:
        """What is timed."""

    def weight_error(self) -> float:
        """sum |W~ - W|^2 / sum |W|^2 over the compressed layers."""

    def facts(self) -> dict[str, Any]:
        """More for the entry: the library's version."""


def measure(session: Session, setting: Setting) -> dict[str, Any]:
    """Figures of one system. Raises NumericsError, and gives none, if the result is not what was asked for.

    compress_s        from the loaded model to the compressed one in memory
    peak_rss_bytes    largest resident set until then, with the loaded model and all libraries
    weight_error      relative squared error of the weights
    """
    start = time.perf_counter()
    session.compress()
    seconds, peak = time.perf_counter() - start, memory("VmHWM")
    error = session.weight_error()
    if not 0 < error < session.largest_error:  # NaN is red too
        raise NumericsError(
            f"the relative squared error of the weights is {error:.2e}, not between 0 and {session.largest_error}: "
            "this is not the model as it was to be compressed; its time is not reported."
        )
    return {"compress_s": seconds, "peak_rss_bytes": peak, "weight_error": error, **session.facts()}
