"""Detection of retrieval heads: which heads look at the answer's tokens at the moment the model writes them.

Source: Wu et al. 2024 (arXiv:2404.15574), section 2 and their code. At decoding step t let i be the position that head
(layer, h) attends to most, over the whole row, and w the token that the model writes next. The head *copies* if i is
inside the answer and the prompt's token at i is w. Its score in a trial is

    (distinct positions of the answer that it copied) / (tokens of the answer)

and its score the mean over the trials that the model answered. Departures: the paper divides the set of copied tokens
by the needle, their code counts every copying step and so exceeds 1 where an answer repeats; distinct positions stay in
[0, 1]. A trial counts if ROUGE-1 recall of the answer is above one half, as in their code; an answer of one word must
be the first word of what is written.

The prompt but for its last token is read with the model's own attention. Weights are needed of one row per step only,
so eager attention runs in the decoding steps alone, whose rows are O(prompt) per head. In half precision many weights
of a row may tie, and the first counts: detect in float32.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from trimtab.cache._retrieval.scores import HEAD_THRESHOLD, HeadScores, TrialScore, head_layout
from trimtab.cache._retrieval.trials import make_trials, spread_depths, spread_lengths
from trimtab.core.errors import BudgetError, ConfigError, NumericsError, TargetError
from trimtab.core.progress import progress
from trimtab.models import info_of, tokenizer_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trimtab.cache._retrieval.trials import Trial

MAX_NEW_TOKENS = 50
ROUGE_RECALL = 0.5
LENGTHS, DEPTHS = 6, 5
"""Prompt lengths and needle depths of a detection that nobody has asked to be thorough; the paper's has 20 and 10."""
LONGEST = 4096
"""Longest prompt of one: the strongest heads show below 5,000 tokens, and attention rows of long prompts are slow."""


def detect_heads(
    model: PreTrainedModel,
    *,
    lengths: Sequence[int] | None = None,
    depths: Sequence[float] = spread_depths(DEPTHS),
    repeats: int = 1,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    threshold: float = HEAD_THRESHOLD,
) -> HeadScores:
    """Retrieval scores of all query heads, from needles of the small world in the prose that comes with trimtab.

        scores = tt.cache.detect_heads(model)
        scores.save("scores.json"); tt.cache.draw(scores, "scores.svg")
        cache = tt.cache.RetrievalHeads(scores="scores.json").new(model)

    lengths     of the prompts, in tokens; None: six, up to the model's context or 4,096. The paper's protocol is
                20 lengths, 10 depths and 3 repeats
    depths      how far into the prose the needle is, 0 to 1
    repeats     trials for each length and depth
    threshold   as in `detect`, whose errors this has too
    """
    tokenizer = tokenizer or tokenizer_of(model)
    if lengths is None:
        context = int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or LONGEST)
        lengths = spread_lengths(min(context, LONGEST), LENGTHS)
    trials = make_trials(tokenizer, lengths, depths=depths, repeats=repeats, seed=seed)
    return detect(model, trials, tokenizer=tokenizer, threshold=threshold)


def detect(
    model: PreTrainedModel,
    trials: Sequence[Trial],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    threshold: float = HEAD_THRESHOLD,
) -> HeadScores:
    """Scores of all query heads of `model` over `trials`.

    threshold   score above which a head is called a retrieval head; kept with the scores, it changes none of them

    Raises DataError if the model answered no trial (then no score is defined), BudgetError for a trial that does not
    fit the context, TargetError if the model cannot show its attention, NumericsError for NaN.
    """
    if not trials or max_new_tokens < 1:
        raise ConfigError(f"detection needs trials and max_new_tokens >= 1, not {len(trials)} and {max_new_tokens}.")
    tokenizer = tokenizer or tokenizer_of(model)
    layout = head_layout(model)
    found = []
    with progress("retrieval heads", len(trials)) as advance:
        for trial in trials:
            copied = torch.zeros(layout.layers, layout.heads, trial.span[1] - trial.span[0], dtype=torch.bool)

            def look(rows: tuple[Tensor, ...], token: int, copied: Tensor = copied, trial: Trial = trial) -> None:
                mark_copies(copied, attended(rows), token, trial.prompt, trial.span)

            text = answer_of(model, tokenizer, trial, max_new_tokens, look)
            found.append(TrialScore.of(trial.length, trial.depth, answers(text, trial.answer), copied))
            advance("")
    return HeadScores(
        model=info_of(model).source,
        fingerprint=layout.fingerprint,
        kv_heads=layout.kv_heads,
        layers=layout.layers,
        heads=layout.heads,
        threshold=threshold,
        trials=tuple(found),
    )


def attended(rows: Sequence[Tensor]) -> Tensor:
    """[layers, heads]: the position that each head attends to most, the first if several tie.

    rows   per layer [1, heads, 1, positions]: attention weights of the last token
    """
    if not all(bool(torch.isfinite(row).all()) for row in rows):
        raise NumericsError("attention weights are NaN or infinite.")
    return torch.stack([row[0, :, -1].argmax(dim=-1).cpu() for row in rows])


def mark_copies(copied: Tensor, position: Tensor, token: int, prompt: Sequence[int], span: tuple[int, int]) -> None:
    """Mark in `copied` [layers, heads, answer tokens] the heads whose `position` [layers, heads] copies `token`."""
    a, b = span
    for index in range(a, b):
        if prompt[index] == token:
            copied[:, :, index - a] |= position == index


def answer_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    trial: Trial,
    max_new_tokens: int = MAX_NEW_TOKENS,
    look: Callable[[tuple[Tensor, ...], int], None] | None = None,
) -> str:
    """The model's greedy answer, cut at the first stop string.

    look   called at each step with the attention rows of the layers and the token that is then written; None: decoding
           uses the model's own attention too
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = max_new_tokens if context is None else min(max_new_tokens, context - trial.length)
    if room < trial.span[1] - trial.span[0]:
        raise BudgetError(
            f"a prompt of {trial.length} tokens and an answer of {trial.span[1] - trial.span[0]} need more than the "
            f"model's context of {context} tokens or max_new_tokens={max_new_tokens}. Make shorter trials."
        )
    ends = _end_tokens(model, tokenizer)
    written: list[int] = []
    text = ""
    with torch.inference_mode():
        # plain layers also where a family's attention slides, so that a row's index is a position in the prompt
        past = DynamicCache()
        ids = torch.tensor([trial.prompt], device=model.device)
        _forward(model, ids[:, :-1], past)
        last = ids[:, -1:]
        with eager_attention(model, look is not None):
            while len(written) < room:
                output = _forward(model, last, past, **({"output_attentions": True} if look else {}))
                last = output.logits[:, -1:].argmax(dim=-1)
                token = int(last)
                if look:
                    look(_rows(model, output, trial.length + len(written)), token)
                if token in ends:
                    break
                written.append(token)
                text = str(tokenizer.decode(written, clean_up_tokenization_spaces=False))
                if any(stop in text for stop in trial.stops):
                    break
    return text[: min((text.index(stop) for stop in trial.stops if stop in text), default=len(text))]


def answers(text: str, answer: str) -> bool:
    """Whether `text` gives the answer: its ROUGE-1 recall is above one half; one word must be the first one."""
    wanted, said = _words(answer), _words(text)
    if len(wanted) < 2:
        return said[:1] == wanted
    return sum((Counter(wanted) & Counter(said)).values()) > ROUGE_RECALL * len(wanted)


@contextmanager
def eager_attention(model: PreTrainedModel, wanted: bool = True) -> Iterator[None]:
    """Eager attention, the one that gives weights, if `wanted`; the attention that the model had before afterwards."""
    before = model.config._attn_implementation
    if not wanted or before == "eager":
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _forward(model: PreTrainedModel, ids: Tensor, past: DynamicCache, **options: Any) -> Any:
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    return model(input_ids=ids, past_key_values=past, use_cache=True, **options)


def _rows(model: PreTrainedModel, output: Any, positions: int) -> tuple[Tensor, ...]:
    rows: tuple[Tensor, ...] | None = output.attentions
    if not rows or any(row is None or row.shape[-1] != positions for row in rows):
        shapes = None if not rows else [None if row is None else list(row.shape) for row in rows]
        raise TargetError(
            f"{type(model).__name__} does not show one attention row of {positions} positions per layer, but {shapes}."
        )
    return rows


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = {own} if isinstance(own, int) else set(own or ())
    return ends if tokenizer.eos_token_id is None else ends | {int(tokenizer.eos_token_id)}


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
