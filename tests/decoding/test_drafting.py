"""What every drafting method must do with models, on every line of cases.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

import trimtab as tt
from tests.cache.cases import FIRST as CACHES
from tests.cache.cases import Case as CacheCase
from tests.cache.conftest import build, fitted, held
from tests.cache.conftest import tiny as tiny_for_caches
from trimtab.core.errors import CompositionError, ConfigError
from trimtab.core.registry import methods
from trimtab.decoding import Decoder, Sampling, Spectr, Speculative
from trimtab.decoding._decoder import exact_cache
from trimtab.decoding._reader import ModelReader
from trimtab.decoding.base import DecodingMethod
from trimtab.models.info import info_of
from trimtab.models.random import ALL_FAMILIES, random_model

from .cases import CASES, DECIDING, FIRST, STEERING, Case
from .conftest import NEW, loop_of, near, plainly, prompts

each = pytest.mark.parametrize("case", CASES, ids=str)
one_of_each = pytest.mark.parametrize("case", FIRST, ids=lambda case: case.name)
MODEL_DRAFTS = [case for case in CASES if case.options.get("draft") != "ngram"]
GREEDY = Sampling(max_new_tokens=NEW)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return random_model("llama")


@pytest.fixture(scope="module")
def llama_draft(llama: PreTrainedModel) -> PreTrainedModel:
    return near(llama)


def decoder(method: DecodingMethod, model: PreTrainedModel, draft: PreTrainedModel, **more: Any) -> Decoder:
    return Decoder(model, [method], drafts={method.draft: draft}, adapt=False, **more)  # type: ignore[attr-defined]


def test_every_method_that_drafts_has_a_case() -> None:
    rooms = {info.name for info in methods().values() if info.room == "decoding"}
    assert {"speculative", "spectr", "rsd_c", "rsd_s"} == {case.name for case in CASES} <= rooms


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_greedy_decoding_is_plain_greedy_decoding(family: str) -> None:
    """With a penalty on repetition: some random models repeat one token for ever without it."""
    model = random_model(family)
    draft, texts = near(model), prompts(3, 11)
    plain = [plainly(model, text, repetition_penalty=1.5) for text in texts]
    for case in CASES:
        sampling = Sampling(max_new_tokens=NEW, repetition_penalty=1.5)
        done = decoder(case.method(), model, draft).generate(texts, sampling)
        assert done.tokens == plain, str(case)
        if case in MODEL_DRAFTS:
            assert 0 < sum(done.ledger.accepted_by_depth) < sum(done.ledger.drafted_by_depth), "right some of the time"


@each
def test_caches_hold_what_a_fresh_prefill_would(
    case: Case, llama: PreTrainedModel, llama_draft: PreTrainedModel
) -> None:
    """Of those rows that were written last; the others have left by then."""
    starts, sampling = prompts(4, 1, 9), Sampling(temperature=1.0, max_new_tokens=70, seed=3)
    loop, readers = loop_of(case.method(), llama, llama_draft, 3, sampling)
    done = loop.run(starts, sampling)
    assert done.ledger.target_forwards >= 20
    wholes = [start + tokens for start, tokens in zip(starts, done.tokens, strict=True)]
    for reader in readers:
        for row, text in enumerate(reader.texts):
            fresh = ModelReader(reader.model, 1, exact_cache)
            fresh.prefill([text])
            assert len(text) > 40
            assert any(whole[: len(text)] == text for whole in wholes)
            for found, wanted in zip(held(reader.cache, row), held(fresh.cache), strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@each
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_of_a_batch_are_the_single_runs(
    case: Case, temperature: float, llama: PreTrainedModel, llama_draft: PreTrainedModel
) -> None:
    """The i-th text of a batch draws from the generator of row i, whatever is written beside it."""
    sampling = Sampling(temperature=temperature, max_new_tokens=NEW, seed=5)
    texts = prompts(3, 14, 8)
    together = decoder(case.method(), llama, llama_draft).generate(texts, sampling)
    for row, text in enumerate(texts):
        # so many copies of the text that one of them is in the row that it had
        alone = decoder(case.method(), llama, llama_draft).generate([text] * (row + 1), sampling)
        assert alone.tokens[row] == together.tokens[row]


@one_of_each
def test_rows_accept_different_lengths(case: Case, llama: PreTrainedModel, llama_draft: PreTrainedModel) -> None:
    accepted: list[tuple[int, int]] = []
    decoder(case.method(), llama, llama_draft).generate(
        prompts(5, 9),
        Sampling(temperature=1.0, max_new_tokens=NEW),
        on_tokens=lambda row, new: accepted.append((row, len(new))),
    )
    pairs = list(zip(accepted[::2], accepted[1::2], strict=False))
    assert any(first[1] != second[1] for first, second in pairs if (first[0], second[0]) == (0, 1))


@one_of_each
@pytest.mark.parametrize("cache", CACHES, ids=lambda cache: cache.name)
def test_every_cache_sees_accepted_tokens_alone(case: Case, cache: CacheCase) -> None:
    """Reading the tokens that each round accepted, and nothing else, gives the same answers and leaves the same cache.

    Tokens that are read together see each other exactly, since they are encoded when they are committed. So a text
    under a cache that rounds may differ from plain decoding's in what a block that fills up inside a draft makes of it.
    """
    model, sampling = tiny_for_caches(), Sampling(max_new_tokens=40)
    start = prompts(60)[0]
    draft, pieces = near(model), list[list[int]]()
    # fitted on another model: keys of the first layer depend on their token alone, so the extremes of the text that it
    # was fitted on would be its limits to the bit, and a rounding error would decide about them
    method = fitted(draft, build(cache.name, cache.options))
    info_of(model).fitted_caches.update(info_of(draft).fitted_caches)

    def of(target: PreTrainedModel) -> Any:
        return method.new(target)

    loop, readers = loop_of(case.method(), model, draft, 1, sampling, of)
    done = loop.run([start], sampling, on_tokens=lambda row, new: pieces.append(list(new)))
    assert max(map(len, pieces)) > 1
    alone = ModelReader(model, 1, of)
    alone.prefill([start[:-1]])
    last = start[-1]
    for piece in pieces:
        (rows,) = alone.read([[last, *piece[:-1]]], [list(range(-1, len(piece) - 1))])
        assert rows.logits.argmax(dim=-1).tolist() == piece
        alone.commit([list(range(len(piece)))])
        last = piece[-1]
    assert [token for piece in pieces for token in piece] == done.tokens[0]
    for found, wanted in zip(held(readers[0].cache), held(alone.cache), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@each
def test_a_stop_token_inside_a_draft_ends_the_text(
    case: Case, llama: PreTrainedModel, llama_draft: PreTrainedModel
) -> None:
    (text,) = prompts(5)
    plain = plainly(llama, text)
    for stop in sorted(set(plain[:12])):
        done = decoder(case.method(), llama, llama_draft).generate(
            [text], Sampling(max_new_tokens=NEW, stop_tokens=(stop,))
        )
        assert done.tokens == [plain[: plain.index(stop) + 1]]
        assert done.finishes == ["stop_token"]


@one_of_each
def test_stop_strings_end_the_text(case: Case, ref_model: PreTrainedModel) -> None:
    text = tt.models.tokenizer_of(ref_model)("The old house by the river")["input_ids"]
    own = Decoder(ref_model, [case.method(draft="ref-mini")], adapt=False)
    whole = own.generate([text], Sampling(max_new_tokens=30))
    written = own.decode(whole.tokens[0])
    stop = written.split()[6]
    done = own.generate([text], Sampling(max_new_tokens=30, stop_strings=(stop,)))
    assert done.finishes == ["stop_string"]
    assert done.tokens[0] == whole.tokens[0][: len(done.tokens[0])]
    assert stop in own.decode(done.tokens[0])
    assert stop not in own.decode(done.tokens[0][:-1])


@pytest.mark.slow
@one_of_each
def test_greedy_on_the_reference_model(case: Case) -> None:
    """50 beginnings of held-out prose, token for token, in float32: rounding to 16 bits makes ties."""
    from importlib import resources

    model = tt.load("ref", dtype=torch.float32)
    held_out = (resources.files("trimtab") / "assets" / "text" / "prose_eval.txt").read_text(encoding="utf-8")
    ids = tt.models.tokenizer_of(model)(held_out[:40_000], add_special_tokens=False, verbose=False)["input_ids"]
    texts = [ids[start * 60 : start * 60 + 8 + start] for start in range(50)]
    done = Decoder(model, [case.method(draft="ref-mini")], adapt=False).generate(texts, Sampling(max_new_tokens=40))
    assert done.tokens == [plainly(model, text, 40) for text in texts]


# Bad input


@pytest.mark.parametrize(
    ("case", "options", "said"),
    [(case, options, said) for case in [*CASES, *STEERING, DECIDING] for options, said in case.bad],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_options_that_mean_nothing_are_refused(case: Case, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        case.method(**options)


def test_a_draft_deeper_than_the_context_is_refused(llama: PreTrainedModel) -> None:
    positions = llama.config.max_position_embeddings
    for method in (Speculative(depth=positions), Spectr(depth=positions), tt.decoding.RsdS(depth=positions)):
        with pytest.raises(ConfigError, match=f"depth={positions} does not fit the model's {positions} positions"):
            Decoder(llama, [method]).generate([[5]], GREEDY)
    with pytest.raises(ConfigError, match=f"depth={positions}"):
        Decoder(llama, [tt.decoding.RsdC(branching=(1,) * positions)]).generate([[5]], GREEDY)


@one_of_each
def test_a_text_longer_than_the_draft_goes_on_without_it(case: Case, llama: PreTrainedModel) -> None:
    short, texts = random_model("llama", max_position_embeddings=16), prompts(3, 10, 20)
    done = decoder(case.method(), llama, short).generate(texts, GREEDY)
    assert done.tokens == [plainly(llama, text) for text in texts]
    drafted = decoder(case.method(), llama, short).generate(texts[:1], GREEDY)
    assert 5 < drafted.ledger.plain_rounds < drafted.ledger.rounds


@one_of_each
def test_a_draft_with_other_tokens_is_refused(case: Case, llama: PreTrainedModel) -> None:
    other = random_model("llama", vocab_size=64)
    with pytest.raises(CompositionError, match="must have the tokenizer of the model that decodes: it has 64 tokens"):
        decoder(case.method(), llama, other).generate([[5, 6]], GREEDY)


def test_a_cache_that_cannot_take_tokens_back_is_refused(llama: PreTrainedModel) -> None:
    for own in ([], [Speculative(draft="ngram")]):
        with pytest.raises(CompositionError, match="a DynamicCache cannot hold a draft"):
            Decoder(llama, own, new_cache=lambda model: DynamicCache()).generate([[5]], GREEDY)  # type: ignore[arg-type, return-value]


def test_only_typical_acceptance_is_lossy(llama: PreTrainedModel, llama_draft: PreTrainedModel) -> None:
    assert all(case.method().lossless for case in CASES)
    typical = Speculative(depth=4, rule="typical")
    assert not typical.lossless
    own = decoder(typical, llama, llama_draft)
    assert not own.lossless
    assert own.generate([[5, 6]], GREEDY).tokens == [plainly(llama, [5, 6])], "greedy decoding loses nothing"
    free, exact = (
        decoder(method, llama, llama_draft).generate([[5, 6]] * 8, Sampling(temperature=1.0, max_new_tokens=NEW))
        for method in (Speculative(depth=4, rule="typical", epsilon=0.0), Speculative(depth=4))
    )
    assert free.ledger.tokens_per_target_forward > 4 > exact.ledger.tokens_per_target_forward


def test_n_grams_help_where_a_text_repeats_itself() -> None:
    """A greedy random model falls into a cycle sooner or later."""
    long = random_model("llama", max_position_embeddings=512)
    done = Decoder(long, [Speculative(draft="ngram", depth=6)], adapt=False).generate(
        prompts(6), Sampling(max_new_tokens=300)
    )
    assert done.ledger.draft_forwards == 0
    assert done.ledger.tokens_per_target_forward > 2


@pytest.mark.parametrize("method", [Spectr(k=4, depth=4), tt.decoding.RsdC(branching=(2, 2, 1, 1)), tt.decoding.RsdS()])
def test_greedy_trees_are_of_likely_tokens(
    method: DecodingMethod, llama: PreTrainedModel, llama_draft: PreTrainedModel
) -> None:
    """At temperature 0 a chain takes the draft's likeliest tokens; a tree must not do worse by drawing others."""
    texts = prompts(*[5] * 8)

    def written(own: DecodingMethod) -> float:
        return decoder(own, llama, llama_draft).generate(texts, GREEDY).ledger.tokens_per_target_forward

    assert written(method) > written(Speculative(depth=4))


def test_more_sequences_and_siblings_are_accepted_for_longer(
    llama: PreTrainedModel, llama_draft: PreTrainedModel
) -> None:
    sampling = Sampling(temperature=1.0, max_new_tokens=60)
    texts = prompts(*[5] * 12)

    def accepted(method: DecodingMethod) -> float:
        return decoder(method, llama, llama_draft).generate(texts, sampling).ledger.tokens_per_target_forward

    chain, wide = accepted(Spectr(k=1, depth=3)), accepted(Spectr(k=6, depth=3))
    beam = accepted(tt.decoding.RsdS(width=6, depth=3))
    assert chain < wide
    assert chain < beam
