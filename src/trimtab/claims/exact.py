"""Claims of the exact cache: nothing is lost, and nothing is stored twice."""

from __future__ import annotations

import torch
from transformers import DynamicCache

from trimtab.cache import Exact
from trimtab.claims._caches import model_with, predictions
from trimtab.claims.base import Claim, Outcome
from trimtab.core.registry import method_info

__all__ = ["CLAIMS"]

TOLERANCE = 1e-3
TOKENS, STEP = 2048, 64


def same_logits() -> Outcome:
    model = model_with(None)
    tokens = predictions().tokens[:1, :TOKENS]
    ours, theirs = Exact().new(model), DynamicCache(config=model.config)
    largest = 0.0
    with torch.inference_mode():
        for start in range(0, TOKENS, STEP):
            piece = tokens[:, start : start + STEP]
            one = model(piece, past_key_values=ours).logits
            other = model(piece, past_key_values=theirs).logits
            largest = max(largest, float((one - other).abs().max()))
    held = sum(getattr(layer, name).nbytes for layer in theirs.layers for name in ("keys", "values"))
    return Outcome(
        measured={"largest_logit_difference": largest, "kv_bytes": ours.nbytes()},
        baseline={"kv_bytes_dynamic_cache": held, "largest_logit": float(one.abs().max())},
        holds=largest < TOLERANCE,
    )


CLAIMS = (
    Claim(
        "exact",
        method_info("exact").paper,
        "Attention split over the history and merged by log-sum-exp is exact.",
        f"ref in float32 reads {TOKENS:,} tokens in steps of {STEP}, with this cache and with transformers' "
        f"DynamicCache, "
        f"the baseline. Holds if no logit differs by more than {TOLERANCE}. Speed is in the benchmark kv-decode.",
        same_logits,
    ),
)
