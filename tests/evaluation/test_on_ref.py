"""On the shipped reference model: planted degradations are found in their order, and outliers break rounding."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import PreTrainedModel

from trimtab.evaluation import Divergence, NextTokens, compare, divergence, evaluate, inject_outliers, task
from trimtab.evaluation.base import Estimate, Generate, LogLikelihood
from trimtab.evaluation.client import LocalClient
from trimtab.evaluation.outliers import Kind
from trimtab.models import load, tokenizer_of
from trimtab.models.compression import compress
from trimtab.weights import Rtn

BITS = (8, 4, 3, 2)


def reference() -> PreTrainedModel:
    return load("ref", dtype=torch.float32)


@pytest.fixture(scope="module")
def kept() -> NextTokens:
    return NextTokens.of(reference(), windows=12, length=128)


@pytest.fixture(scope="module")
def rounded(kept: NextTokens) -> dict[int, Divergence]:
    """`ref` rounded to each width, against `ref`."""
    found = {}
    for bits in BITS:
        method = Rtn.from_options({"bits": bits})
        found[bits] = divergence(compress(reference(), method, progress=False), kept)
    return found


def test_more_rounding_is_more_divergence(rounded: dict[int, Divergence]) -> None:
    for finer, coarser in itertools.pairwise(BITS):
        assert rounded[finer].kl_difference(rounded[coarser]).high < 0
        agreement = [rounded[bits].estimates()["top1_agreement"].value for bits in (finer, coarser)]
        assert agreement[0] > agreement[1]


def sharpness(estimate: Estimate) -> float:
    """Value in units of half its interval: above one, the interval excludes zero."""
    return abs(estimate.value) / ((estimate.high - estimate.low) / 2)


def test_kl_moves_before_perplexity(rounded: dict[int, Divergence]) -> None:
    """At 8 bits KL is clearly seen on these few tokens; the change of perplexity is lost in its interval, or nearly."""
    for bits in (8, 4):
        found = rounded[bits].estimates()
        assert sharpness(found["kl_nats_per_token"]) > 5
        assert sharpness(found["kl_nats_per_token"]) > 2 * sharpness(found["gold_nats_change"])
    assert sharpness(rounded[8].estimates()["gold_nats_change"]) < 3
    assert rounded[2].estimates()["gold_nats_change"].low > 0


@pytest.mark.parametrize("kind", ["activations", "weights"])
def test_rounding_to_4_bits_is_clearly_worse_with_outliers(
    kind: Kind, kept: NextTokens, rounded: dict[int, Divergence]
) -> None:
    model = reference()
    tokens = kept.tokens[:2, :64]
    with torch.no_grad():
        before = model(tokens).logits
        inject_outliers(model, kind=kind)
        torch.testing.assert_close(model(tokens).logits, before, rtol=0, atol=1e-5)
    uneven = divergence(compress(model, Rtn(bits=4), progress=False), kept)
    assert uneven.estimates()["kl_nats_per_token"].low > 2 * rounded[4].estimates()["kl_nats_per_token"].high


def test_ref_is_better_than_ref_mini_and_knows_its_world() -> None:
    names = [task("prose"), task("recall", distance=0), "sentiment"]
    large, small = (evaluate(load(name, dtype=torch.float32), names, limit=16) for name in ("ref", "ref-mini"))
    (bits_per_byte,) = [c for c in compare(small, large) if c.metric == "bits_per_byte"]
    assert bits_per_byte.difference.high < 0
    assert bits_per_byte.p_holm < 0.01
    assert large["recall"].metrics["exact_match"].value >= 0.8
    assert large["sentiment"].metrics["accuracy"].value >= 0.8


def test_exact_match_is_what_greedy_generation_writes() -> None:
    model = reference()
    client = LocalClient(model, tokenizer_of(model))
    agreed = 0
    for name in ("facts", "format", "arithmetic", "openbook"):
        made = task(name)
        documents = made.documents(10, 3)
        asked = [made.requests(document)["gold"] for document in documents]
        forced = client.run(asked)
        prompts = [request for request in asked if isinstance(request, LogLikelihood)]
        written = client.run([Generate(request.context, 24, ("\n",)) for request in prompts])
        for document, response, text in zip(documents, forced, written, strict=True):
            scored = made.score(document, {"gold": response})[document.fields["metric"]]
            assert (text.text == document.fields["answer"]) == bool(scored)
            agreed += 1
    assert agreed == 40
