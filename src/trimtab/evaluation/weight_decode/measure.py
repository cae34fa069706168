"""What is measured of a system, the same for all: reading a prompt, then decoding after a context. Loads no torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from trimtab.evaluation.kv_decode import measure as kv_decode

_PREFILLS = 3
_ENOUGH_SECONDS = 20.0


@dataclass(frozen=True, kw_only=True)
class Setting(kv_decode.Setting):
    """Model and lengths of one run: a random Llama of 369 million parameters in 16 bits.

    context   tokens held while steps are timed
    steps     tokens decoded after it
    prompt    tokens of the prompt whose reading is timed
    seed      of weights and tokens
    """

    bench: ClassVar[str] = "decode"
    package: ClassVar[str] = "trimtab.evaluation.weight_decode"

    context: int = 128
    steps: int = 64
    prompt: int = 512
    layers: int = 8
    hidden: int = 2048
    query_heads: int = 32
    kv_heads: int = 4
    head_dim: int = 64
    mlp: int = 5632
    vocabulary: int = 4096

    @property
    def positions(self) -> int:
        return max(self.context, self.prompt) + self.steps

    @property
    def embedding_entries(self) -> int:
        """Weights of the embedding, of which a step reads one row."""
        return self.vocabulary * self.hidden


class Session(Protocol):
    """A system with the model loaded, ready to run. Batch size is one."""

    def prefill(self, tokens: Sequence[int]) -> None:
        """Empty the cache and read the prompt."""

    def step(self, token: int) -> None:
        """Decode with one more token; done when its logits are there."""

    def logits(self) -> list[float]:
        """Of the last token that was read."""

    def weight_bytes(self) -> int:
        """Of everything that stands for the weights, the embedding included."""

    def embedding_bytes(self) -> int:
        """Of the embedding alone, as this system keeps it."""

    def reference_step(self, token: int) -> list[float] | None:
        """Logits after one more token by an independent way to compute them, None where there is none."""

    def facts(self) -> dict[str, Any]:
        """More for the entry: the library's version, kernels."""


def measure(session: Session, setting: Setting) -> dict[str, Any]:
    """Figures of one system. Raises NumericsError, and gives none, if its logits are not those of its reference.

    decode_ms_median, _best, _spread   one step at the context; the spread is the distance of the quartiles / median
    prefill_s_median, prefills         reading the prompt, of so many times after one that is not counted
    weight_bytes                       of all weights; read_bytes: without the embedding, of which a step reads one row
    parity                             relative RMS error of the logits against the reference; None where there is none
    logits                             after the context, to be compared with those of the uncompressed model
    """
    tokens = setting.tokens()
    prompt, context = tokens[: setting.prompt], tokens[: setting.context]
    following = tokens[setting.context : setting.context + setting.steps]
    prefills = [kv_decode.seconds(session.prefill, prompt)]
    while len(prefills) < 1 + (1 if prefills[0] > _ENOUGH_SECONDS else _PREFILLS):
        prefills.append(kv_decode.seconds(session.prefill, prompt))
    session.prefill(context)
    logits = session.logits()
    expected = session.reference_step(following[0])
    if expected is not None:
        session.prefill(context)
    steps = [kv_decode.seconds(session.step, following[0])]
    parity = None if expected is None else kv_decode.demand_parity(session.logits(), expected)
    steps += [kv_decode.seconds(session.step, token) for token in following[1:]]
    return {
        "decode_ms_median": 1e3 * statistics.median(steps),
        "decode_ms_best": 1e3 * min(steps),
        "decode_spread": kv_decode.spread(steps),
        "prefill_s_median": statistics.median(prefills[1:]),
        "prefills": len(prefills) - 1,
        "prompt": setting.prompt,
        "weight_bytes": session.weight_bytes(),
        "read_bytes": session.weight_bytes() - session.embedding_bytes(),
        "parity": parity,
        "logits": logits,
        **session.facts(),
    }
