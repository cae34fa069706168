"""The loop step by step: the same law as in one go, texts that wait for others, and caches of chosen texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from transformers import PreTrainedModel

from trimtab.core.errors import DataError
from trimtab.decoding import Sampling
from trimtab.decoding._decoder import exact_cache
from trimtab.decoding._distribution import Distribution, Warp
from trimtab.decoding._loop import Decode, Generation, Loop, NoDraft, OnTokens
from trimtab.decoding._proposers.chain import Chain
from trimtab.decoding._reader import ModelReader, Reader
from trimtab.decoding._rules.token import GreedyRule, SampleRule, TokenRule
from trimtab.evaluation.exactness import TableModel, check_pairs, exact_pairs
from trimtab.evaluation.exactness.table import TableReader
from trimtab.models.random import random_model

SAMPLED = Distribution([Warp(Sampling(temperature=1.0))])
GREEDY = Distribution([Warp(Sampling())])
TARGET, DRAFT = TableModel(0), TableModel(1)
PROMPTS = [[5, 6, 7, 8, 9], [10], [11, 12, 13]]


class Steps(Loop):
    """`run`, but in chunks of one token, with the texts turned around in between."""

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        decode: Decode | None = None,
        on_tokens: OnTokens | None = None,
    ) -> Generation:
        self.start(prompts, sampling, decode=decode)
        while any(text.finish is None for text in self.texts):
            self.advance(1)
            self.select(range(len(self.texts))[::-1])
        return self.generation()


def table_loop(kind: type[Loop], rows: int, *, drafting: bool = True) -> Loop:
    chain = Chain(lambda n: TableReader(DRAFT, n), SAMPLED, 2)
    proposer, rule = (chain, TokenRule()) if drafting else (NoDraft(), SampleRule())
    return kind(TableReader(TARGET, rows), SAMPLED, proposer, rule)


def of_model(
    model: PreTrainedModel, draft: PreTrainedModel, made: list[ModelReader], *, greedy: bool = False
) -> tuple[Loop, Callable[[int], Reader]]:
    """A loop that drafts, and what makes its readers, which are noted."""

    def reader(of: PreTrainedModel) -> Callable[[int], Reader]:
        def new(rows: int) -> Reader:
            made.append(ModelReader(of, rows, exact_cache))
            return made[-1]

        return new

    distribution = GREEDY if greedy else SAMPLED
    rule = GreedyRule() if greedy else TokenRule()
    chain = Chain(reader(draft), distribution, 3)
    return Loop(reader(model)(len(PROMPTS)), distribution, chain, rule), reader(model)


@pytest.mark.parametrize("drafting", [False, True])
def test_chunks_follow_the_same_law(drafting: bool) -> None:
    expected = exact_pairs(TARGET, SAMPLED)
    result = check_pairs(
        lambda n: table_loop(Steps, n, drafting=drafting), expected, rounds=8_000, new_tokens=3, seed=1
    )
    assert result.exact, result


def test_each_chunk_has_as_many_tokens_whatever_is_accepted() -> None:
    loop = table_loop(Loop, 20)
    loop.start([[0]] * 20, Sampling(temperature=1.0, max_new_tokens=12))
    for chunk in range(1, 4):
        loop.advance(5)
        assert {len(text.new) for text in loop.texts} == {min(12, 5 * chunk)}
    assert all(text.finish == "length" for text in loop.texts)
    assert max(loop.ledger.accepted_by_depth) > 0
    assert loop.generation().tokens == [text.new for text in loop.texts]


def test_chunks_write_what_one_run_writes() -> None:
    sampling = Sampling(temperature=1.0, max_new_tokens=11, stop_tokens=(3,))
    whole = table_loop(Loop, 20, drafting=False).run([[0]] * 20, sampling)
    loop = table_loop(Loop, 20, drafting=False)
    loop.start([[0]] * 20, sampling)
    for _ in range(4):
        loop.advance(3)
    assert loop.generation().tokens == whole.tokens
    assert loop.generation().finishes == whole.finishes


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt"])
def test_caches_of_chosen_texts_are_fresh_prefills(family: str) -> None:
    """Of target and draft, after rounds in which texts accept different lengths, wait, end, come twice or not."""
    model, draft = random_model(family), random_model(family)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    made: list[ModelReader] = []
    loop, _ = of_model(model, draft, made)
    loop.start(PROMPTS, Sampling(temperature=1.0, max_new_tokens=30, stop_tokens=tuple(range(40, 47))))
    waited, ended = False, 0
    for _ in range(4):
        before = loop.ledger.rounds
        forwards = made[0].forwards
        loop.advance(4)
        live = [row for row, text in enumerate(loop.texts) if text.finish is None]
        waited |= loop.ledger.rounds - before < len(live) * (made[0].forwards - forwards)
        over = [row for row, text in enumerate(loop.texts) if text.finish is not None]
        ended += len(over)
        loop.select([*over[:1], *live[::-1], live[0]][:6])
        for reader, of in zip(made, (model, draft), strict=True):
            texts = [text.tokens for text in loop.texts if text.finish is None]
            assert all(text[: len(kept)] == kept for text, kept in zip(texts, reader.texts, strict=True))
            fresh = ModelReader(of, len(texts), exact_cache)
            fresh.prefill(reader.texts)
            after = [text[len(kept) :] for text, kept in zip(texts, reader.texts, strict=True)]
            chain = [list(range(-1, len(own) - 1)) for own in after]
            answers = zip(reader.read(after, chain), fresh.read(after, chain), strict=True)
            for found, wanted in answers:
                torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-4)
            reader.commit([[] for _ in texts])
    assert waited
    assert ended
    assert max(loop.ledger.accepted_by_depth) > 0


def test_greedy_chunks_with_drafts_are_plain_greedy() -> None:
    model, draft = random_model("llama"), random_model("llama", seed=1)
    sampling = Sampling(max_new_tokens=20)
    made: list[ModelReader] = []
    loop, new = of_model(model, draft, made, greedy=True)
    loop.start(PROMPTS, sampling)
    for _ in range(5):
        loop.advance(4)
    plain = Loop(new(len(PROMPTS)), GREEDY, NoDraft(), GreedyRule()).run(PROMPTS, sampling)
    assert loop.generation().tokens == plain.tokens


def test_copies_go_on_apart_and_chance_stays_with_the_place() -> None:
    sampling = Sampling(temperature=1.0, max_new_tokens=12)
    whole = table_loop(Loop, 3, drafting=False).run([[0]] * 3, sampling)
    loop = table_loop(Loop, 3, drafting=False)
    loop.start([[0]] * 3, sampling)
    loop.advance(6)
    loop.select([0, 0, 0])
    loop.advance()
    assert loop.texts[0].new == whole.tokens[0]
    assert [text.new[:6] for text in loop.texts] == [whole.tokens[0][:6]] * 3
    assert len({tuple(text.new) for text in loop.texts}) == 3
    # place 1 draws what it would have drawn, from the tables of text 0
    assert loop.texts[1].new[6:] != whole.tokens[0][6:]


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(DataError, match="a prompt holds no token"):
        table_loop(Loop, 2).start([[0], []], Sampling())
