"""Claims of PV-Tuning at two bits: over its start, over tuning numbers only, over straight-through estimation."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from trimtab.claims.base import Claim, Outcome
from trimtab.core.registry import method_info
from trimtab.evaluation import Divergence, NextTokens, divergence
from trimtab.models import load, tokenizer_of
from trimtab.models.calibration import CalibrationSet
from trimtab.models.compression import compress
from trimtab.models.info import info_of
from trimtab.weights import PvTuning
from trimtab.weights.pv_tuning import Mode

__all__ = ["CLAIMS"]

SEQUENCES, LENGTH = 128, 128
STEPS, BATCH_TOKENS = 40, 1024
WINDOWS = 24


@dataclass(frozen=True, slots=True)
class _Run:
    """`ref-mini` at 2 bits: how far it has moved, bytes of the linears, losses while it was tuned."""

    moved: Divergence
    nbytes: int
    trace: tuple[float, ...]

    @property
    def kl(self) -> float:
        return self.moved.estimates()["kl_nats_per_token"].value


@functools.cache
def _predictions() -> NextTokens:
    return NextTokens.of(load("ref-mini", dtype=torch.float32), windows=WINDOWS)


@functools.cache
def _run(base: str, mode: Mode | None) -> _Run:
    """Compressed by `base` and tuned; not tuned if there is no mode."""
    model = load("ref-mini", dtype=torch.float32)
    text = CalibrationSet.from_text(None, tokenizer_of(model), sequences=SEQUENCES, length=LENGTH)
    method = PvTuning(base=base, bits=2, steps=STEPS, batch_tokens=BATCH_TOKENS, mode=mode or "continuous")
    compress(model, method if mode else method.method, calibration=text)
    record = info_of(model).record
    assert record is not None
    trace = tuple(record.metrics.get("tuning_trace", ()))
    return _Run(divergence(model, _predictions()), int(record.ledger["compressed_bytes"]), trace)


def _improves(base: str) -> Outcome:
    start, numbers, pv = _run(base, None), _run(base, "continuous"), _run(base, "pv_ste")
    over_start = pv.moved.kl_difference(start.moved).high
    over_numbers = pv.moved.kl_difference(numbers.moved).high
    return Outcome(
        {
            "kl_nats_per_token": pv.kl,
            "kl_difference_to_start_high": over_start,
            "kl_difference_to_continuous_high": over_numbers,
            "calibration_kl_before": pv.trace[0],
            "calibration_kl_after": min(pv.trace),
            "compressed_bytes": pv.nbytes,
        },
        {
            "start_kl_nats_per_token": start.kl,
            "continuous_kl_nats_per_token": numbers.kl,
            "start_compressed_bytes": start.nbytes,
        },
        holds=over_start < 0 and over_numbers < 0 and pv.nbytes == start.nbytes and min(pv.trace) < pv.trace[0],
    )


def _beats_ste(base: str) -> Outcome:
    ste, pv = _run(base, "ste"), _run(base, "pv_ste")
    high = pv.moved.kl_difference(ste.moved).high
    return Outcome(
        {"kl_nats_per_token": pv.kl, "kl_difference_high": high, "calibration_kl_after": min(pv.trace)},
        {"ste_kl_nats_per_token": ste.kl, "ste_calibration_kl_after": min(ste.trace)},
        holds=high < 0,
    )


_PAPER = method_info("pv_tuning").paper
_SETTING = (
    f"ref-mini at 2 bits from {{}}, {STEPS} steps of {BATCH_TOKENS:,} tokens of {SEQUENCES} x {LENGTH} of prose, "
    "of which an eighth is held out to choose by; the same rates for all modes; KL(ref-mini || compressed) on "
    f"{WINDOWS} x 256 tokens of other prose. "
)
_BASES = (("integer grids", "gptq"), ("NormalFloat levels", "nf"), ("codebooks", "vq"))

CLAIMS = tuple(
    Claim("pv_tuning", _PAPER, f"{claim} for {what}.", _SETTING.format(base) + rule, functools.partial(run, base))
    for claim, rule, run in (
        (
            "At 2 bits PV-Tuning improves on its initialisation and on tuning numbers only",
            "Holds if the paired 95 % intervals of the difference in KL to both lie below zero at the same bytes, and "
            "the loss on the held-out text fell.",
            _improves,
        ),
        (
            "At 2 bits PV-Tuning beats straight-through estimation",
            "Holds if the paired 95 % interval of the difference in KL lies below zero.",
            _beats_ste,
        ),
    )
    for what, base in _BASES
)
