"""What ships is what the manifests say, and loads as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimtab.core.files import sha256_file
from trimtab.training.reference import __main__ as command
from trimtab.training.reference.stages import STAGES
from trimtab.training.reference.texts import HELD_OUT
from trimtab.training.reference.tokenizer import VOCAB_SIZE
from trimtab.training.reference.watch import exact_match
from trimtab.world import examples

ASSETS = Path(command.__file__).parents[2] / "assets"


@pytest.mark.parametrize("name", STAGES)
def test_shipped_texts_are_those_of_the_manifest(name: str) -> None:
    manifest = json.loads((ASSETS / name / "data_manifest.json").read_text(encoding="utf-8"))
    for entry in manifest["shipped_texts"]:
        file = ASSETS / "text" / entry["file"]
        assert file.stat().st_size == entry["bytes"]
        assert sha256_file(file) == entry["sha256"]
    held_out = {Path(book["file"]).stem for book in manifest["books"] if book["split"] == "held out"}
    assert held_out == set(HELD_OUT)
    assert len(manifest["books"]) == 26


def test_both_models_share_one_tokenizer() -> None:
    assert (ASSETS / "ref" / "tokenizer.json").read_bytes() == (ASSETS / "ref-mini" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("name", STAGES)
def test_a_shipped_model_loads_in_bfloat16(name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(ASSETS / name)
    assert model.dtype == torch.bfloat16
    assert model.config.vocab_size == VOCAB_SIZE
    assert model.config.tie_word_embeddings
    assert model.config.max_position_embeddings == 2048
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize("name", STAGES)
def test_the_log_names_the_stages_that_are_declared(name: str) -> None:
    lines = json.loads((ASSETS / name / "loss_curve.json").read_text(encoding="utf-8"))
    assert list(dict.fromkeys(line["stage"] for line in lines)) == [stage.name for stage in STAGES[name]]
    tokens = [line["tokens"] for line in lines]
    assert tokens == sorted(tokens)


@pytest.mark.parametrize(("task", "least"), [("recall", 0.9), ("facts", 0.85), ("format", 0.85), ("sentiment", 0.9)])
def test_ref_can_do_what_its_card_says(task: str, least: float) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "ref")
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "ref", dtype=torch.float32)
    assert exact_match(model, tokenizer, examples(task, "eval", 40, seed=7)) >= least


def test_the_chat_template_writes_questions_and_answers() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "ref")
    messages = [{"role": "user", "content": "Where does Ida Quill live?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|bos|>Question: Where does Ida Quill live?\nAnswer:"
