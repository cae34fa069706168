"""Claims of StreamingLLM: endless text at constant memory, sinks instead of a break, speed, and what it does not do."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from math import exp

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.cache import Exact, Streaming
from trimtab.cache._retrieval.trials import calibration_prose
from trimtab.claims._caches import model_with
from trimtab.claims._planted_sink import planted_model, planted_text
from trimtab.claims.base import Claim, Outcome
from trimtab.core.registry import method_info
from trimtab.evaluation.caches import RecallSetting, chunked_logits, recall_by_distance
from trimtab.evaluation.caches.recall import METRIC
from trimtab.evaluation.tasks._prose import held_out_prose
from trimtab.models import load, tokenizer_of
from trimtab.models.segments import SegmentCache

__all__ = ["CLAIMS"]

SINKS, CACHE = 4, 1024
TOKENS, PIECE = 100_000, 10_000
CHUNK, STRIDE = 64, 512
BY_TOKEN = 2 * CACHE, 2 * CACHE + 512
"""The stretch that is read again token by token."""
LARGEST_LOSS = 0.01
BREAKS = 10.0
SIZES = (256, 1024)
SHORT = 6144
PLANTED_CACHE, PLANTED_TOKENS = 64, 1024
CLOSE = 0.02
FASTER = 15.0
STEPS = 9
CONTEXTS, RECALL_CACHE, GONE = 4, 512, 0.1


def streaming(size: int, sinks: int = SINKS) -> Streaming:
    """A cache of so many tokens, sinks included."""
    return Streaming(sinks=sinks, window=size - sinks)


@functools.cache
def small_model() -> PreTrainedModel:
    return load("ref-mini", dtype=torch.float32)


def prose_tokens(count: int) -> list[int]:
    """The first token, then the shipped prose, held-out books first; none of it comes twice."""
    tokenizer = tokenizer_of(small_model())
    text = held_out_prose() + "\n" + calibration_prose()
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [int(tokenizer.bos_token_id), *ids[:count]]


def losses(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """Nats of each token by the logits [1, T, vocabulary] before it; the last logits may have none."""
    targets = torch.tensor(tokens, dtype=torch.long)
    return torch.nn.functional.cross_entropy(logits[0, : len(tokens)].float(), targets, reduction="none")


def read(
    model: PreTrainedModel, tokens: list[int], cache: SegmentCache, *, chunk: int = CHUNK
) -> tuple[Tensor, list[int]]:
    """Nats of each token but the first, and the bytes of the cache after each chunk."""
    nats, sizes = [], []
    with torch.inference_mode():
        for begin, logits in chunked_logits(model, [tokens], cache, chunk=chunk):
            nats.append(losses(logits, tokens[begin + 1 : begin + 1 + logits.shape[1]]))
            sizes.append(cache.nbytes())
    return torch.cat(nats), sizes


def recomputed(model: PreTrainedModel, tokens: list[int], size: int, stride: int) -> Tensor:
    """Nats of each token but the first with at least the `size` tokens before it, computed anew every `stride`."""
    nats = []
    with torch.inference_mode():
        for begin in range(0, len(tokens) - 1, stride):
            first = max(0, begin - size)
            logits = model(torch.tensor([tokens[first : begin + stride]]), use_cache=False).logits
            nats.append(losses(logits[:, begin - first :], tokens[begin + 1 : begin + 1 + stride]))
    return torch.cat(nats)


def constant_memory_and_flat_loss() -> Outcome:
    model, tokens = small_model(), prose_tokens(TOKENS)
    nats, sizes = read(model, tokens, streaming(CACHE).new(model))
    filled = sizes[CACHE // CHUNK + 1 :]
    reference = recomputed(model, tokens, CACHE, STRIDE)
    change = [float(piece.mean()) for piece in torch.split(nats - reference, PIECE)]
    share = max(change) / float(reference.mean())

    begin, end = BY_TOKEN
    cache = streaming(CACHE).new(model)
    read(model, tokens[:begin], cache)
    one_by_one, _ = read(model, tokens[begin : end + 1], cache, chunk=1)
    by_token = float((one_by_one - nats[begin:end]).mean())

    exact = Exact().new(model)
    read(model, tokens[:CACHE], exact)
    return Outcome(
        measured={
            "nats_per_token": float(nats.mean()),
            "largest_change_share_of_a_piece": share,
            "change_nats_first_piece": change[0],
            "change_nats_last_piece": change[-1],
            "change_nats_when_read_token_by_token": by_token,
            "kv_bytes_smallest": min(filled),
            "kv_bytes_largest": max(filled),
        },
        baseline={
            "nats_per_token_recomputed": float(reference.mean()),
            "kv_bytes_exact": exact.nbytes() / CACHE * TOKENS,
        },
        holds=share < LARGEST_LOSS
        and abs(by_token) < LARGEST_LOSS * float(reference.mean())
        and min(filled) == max(filled),
    )


def window_breaks() -> Outcome:
    """Perplexity of what comes after the cache is full, without sinks as a factor of with them."""
    tokens = prose_tokens(SHORT)
    factors, kept = {}, {}
    for name, model in (("ref", model_with(None)), ("ref_mini", small_model())):
        for size in SIZES:
            window, sinks = (
                float(read(model, tokens, streaming(size, count).new(model))[0][size:].mean()) for count in (0, SINKS)
            )
            factors[f"perplexity_factor_without_sinks_{name}_{size}"] = exp(window - sinks)
            kept[f"perplexity_with_sinks_{name}_{size}"] = exp(sinks)
    return Outcome(measured=factors, baseline=kept, holds=min(factors.values()) >= BREAKS)


def planted_sink_breaks() -> Outcome:
    model, text = planted_model(), planted_text(PLANTED_TOKENS)
    after = slice(PLANTED_CACHE, None)
    window, sinks = (
        float(read(model, text, streaming(PLANTED_CACHE, count).new(model), chunk=1)[0][after].mean())
        for count in (0, SINKS)
    )
    rows = [text[:SINKS] + text[end - PLANTED_CACHE + SINKS : end + 1] for end in range(PLANTED_CACHE, len(text) - 1)]
    with torch.inference_mode():
        logits = model(torch.tensor(rows), use_cache=False).logits[:, -1]
    anew = float(losses(logits[None], text[PLANTED_CACHE + 1 :]).mean())
    return Outcome(
        measured={"perplexity_sinks": exp(sinks), "change_nats_of_recomputation": sinks - anew},
        baseline={"perplexity_window": exp(window), "perplexity_recomputed": exp(anew)},
        holds=exp(window - anew) >= BREAKS and abs(exp(sinks - anew) - 1) < CLOSE,
    )


def faster_than_recomputation() -> Outcome:
    model, tokens = model_with(None), prose_tokens(2 * CACHE)
    cache = streaming(CACHE).new(model)
    read(model, tokens[: CACHE + CHUNK], cache)
    upcoming = iter(tokens[CACHE + CHUNK :])

    def step() -> None:
        model(torch.tensor([[next(upcoming)]]), past_key_values=cache)

    def anew() -> None:
        model(torch.tensor([tokens[:CACHE]]), use_cache=False, logits_to_keep=1)

    stepping, recomputing = seconds(step, 5 * STEPS), seconds(anew, STEPS)
    return Outcome(
        measured={"milliseconds_per_token": stepping * 1e3, "times_faster": recomputing / stepping},
        baseline={"milliseconds_per_token_recomputed": recomputing * 1e3},
        holds=recomputing / stepping >= FASTER,
    )


def seconds(work: Callable[[], None], times: int) -> float:
    """Median; the first call does not count."""
    found = []
    with torch.inference_mode():
        for _ in range(times + 1):
            start = time.perf_counter()
            work()
            found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


def what_has_left_is_gone() -> Outcome:
    near, far = RecallSetting(128), RecallSetting(1024)
    shown = {
        name: {
            place: result.metrics[METRIC].value
            for place, result in zip(
                ("near", "far"),
                recall_by_distance(model_with(None), method, (near, far), contexts=CONTEXTS).values(),
                strict=True,
            )
        }
        for name, method in (("streaming", streaming(RECALL_CACHE)), ("exact", Exact()))
    }
    ours, exact = shown["streaming"], shown["exact"]
    return Outcome(
        measured={f"recall_{place}": value for place, value in ours.items()},
        baseline={f"recall_{place}_exact": value for place, value in exact.items()},
        holds=ours["near"] >= 0.95 * exact["near"] > 0 and ours["far"] <= GONE * exact["far"],
    )


_PAPER = method_info("streaming").paper

CLAIMS = (
    Claim(
        "streaming",
        _PAPER,
        "Four sinks and a window stream a text of any length with constant memory and a loss that does not grow, as "
        "good as a sliding window that is recomputed.",
        f"ref-mini reads {TOKENS:,} tokens of prose in chunks of {CHUNK} through a cache of {SINKS} + {CACHE - SINKS}; "
        f"{BY_TOKEN[1] - BY_TOKEN[0]} of them again one by one. Baseline: at least {CACHE:,} tokens of context, "
        f"computed anew every {STRIDE}. Holds if in every {PIECE:,} tokens the loss exceeds the baseline's by less "
        f"than {LARGEST_LOSS:.0%}, reading one by one changes it by less than that, and the full cache takes the same "
        "bytes from first to last.",
        constant_memory_and_flat_loss,
    ),
    Claim(
        "streaming",
        _PAPER,
        "Window attention breaks as soon as the first tokens leave the cache (Llama-2-13B: perplexity 5158 for 0 + "
        "1024, 5.40 for 4 + 1020).",
        f"ref and ref-mini, {SHORT:,} tokens of prose after the first token, caches of {SIZES[0]} and {SIZES[1]:,}, "
        f"perplexity of what comes after the cache is full. Holds if without sinks it is {BREAKS:g} times that with "
        f"{SINKS}, in all of them. Baseline: with sinks.",
        window_breaks,
    ),
    Claim(
        "streaming",
        _PAPER,
        "A model that puts its mass on the first token where it has nothing to attend to breaks without that token; "
        "with it, streaming stays with recomputation.",
        f"A Llama of one layer with a planted sink and {PLANTED_TOKENS:,} tokens of a Markov chain whose triggers are "
        f"followed by the word before them; a cache of {PLANTED_CACHE}, token by token. Baseline: window attention, "
        f"and {SINKS} + {PLANTED_CACHE - SINKS} tokens computed anew, which must be the same with one layer. Holds if "
        f"the window's perplexity is {BREAKS:g} times that of recomputation and that with {SINKS} sinks within "
        f"{CLOSE:.0%}.",
        planted_sink_breaks,
    ),
    Claim(
        "streaming",
        _PAPER,
        "Streaming is up to 22.2 times faster per token than recomputing the sliding window.",
        f"ref in float32, the median of {5 * STEPS} steps with a cache of {CACHE:,}. Baseline: the last {CACHE:,} "
        f"tokens computed anew for each token, {STEPS} times. Holds if a step is {FASTER:g} times faster.",
        faster_than_recomputation,
    ),
    Claim(
        "streaming",
        _PAPER,
        "Streaming does not lengthen the memory of a model: what has left the window is not recalled.",
        f"ref, recall of one of 16 records through a cache of {SINKS} + {RECALL_CACHE - SINKS}, {CONTEXTS} contexts of "
        f"16 questions, 128 (near) and 1,024 (far) tokens back. Holds if the near ones are recalled as often as by the "
        f"exact cache, the baseline, up to 5 %, and of the far ones at most {GONE:.0%} as many.",
        what_has_left_is_gone,
    ),
)
