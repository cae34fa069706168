"""How far a compressed model's next-token distributions are from the original's: they move before accuracy does."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trimtab.core.errors import BudgetError, ConfigError, DataError, NumericsError
from trimtab.core.progress import progress
from trimtab.evaluation import statistics
from trimtab.evaluation.base import Estimate
from trimtab.evaluation.caches.decoding import CHUNK, chunked_logits
from trimtab.evaluation.client import context_length, inference
from trimtab.evaluation.encoding import Encoder
from trimtab.evaluation.tasks._prose import held_out_prose, read_text
from trimtab.models import tokenizer_of

if TYPE_CHECKING:
    from trimtab.cache.base import CacheMethod

WINDOWS = 24
LENGTH = 256
MAX_BYTES = 1 << 30
_BATCH_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class NextTokens:
    """Next-token log-probabilities of one model on fixed windows of text, kept so that the model itself can go.

    tokens      [windows, length + 1] int64; the first of each is BOS
    log_probs   one [windows, length, vocabulary] float32 tensor per batch, natural log, on the CPU
    """

    tokens: Tensor
    log_probs: tuple[Tensor, ...]

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text: str | Path | None = None,
        windows: int = WINDOWS,
        length: int = LENGTH,
        seed: int = 0,
        max_bytes: int = MAX_BYTES,
    ) -> NextTokens:
        """Read the model's predictions on held-out prose, or on the file `text`. Memory is at most `max_bytes`.

        Raises BudgetError if the log-probabilities need more (the message says how many windows fit), DataError if
        the text has fewer than two windows.
        """
        tokens = window_tokens(model, tokenizer or tokenizer_of(model), text, windows, length, seed)
        vocabulary = int(model.config.get_text_config().vocab_size)
        per_window = (tokens.shape[1] - 1) * vocabulary * 4
        if tokens.shape[0] * per_window > max_bytes:
            raise BudgetError(
                f"log-probabilities of {tokens.shape[0]} windows of {tokens.shape[1] - 1} tokens over {vocabulary} "
                f"words take {tokens.shape[0] * per_window:,} bytes; max_bytes={max_bytes:,} holds "
                f"{max_bytes // per_window} windows. Ask for fewer, or give the reference model itself, which is "
                "then read batch by batch."
            )
        return cls(tokens, tuple(_read(model, tokens, "reference")))

    def bits_per_byte(self, window_bytes: Sequence[float]) -> Estimate:
        """The model's own figure, given the UTF-8 bytes of the text of each window."""
        read = torch.cat(self.log_probs).gather(2, self.tokens[:, 1:, None])[..., 0].double().sum(dim=1)
        return statistics.ratio_of_sums((-read / math.log(2)).tolist(), window_bytes)


def window_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Path | None,
    windows: int,
    length: int,
    seed: int,
) -> Tensor:
    """[windows, length + 1]: BOS, then adjoining pieces of the text, of which `windows` are drawn by the seed."""
    if windows < 2 or length < 1:
        raise ConfigError(f"fidelity needs at least 2 windows of 1 token, not {windows} of {length}.")
    length = min(length, context_length(model, tokenizer) or length)
    encoder = Encoder(tokenizer)
    ids = encoder.ids(held_out_prose() if text is None else read_text(text))
    whole = len(ids) // length
    if whole < 2:
        raise DataError(f"{text or 'the text'} has {len(ids)} tokens; two windows of {length} are the least.")
    chosen = sorted(random.Random(f"trimtab windows {seed}").sample(range(whole), min(windows, whole)))
    return torch.tensor([[encoder.start_token, *ids[i * length : (i + 1) * length]] for i in chosen])


def _read(
    model: PreTrainedModel, tokens: Tensor, description: str, cache: CacheMethod | None = None, chunk: int = CHUNK
) -> Iterator[Tensor]:
    """Log-probabilities [windows, length, vocabulary] of one batch of windows after the other, always cut alike."""
    size = max(1, _BATCH_TOKENS // tokens.shape[1])
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    if cache is not None:
        cache.new(model)  # may fit itself to the model, which may need gradients
    groups = torch.split(tokens, size)
    with progress(description, len(groups)) as advance:
        for group in groups:
            # not around the loop: two of these run in turn, and the mode that the second leaves would outlive both
            with inference(model):
                if cache is None:
                    logits = model(input_ids=group[:, :-1].to(model.device), **options).logits
                else:
                    read = chunked_logits(model, group[:, :-1].tolist(), cache.new(model), chunk=chunk)
                    logits = torch.cat([part for _, part in read], dim=1)
                log_probs = logits.float().log_softmax(dim=-1).cpu()
            if not bool(torch.isfinite(log_probs).all()):
                raise NumericsError(f"{type(model).__name__} gives NaN or infinite log-probabilities.")
            yield log_probs
            advance("")


@dataclass(frozen=True, slots=True)
class Divergence:
    """Sums over the tokens of each window, for estimates and for paired comparison of several models.

    tokens   tokens scored
    kl       sum_v p(v) (log p(v) - log q(v)), p the reference's, q the model's; nats
    agree    1 where both find the same token most likely
    gold     log p - log q of the token that the text has; nats
    nats     -log q of the token that the text has
    """

    tokens: tuple[float, ...]
    kl: tuple[float, ...]
    agree: tuple[float, ...]
    gold: tuple[float, ...]
    nats: tuple[float, ...]

    def estimates(self) -> dict[str, Estimate]:
        """Means per token with 95 % intervals over windows; see `fidelity`."""
        named = {"kl_nats_per_token": self.kl, "top1_agreement": self.agree, "gold_nats_change": self.gold}
        return {name: statistics.ratio_of_sums(sums, self.tokens) for name, sums in named.items()}

    def kl_difference(self, other: Divergence) -> Estimate:
        """KL per token of this model minus that of another on the same windows, paired; below zero: this is closer."""
        if self.tokens != other.tokens:
            raise DataError("a paired difference needs both models to be read on the same windows.")
        return statistics.ratio_of_sums([a - b for a, b in zip(self.kl, other.kl, strict=True)], self.tokens)


def divergence(
    model: PreTrainedModel,
    reference: PreTrainedModel | NextTokens,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    text: str | Path | None = None,
    windows: int = WINDOWS,
    length: int = LENGTH,
    seed: int = 0,
    cache: CacheMethod | None = None,
    chunk: int = CHUNK,
) -> Divergence:
    """What `fidelity` is made of, window by window; same arguments, and

    cache   the model reads its windows through a cache of this method, `chunk` tokens at a time; the reference does not

    Raises ConfigError if the vocabularies differ, NumericsError if a model gives NaN, DataError for a short text.
    """
    if isinstance(reference, NextTokens):
        tokens, theirs = reference.tokens, iter(reference.log_probs)
    else:
        tokens = window_tokens(model, tokenizer or tokenizer_of(reference), text, windows, length, seed)
        theirs = _read(reference, tokens, "reference")
    kl: list[float] = []
    agree: list[float] = []
    gold: list[float] = []
    nats: list[float] = []
    for ours, p in zip(_read(model, tokens, "fidelity", cache, chunk), theirs, strict=True):
        if ours.shape != p.shape:
            raise ConfigError(
                f"the model predicts {ours.shape[-1]} tokens and the reference {p.shape[-1]}; fidelity compares models "
                "of one vocabulary."
            )
        text_tokens = tokens[len(kl) : len(kl) + len(ours), 1:, None]
        gap = p - ours
        kl += (p.exp() * gap).sum(dim=-1).double().sum(dim=1).tolist()
        agree += (ours.argmax(dim=-1) == p.argmax(dim=-1)).double().sum(dim=1).tolist()
        gold += gap.gather(2, text_tokens)[..., 0].double().sum(dim=1).tolist()
        nats += (-ours.gather(2, text_tokens)[..., 0]).double().sum(dim=1).tolist()
    return Divergence((float(tokens.shape[1] - 1),) * len(kl), tuple(kl), tuple(agree), tuple(gold), tuple(nats))


def fidelity(
    model: PreTrainedModel,
    reference: PreTrainedModel | NextTokens,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    text: str | Path | None = None,
    windows: int = WINDOWS,
    length: int = LENGTH,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Faithfulness of `model` to `reference` per token of held-out prose, with 95 % intervals over windows.

    kl_nats_per_token   mean over tokens of KL(reference || model) of the next-token distributions
    top1_agreement      share of tokens at which both find the same token most likely
    gold_nats_change    mean increase of the negative log-likelihood of the text

    `reference` is a model, which is read batch by batch beside this one, or what `NextTokens.of` kept of it, whose
    windows are then used and the other options ignored. `text` is a UTF-8 file instead of the shipped prose.
    Raises what `divergence` raises.
    """
    found = divergence(model, reference, tokenizer=tokenizer, text=text, windows=windows, length=length, seed=seed)
    return found.estimates()
