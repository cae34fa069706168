"""The score of weak-to-strong search: piece by piece or at once, from tokens or from text, with other tokenizers."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import trimtab as tt
from trimtab.core.errors import NumericsError
from trimtab.decoding import Decoder, Sampling
from trimtab.decoding._decoder import exact_cache
from trimtab.decoding._loop import Finish, Text
from trimtab.decoding._reader import ModelReader
from trimtab.decoding._search.likelihood import Likelihood, LogRatio, TextCoder, TokenCoder
from trimtab.decoding.weak_to_strong import WeakToStrong
from trimtab.models.info import info_of
from trimtab.models.random import random_model

EOS = "<|end|>"


def bytes_tokenizer(*merges: tuple[str, str]) -> PreTrainedTokenizerBase:
    """One token per byte, and those that merges make; no token at the beginning."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate([*letters, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(EOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)  # type: ignore[no-untyped-call]


PLAIN = bytes_tokenizer()
MERGING = bytes_tokenizer(("t", "h"), ("th", "e"), ("e", "n"), ("a", "the"), ("Ġ", "a"))


@pytest.fixture(scope="module")
def scorer() -> PreTrainedModel:
    return random_model("llama", vocab_size=300, max_position_embeddings=256)


@pytest.fixture(scope="module")
def mini() -> PreTrainedModel:
    return tt.load("ref-mini", dtype=torch.float32)


def text(tokenizer: PreTrainedTokenizerBase, prompt: str, new: str, finish: Finish | None = None) -> Text:
    ids, more = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompt, new))
    return Text(0, [*ids, *more], list(more), finish=finish)


def likelihood(model: PreTrainedModel, coder: TokenCoder | TextCoder) -> Likelihood:
    return Likelihood(lambda rows: ModelReader(model, rows, exact_cache), coder)


def at_once(model: PreTrainedModel, coder: TokenCoder | TextCoder, texts: Sequence[Text]) -> list[tuple[float, int]]:
    return [by_forward_pass(model, *encoded(coder, own)) for own in texts]


def encoded(coder: TokenCoder | TextCoder, own: Text) -> tuple[list[int], int]:
    found = coder(own)
    return found.ids, found.start


def by_forward_pass(model: PreTrainedModel, ids: list[int], start: int) -> tuple[float, int]:
    """Log-probability of the tokens from `start` on, by one call of the model."""
    with torch.no_grad():
        log_probs = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)
    own = [float(log_probs[place - 1, ids[place]]) for place in range(start, len(ids))]
    return sum(own), len(own)


def cut(own: Text, count: int) -> Text:
    """The text when only so much was written."""
    prompt = own.tokens[: len(own.tokens) - len(own.new)]
    finish = own.finish if count >= len(own.new) else None
    return Text(0, [*prompt, *own.new[:count]], own.new[:count], finish=finish)


def assert_same(found: list[tuple[float, int]], wanted: list[tuple[float, int]]) -> None:
    assert [count for _, count in found] == [count for _, count in wanted]
    assert [total for total, _ in found] == pytest.approx([total for total, _ in wanted], abs=1e-3)


# Piece by piece.


@pytest.mark.parametrize("tokenizer", [PLAIN, MERGING, None], ids=["bytes", "merging bytes", "tokens"])
def test_read_piece_by_piece_is_read_at_once(
    scorer: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Texts of different lengths that grow, are chosen, come twice; with a tokenizer that joins what is cut apart."""
    coder = TokenCoder() if tokenizer is None else TextCoder(tokenizer, "{prompt}", PLAIN)
    texts = [
        text(PLAIN, "at", "then a then a theathen at then", "stop_token"),
        text(PLAIN, "a longer prompt, then", " the a the n a thenthen"),
        text(PLAIN, "then a t", "he the the en, ate", "length"),
    ]
    reader = likelihood(scorer, coder)
    reader.start([cut(own, 0) for own in texts])
    for count in (3, 7, 8, 14, 40):
        now = [cut(own, count) for own in texts]
        assert_same(reader(now), at_once(scorer, coder, now))
        chosen = [2, 0, 1, 0] if len(texts) == 3 else [3, 0, 2]
        reader.select(chosen)
        texts = [texts[row] for row in chosen]


def test_each_token_is_read_once(scorer: PreTrainedModel) -> None:
    read = 0

    class Counting(ModelReader):
        def read(self, tokens: Sequence[Sequence[int]], parents: Sequence[Sequence[int]]) -> list:  # type: ignore[type-arg]
            nonlocal read
            read += sum(map(len, tokens))
            return super().read(tokens, parents)

    own = text(PLAIN, "prompt", "x" * 40)
    reader = Likelihood(lambda rows: Counting(scorer, rows, exact_cache), TokenCoder())
    reader.start([cut(own, 0)])
    for count in range(5, 45, 5):
        reader([cut(own, count)])
    assert read == 1 + 40  # the last token of the prompt is read with the first ones


def test_padding_changes_nothing(scorer: PreTrainedModel) -> None:
    """Whichever rows are longer: that of a short text does not depend on what stands beside it."""
    short, long = text(PLAIN, "ab", "cd"), text(PLAIN, "a much longer prompt", "and a much longer text")
    alone = likelihood(scorer, TokenCoder())
    alone.start([cut(short, 0)])
    ((wanted, _),) = alone([short])
    for texts in ([short, long], [long, short]):
        both = likelihood(scorer, TokenCoder())
        both.start([cut(own, 0) for own in texts])
        assert both(texts)[texts.index(short)][0] == pytest.approx(wanted, abs=1e-4)


# Other tokenizers.


def test_score_with_another_tokenizer_by_hand(scorer: PreTrainedModel, mini: PreTrainedModel) -> None:
    """Words write, bytes score, with a prompt of their own and the end of the text counted."""
    words = tt.models.tokenizer_of(mini)
    ids = words("Review: The room")["input_ids"]
    new = words(" was good.", add_special_tokens=False)["input_ids"]
    own = Text(0, [*ids, *new, words.eos_token_id], [*new, words.eos_token_id], finish="stop_token")
    coder = TextCoder(PLAIN, "Q: {prompt} A:", words)
    before = PLAIN("Q: Review: The room A:")["input_ids"]
    after = PLAIN(" was good.")["input_ids"]
    wanted = by_forward_pass(scorer, [*before, *after, PLAIN.eos_token_id], len(before))
    reader = likelihood(scorer, coder)
    reader.start([Text(0, list(ids))])
    assert_same(reader([own]), [wanted])
    assert wanted[1] == len(" was good.") + 1


def test_where_prompt_and_text_join_the_joined_token_is_scored(scorer: PreTrainedModel) -> None:
    own = text(PLAIN, "then t", "he a")
    ids = MERGING("then the a")["input_ids"]
    alone = MERGING("then t")["input_ids"]
    start = next(place for place in range(len(alone)) if alone[place] != ids[place])
    assert start < len(alone)
    reader = likelihood(scorer, TextCoder(MERGING, "{prompt}", PLAIN))
    reader.start([cut(own, 0)])
    assert_same(reader([own]), [by_forward_pass(scorer, ids, start)])


def test_an_incomplete_character_waits() -> None:
    own = text(PLAIN, "a", "né€x")  # of 1, 2, 3 and 1 bytes
    coder = TextCoder(PLAIN, "{prompt}", PLAIN)
    prompt = own.tokens[:1]
    found = [coder.written(prompt, cut(own, count)) for count in range(8)]
    assert found == ["", "n", "n", "né", "né", "né", "né€", "né€x"]
    ended = cut(own, 2)
    ended.finish = "length"
    assert coder.written(prompt, ended) == "n\ufffd"


def test_bytes_that_are_no_text_are_scored_all_the_same() -> None:
    coder = TextCoder(PLAIN, "{prompt}", PLAIN)
    broken = PLAIN("é")["input_ids"][1:] * 6
    own = Text(0, [*PLAIN("a")["input_ids"], *broken], broken)
    assert coder.written(own.tokens[:1], own) == "\ufffd" * 6


def test_the_end_is_scored_only_where_a_stop_token_came() -> None:
    coder = TextCoder(PLAIN, "{prompt}", PLAIN)
    finishes: list[Finish | None] = ["stop_token", "stop_string", "length", None]
    for finish in finishes:
        ids, _ = encoded(coder, text(PLAIN, "a", "bc", finish))
        assert (ids[-1] == PLAIN.eos_token_id) == (finish == "stop_token")


def test_means_instead_of_sums(scorer: PreTrainedModel) -> None:
    other = random_model("llama", seed=1, vocab_size=300, max_position_embeddings=256)
    texts = [text(PLAIN, "ab", "cd"), text(PLAIN, "ab", "cdefgh")]
    scores = []
    for normalise in (False, True):
        ratio = LogRatio(likelihood(scorer, TokenCoder()), likelihood(other, TokenCoder()), normalise=normalise)
        ratio.start([cut(own, 0) for own in texts])
        scores.append(ratio.score(texts))
    assert [a / n for a, n in zip(scores[0], (2, 6), strict=True)] == pytest.approx(scores[1], abs=1e-5)


def test_search_with_another_tokenizer(mini: PreTrainedModel) -> None:
    tuned, untuned = (random_model("llama", seed=s, vocab_size=300, max_position_embeddings=256) for s in (0, 1))
    for model in (tuned, untuned):
        info_of(model).tokenizer = PLAIN
    prompts = [tt.models.tokenizer_of(mini)(t)["input_ids"] for t in ("The old house", "Review:")]
    method = WeakToStrong(tuned="t", untuned="u", width=2, successors=2, chunk=3)
    decoder = Decoder(mini, [method], drafts={"t": tuned, "u": untuned})
    sampling = Sampling(temperature=1.0, max_new_tokens=7, stop_tokens=(201,))
    done = decoder.generate(prompts, sampling)
    samples = Decoder(mini).generate([p for p in prompts for _ in range(4)], sampling)
    # the best of the same number of samples cannot be told apart by length, but by score: chunk 0 chooses among them
    best = Decoder(mini, [WeakToStrong(tuned="t", untuned="u", width=1, successors=4, chunk=0)], drafts=decoder._named)
    chosen = best.generate(prompts, sampling)
    for row, prompt in enumerate(prompts):
        own = samples.tokens[4 * row : 4 * row + 4]
        finishes = samples.finishes[4 * row : 4 * row + 4]
        coder = TextCoder(PLAIN, "{prompt}", tt.models.tokenizer_of(mini))
        texts = [Text(0, [*prompt, *new], new, finish=end) for new, end in zip(own, finishes, strict=True)]
        scores = [
            a[0] - b[0] for a, b in zip(at_once(tuned, coder, texts), at_once(untuned, coder, texts), strict=True)
        ]
        assert chosen.tokens[row] == own[scores.index(max(scores))]
    assert all(done.tokens)


def test_nan_of_a_scoring_model_is_an_error() -> None:
    broken = random_model("llama", vocab_size=300)
    with torch.no_grad():
        broken.get_input_embeddings().weight[5] = torch.nan
    reader = likelihood(broken, TokenCoder())
    reader.start([Text(0, [6, 7])])
    with pytest.raises(NumericsError, match="the model that scores gives NaN"):
        reader([Text(0, [6, 7, 5, 8], [5, 8])])
