"""Names that a model can be loaded by, and the answers to those it cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import trimtab as tt
from trimtab.core.errors import CheckpointError, ConfigError
from trimtab.models import info_of, tokenizer_of
from trimtab.models.random import random_model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    random_model("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_foreign_directory(saved: Path) -> None:
    model = tt.load(saved)
    assert not model.training
    assert model.dtype == torch.bfloat16
    info = info_of(model)
    assert (info.source, info.tokenizer, info.recipe, info.record) == (str(saved), None, None, None)
    assert info.baseline_bytes == sum(p.numel() * 2 for p in model.parameters())
    assert tt.load(str(saved), dtype="float32").dtype == torch.float32
    assert tt.load(saved, dtype=torch.float16, device="cpu").dtype == torch.float16


def test_the_tokenizer_comes_with_the_model(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer is known for .*Load a directory with tokenizer files"):
        tokenizer_of(tt.load(saved))
    vocabulary = {f"w{i}": i for i in range(131)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w0")), unk_token="w0"
    ).save_pretrained(saved)
    model = tt.load(saved)
    assert tokenizer_of(model).get_vocab() == vocabulary
    tt.save(model, tmp_path / "again")
    assert tokenizer_of(tt.load(tmp_path / "again")).get_vocab() == vocabulary
    (saved / "tokenizer.json").write_text("{]")
    with pytest.raises(CheckpointError, match=r"the tokenizer in .* cannot be read"):
        tt.load(saved)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("reff", r"unknown model 'reff' \(no such directory\). Did you mean 'ref'\? Known: ref, ref-mini."),
        ("./nowhere", r"unknown model './nowhere' \(no such directory\)"),
        ("a/b/c", r"unknown model 'a/b/c'"),
        ("trimtab-tests/none-such", r"unknown model 'trimtab-tests/none-such' \(Hugging Face has no answer: .+\)"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        tt.load(name)
    assert "\n" not in str(caught.value)


def test_a_mistyped_directory_gets_a_suggestion(saved: Path) -> None:
    with pytest.raises(ConfigError, match=rf"Did you mean '{saved}'"):
        tt.load(saved.with_name("modle"))


def test_a_file_is_no_model(saved: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a file; give the directory"):
        tt.load(saved / "config.json")


def test_dtypes_and_devices_that_cannot_be_used(saved: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown dtype 'bfloat61'. Did you mean 'bfloat16'"):
        tt.load(saved, dtype="bfloat61")
    with pytest.raises(ConfigError, match=r"device 'gpu' cannot be used"):
        tt.load(saved, device="gpu")
    with pytest.raises(ConfigError, match=r"device 'cuda:99' cannot be used"):
        tt.load(saved, device="cuda:99")


def change_config(directory: Path, **changes: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


def test_a_configuration_of_another_size(saved: Path) -> None:
    change_config(saved, num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"lack 'model.layers.2.input_layernorm.weight'.*\(and 8 more\)"):
        tt.load(saved)
    change_config(saved, num_hidden_layers=2, intermediate_size=96)
    with pytest.raises(
        CheckpointError, match=r"is \[48, 112\] in the weights, but LlamaForCausalLM .* wants \[48, 96\]"
    ):
        tt.load(saved)
    change_config(saved, num_hidden_layers=1, intermediate_size=112)
    with pytest.warns(
        UserWarning, match=r"hold 'model.layers.1.input_layernorm.weight', which LlamaForCausalLM does not"
    ):
        tt.load(saved)


def test_a_configuration_of_another_kind(saved: Path) -> None:
    config = (saved / "config.json").read_text()
    random_model("gpt2").config.save_pretrained(saved)
    with pytest.raises(CheckpointError, match=r"of different models"):
        tt.load(saved)
    (saved / "config.json").write_text(config)
    change_config(saved, model_type="t5")
    with pytest.raises(CheckpointError, match=r"does not hold a model that can be loaded"):
        tt.load(saved)
    change_config(saved, model_type="lama")
    with pytest.raises(CheckpointError, match=r"does not hold a model that can be loaded: .*lama"):
        tt.load(saved)


def test_reference_models_by_name(monkeypatch: pytest.MonkeyPatch, saved: Path, tmp_path: Path) -> None:
    from trimtab.models import loading

    monkeypatch.setattr(loading, "ASSETS", tmp_path / "assets")
    with pytest.raises(ConfigError, match=r"'ref-mini' is not part of this installation"):
        tt.load("ref-mini")
    shutil.copytree(saved, tmp_path / "assets" / "ref-mini")
    assert info_of(tt.load("ref-mini")).source == "ref-mini"


def test_a_hugging_face_id_from_the_local_cache(monkeypatch: pytest.MonkeyPatch, saved: Path, tmp_path: Path) -> None:
    revision = "0123456789" * 4
    repository = tmp_path / "hub" / "models--acme--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    snapshot = repository / "snapshots" / revision
    tt.save(tt.load(saved), snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert info_of(tt.load("acme/tiny")).source == "acme/tiny"
    (snapshot / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model.safetensors is truncated"):
        tt.load("acme/tiny")
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"unknown model 'acme/tiny' \(Hugging Face has no answer"):
        tt.load("acme/tiny")
