"""Claims of retrieval heads: few, the same at all lengths, needed for recall; and budgets that follow them."""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

import torch

from trimtab.cache import Exact, HeadScores, RetrievalHeads, detect_heads
from trimtab.cache._retrieval.masking import MaskingResult, masking_experiment
from trimtab.cache._retrieval.trials import make_trials
from trimtab.cache.base import CacheMethod
from trimtab.claims._caches import model_with
from trimtab.claims.base import Claim, Outcome
from trimtab.core.registry import method_info
from trimtab.evaluation.caches import RecallSetting, recall_by_distance
from trimtab.evaluation.caches.recall import METRIC
from trimtab.models import CalibrationSet, tokenizer_of

__all__ = ["CLAIMS"]

SPARSE = 0.06
STABLE = 0.9
SEEDS = tuple(range(5))
LENGTHS, DEPTHS = (300, 800), (0.1, 0.3, 0.5, 0.7, 0.9)
LOST, KEPT = 0.2, 0.8
FULL = 0.25
SETTINGS = (RecallSetting(1024), RecallSetting(1500))
CONTEXTS = 3
READ = 1536
NEARLY_ALL, HALF = 0.97, 0.5


@functools.cache
def scores() -> HeadScores:
    """Of `ref`, by the trials that the method runs on its first use."""
    return detect_heads(model_with(None))


def few_heads() -> Outcome:
    found = scores()
    values = found.scores
    return Outcome(
        measured={
            "heads_above_threshold": len(found.retrieval_heads),
            "share_above_threshold": len(found.retrieval_heads) / values.numel(),
            "share_never_copying": float((values == 0).double().mean()),
        },
        baseline={
            "highest_score_below_threshold": float(values[values <= found.threshold].max()),
            "share_of_trials_counted": len(found.counted) / len(found.trials),
        },
        holds=0 < len(found.retrieval_heads) <= SPARSE * values.numel(),
    )


def same_at_all_lengths() -> Outcome:
    found = scores()
    wanted = set(found.retrieval_heads)
    lengths = found.by_length()
    shared = [
        len(wanted & set(own.retrieval_heads)) / len(wanted | set(own.retrieval_heads)) for own in lengths.values()
    ]
    rows = torch.stack([own.scores.flatten() for own in lengths.values()])
    together = torch.corrcoef(rows)
    return Outcome(
        measured={
            "least_correlation_of_two_lengths": float(together.min()),
            "least_share_of_retrieval_heads_in_common": min(shared),
        },
        baseline={"lengths": len(lengths), "shortest": min(lengths), "longest": max(lengths)},
        holds=min(shared) == 1 and float(together.min()) > STABLE,
    )


def recall_needs_them() -> Outcome:
    model, count = model_with(None), len(scores().retrieval_heads)
    tokenizer = tokenizer_of(model)
    trials = make_trials(tokenizer, LENGTHS, depths=DEPTHS, repeats=1, seed=1)
    prose = CalibrationSet.from_text(None, tokenizer, sequences=4, length=256)

    def silence(*spared: int) -> MaskingResult:
        return masking_experiment(model, scores(), trials, (count,), SEEDS, prose=prose, spared=spared)

    outside, anywhere = silence(0), silence()
    whole, top = outside.none.recall, outside.top[count].recall
    others, all_layers = ([row.recall for row in found.at_random[count]] for found in (outside, anywhere))
    return Outcome(
        measured={
            "recall_without_top_heads": top,
            "prose_perplexity_factor_without_top_heads": outside.prose_change(count),
        },
        baseline={
            "recall_whole_model": whole,
            "recall_without_random_heads_outside_layer_0": fmean(others),
            "recall_without_random_heads_outside_layer_0_least": min(others),
            "recall_without_random_heads_anywhere": fmean(all_layers),
            "recall_without_random_heads_anywhere_least": min(all_layers),
        },
        holds=top <= LOST * whole and fmean(others) >= KEPT * whole and min(others) > top,
    )


@contextmanager
def _scores_file() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scores.json"
        scores().save(path)
        yield str(path)


def recall_of(method: CacheMethod) -> float:
    found = recall_by_distance(model_with(None), method, SETTINGS, contexts=CONTEXTS)
    return fmean(result.metrics[METRIC].value for result in found.values())


def bytes_of(method: CacheMethod) -> int:
    """Allocated after READ tokens of random keys and values in the shapes of `ref`, as bfloat16."""
    cache, generator = method.new(model_with(None)), torch.Generator().manual_seed(0)
    config = model_with(None).config
    shape = (1, config.num_key_value_heads, 64, config.head_dim)
    with torch.inference_mode():
        for _ in range(READ // shape[2]):
            for layer in cache.segment_layers:
                layer.store(*(torch.randn(shape, generator=generator).bfloat16() for _ in range(2)))
    return cache.nbytes()


def token_bytes() -> int:
    """Of one token in all heads of `ref`, as bfloat16, room that is not filled not counted."""
    config = model_with(None).config
    return 4 * int(config.num_hidden_layers * config.num_key_value_heads * config.head_dim)


def budgets_follow_scores() -> Outcome:
    with _scores_file() as path:
        budget = RetrievalHeads(full_fraction=FULL, scores=path)
        full_bytes, ours_bytes = bytes_of(Exact()), bytes_of(budget)
        recent = math.ceil(ours_bytes / token_bytes()) - budget.sinks
        uniform = RetrievalHeads(full_fraction=0.0, recent=recent, scores=path)
        full, ours, evenly = (recall_of(method) for method in (Exact(), budget, uniform))
        uniform_bytes = bytes_of(uniform)
    return Outcome(
        measured={
            "recall": ours,
            "share_of_bytes": ours_bytes / full_bytes,
            "share_of_recall": ours / full if full else 0.0,
        },
        baseline={
            "recall_exact": full,
            "recall_uniform": evenly,
            "share_of_bytes_uniform": uniform_bytes / full_bytes,
            "recent_tokens_uniform": recent,
        },
        holds=full > 0
        and ours >= NEARLY_ALL * full
        and evenly < NEARLY_ALL * full
        and ours_bytes <= HALF * full_bytes
        and ours_bytes <= uniform_bytes,
    )


_PAPER = method_info("retrieval_heads").paper
_DUO = (
    'Guangxuan Xiao et al., "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads", '
    "ICLR 2025, arXiv:2410.10819."
)
_TRIALS = "ref, 30 trials: 6 prompt lengths of 256 to 1,984 tokens, 5 depths"

CLAIMS = (
    Claim(
        "retrieval_heads",
        _PAPER,
        "Retrieval heads are sparse: 3 to 6 % of the heads of a model have a score above 0.1.",
        f"{_TRIALS}. Holds if there are some, at most {SPARSE:.0%} of all. Baseline: the highest score of the others. "
        "ref has 32 heads; the models of the paper have about a thousand.",
        few_heads,
    ),
    Claim(
        "retrieval_heads",
        _PAPER,
        "Retrieval heads are a property of the model: the same heads at all context lengths.",
        f"{_TRIALS}, scored for each length alone. Holds if at each length the same heads are above 0.1, and the "
        f"scores of any two lengths are correlated above {STABLE:g} over all heads.",
        same_at_all_lengths,
    ),
    Claim(
        "retrieval_heads",
        _PAPER,
        "Without its retrieval heads a model retrieves nothing; without as many random heads it goes on.",
        f"ref, 10 other trials, the output of heads set to zero: those above 0.1, and as many random others for "
        f"{len(SEEDS)} seeds. Holds if without the first recall falls to {LOST:.0%} of the whole model's or less, and "
        f"without random heads outside layer 0 it stays at {KEPT:.0%} or more on average and above that in each draw. "
        "Beside it, random heads of all layers: without heads of layer 0, ref does not work at all, be it recall or "
        "prose.",
        recall_needs_them,
    ),
    Claim(
        "retrieval_heads",
        _DUO,
        "Full history for a quarter to a half of the heads keeps long-context accuracy at about half of the memory.",
        f"ref, {FULL:.0%} of the KV heads whole, the others 16 + 256 tokens; recall of one of 16 records "
        f"{SETTINGS[0].distance:,} and {SETTINGS[1].distance:,} tokens back, {CONTEXTS} contexts of 16 questions each; "
        f"bytes allocated for {READ:,} tokens in bfloat16. Holds if at {HALF:.0%} of the bytes of the exact cache or "
        f"less {NEARLY_ALL:.0%} of its recall remain, and a uniform budget, which gives every head the same number of "
        "tokens with no fewer bytes, loses more.",
        budgets_follow_scores,
    ),
)
