"""The masking experiment: retrieval fails without the retrieval heads, and does not without as many others.

Source: Wu et al. 2024 (arXiv:2404.15574), section 3.1. Their code silences a head by zeroing its query (the fast path)
or its logits (the slow one), which makes its attention uniform: it still adds the mean value to the residual stream.
The default here is cleaner, the head's output is zeroed before the output projection; "uniform" is theirs. Departure:
random heads are drawn outside the top `max(counts)`, where theirs are outside the top 100 of about a thousand.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.cache._retrieval.detection import answer_of, answers
from trimtab.cache._retrieval.scores import Head, HeadScores
from trimtab.core.errors import ConfigError, TargetError
from trimtab.core.progress import progress
from trimtab.models import CalibrationSet, ModelView, tokenizer_of
from trimtab.models.views import AttentionView, LinearView

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedTokenizerBase

    from trimtab.cache._retrieval.trials import Trial

How = Literal["output", "uniform"]
COUNTS = (1, 2, 3, 4, 6, 8)
SEEDS = 5
ANSWER_TOKENS = 12


@contextmanager
def mask_heads(model: PreTrainedModel, heads: Iterable[Head], how: How = "output") -> Iterator[None]:
    """Silence query heads (layer, head) while the block runs; the model is as before afterwards.

    how   "output": what the head gives to the output projection is zero; "uniform": its query is zero, so that it
          attends alike to every token it may see

    Raises TargetError for a head that the model does not have, ConfigError for an unknown `how`.
    """
    if how not in ("output", "uniform"):
        raise ConfigError(f"heads are masked by 'output' or 'uniform', not {how!r}.")
    blocks = ModelView.of(model).blocks
    silenced: dict[int, list[int]] = {}
    for layer, head in sorted(set(heads)):
        if not (0 <= layer < len(blocks) and 0 <= head < blocks[layer].attention.num_heads):
            raise TargetError(
                f"{type(model).__name__} has no head {head} in layer {layer}: it has {len(blocks)} layers of "
                f"{blocks[0].attention.num_heads} heads, counted from 0."
            )
        silenced.setdefault(layer, []).append(head)
    hook = _silence_output if how == "output" else _silence_query
    with ExitStack() as handles:
        for layer, chosen in silenced.items():
            handles.callback(hook(blocks[layer].attention, chosen).remove)
        yield


def _silence_output(attention: AttentionView, heads: list[int]) -> RemovableHandle:
    linear = next(linear for linear in attention.linears if linear.role == "o")
    columns = _head_rows(attention, heads)

    def hook(module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_zeroed(inputs[0], columns), *inputs[1:])

    return linear.module.register_forward_pre_hook(hook)


def _silence_query(attention: AttentionView, heads: list[int]) -> RemovableHandle:
    linear = next(linear for linear in attention.linears if linear.role in ("q", "qkv"))
    rows = _query_rows(linear)[_head_rows(attention, heads)]

    def hook(module: torch.nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return _zeroed(output, rows)

    return linear.module.register_forward_hook(hook)


def _head_rows(attention: AttentionView, heads: list[int]) -> Tensor:
    """Channels of these heads where all query heads lie one after the other."""
    return torch.cat([torch.arange(attention.head_dim) + head * attention.head_dim for head in heads])


def _query_rows(linear: LinearView) -> Tensor:
    """Rows of the queries in the output of a query projection, which may be fused with others."""
    return torch.arange(linear.out_features)[linear.rows.get("q", slice(None))]


def _zeroed(values: Tensor, channels: Tensor) -> Tensor:
    return values.index_fill(-1, channels.to(values.device), 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Masked:
    """What was measured with some heads silenced.

    heads        the silenced ones
    seed         of the draw, None for the top heads
    recall       share of the trials that were answered
    prose_nats   mean negative log-likelihood per token of ordinary text
    """

    heads: tuple[Head, ...]
    seed: int | None
    recall: float
    prose_nats: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskingResult:
    """What silencing heads did. `none` is the whole model; `top` and `at_random` are by number of heads.

    at_random   count -> one measurement per seed, paired: each on the same trials and text as the top heads
    """

    how: str
    trials: int
    none: Masked
    top: dict[int, Masked]
    at_random: dict[int, tuple[Masked, ...]]

    def recall_gap(self, count: int) -> tuple[float, ...]:
        """Per seed: recall without `count` random heads minus recall without the top `count`; above 0 is the claim."""
        return tuple(row.recall - self.top[count].recall for row in self.at_random[count])

    def prose_change(self, count: int) -> float:
        """Perplexity of ordinary text without the top `count` heads, as a factor of that of the whole model."""
        return float(torch.tensor(self.top[count].prose_nats - self.none.prose_nats, dtype=torch.float64).exp())

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return dataclasses.asdict(self)


def masking_experiment(
    model: PreTrainedModel,
    scores: HeadScores,
    trials: Sequence[Trial],
    counts: Sequence[int] = COUNTS,
    seeds: Sequence[int] = tuple(range(SEEDS)),
    *,
    how: How = "output",
    tokenizer: PreTrainedTokenizerBase | None = None,
    prose: CalibrationSet | None = None,
    spared: Collection[int] = (),
) -> MaskingResult:
    """Silence the top `count` heads, and as many random ones per seed, for each count.

    trials   others than those of the scores, or the top heads are chosen and judged by the same ones
    seeds    one draw each; a draw of more heads holds that of fewer
    prose    ordinary text; None: 8 pieces of 512 tokens of what comes with trimtab for calibration
    spared   layers from which no random head is drawn. A small model may not do without heads of its first layer,
             retrieval or not; what random heads of the others cost is then a separate question

    Raises ConfigError if the counts leave too few heads to draw from, or the scores are another model's.
    """
    scores.check_model(model)
    tokenizer = tokenizer or tokenizer_of(model)
    if not trials or not counts or min(counts) < 1:
        raise ConfigError(f"masking needs trials and counts of at least 1, not {len(trials)} trials and {counts}.")
    ranking = scores.ranking
    # sorted, so that a draw depends on which heads are the top ones and on nothing else
    others = sorted(head for head in ranking[max(counts) :] if head[0] not in spared)
    if len(others) < max(counts):
        raise ConfigError(
            f"{max(counts)} random heads outside of the top {max(counts)} do not exist: {len(ranking)} heads, of which "
            f"{len(others)} may be drawn."
        )
    if prose is None:
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        prose = CalibrationSet.from_text(None, tokenizer, sequences=8, length=min(512, context or 512))
    draws = {seed: random.Random(f"trimtab masking {seed}").sample(others, max(counts)) for seed in seeds}
    with progress("masking", 1 + len(counts) * (1 + len(seeds))) as advance:

        def measure(heads: Sequence[Head], seed: int | None = None) -> Masked:
            with mask_heads(model, heads, how):
                right = [answers(answer_of(model, tokenizer, trial, ANSWER_TOKENS), trial.answer) for trial in trials]
                nats = prose_nats(model, prose)
            advance("")
            return Masked(heads=tuple(heads), seed=seed, recall=fmean(right), prose_nats=nats)

        return MaskingResult(
            how=how,
            trials=len(trials),
            none=measure(()),
            top={count: measure(ranking[:count]) for count in counts},
            at_random={count: tuple(measure(draws[seed][:count], seed) for seed in seeds) for count in counts},
        )


def prose_nats(model: PreTrainedModel, prose: CalibrationSet) -> float:
    """Mean negative log-likelihood per token of text, in nats; padding does not count."""
    total, count = 0.0, 0
    with torch.inference_mode():
        for ids, mask in zip(prose.tokens, prose.mask, strict=True):
            row = ids[mask].to(model.device)[None]
            logits = model(input_ids=row, use_cache=False).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum"))
            count += row.shape[1] - 1
    return total / count
