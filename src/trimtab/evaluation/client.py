"""One way to ask a local model: log-likelihoods, greedy text and scores of long texts, in batches that change nothing.

Scored rows are padded on the right, where causal attention cannot see it; prompts to be continued are padded on the
left and masked. Batch size and order change no log-probability by more than rounding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from trimtab.core.errors import BudgetError, ConfigError, NumericsError
from trimtab.core.progress import progress
from trimtab.evaluation.base import Generate, LogLikelihood, Request, Response
from trimtab.evaluation.caches.decoding import CHUNK, chunked_logits
from trimtab.evaluation.encoding import Encoder, Forward, Scored, batches, forwards
from trimtab.evaluation.stop_strings import cut_at_stop
from trimtab.tensors.sparse_inputs import every_token_sparse

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trimtab.cache.base import CacheMethod

DEFAULT_WINDOW = 2048
_LOGITS_PER_BATCH = 1 << 25  # numbers; 128 MiB in float32


@dataclass(slots=True)
class _Sum:
    """What has been read for one request so far."""

    log_prob: float = 0.0
    tokens: int = 0
    is_greedy: bool = True
    next_text: str | None = None


class LocalClient:
    """Asks a transformers causal language model in this process.

    batch_tokens   tokens per forward pass, padding included; smaller for large vocabularies, whose logits count most
    window         tokens a window of `Score` reads at once; default min(context, 2,048)
    stride         tokens each further window scores; default half of the window
    overflow       what to do with a prompt that does not fit the context: "error" raises BudgetError, "truncate"
                   drops tokens on its left and counts the prompt in `truncated`
    context        most tokens the model reads; default from its configuration
    cache          keep keys and values by this method: every batch has a new cache, and texts are read through it in
                   chunks, because a single forward pass attends to exact keys and would not show what the cache loses
    chunk          tokens per forward pass with a cache
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_tokens: int = 2048,
        window: int | None = None,
        stride: int | None = None,
        overflow: Literal["error", "truncate"] = "error",
        context: int | None = None,
        cache: CacheMethod | None = None,
        chunk: int = CHUNK,
    ) -> None:
        if batch_tokens < 1:
            raise ConfigError(f"batch_tokens must be at least 1, but is {batch_tokens}.")
        self.model, self.tokenizer = model, tokenizer
        self.encoder = Encoder(tokenizer)
        self.context = context or context_length(model, tokenizer)
        self.window = min(window or DEFAULT_WINDOW, self.context or DEFAULT_WINDOW)
        self.stride = stride or max(1, self.window // 2)
        vocabulary = int(model.config.get_text_config().vocab_size)
        self.batch_tokens = max(1, min(batch_tokens, _LOGITS_PER_BATCH // vocabulary))
        self.overflow = overflow
        self.truncated = 0
        self.cache, self.chunk = cache, chunk
        if cache is not None:
            cache.new(model)  # refuses, or fits itself, before anything is asked
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    @property
    def piecewise(self) -> int:
        """Continuations that could not be encoded jointly with their context."""
        return self.encoder.piecewise

    def run(self, requests: Sequence[Request], description: str = "asking") -> list[Response]:
        """Responses in the order of the requests.

        Raises BudgetError for a prompt that does not fit the context, DataError for an empty continuation and
        NumericsError if the model gives NaN.
        """
        scored: list[Scored] = []
        generate: list[tuple[int, Generate]] = []
        for index, request in enumerate(requests):
            if isinstance(request, Generate):
                generate.append((index, request))
            elif isinstance(request, LogLikelihood):
                item = self.encoder.continuation(index, request.context, request.continuation, request.ends)
                scored.append(self._fitted(item, request))
            else:
                scored += self.encoder.windows(index, request.text, self.window, self.stride)
        prompts = [(index, request, self._prompt(request)) for index, request in generate]
        groups = list(batches(forwards(scored), self.batch_tokens))
        turns = list(self._turns(prompts))
        answers: dict[int, Response] = {}
        with inference(self.model), progress(description, len(groups) + len(turns)) as advance:
            answers |= self._score(groups, advance)
            for turn in turns:
                answers |= self._generate(turn)
                advance("")
        empty = Response(is_greedy=True)  # a text without a token
        return [answers.get(index, empty) for index in range(len(requests))]

    def _fitted(self, item: Scored, request: LogLikelihood) -> Scored:
        excess = len(item.inputs) - self.context if self.context else 0
        if excess <= 0:
            return item
        if self.overflow == "error" or item.start - excess < 1:
            raise BudgetError(
                f"a prompt of {item.start} tokens with a continuation of {len(item.ids) - item.start} does not fit "
                f"the model's context of {self.context}: {request.context[:60]!r}..."
            )
        self.truncated += 1
        return Scored(item.request, item.ids[excess:], item.start - excess, item.ends)

    def _prompt(self, request: Generate) -> list[int]:
        ids = self.encoder.prompt(request.prompt)
        if request.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, but is {request.max_new_tokens}.")
        excess = len(ids) + request.max_new_tokens - self.context if self.context else 0
        if excess > 0 and self.overflow == "truncate" and excess < len(ids):
            self.truncated += 1
            return ids[excess:]
        if excess > 0:
            raise BudgetError(
                f"a prompt of {len(ids)} tokens and max_new_tokens={request.max_new_tokens} do not fit the model's "
                f"context of {self.context}: {request.prompt[:60]!r}..."
            )
        return ids

    def _score(self, groups: Sequence[list[Forward]], advance: Callable[[str], None]) -> dict[int, Response]:
        sums: dict[int, _Sum] = {}
        for group in groups:
            self._score_batch(group, sums)
            advance("")
        return {i: Response(s.log_prob, s.tokens, s.is_greedy, next_text=s.next_text) for i, s in sums.items()}

    def _score_batch(self, group: list[Forward], sums: dict[int, _Sum]) -> None:
        places: list[tuple[int, int, int]] = []  # row, position of the logits, token to score (-1: none)
        spans: list[tuple[Scored, int, int]] = []
        for row, forward in enumerate(group):
            for item in forward.served:
                first = len(places)
                places += [(row, item.start - 1 + k, token) for k, token in enumerate(item.ids[item.start :])]
                spans.append((item, first, len(places)))
                if item.ends:
                    places.append((row, len(item.ids) - 1, -1))
        device = self.model.device
        rows, positions, targets = torch.tensor(places, device=device).unbind(dim=1)
        kept, position = torch.unique(positions, return_inverse=True)
        logits = self._logits(group, kept)[rows, position].float()
        best = logits.argmax(dim=-1)
        log_probs = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0] - logits.logsumexp(dim=-1)
        if not bool(torch.isfinite(log_probs).all()):
            raise NumericsError(f"{type(self.model).__name__} gives NaN or infinite log-probabilities.")
        hits, log_probs, best = (best == targets).cpu(), log_probs.double().cpu(), best.cpu()
        for item, first, last in spans:
            total = sums.setdefault(item.request, _Sum())
            total.log_prob += float(log_probs[first:last].sum())
            total.tokens += last - first
            total.is_greedy &= bool(hits[first:last].all())
            if item.ends:
                total.next_text = self._next_text(item.ids, int(best[last]))

    def _logits(self, group: list[Forward], kept: Tensor) -> Tensor:
        """[rows, kept positions, vocabulary]. Padding repeats the last token: it is never read."""
        width = len(group[0].inputs)
        if self.cache is not None:
            return self._cached_logits([row.inputs for row in group], kept, self.cache)
        padded = [row.inputs + (row.inputs[-1],) * (width - len(row.inputs)) for row in group]
        ids = torch.tensor(padded, device=self.model.device)
        if self._keeps_logits:
            logits: Tensor = self.model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits
            return logits
        logits = self.model(input_ids=ids, use_cache=False).logits
        return logits[:, kept]

    def _cached_logits(self, rows: list[tuple[int, ...]], kept: Tensor, cache: CacheMethod) -> Tensor:
        """The same, each token given what the cache has kept of the chunks before; zeros past the end of a row."""
        parts = []
        for begin, logits in chunked_logits(self.model, rows, cache.new(self.model), chunk=self.chunk):
            own = kept[(kept >= begin) & (kept < begin + logits.shape[1])] - begin
            part = logits.new_zeros((len(rows), len(own), logits.shape[2]))
            part[: logits.shape[0]] = logits[:, own]
            parts.append(part)
        return torch.cat(parts, dim=1)

    def _next_text(self, ids: tuple[int, ...], token: int) -> str:
        return self._text_after(list(ids), [token])

    def _text_after(self, ids: list[int], new: list[int]) -> str:
        """Text that `new` adds. Some tokenizers drop the space of a first token, so a few before it are decoded too."""
        before = ids[-4:]
        whole = _decode(self.tokenizer, before + new)
        return whole[len(_decode(self.tokenizer, before)) :]

    def _turns(self, prompts: list[tuple[int, Generate, list[int]]]) -> Iterator[list[tuple[int, Generate, list[int]]]]:
        """Prompts of similar length that are continued together, by the same number of tokens."""
        turn: list[tuple[int, Generate, list[int]]] = []
        for entry in sorted(prompts, key=lambda e: (e[1].max_new_tokens, len(e[2])), reverse=True):
            room = turn and turn[0][1].max_new_tokens == entry[1].max_new_tokens
            width = (len(turn[0][2]) + entry[1].max_new_tokens) * (len(turn) + 1) if turn else 0
            if turn and (not room or width > self.batch_tokens):
                yield turn
                turn = []
            turn.append(entry)
        if turn:
            yield turn

    def _generate(self, turn: list[tuple[int, Generate, list[int]]]) -> dict[int, Response]:
        width = max(len(ids) for _, _, ids in turn)
        padded = [[0] * (width - len(ids)) + ids for _, _, ids in turn]
        mask = [[0] * (width - len(ids)) + [1] * len(ids) for _, _, ids in turn]
        device = self.model.device
        ends = self._end_tokens()
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else (ends or [0])[0]
        # Every option that could bend greedy choice is stated, because unset ones come from the model's own defaults.
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=turn[0][1].max_new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            eos_token_id=ends or None,
            pad_token_id=pad,
            prefill_chunk_size=None if self.cache is None else self.chunk,
        )
        own = {} if self.cache is None else {"past_key_values": self.cache.new(self.model)}
        stopping = _Stops(self, [request.stop for _, request, _ in turn], width)
        ids = torch.tensor(padded, device=device)
        output = self.model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.tensor(mask, device=device),
            generation_config=config,
            stopping_criteria=[stopping],
            **own,
        )
        answers = {}
        for (index, request, prompt), row, length in zip(
            turn, output[:, width:].tolist(), stopping.lengths, strict=True
        ):
            written = _until(row[:length], set(ends))
            text = cut_at_stop(self._text_after(prompt, written), request.stop)
            answers[index] = Response(tokens=len(written), text=text)
        return answers

    def _end_tokens(self) -> list[int]:
        own = getattr(self.model.generation_config, "eos_token_id", None)
        found = [own] if isinstance(own, int) else list(own or [])
        if self.tokenizer.eos_token_id is not None:
            found.append(int(self.tokenizer.eos_token_id))
        return sorted(set(found))


class _Stops(StoppingCriteria):
    """Rows whose new text holds one of their stop strings; `lengths` is where they did (None: not yet)."""

    def __init__(self, client: LocalClient, stops: list[tuple[str, ...]], width: int) -> None:
        self.client, self.stops, self.width = client, stops, width
        self.lengths: list[int | None] = [None] * len(stops)
        # A token has at least one byte, so a stop string lies within as many tokens as it has bytes.
        self.reach = [max((len(stop.encode()) for stop in row), default=0) + 4 for row in stops]

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        for i, row in enumerate(input_ids[:, self.width :].tolist()):
            if self.lengths[i] is None:
                tail = _decode(self.client.tokenizer, row[-self.reach[i] :])
                if any(stop in tail for stop in self.stops[i] if stop):
                    self.lengths[i] = len(row)
        done = [length is not None for length in self.lengths]
        return torch.tensor(done, device=input_ids.device)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _until(row: list[int], ends: set[int]) -> list[int]:
    for at, token in enumerate(row):
        if token in ends:
            return row[:at]
    return row


def context_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Most tokens the model reads at once; None if neither its configuration nor its tokenizer says."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length"):
        if isinstance(length := getattr(config, name, None), int):
            return length
    length = int(tokenizer.model_max_length)
    return length if length < 1_000_000_000 else None


@contextmanager
def inference(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients, and the mode the model had before afterwards.

    Every token is computed as a decoded one is, also those of a prompt that a layer would otherwise read densely.
    """
    training = model.training
    model.train(False)
    try:
        with torch.inference_mode(), every_token_sparse():
            yield
    finally:
        model.train(training)
