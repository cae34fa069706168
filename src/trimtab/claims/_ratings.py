"""Rated reviews: what the claims of `metric_aware` decide about, because raters disagree and nobody can be certain.

The small world's reviews have one label each, which `ref` never gets wrong. Here a review says two things in words of
different strength, and its stars come from one of many raters: most of them waver around what the words say, some are
cross and give a single star whatever they read. `ref-mini`, trained on a few thousand such reviews, knows how raters
spread, and reviews of the other split, whose texts it never saw, are rated anew.
"""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from trimtab.models import load, tokenizer_of
from trimtab.world.sentiment import OPINIONS, TOPICS
from trimtab.world.split import belongs, generator
from trimtab.world.types import Split

STARS = ("1", "2", "3", "4", "5")
CROSS = 0.3
"""Share of raters who give one star to everything."""
STEPS, ROWS, RATE = 220, 40, 1e-3


@dataclass(frozen=True)
class Review:
    """prompt: what the model reads; stars: of one rater; chances [5]: of a rater of this review."""

    prompt: str
    stars: int
    chances: NDArray[np.float64]


def chances(strength: int) -> NDArray[np.float64]:
    """Of each number of stars, for a review whose two opinions add up to -4 (worst) to 4 (best)."""
    p = 1 / (1 + math.exp(-0.8 * strength))
    wavering = np.array([math.comb(4, k) * p**k * (1 - p) ** (4 - k) for k in range(5)])
    return np.asarray((1 - CROSS) * wavering + CROSS * np.eye(5)[0], dtype=np.float64)


def review(rng: random.Random, split: Split) -> Review:
    """One review of this split with the stars of one rater."""
    while True:
        topic = rng.choice(tuple(TOPICS))
        one, two = rng.sample(TOPICS[topic], 2)
        words, strength = [], 0
        for _ in range(2):
            label = rng.choice(tuple(OPINIONS))
            place = rng.randrange(len(OPINIONS[label]))
            words.append(OPINIONS[label][place])
            strength += (1 if label == "good" else -1) * (1 + place % 2)
        text = f"The {one} of this {topic} was {words[0]} and the {two} was {words[1]}."
        if belongs(split, "ratings", text):
            chance = chances(strength)
            return Review(f"Review: {text}\nStars:", rng.choices(range(1, 6), chance.tolist())[0], chance)


def reviews(split: Split, count: int, seed: int = 0) -> list[Review]:
    """So many reviews of this split."""
    rng = generator("ratings", split, seed)
    return [review(rng, split) for _ in range(count)]


@functools.cache
def rating_model() -> PreTrainedModel:
    """`ref-mini` trained to rate reviews of the training split, in float32."""
    model = load("ref-mini", dtype=torch.float32)
    tokenizer = tokenizer_of(model)
    rng = generator("ratings", "train", 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    model.train()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / STEPS)
        rows = [review(rng, "train") for _ in range(ROWS)]
        prompts = [tokenizer(row.prompt)["input_ids"] for row in rows]
        answers = [tokenizer(f" {row.stars}\n", add_special_tokens=False)["input_ids"] for row in rows]
        width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        ids = torch.zeros((ROWS, width), dtype=torch.long)
        wanted = torch.full_like(ids, -100)
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            wanted[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        loss = model(input_ids=ids, labels=wanted, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()  # type: ignore[no-untyped-call]
    return model
