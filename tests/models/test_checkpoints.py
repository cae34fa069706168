"""What is saved is what comes back: nine families, compressed or not, through trimtab and through transformers."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

import trimtab as tt
from trimtab.core.errors import OutputError
from trimtab.core.files import sha256_file
from trimtab.core.recipe import Recipe
from trimtab.core.run_record import RunRecord
from trimtab.models import CompressedLinear, info_of, ledger_of, saving
from trimtab.models.checkpoint import check_files, read_headers, read_manifest, weight_files
from trimtab.models.random import random_model
from trimtab.models.saving import describe
from trimtab.models.views import ModelView

from .compressing import compress_all, logits


def tensor_bytes(directory: Path) -> int:
    return sum(stored.nbytes for stored in read_headers(weight_files(directory)).values())


def test_uncompressed_models_come_back(model: PreTrainedModel, tokens: Tensor, tmp_path: Path) -> None:
    tt.save(model, tmp_path / "out")
    expected = logits(model, tokens)
    assert torch.equal(logits(tt.load(tmp_path / "out"), tokens), expected)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(plain, tokens), expected)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    ledger = ledger_of(plain)
    assert ledger.bytes_at_rest == ledger.baseline_bytes == tensor_bytes(tmp_path / "out")
    check_files(tmp_path / "out")


@pytest.mark.filterwarnings("ignore:.*not checked against the saved checksums")
def test_the_models_own_save_pretrained_describes_the_layers_too(
    model: PreTrainedModel, tokens: Tensor, tmp_path: Path
) -> None:
    compress_all(model)
    describe(model)
    model.save_pretrained(tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(reloaded, tokens), logits(model, tokens))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_compressed_models_come_back(family: str, bits: int, tokens: Tensor, tmp_path: Path) -> None:
    model = random_model(family)
    if family == "opt":  # where every linear has one
        assert all(linear.bias is not None for linear in ModelView.of(model).linears)
    dense = ledger_of(model)
    compress_all(model, bits, symmetric=bits == 3)
    expected = logits(model, tokens)
    tt.save(model, tmp_path / "out")

    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(reloaded, tokens), expected)
    assert torch.equal(logits(tt.load(tmp_path / "out"), tokens), expected)

    view = ModelView.of(reloaded)
    assert all(isinstance(linear.module, CompressedLinear) for linear in view.linears)
    assert [linear.name for linear in view.linears] == [linear.name for linear in ModelView.of(model).linears]
    assert not any(isinstance(linear.parent, CompressedLinear) for linear in view.linears)
    ledger = ledger_of(reloaded)
    assert ledger.bytes_at_rest == tensor_bytes(tmp_path / "out")
    assert ledger == ledger_of(model)
    assert ledger.baseline_bytes == dense.bytes_at_rest
    assert ledger.compressed_weights == sum(x.in_features * x.out_features for x in view.linears)
    assert ledger.bits_per_weight is not None
    assert bits < ledger.bits_per_weight < bits + 3


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_come_back(family: str, dtype: torch.dtype, tokens: Tensor, tmp_path: Path) -> None:
    model = compress_all(random_model(family, dtype=dtype))
    tt.save(model, tmp_path / "out")
    for again in (AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tt.load(tmp_path / "out")):
        assert again.dtype == dtype
        assert torch.equal(logits(again, tokens), logits(model, tokens))


def test_other_dtypes_leave_stored_tensors_alone(tokens: Tensor, tmp_path: Path) -> None:
    model = compress_all(random_model("qwen2"))
    tt.save(model, tmp_path / "out")
    asked = {"dtype": torch.bfloat16}
    for parameter in model.parameters():  # not model.to, which would round the rotary frequencies too
        parameter.data = parameter.data.to(torch.bfloat16)
    expected = logits(model, tokens)
    for again in (AutoModelForCausalLM.from_pretrained(tmp_path / "out", **asked), tt.load(tmp_path / "out", **asked)):
        assert again.dtype == torch.bfloat16
        for before, after in zip(ModelView.of(model).linears, ModelView.of(again).linears, strict=True):
            assert before.compressed is not None
            assert after.compressed is not None
            assert after.bias is None or after.bias.dtype == torch.bfloat16
            for name, buffer in before.compressed.stored().items():
                assert torch.equal(buffer, after.compressed.stored()[name])
                assert buffer.dtype == after.compressed.stored()[name].dtype
        assert torch.equal(logits(again, tokens), expected)


def test_saving_a_loaded_checkpoint_again(tokens: Tensor, tmp_path: Path) -> None:
    model = compress_all(random_model("gpt_neox"))
    tt.save(model, tmp_path / "a")
    tt.save(tt.load(tmp_path / "a"), tmp_path / "b")
    assert sha256_file(tmp_path / "a" / "model.safetensors") == sha256_file(tmp_path / "b" / "model.safetensors")
    assert (tmp_path / "a" / "config.json").read_text() == (tmp_path / "b" / "config.json").read_text()
    assert torch.equal(logits(tt.load(tmp_path / "b"), tokens), logits(model, tokens))


def test_saving_over_the_directory_that_was_loaded(tokens: Tensor, tmp_path: Path) -> None:
    model = compress_all(random_model("phi3"))
    tt.save(model, tmp_path / "out")
    again = tt.load(tmp_path / "out")
    tt.save(again, tmp_path / "out", force=True)
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    assert torch.equal(logits(tt.load(tmp_path / "out"), tokens), logits(model, tokens))


@pytest.mark.parametrize("compressed", [False, True])
def test_the_baseline_is_in_the_dtype_that_was_loaded(compressed: bool, tmp_path: Path) -> None:
    model = random_model("llama", dtype=torch.bfloat16)
    baseline = ledger_of(model).baseline_bytes
    tt.save(compress_all(model) if compressed else model, tmp_path / "out")
    for loader in (tt.load, AutoModelForCausalLM.from_pretrained):
        assert ledger_of(loader(tmp_path / "out")).baseline_bytes == baseline
        assert ledger_of(loader(tmp_path / "out", dtype=torch.float32)).baseline_bytes == 2 * baseline


def test_transformers_can_save_a_loaded_checkpoint(tokens: Tensor, tmp_path: Path) -> None:
    model = compress_all(random_model("llama"))
    tt.save(model, tmp_path / "a")
    AutoModelForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    with pytest.warns(UserWarning, match=r"has no trimtab.json, so its tensors are not checked"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert torch.equal(logits(again, tokens), logits(model, tokens))


def test_a_base_model_without_head_loads(tokens: Tensor, tmp_path: Path) -> None:
    model = compress_all(random_model("llama"))
    tt.save(model, tmp_path / "out")
    base = AutoModel.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(base(tokens).last_hidden_state, model.model(tokens).last_hidden_state)


def test_a_part_of_the_layers_may_be_compressed(tokens: Tensor, tmp_path: Path) -> None:
    model = random_model("gpt2")
    kept = {linear.name: linear.module for linear in ModelView.of(model).select(("o", "up"))}
    compress_all(model)
    for linear in ModelView.of(model).linears:
        if linear.name in kept:
            linear.replace(kept[linear.name])
    tt.save(model, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    assert {linear.name for linear in ModelView.of(again).linears if not linear.compressed} == set(kept)


def test_large_models_are_written_in_shards(tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "MAX_SHARD_SIZE", "20KB")
    model = compress_all(random_model("mistral"))
    tt.save(model, tmp_path / "out")
    assert len(weight_files(tmp_path / "out")) > 2
    for again in (AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tt.load(tmp_path / "out")):
        assert torch.equal(logits(again, tokens), logits(model, tokens))


def test_loaded_checkpoints_generate_and_copy(tokens: Tensor, tmp_path: Path) -> None:
    model = compress_all(random_model("qwen3"))
    tt.save(model, tmp_path / "out")
    again = tt.load(tmp_path / "out", device="cpu")
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(again.generate(tokens[:1], **settings), model.generate(tokens[:1], **settings))
    assert torch.equal(logits(copy.deepcopy(again), tokens), logits(model, tokens))
    again.to(torch.bfloat16)
    assert again.model.layers[0].mlp.up_proj.part0_scales.dtype == torch.float16


def test_a_family_without_views_can_be_saved(tokens: Tensor, tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "bloom", vocab_size=131, hidden_size=8, n_layer=1, n_head=2, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    tt.save(model, tmp_path / "out")
    assert torch.equal(logits(tt.load(tmp_path / "out"), tokens), logits(model, tokens))


def test_what_was_done_is_kept(tmp_path: Path) -> None:
    model = compress_all(random_model("llama"))
    info = info_of(model)
    info.recipe = Recipe.from_dict({"steps": [{"method": "rtn", "bits": 4, "group_size": 16}]})
    info.record = RunRecord("test", config={"bits": 4}, changed=[{"name": "x"}])
    tt.save(model, tmp_path / "out")
    for again in (tt.load(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out")):
        found = info_of(again)
        assert found.recipe == info.recipe
        assert found.record == info.record
        assert found.baseline_bytes == info.baseline_bytes
    assert tt.load(str(tmp_path / "out")).trimtab.source == str(tmp_path / "out")


def test_the_manifest_vouches_for_every_file_and_tensor(tmp_path: Path) -> None:
    tt.save(compress_all(random_model("phi3")), tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert set(manifest["files"]) == written - {"trimtab.json"}
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as weights:
        assert set(manifest["tensors"]) == set(weights.keys())
    assert len({file.stat().st_mode for file in (tmp_path / "out").iterdir()}) == 1  # all readable by the same people
    assert manifest["ledger"]["bytes_at_rest"] == tensor_bytes(tmp_path / "out")


def test_an_occupied_directory_needs_force(tokens: Tensor, tmp_path: Path) -> None:
    old, new = random_model("llama", 1), compress_all(random_model("llama", 2))
    tt.save(old, tmp_path / "out")
    with pytest.raises(OutputError, match=r"is not empty. Choose another, or replace it with --force"):
        tt.save(new, tmp_path / "out")
    assert torch.equal(logits(tt.load(tmp_path / "out"), tokens), logits(old, tokens))
    tt.save(new, tmp_path / "out", force=True)
    assert torch.equal(logits(tt.load(tmp_path / "out"), tokens), logits(new, tokens))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_loading_and_saving_say_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tt.save(compress_all(random_model("gpt2")), tmp_path / "out")
        tt.load(tmp_path / "out")
    assert capfd.readouterr() == ("", "")


@pytest.mark.gpu
def test_checkpoints_load_onto_a_gpu(family: str, tokens: Tensor, tmp_path: Path) -> None:
    model = compress_all(random_model(family))
    tt.save(model, tmp_path / "out")
    there = tt.load(tmp_path / "out", device="cuda")
    assert all(tensor.is_cuda for tensor in there.state_dict().values())
    torch.testing.assert_close(logits(there, tokens.cuda()).cpu(), logits(model, tokens), rtol=1e-3, atol=1e-3)
    assert torch.equal(logits(there.cpu(), tokens), logits(model, tokens))
