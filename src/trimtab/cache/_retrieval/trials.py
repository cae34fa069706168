"""Trials for the detection of retrieval heads: a needle somewhere in a haystack of prose, then a question about it.

Source: Wu et al. 2024 (arXiv:2404.15574), section 2. Departures: the needle is drawn afresh for each trial, since the
world has as many as are asked for, where they reuse three; the prompt has exactly the length that is asked for, where
theirs leaves 200 tokens free; the answer is found by exact token ids, where their code takes the first window of which
90 % of the ids are in the needle.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

from trimtab.core.errors import ConfigError, DataError
from trimtab.world import recall
from trimtab.world.split import generator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LENGTHS = 20
DEPTHS = 10
REPEATS = 3
RECORDS = 8
_QUOTES = "\"'”’)]»_ "
_SENTENCE_END = (".", "!", "?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Needle:
    """A passage that holds an answer, and the question for it. The texts are used as they are, white space included.

    before, answer, after   the passage is these three in turn; only `answer` is looked for
    question                ends the prompt; the model's greedy continuation is its answer
    stops                   strings that end an answer
    """

    before: str
    answer: str
    after: str
    question: str
    stops: tuple[str, ...] = ("\n",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One prompt.

    prompt   token ids, those of the question last
    span     [a, b): where the answer stands in them
    answer   its text
    stops    strings that end an answer
    depth    how far into the haystack the needle was asked to be, 0 to 1; it is moved back to the end of a sentence
    """

    prompt: tuple[int, ...]
    span: tuple[int, int]
    answer: str
    stops: tuple[str, ...]
    depth: float

    @property
    def length(self) -> int:
        return len(self.prompt)


def recall_needles(seed: int = 0, *, records: int = RECORDS) -> Iterator[Needle]:
    """Needles without end: a list of records of the small world, one of which is asked for.

    From the train split, so none of them is an item of the evaluation. Values are words, pairs of words and numbers in
    turn, written as a list and in sentences in turn.
    """
    rng = generator("retrieval heads", "train", seed)
    for kind, form in itertools.cycle(itertools.product(("pair", "code", "word"), ("list", "sentence"))):
        layout = recall.FORMS[form]
        known = recall.draw_records(rng, "train", records, kind)
        asked = rng.randrange(records)
        texts = [layout.record.format(k=key) + f" {value}" for key, value in known]
        key, value = known[asked]
        listing = f"\n{layout.opening}" + layout.between.join([*texts[:asked], layout.record.format(k=key)])
        yield Needle(
            before=listing,
            answer=f" {value}",
            after="".join(layout.between + text for text in texts[asked + 1 :]) + layout.closing,
            question=f"\n{layout.asking}{layout.record.format(k=key)}",
            stops=(",", ".", "\n"),
        )


def calibration_prose() -> str:
    """The public-domain prose that trimtab ships for calibration; nothing is evaluated on it."""
    return (resources.files("trimtab") / "assets" / "text" / "prose_calibration.txt").read_text(encoding="utf-8")


def spread_lengths(context: int, count: int = LENGTHS) -> tuple[int, ...]:
    """`count` prompt lengths in equal steps from an eighth of the context to all but 64 tokens of it."""
    first, last = max(context // 8, 1), context - 64
    if count < 1 or last < first:
        raise ConfigError(f"no {count} prompt lengths can be spread over a context of {context} tokens.")
    return tuple(round(first + (last - first) * i / max(count - 1, 1)) for i in range(count))


def spread_depths(count: int = DEPTHS) -> tuple[float, ...]:
    """`count` depths in equal steps from 0 to 1."""
    return tuple(i / max(count - 1, 1) for i in range(count))


def make_trials(
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int],
    *,
    depths: Sequence[float] = spread_depths(),
    repeats: int = REPEATS,
    needles: Sequence[Needle] | None = None,
    haystack: str | None = None,
    seed: int = 0,
) -> tuple[Trial, ...]:
    """`repeats` trials for each length and depth, each in a piece of the haystack from a random place.

    lengths    of the prompts, in tokens, question included
    needles    taken in turn; None: records of the small world, others for each trial
    haystack   prose; None: what comes with trimtab for calibration

    Raises ConfigError for a depth outside of [0, 1], DataError if a length is too short for its needle or the haystack
    for a length.
    """
    if not lengths or not depths or repeats < 1:
        raise ConfigError(f"trials need a length, a depth and a repeat, not {lengths}, {depths} and {repeats}.")
    if wrong := [depth for depth in depths if not 0 <= depth <= 1]:
        raise ConfigError(f"depth {wrong[0]} of a needle is not in [0, 1].")
    if needles is not None and not needles:
        raise ConfigError("an empty list of needles makes no trials; leave it out for records of the small world.")
    hay = _ids(tokenizer, calibration_prose() if haystack is None else haystack)
    ends = _sentence_ends(tokenizer, hay)
    rng = random.Random(f"trimtab haystack {seed}")
    supply = itertools.cycle(needles) if needles else recall_needles(seed)
    cells = itertools.product(range(repeats), lengths, depths)
    return tuple(_trial(tokenizer, next(supply), hay, ends, length, depth, rng) for _, length, depth in cells)


def _trial(
    tokenizer: PreTrainedTokenizerBase,
    needle: Needle,
    hay: list[int],
    ends: list[bool],
    length: int,
    depth: float,
    rng: random.Random,
) -> Trial:
    start = [t for t in tokenizer("")["input_ids"] if t == tokenizer.bos_token_id]
    passage, span = locate_answer(tokenizer, needle)
    question = _ids(tokenizer, needle.question)
    room = length - len(start) - len(passage) - len(question)
    if room < 0:
        raise DataError(
            f"a prompt of {length} tokens cannot hold a needle of {len(passage)} and a question of {len(question)}; "
            f"the shortest that can has {length - room}."
        )
    if room > len(hay):
        raise DataError(f"the haystack has {len(hay)} tokens, and a prompt of {length} takes {room}. Give more.")
    begin = rng.randrange(len(hay) - room + 1)
    at = round(room * depth)
    while at > 0 and not ends[begin + at - 1]:
        at -= 1
    prompt = start + hay[begin : begin + at] + passage + hay[begin + at : begin + room] + question
    offset = len(start) + at
    return Trial(
        prompt=tuple(prompt),
        span=(offset + span[0], offset + span[1]),
        answer=needle.answer,
        stops=needle.stops,
        depth=depth,
    )


def locate_answer(tokenizer: PreTrainedTokenizerBase, needle: Needle) -> tuple[list[int], tuple[int, int]]:
    """Token ids of the needle's passage, and where [a, b) the answer stands in them.

    The ids of the answer alone are looked for, and of several places the nearest to where the text before it ends is
    taken. A tokenizer that writes the answer otherwise in its place gets the fewest tokens whose text covers it.
    Raises DataError for an answer without tokens.
    """
    passage, answer = _ids(tokenizer, needle.before + needle.answer + needle.after), _ids(tokenizer, needle.answer)
    if not needle.answer.strip() or not answer:
        raise DataError(f"a needle needs an answer, not {needle.answer!r}: ...{needle.before[-40:]!r}")
    expected = len(_ids(tokenizer, needle.before))
    size = len(answer)
    places = [i for i in range(len(passage) - size + 1) if passage[i : i + size] == answer]
    if places:
        a = min(places, key=lambda place: abs(place - expected))
        return passage, (a, a + size)
    first = len(needle.before) + len(needle.answer) - len(needle.answer.lstrip())
    last = len(needle.before) + len(needle.answer.rstrip())
    lengths = [len(_text(tokenizer, passage[:n])) for n in range(len(passage) + 1)]
    a = max(n for n in range(len(passage)) if lengths[n] <= first)
    b = min((n for n in range(a + 1, len(passage) + 1) if lengths[n] >= last), default=len(passage))
    return passage, (a, b)


def _sentence_ends(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[bool]:
    """Whether a sentence or a line ends with each token."""
    known = {token: _text(tokenizer, [token]) for token in set(ids)}
    ends = {token: "\n" in text or text.rstrip(_QUOTES).endswith(_SENTENCE_END) for token, text in known.items()}
    return [ends[token] for token in ids]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
