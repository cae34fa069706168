"""Claims of emulated fine-tuning: a small pair's difference steers a large model, and drafts make it cheaper."""

from __future__ import annotations

import torch

from trimtab.claims._steering import SETTING, TUNED, UNTUNED, openings, steered, taught
from trimtab.claims.base import Claim, Outcome
from trimtab.core.registry import method_info
from trimtab.decoding import Decoder, Sampling, Speculative
from trimtab.decoding.eft import Eft
from trimtab.models import load

__all__ = ["CLAIMS"]

BETA = 1.0
DEPTH = 4
NEW_TOKENS = 24
PROMPTS = 8


def steers() -> Outcome:
    both = Eft(tuned=TUNED, untuned=UNTUNED, beta=BETA)
    tuned, plain = steered(both), steered()
    gain, value, base = tuned.over(plain), tuned.estimate, plain.estimate
    return Outcome(
        measured={
            "reward_eft": value.value,
            "reward_eft_low": value.low,
            "reward_eft_high": value.high,
            "gain": gain.value,
            "gain_low": gain.low,
            "gain_high": gain.high,
        },
        baseline={"reward_plain": base.value, "reward_plain_low": base.low, "reward_plain_high": base.high},
        holds=gain.low > 0,
    )


def drafts_change_nothing() -> Outcome:
    model, models = load("ref", dtype=torch.float32), taught()
    method = Eft(tuned=TUNED, untuned=UNTUNED, beta=BETA)
    prompts = openings(model)[:PROMPTS]
    sampling = Sampling(max_new_tokens=NEW_TOKENS)
    drafts = Speculative(draft=TUNED, depth=DEPTH)
    drafted = Decoder(model, [method, drafts], drafts=models, adapt=False).generate(prompts, sampling)
    plain = Decoder(model, [method], drafts=models).generate(prompts, sampling)
    same = sum(a == b for a, b in zip(drafted.tokens, plain.tokens, strict=True))
    per_forward = drafted.ledger.tokens_per_target_forward
    return Outcome(
        measured={"texts_equal": float(same), "tokens_per_target_forward": per_forward},
        baseline={"texts": float(PROMPTS), "tokens_per_target_forward_plain": plain.ledger.tokens_per_target_forward},
        holds=same == PROMPTS and per_forward > 1.5,
    )


_PAPER = method_info("eft").paper

CLAIMS = (
    Claim(
        "eft",
        _PAPER,
        "What tuning did to a small model, added to the logits of a large one, does the same to that.",
        f"{SETTING}. Holds if the reward at beta {BETA} is above that of ref alone, the baseline (95 % interval of the "
        "differences, prompt by prompt).",
        steers,
    ),
    Claim(
        "eft",
        _PAPER,
        "Drafts of the small tuned model make it faster and change no text.",
        f"The same models, {PROMPTS} texts of {NEW_TOKENS} tokens, greedy, in float32, drafts of {DEPTH} tokens. Holds "
        "if all texts are those without drafts, the baseline, at more than 1.5 tokens per forward pass of ref.",
        drafts_change_nothing,
    ),
)
