"""What the claims about steering share: a small model that was taught a taste, and how well `ref` follows it.

The taste is about words of reviews, whatever the review says in the end: three warm ones count 1, harsh ones -1. Few
reviews hold two warm words, so that the best of sixteen is not the best there is. `ref-mini` learns the taste by direct
preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) from pairs of reviews of the training split with the
same opening; `ref` is left as it is.
"""

from __future__ import annotations

import copy
import functools
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from trimtab.decoding._decoder import Decoder
from trimtab.decoding._sampling import Sampling
from trimtab.decoding.base import DecodingMethod
from trimtab.evaluation import statistics
from trimtab.evaluation.base import Estimate
from trimtab.models import load, tokenizer_of
from trimtab.world import sentiment

TUNED, UNTUNED = "tuned", "untuned"
WARM = ("wonderful", "splendid", "perfect")
HARSH = sentiment.OPINIONS["bad"]
TIMES = 3
NEW_TOKENS = 32
TEMPERATURE, TOP_K = 0.7, 50
STEPS, PAIRS, RATE, BETA = 40, 8, 1e-4, 0.5
_WARM_UP = 10
_REVIEWS = 6000
SETTING = (
    f"ref-mini taught by DPO (beta {BETA}, {STEPS} steps of {PAIRS} pairs) to prefer reviews with warm words; "
    f"ref, untouched, writes {TIMES} reviews of each of 32 things at temperature {TEMPERATURE}, top-k {TOP_K}; reward: "
    "warm words minus harsh"
)


def reward(text: str) -> float:
    """Warm words minus harsh ones."""
    words = text.replace(",", " ").replace(".", " ").split()
    return float(sum(word in WARM for word in words) - sum(word in HARSH for word in words))


@functools.cache
def taught() -> Mapping[str, PreTrainedModel]:
    """`ref-mini` after and before."""
    before = load("ref-mini", dtype=torch.float32)
    after = copy.deepcopy(before)
    pairs = _pairs(STEPS * PAIRS)
    optimizer = torch.optim.AdamW(after.parameters(), lr=RATE, weight_decay=0.0)
    after.train()
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / _WARM_UP)
        chosen = pairs[step * PAIRS : (step + 1) * PAIRS]
        texts = [(opening, better) for opening, better, _ in chosen] + [
            (opening, worse) for opening, _, worse in chosen
        ]
        with torch.no_grad():
            start = _log_probs(before, texts)
        gained = _log_probs(after, texts) - start
        loss = -functional.logsigmoid(BETA * (gained[:PAIRS] - gained[PAIRS:])).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    after.eval()  # type: ignore[no-untyped-call]
    after.requires_grad_(False)
    return {TUNED: after, UNTUNED: before}


def _pairs(count: int) -> list[tuple[str, str, str]]:
    """(opening, better end, worse end) of reviews of the training split."""
    ends = defaultdict(list)
    for example in sentiment.examples("train", _REVIEWS, 1):
        opening, _, end = example.prompt.partition(" was")
        ends[f"{opening} was"].append(f"{end}{example.answer}\n")
    rng, openings = random.Random(0), sorted(ends)
    found: list[tuple[str, str, str]] = []
    while len(found) < count:
        opening = rng.choice(openings)
        worse, better = sorted(rng.sample(ends[opening], 2), key=reward)
        if reward(worse) < reward(better):
            found.append((opening, better, worse))
    return found


def _log_probs(model: PreTrainedModel, texts: Sequence[tuple[str, str]]) -> Tensor:
    """[n] of the ends after their openings, the end of the text included."""
    tokenizer = tokenizer_of(model)
    openings = [tokenizer(opening)["input_ids"] for opening, _ in texts]
    ends = [[*tokenizer(end, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for _, end in texts]
    width = max(len(opening) + len(end) for opening, end in zip(openings, ends, strict=True))
    ids, counts = torch.zeros((len(texts), width), dtype=torch.long), torch.zeros((len(texts), width))
    for row, (opening, end) in enumerate(zip(openings, ends, strict=True)):
        ids[row, : len(opening) + len(end)] = torch.tensor([*opening, *end])
        counts[row, len(opening) : len(opening) + len(end)] = 1
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    log_probs = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    total: Tensor = (log_probs * counts[:, 1:]).sum(dim=1)
    return total


@dataclass(frozen=True, slots=True)
class Steered:
    """Rewards of one review for each prompt, and how many tokens were written for them."""

    rewards: tuple[float, ...]
    tokens: int

    @property
    def estimate(self) -> Estimate:
        return statistics.mean(self.rewards, self._clusters)

    def over(self, other: Steered) -> Estimate:
        """By how much the reward is higher, prompt by prompt."""
        gains = [a - b for a, b in zip(self.rewards, other.rewards, strict=True)]
        return statistics.mean(gains, self._clusters)

    @property
    def _clusters(self) -> list[str]:
        """Reviews of one thing belong together."""
        things = len(self.rewards) // TIMES
        return [str(place % things) for place in range(len(self.rewards))]


@functools.cache
def steered(*methods: DecodingMethod, writer: str = "ref") -> Steered:
    """Reviews by `ref` (or "tuned", the small model itself) with these methods."""
    model = load("ref", dtype=torch.float32) if writer == "ref" else taught()[writer]
    tokenizer = tokenizer_of(model)
    sampling = Sampling(
        temperature=TEMPERATURE, top_k=TOP_K, max_new_tokens=NEW_TOKENS, stop_tokens=(tokenizer.eos_token_id,)
    )
    prompts = openings(model)
    written = Decoder(model, methods, drafts=taught()).generate(prompts, sampling)
    return Steered(tuple(reward(str(tokenizer.decode(tokens))) for tokens in written.tokens), written.ledger.committed)


def openings(model: PreTrainedModel) -> list[list[int]]:
    """Beginnings of reviews of all things, as the model's tokens, each as often as it is written."""
    begun = [f"Review: The {one} of this {topic} was" for topic, ones in sentiment.TOPICS.items() for one in ones]
    return [list(tokenizer_of(model)(text)["input_ids"]) for text in begun * TIMES]
