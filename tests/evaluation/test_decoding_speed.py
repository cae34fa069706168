"""The benchmark of decoding methods and the measurement of controlled drafts, as small as they can be."""

from __future__ import annotations

import pytest
import torch

import trimtab as tt
from trimtab.core.errors import ConfigError, NumericsError
from trimtab.decoding import Decoder, Sampling, Speculative
from trimtab.evaluation.controlled_drafts import METHODS, PROMPT_TOKENS, PROMPTS, prompt_sets
from trimtab.evaluation.decoding_speed import Setting, choose, run
from trimtab.evaluation.decoding_speed.measure import demand_same
from trimtab.evaluation.decoding_speed.sessions import untrained
from trimtab.evaluation.decoding_speed.widened import widen
from trimtab.evaluation.decodings import decoding_reference, measure_decoding
from trimtab.models.random import random_model

SMALL = Setting(million_weights=1, prompts=2, prompt=16, steps=8, depth=3)


@pytest.mark.slow
def test_systems_write_the_same_text_and_say_what_each_forward_brought() -> None:
    systems = choose(["transformers", "trimtab/plain", "trimtab/speculative"])
    entries = run(systems, SMALL, threads=1)
    assert [entry["system"] for entry in entries] == [system.name for system in systems]
    assert not [entry["error"] for entry in entries if "error" in entry]
    by_name = {entry["system"]: entry for entry in entries}
    for entry in entries:
        assert entry["bench"] == "decoding"
        assert entry["setting"]["depth"] == 3
        assert entry["tokens_per_s_median"] > 0
        assert entry["same_text"] >= 0.5
    assert by_name["trimtab/plain"]["tokens_per_target_forward"] == 1
    assert by_name["trimtab/speculative"]["tokens_per_target_forward"] > 1
    assert 1 <= len(by_name["trimtab/speculative"]["accepted_by_depth"]) <= 3


def test_unknown_systems_and_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown system 'vllm'"):
        choose(["vllm"])
    with pytest.raises(ConfigError, match="depth is 0"):
        Setting(depth=0)
    with pytest.raises(ConfigError, match="prompts is 1"):
        Setting(prompts=1)


def test_another_text_is_not_timed() -> None:
    assert demand_same([[1, 2, 3, 4]], [[1, 2, 9, 4]], 0.2) == 0.5
    with pytest.raises(NumericsError, match="only 0% of the tokens"):
        demand_same([[5, 2]], [[1, 2]], 0.2)


def test_a_widened_model_writes_the_same() -> None:
    model, ids = random_model("llama"), torch.arange(3, 20)[None]
    before, size = model(ids).logits, sum(parameter.numel() for parameter in model.parameters())
    assert widen(model, 200_000) == pytest.approx(size + 200_000, rel=0.1)
    torch.testing.assert_close(model(ids).logits, before)


def test_an_untrained_draft_has_the_size_of_the_trained_one() -> None:
    mini = tt.load("ref-mini")
    other = untrained(mini, 0)
    assert [p.shape for p in other.parameters()] == [p.shape for p in mini.parameters()]
    assert not torch.equal(next(other.parameters()), next(mini.parameters()))


def test_prompts_of_all_kinds_have_their_length() -> None:
    sets = prompt_sets(tt.load("ref-mini"))
    assert {len(texts) for texts in sets.values()} == {PROMPTS}
    assert {len(text) for name in ("prose", "repetition", "random tokens") for text in sets[name]} == {PROMPT_TOKENS}
    assert all(text[:8] == text[8:16] for text in sets["repetition"])
    assert {method.to_dict()["draft"] for method in METHODS.values()} == {"ref-mini", "ngram", "untrained"}


def test_a_method_is_compared_with_plain_decoding_of_the_same_prompts() -> None:
    model = tt.load("ref-mini", dtype=torch.float32)
    reference, plain = decoding_reference(model, prompts=2)
    found = measure_decoding(model, [Speculative(draft="self:8bit", depth=3)], reference)
    assert plain["ledger"]["tokens_per_target_forward"] == 1
    assert found["same_text"] == 1
    assert found["lossless"]
    sampled, _ = decoding_reference(model, prompts=2, temperature=1.0)
    assert "same_text" not in measure_decoding(model, [Speculative(draft="ngram")], sampled)
    whole = Decoder(model).generate(reference.prompts, Sampling(max_new_tokens=reference.sampling.max_new_tokens))
    assert whole.tokens == reference.texts
