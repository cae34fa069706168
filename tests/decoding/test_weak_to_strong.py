"""Weak-to-strong search: on tables against best-of-N and plain sampling, ended texts, drafts, the front doors."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import trimtab as tt
from trimtab.core.errors import CompositionError, ConfigError
from trimtab.decoding import Decoder, Sampling, Speculative
from trimtab.decoding._distribution import Distribution, Warp
from trimtab.decoding._loop import Loop, NoDraft, Text
from trimtab.decoding._proposers.chain import Chain
from trimtab.decoding._reader import Rows
from trimtab.decoding._rules.token import SampleRule, TokenRule
from trimtab.decoding._search.chunks import ChunkSearch
from trimtab.decoding._search.likelihood import Likelihood, LogRatio, TokenCoder
from trimtab.decoding.eft import Eft
from trimtab.decoding.weak_to_strong import WeakToStrong
from trimtab.evaluation.exactness import TableModel
from trimtab.evaluation.exactness.table import TableReader
from trimtab.models.random import random_model

SAMPLED = Distribution([Warp(Sampling(temperature=1.0))])
LENGTH = 6
REWARD = torch.tensor([1.0, 0.0, -0.5, 0.3, -1.0])
BASE = TableModel(0)


class Tilted(TableModel):
    """log p + reward of the token, normalised: what tuning makes of a table for an additive reward."""

    def rows(self, new: Sequence[Sequence[int]]) -> Rows:
        return Rows((super().rows(new).logits + REWARD).log_softmax(-1))


WEAK, TUNED = TableModel(1), Tilted(1)


def likelihood(model: TableModel) -> Likelihood:
    return Likelihood(lambda rows: TableReader(model, rows), TokenCoder())


def new_loop(prompts: int, *, drafting: bool = False) -> Loop:
    if not drafting:
        return Loop(TableReader(BASE, prompts), SAMPLED, NoDraft(), SampleRule())
    chain = Chain(lambda rows: TableReader(WEAK, rows), SAMPLED, 3)
    return Loop(TableReader(BASE, prompts), SAMPLED, chain, TokenRule())


def search(
    width: int,
    successors: int,
    chunk: int | None,
    *,
    prompts: int = 60,
    tuned: TableModel = TUNED,
    seed: int = 0,
    drafting: bool = False,
    stops: tuple[int, ...] = (),
    dedupe: bool = True,
) -> list[list[int]]:
    sampling = Sampling(temperature=1.0, max_new_tokens=LENGTH, seed=seed, stop_tokens=stops)
    scorer = LogRatio(likelihood(tuned), likelihood(WEAK))
    method = ChunkSearch(width, successors, chunk, dedupe)
    return method.run(new_loop(prompts, drafting=drafting), scorer, [[0]] * prompts, sampling).tokens


def mean_reward(texts: Sequence[Sequence[int]]) -> float:
    return sum(float(REWARD[list(text)].sum()) for text in texts) / len(texts)


# Tables.


@pytest.mark.parametrize("drafting", [False, True])
def test_search_by_chunks_beats_best_of_n_beats_one(drafting: bool) -> None:
    """At equal samples. The additive reward is known, and the pair of tables knows it up to a constant per step."""
    chunks = mean_reward(search(4, 4, 1, drafting=drafting))
    best = mean_reward(search(1, 16, None, drafting=drafting))
    one = mean_reward(search(1, 1, None, drafting=drafting))
    assert chunks > best + 0.3
    assert best > one + 0.3


def test_a_pair_without_a_difference_leaves_plain_sampling() -> None:
    prompts, places = 40, 2 * 3
    found = search(2, 3, 2, tuned=WEAK, prompts=prompts)
    sampling = Sampling(temperature=1.0, max_new_tokens=LENGTH)
    plain = new_loop(prompts * places).run([[0]] * prompts * places, sampling)
    assert found == plain.tokens[::places]


def test_one_chunk_without_end_is_best_of_n() -> None:
    """The same generators, so the same samples; chosen by scores computed from the tables."""
    prompts, n = 30, 5
    sampling = Sampling(temperature=1.0, max_new_tokens=LENGTH)
    samples = new_loop(prompts * n).run([[0]] * prompts * n, sampling).tokens
    wanted = []
    for prompt in range(prompts):
        own = samples[prompt * n : (prompt + 1) * n]
        wanted.append(max(own, key=lambda text: score_by_hand(text)))
    assert search(1, n, None, prompts=prompts) == wanted


def score_by_hand(text: Sequence[int]) -> float:
    total = 0.0
    for place, token in enumerate(text):
        for sign, model in ((1, TUNED), (-1, WEAK)):
            row: Tensor = model.rows([text[:place]]).logits[0]
            total += sign * float(row.log_softmax(-1)[token])
    return total


def test_one_text_and_one_successor_is_plain_sampling() -> None:
    plain = new_loop(20).run([[0]] * 20, Sampling(temperature=1.0, max_new_tokens=LENGTH))
    assert search(1, 1, 2, prompts=20) == plain.tokens


def test_prompts_do_not_influence_each_other() -> None:
    assert search(2, 2, 2, prompts=5, stops=(3,))[0] == search(2, 2, 2, prompts=1, stops=(3,))[0]


def test_the_ledger_counts_all_that_was_tried() -> None:
    sampling = Sampling(temperature=1.0, max_new_tokens=LENGTH)
    scorer = LogRatio(likelihood(TUNED), likelihood(WEAK))
    done = ChunkSearch(2, 3, 2).run(new_loop(4), scorer, [[0]] * 4, sampling)
    assert done.ledger.committed == 4 * 2 * 3 * LENGTH
    assert done.ledger.score_forwards == 2 * 3
    assert done.finishes == ["length"] * 4


class Ended:
    """Likes best what has ended, then what has most tokens 0."""

    forwards = 0

    def start(self, texts: Sequence[Text]) -> None: ...

    def select(self, rows: Sequence[int]) -> None: ...

    def score(self, texts: Sequence[Text]) -> list[float]:
        return [100.0 * (text.finish == "stop_token") + text.new.count(0) for text in texts]


def test_an_ended_text_stands_once_among_the_candidates() -> None:
    """With copies, one ended text fills the beam and ends the search; without, the others go on until their end."""
    sampling = Sampling(temperature=1.0, max_new_tokens=40, stop_tokens=(3,))
    rounds = {}
    for dedupe in (False, True):
        loop = new_loop(30)
        ChunkSearch(3, 3, 1, dedupe).run(loop, Ended(), [[0]] * 30, sampling)
        rounds[dedupe] = loop.ledger.rounds
    assert rounds[True] > rounds[False]


def test_ended_texts_are_followed_to_the_end() -> None:
    assert all(text[-1] == 3 or len(text) == LENGTH for text in search(2, 2, 2, stops=(3,)))


# Models.


@pytest.fixture(scope="module")
def mini() -> PreTrainedModel:
    return tt.load("ref-mini", dtype=torch.float32)


def shaken(model: str, seed: int) -> PreTrainedModel:
    other = tt.load(model, dtype=torch.float32)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
            parameter.add_(0.02 * parameter.std() * noise)
    return other


def test_search_on_a_model_with_drafts(mini: PreTrainedModel) -> None:
    tokenizer = tt.models.tokenizer_of(mini)
    prompts = [tokenizer(text)["input_ids"] for text in ("The old house", "Review: The room of this inn")]
    method = WeakToStrong(tuned="other", untuned="same", width=2, successors=2, chunk=3)
    named = {"other": shaken("ref-mini", 1), "same": mini}
    sampling = Sampling(temperature=0.7, top_k=50, max_new_tokens=8)
    found = Decoder(mini, [method, Speculative(draft="self:8bit", depth=3)], drafts=named, adapt=False)
    done = found.generate(prompts, sampling)
    assert [len(tokens) for tokens in done.tokens] == [8, 8]
    assert sum(done.ledger.accepted_by_depth) > 0
    assert done.ledger.committed == 2 * 4 * 8
    again = found.generate(prompts, sampling)
    assert again.tokens == done.tokens


def test_as_custom_generate(mini: PreTrainedModel) -> None:
    method = WeakToStrong(tuned="ref-mini", untuned="ref-mini", width=2, successors=1, chunk=2)
    torch.manual_seed(0)
    found = mini.generate(torch.tensor([[5, 6]]), custom_generate=method, do_sample=True, max_new_tokens=4)  # type: ignore[operator]
    assert found.shape == (1, 6)


def test_refuses_temperature_0(mini: PreTrainedModel) -> None:
    decoder = Decoder(mini, [WeakToStrong(tuned="a", untuned="a")], drafts={"a": mini})
    with pytest.raises(ConfigError, match="at temperature 0 all are the same"):
        decoder.generate([[5]], Sampling())


def test_two_searches_are_refused(mini: PreTrainedModel) -> None:
    method = WeakToStrong(tuned="a", untuned="a")
    with pytest.raises(CompositionError, match="each bring their own search"):
        Decoder(mini, [method, method])


def test_an_unknown_model_is_an_error_that_names_it(mini: PreTrainedModel) -> None:
    decoder = Decoder(mini, [WeakToStrong(tuned="ref-min", untuned="ref-mini")])
    with pytest.raises(ConfigError, match="unknown model 'ref-min'"):
        decoder.generate([[5]], Sampling(temperature=1.0))


def test_search_composes_with_the_difference_of_logits(mini: PreTrainedModel) -> None:
    named = {"other": shaken("ref-mini", 1), "same": mini}
    methods = [Eft(tuned="other", untuned="same"), WeakToStrong(tuned="other", untuned="same", width=2, successors=2)]
    done = Decoder(mini, methods, drafts=named).generate([[5, 6]], Sampling(temperature=1.0, max_new_tokens=6))
    assert len(done.tokens[0]) == 6


def test_a_scorer_without_tokenizer_and_with_other_tokens_is_refused(mini: PreTrainedModel) -> None:
    other = random_model("llama")
    decoder = Decoder(mini, [WeakToStrong(tuned="a", untuned="a")], drafts={"a": other})
    with pytest.raises(ConfigError, match="tokenizer"):
        decoder.generate([[5]], Sampling(temperature=1.0))
