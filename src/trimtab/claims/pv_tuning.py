"""Claims of PV-Tuning: at two bits it beats straight-through estimation for grids, NormalFloat levels and codebooks."""

from __future__ import annotations

import functools
from itertools import pairwise

import torch

from trimtab.claims.base import Claim, Outcome
from trimtab.core.registry import method_info
from trimtab.evaluation import Divergence, NextTokens, divergence
from trimtab.models import load, tokenizer_of
from trimtab.models.calibration import CalibrationSet
from trimtab.models.info import info_of
from trimtab.weights import PvTuning, compress
from trimtab.weights.pv_tuning import Mode

__all__ = ["CLAIMS"]

SEQUENCES, LENGTH = 256, 128
STEPS = 50
WINDOWS = 24
MODES: tuple[Mode, ...] = ("pv_ste", "ste", "continuous")


@functools.cache
def _predictions() -> NextTokens:
    return NextTokens.of(load("ref-mini", dtype=torch.float32), windows=WINDOWS)


def _tuned(base: str, mode: Mode) -> tuple[Divergence, dict[str, float], list[float], int]:
    """How far `ref-mini` at 2 bits is from itself; what tuning noted, its trace, the bytes of the linears."""
    model = load("ref-mini", dtype=torch.float32)
    text = CalibrationSet.from_text(None, tokenizer_of(model), sequences=SEQUENCES, length=LENGTH)
    method = PvTuning(base=base, bits=2, mode=mode, steps=STEPS)
    compress(model, method, calibration=text)
    record = info_of(model).record
    assert record is not None
    moved = divergence(model, _predictions())
    return moved, record.metrics["tuning"], record.metrics["tuning_trace"], int(record.ledger["compressed_bytes"])


def _base(base: str) -> tuple[Divergence, int]:
    model = load("ref-mini", dtype=torch.float32)
    text = CalibrationSet.from_text(None, tokenizer_of(model), sequences=SEQUENCES, length=LENGTH)
    compress(model, PvTuning(base=base, bits=2).method, calibration=text)
    record = info_of(model).record
    assert record is not None
    return divergence(model, _predictions()), int(record.ledger["compressed_bytes"])


def _kl(found: Divergence) -> float:
    return found.estimates()["kl_nats_per_token"].value


def _beats(base: str) -> Outcome:
    start, start_bytes = _base(base)
    found = {mode: _tuned(base, mode) for mode in MODES}
    pv, notes, trace, nbytes = found["pv_ste"]
    best = [min(trace[: index + 1]) for index in range(len(trace))]
    never_rises = all(after <= before for before, after in pairwise(best))
    over_ste = pv.kl_difference(found["ste"][0]).high
    over_start = pv.kl_difference(start).high
    measured = {
        "kl_nats_per_token": _kl(pv),
        "kl_difference_to_ste_high": over_ste,
        "kl_difference_to_start_high": over_start,
        "calibration_kl_before": notes["kl_before"],
        "calibration_kl_after": notes["kl_after"],
        "compressed_bytes": nbytes,
    }
    baseline = {
        "start_kl_nats_per_token": _kl(start),
        "ste_kl_nats_per_token": _kl(found["ste"][0]),
        "continuous_kl_nats_per_token": _kl(found["continuous"][0]),
        "ste_calibration_kl_after": found["ste"][1]["kl_after"],
        "start_compressed_bytes": start_bytes,
    }
    holds = over_ste < 0 and over_start < 0 and never_rises and nbytes == start_bytes
    return Outcome(measured, baseline, holds)


def beats_for_grids() -> Outcome:
    return _beats("gptq")


def beats_for_normal_float() -> Outcome:
    return _beats("nf")


def beats_for_codebooks() -> Outcome:
    return _beats("vq")


_PAPER = method_info("pv_tuning").paper
_SETTING = (
    f"ref-mini at 2 bits, {STEPS} steps of 2,048 tokens of {SEQUENCES} x {LENGTH} tokens of prose, of which an eighth "
    f"is held out to choose by; the same rates for all; measured as KL(ref-mini || compressed) on {WINDOWS} x 256 "
    "tokens of other prose, continuous-only beside it. Holds if the paired 95 % intervals of the difference in KL both "
    "to straight-through estimation of as many steps and to {} lie below zero, the loss of what is kept never rises, "
    "and the bytes are those of {}."
)

CLAIMS = tuple(
    Claim(
        "pv_tuning",
        _PAPER,
        f"At 2 bits PV-Tuning beats straight-through estimation and its own initialisation for {what}.",
        _SETTING.format(base, base),
        run,
    )
    for what, base, run in (
        ("integer grids", "gptq", beats_for_grids),
        ("NormalFloat levels", "nf", beats_for_normal_float),
        ("codebooks", "vq", beats_for_codebooks),
    )
)
