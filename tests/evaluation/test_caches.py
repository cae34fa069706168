"""Measuring caches: what is lossless measures as lossless, what loses is noticed, bytes are those allocated."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import trimtab as tt
from tests.evaluation.conftest import CORPUS, small_model
from trimtab.core.errors import ConfigError, DataError
from trimtab.evaluation import NextTokens, divergence, evaluate
from trimtab.evaluation.base import Generate, LogLikelihood, Score
from trimtab.evaluation.caches import (
    AttentionInputs,
    CacheReference,
    RecallSetting,
    attention_error,
    cache_bits,
    cache_divergence,
    chunked_logits,
    measure_cache,
    recall_by_distance,
    replay,
)
from trimtab.evaluation.client import LocalClient, inference
from trimtab.evaluation.probes import measure_speed

EXACT = tt.cache.Exact()
COARSE = tt.cache.Kivi(bits=1, group_size=16, window=16)
FINE = tt.cache.Kivi(bits=8, group_size=16, window=16)
STREAMING = tt.cache.Streaming(sinks=2, window=14)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text(CORPUS, encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def own(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A model of its own, since caches change its attention implementation."""
    made = small_model(max_position_embeddings=512)
    tt.models.info_of(made).tokenizer = tokenizer
    return made


@pytest.fixture(scope="module")
def windows(own: LlamaForCausalLM, text: str) -> NextTokens:
    return NextTokens.of(own, text=text, windows=3, length=100)


def test_chunks_through_an_exact_cache_are_one_forward_pass(own: LlamaForCausalLM) -> None:
    rows = [[5, 9, 200, 31, 77, 8, 41], [7, 12, 300, 4], [11, 3]]
    with inference(own):
        for chunk in (1, 2, 3, 7, 64):
            parts = dict(chunked_logits(own, rows, EXACT.new(own), chunk=chunk))
            for index, row in enumerate(rows):
                alone = own(input_ids=torch.tensor([row]), use_cache=False).logits[0]
                read = torch.cat([part[index] for part in parts.values() if index < part.shape[0]])[: len(row)]
                torch.testing.assert_close(read, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", [[], [[]], [[1], [1, 2]]])
def test_rows_that_cannot_be_read_together_are_refused(own: LlamaForCausalLM, rows: list[list[int]]) -> None:
    with pytest.raises(DataError, match="longest first"):
        next(chunked_logits(own, rows, EXACT.new(own)))


def test_divergence_sees_what_a_cache_loses(own: LlamaForCausalLM, windows: NextTokens) -> None:
    def found(method: tt.cache.Exact | tt.cache.Kivi | tt.cache.Streaming) -> dict[str, float]:
        estimates = cache_divergence(own, method, windows, chunk=16).estimates()
        return {name: estimate.value for name, estimate in estimates.items()}

    exact, fine, coarse, evicting = (found(method) for method in (EXACT, FINE, COARSE, STREAMING))
    assert abs(exact["kl_nats_per_token"]) < 1e-6
    assert exact["top1_agreement"] == 1.0
    assert abs(exact["bits_per_byte_change"]) < 1e-6
    assert 1e-9 < fine["kl_nats_per_token"] < coarse["kl_nats_per_token"] / 100
    assert evicting["kl_nats_per_token"] > 1e-3
    # a single forward pass attends to exact keys and would show nothing
    whole = divergence(own, windows, cache=COARSE, chunk=100).estimates()
    assert abs(whole["kl_nats_per_token"].value) < 1e-6


def test_bits_per_byte_is_the_prose_tasks_figure(own: LlamaForCausalLM, windows: NextTokens) -> None:
    measured = cache_divergence(own, EXACT, windows)
    sizes = measured.window_bytes
    with inference(own):
        logits = own(input_ids=windows.tokens[:, :-1], use_cache=False).logits.log_softmax(-1)
    nats = -logits.gather(2, windows.tokens[:, 1:, None]).sum()
    assert measured.estimates()["bits_per_byte"].value == pytest.approx(
        float(nats) / math.log(2) / sum(sizes), rel=1e-5
    )
    assert windows.bits_per_byte(sizes).value == pytest.approx(measured.estimates()["bits_per_byte"].value, rel=1e-5)


def test_attention_inputs_are_those_of_the_model(own: LlamaForCausalLM, windows: NextTokens) -> None:
    """Replayed through an exact cache they give the outputs that torch computes from them, at any chunk size."""
    tokens = windows.tokens[0, :-1].tolist()
    inputs = AttentionInputs.of(own, tokens)
    assert len(inputs.layers) == 2
    for chunk in (1, 16, 33, 100):
        for out, layer in zip(replay(EXACT.new(own), inputs, chunk=chunk), inputs.layers, strict=True):
            keys, values = (t.repeat_interleave(2, dim=1) for t in (layer.keys, layer.values))
            true = torch.nn.functional.scaled_dot_product_attention(layer.query, keys, values, is_causal=True)
            torch.testing.assert_close(out, true, atol=1e-5, rtol=1e-4)


def test_attention_error_tells_keys_from_values(own: LlamaForCausalLM, windows: NextTokens) -> None:
    texts = [AttentionInputs.of(own, row[:-1].tolist()) for row in windows.tokens[:2]]

    def found(method: tt.cache.Exact | tt.cache.Kivi | tt.cache.Streaming) -> dict[str, float]:
        return attention_error(own, method, texts, chunk=16).means()

    assert set(found(EXACT).values()) == {0.0}
    fine, coarse = found(FINE), found(COARSE)
    assert all(0 < fine[name] < coarse[name] / 20 for name in fine)
    only_values = found(tt.cache.Kivi(bits=8, value_bits=1, group_size=16, window=16))
    assert only_values["output_keys"] == pytest.approx(fine["output_keys"])
    assert only_values["output_values"] == pytest.approx(coarse["output_values"])
    assert only_values["keys"] == pytest.approx(fine["keys"])
    assert only_values["values"] == pytest.approx(coarse["values"])


def test_evicted_tokens_count_as_lost(own: LlamaForCausalLM, windows: NextTokens) -> None:
    inputs = AttentionInputs.of(own, windows.tokens[0, :-1].tolist())
    found = attention_error(own, STREAMING, [inputs], chunk=10)
    for index, layer in enumerate(inputs.layers):
        kept = torch.cat([torch.arange(2), torch.arange(86, 100)])
        for name, tensor in (("keys", layer.keys), ("values", layer.values)):
            lost = 1 - tensor[:, :, kept].square().sum() / tensor.square().sum()
            assert getattr(found, name)[index] == pytest.approx(float(lost.sqrt()), rel=1e-4)
    assert found.output == found.output_keys == found.output_values
    assert min(found.output) > 0.01


def test_bits_are_counted_from_what_is_allocated(own: LlamaForCausalLM, windows: NextTokens) -> None:
    inputs = AttentionInputs.of(own, windows.tokens[0, :-1].tolist())
    with pytest.raises(DataError, match="empty"):
        cache_bits(COARSE.new(own))
    for method in (EXACT, FINE, COARSE, STREAMING):
        cache = method.new(own)
        replay(cache, inputs, chunk=20)
        bits = cache_bits(cache)
        assert bits.tokens == 100
        assert bits.nbytes == cache.nbytes()
        assert bits.bits == pytest.approx(8 * cache.nbytes() / (2 * 100 * 2 * 2 * 16))  # k and v, layers, heads, d
        assert sum(bits.parts.values()) == pytest.approx(bits.bits)
        assert bits.window == pytest.approx(sum(v for k, v in bits.parts.items() if k.startswith("window")))
    coarse = tt.cache.Kivi(bits=1, group_size=16, window=32).new(own)
    replay(coarse, inputs, chunk=32)
    bits = cache_bits(coarse)
    assert bits.formula == pytest.approx(1 + 32 / 16)
    assert bits.encoded == pytest.approx(bits.formula)
    assert bits.encoded_fraction == pytest.approx((96 + 64) / 200)


def test_half_precision_halves_the_window(own: LlamaForCausalLM, windows: NextTokens) -> None:
    inputs = AttentionInputs.of(own, windows.tokens[0, :-1].tolist())
    sizes = []
    for given in (inputs, inputs.to(torch.bfloat16)):
        cache = EXACT.new(own)
        replay(cache, given)
        sizes.append(cache.nbytes())
    assert sizes[0] == 2 * sizes[1]


def test_the_client_reads_through_the_cache(own: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    context = CORPUS[:400]
    requests = [
        LogLikelihood(context, " The king", ends=True),
        LogLikelihood(context, " The road of the hill"),
        LogLikelihood(CORPUS[:90], " was old"),
        Score(CORPUS[:600]),
        Generate(context, 6, ()),
        Generate(CORPUS[:60], 6, ()),
    ]
    plain = LocalClient(own, tokenizer).run(requests)
    for batch_tokens in (1, 2048):
        exact = LocalClient(own, tokenizer, cache=EXACT, chunk=16, batch_tokens=batch_tokens).run(requests)
        coarse = LocalClient(own, tokenizer, cache=COARSE, chunk=16, batch_tokens=batch_tokens).run(requests)
        for true, same, other in zip(plain, exact, coarse, strict=True):
            assert same.log_prob == pytest.approx(true.log_prob, abs=1e-3)
            assert (same.text, same.next_text, same.tokens) == (true.text, true.next_text, true.tokens)
            if not true.text:
                assert abs(other.log_prob - true.log_prob) > 1e-3


def test_evaluate_takes_a_cache_by_name_or_method(own: LlamaForCausalLM, text: str) -> None:
    def bits(**options: object) -> float:
        return evaluate(own, "prose", text=text, limit=1, **options)["prose"].metrics["bits_per_byte"].value  # type: ignore[arg-type]

    assert bits(cache="exact") == pytest.approx(bits(), abs=1e-5)
    assert abs(bits(cache=COARSE) - bits()) > 1e-5
    with pytest.raises(ConfigError, match="Did you mean 'kivi'"):
        bits(cache="kivvi")
    with pytest.raises(ConfigError, match="room 'weights', not a cache"):
        bits(cache="gptq")
    with pytest.raises(ConfigError, match="does not divide the head dimension 16"):
        bits(cache="kivi")


def test_recall_asks_the_same_documents_with_and_without_a_cache(
    own: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    settings = [RecallSetting(20, records=4), RecallSetting(20, records=4, value="code")]
    plain, exact = (
        recall_by_distance(own, method, settings, contexts=2, questions=3, tokenizer=tokenizer)
        for method in (None, EXACT)
    )
    assert list(plain) == settings
    for setting in settings:
        result = plain[setting]
        assert result.ids == exact[setting].ids
        assert result.metrics["exact_match_far"].n == 6
        assert len(set(result.clusters)) == 2
        assert result.values["answer_nats"] == pytest.approx(exact[setting].values["answer_nats"], abs=1e-3)
    assert plain[settings[0]].ids != plain[settings[1]].ids


def test_recall_knows_its_kinds_of_values() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'code'"):
        evaluate("ref-mini", [tt.evaluation.task("recall", value="cod")])


def test_everything_of_one_method(own: LlamaForCausalLM, text: str) -> None:
    reference = CacheReference.of(
        own, text=text, windows=2, length=96, recall=[RecallSetting(8, records=2)], contexts=2, questions=2
    )
    assert set(reference.figures(own)) == {"divergence", "recall"}
    found = measure_cache(own, COARSE, reference, bits_dtype=torch.bfloat16)
    assert found["bits"]["bits"] < 16 + 8
    assert found["divergence"]["kl_nats_per_token"]["value"] > 0
    assert found["attention"]["output"] > 0
    assert len(found["attention"]["layers"]["keys"]) == 2
    (setting,) = found["recall"].values()
    assert setting["change"]["n"] == 4


def test_speed_with_a_cache(own: LlamaForCausalLM) -> None:
    assert measure_speed(own, prompt_tokens=8, new_tokens=2, repeats=1, cache=EXACT).decode_ms_median > 0


def test_survey_options_are_the_bits_that_a_method_takes() -> None:
    from trimtab.evaluation.caches.named import cache_names
    from trimtab.evaluation.caches.survey import survey_options

    options = survey_options(bits=(2, 7))
    assert {name for name, _ in options} == set(cache_names())
    assert [own for name, own in options if name == "kivi"] == [{"bits": 2}]
    assert [own for name, own in options if name == "exact"] == [{}]
