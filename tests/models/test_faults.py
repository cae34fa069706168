"""Damage is found and named; nothing that was whole is lost."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import trimtab as tt
from trimtab.core.errors import CheckpointError, OutputError
from trimtab.models import checkpoint, info_of
from trimtab.models.checkpoint import check_files, read_header
from trimtab.models.random import random_model

from .compressing import compress_all, logits

Loader = Callable[[Path], object]
BOTH = pytest.mark.parametrize(
    "loader", [tt.load, AutoModelForCausalLM.from_pretrained], ids=["trimtab", "transformers"]
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return tt.save(compress_all(random_model("llama")), tmp_path / "out")


def rewrite(path: Path, change: Callable[[dict[str, object]], None]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@BOTH
@pytest.mark.parametrize("buffer", ["part0_codes", "part0_scales", "part0_zeros"])
def test_one_flipped_bit_is_named(saved: Path, loader: Loader, buffer: str) -> None:
    name = f"model.layers.1.mlp.down_proj.{buffer}"
    file = saved / "model.safetensors"
    place = read_header(file)[name]
    content = bytearray(file.read_bytes())
    content[(place.start + place.end) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"bytes of '{name}' in model.safetensors are not those"):
        loader(saved)
    with pytest.raises(CheckpointError, match=r"model.safetensors is not as it was saved"):
        check_files(saved)


def test_a_flipped_bit_in_an_uncompressed_checkpoint(tmp_path: Path) -> None:
    saved = tt.save(random_model("opt"), tmp_path / "out")
    file = saved / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 0x80
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is damaged: the bytes of"):
        tt.load(saved)


def test_scales_that_no_compression_writes_are_refused_without_checksums(saved: Path) -> None:
    place = read_header(saved / "model.safetensors")["model.layers.0.self_attn.q_proj.part0_scales"]
    content = bytearray((saved / "model.safetensors").read_bytes())
    content[place.start : place.start + 2] = b"\x00\xfe"  # a NaN in float16
    (saved / "model.safetensors").write_bytes(content)
    (saved / "trimtab.json").unlink()
    with (
        pytest.warns(UserWarning, match=r"has no trimtab.json"),
        pytest.raises(CheckpointError, match=r"'model.layers.0.self_attn.q_proj': .*scales\[0, 0\] = nan"),
    ):
        AutoModelForCausalLM.from_pretrained(saved)


@BOTH
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_truncated_weights(saved: Path, loader: Loader, share: float) -> None:
    file = saved / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match=r"model.safetensors is truncated or damaged"):
        loader(saved)


def test_missing_weights(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no weights: neither model.safetensors nor"):
        tt.load(saved)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    random_model("llama").save_pretrained(tmp_path / "out", max_shard_size="100KB")
    shard = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"lacks {shard.name}, one of the \d+ weight files its index names"):
        tt.load(tmp_path / "out")


@BOTH
def test_a_newer_format_is_refused(saved: Path, loader: Loader) -> None:
    def newer(config: dict[str, object]) -> None:
        quantization = config["quantization_config"]
        assert isinstance(quantization, dict)
        quantization |= {"format_version": 2, "trimtab_version": "9.1.0", "something_new": [1]}

    rewrite(saved / "config.json", newer)
    with pytest.raises(
        CheckpointError, match=r"written by trimtab 9.1.0 in checkpoint format 2; this trimtab reads formats up to 1"
    ):
        loader(saved)


def test_a_newer_manifest_is_refused(tmp_path: Path) -> None:
    saved = tt.save(random_model("llama"), tmp_path / "out")
    rewrite(saved / "trimtab.json", lambda m: m.update(format_version=7, trimtab_version="9.1.0"))
    with pytest.raises(CheckpointError, match=r"written by trimtab 9.1.0 in checkpoint format 7"):
        tt.load(saved)


@pytest.mark.parametrize("content", [b'{"model_type": "lla', b"\xff\xfe", b"[]"])
@pytest.mark.parametrize(
    ("file", "loader"),
    [
        ("config.json", tt.load),  # transformers reads it before trimtab is asked
        ("trimtab.json", tt.load),
        ("trimtab.json", AutoModelForCausalLM.from_pretrained),
    ],
)
def test_damaged_json(saved: Path, loader: Loader, file: str, content: bytes) -> None:
    (saved / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{file} is damaged"):
        loader(saved)


@BOTH
@pytest.mark.parametrize(
    "change", [{"baseline_bytes": None}, {"dtype": "float99"}, {"record": {"comand": "x"}}, {"recipe": {"steps": 3}}]
)
def test_a_manifest_that_cannot_be_used(saved: Path, loader: Loader, change: dict[str, object]) -> None:
    rewrite(saved / "trimtab.json", lambda manifest: manifest.update(change))
    with pytest.raises(CheckpointError, match=r"trimtab.json cannot be used"):
        loader(saved)


@BOTH
def test_a_configuration_for_another_architecture(saved: Path, loader: Loader) -> None:
    quantization = json.loads((saved / "config.json").read_text())["quantization_config"]
    other = json.loads(random_model("gpt2").config.to_json_string(use_diff=False))
    (saved / "config.json").write_text(json.dumps({**other, "quantization_config": quantization}))
    with pytest.raises(CheckpointError, match=r"config.json describes a model of type 'gpt2', but .*'llama'"):
        loader(saved)


@BOTH
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 1}, r"has a compressed layer 'model.layers.1.mlp.down_proj', which LlamaForCausalLM"),
        ({"intermediate_size": 96}, r"'model.layers.0.mlp.down_proj' is \[48, 112\] .* describes it is \[48, 96\]"),
    ],
)
def test_layers_that_do_not_fit(saved: Path, loader: Loader, change: dict[str, object], message: str) -> None:
    rewrite(saved / "config.json", lambda config: config.update(change))
    with pytest.raises(CheckpointError, match=message):
        loader(saved)


@BOTH
def test_specs_that_do_not_fit_the_stored_tensors(saved: Path, loader: Loader) -> None:
    def widen(config: dict[str, object]) -> None:
        layers = config["quantization_config"]["layers"]  # type: ignore[index]
        layers["model.layers.0.self_attn.q_proj"]["parts"][0]["bits"] = 8

    rewrite(saved / "config.json", widen)
    with pytest.raises(CheckpointError, match=r"'model.layers.0.self_attn.q_proj.part0_codes' is U8 \[48, 24\]"):
        loader(saved)


def test_a_configuration_that_forgot_the_compression(saved: Path) -> None:
    rewrite(saved / "config.json", lambda config: config.pop("quantization_config"))
    with pytest.raises(CheckpointError, match=r"the weights lack 'model.layers.0.mlp.down_proj.weight'"):
        tt.load(saved)


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: what a full disk does to a writer, done by the system itself."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.skipif(sys.platform != "linux", reason="limits file sizes through Linux")
@pytest.mark.parametrize("size", [100, 8_000, 60_000, 600_000])
def test_a_full_disk_leaves_the_old_result(tmp_path: Path, tokens: Tensor, size: int) -> None:
    """The limits stop the configuration, the weights (twice), and the tokenizer."""
    old, new = random_model("llama", 1), random_model("llama", 2)
    tt.save(old, tmp_path / "out")
    words = {f"a word of some length, number {i}": i for i in range(20_000)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="a word of some length, number 0"))
    info_of(new).tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    with files_up_to(size), pytest.raises(OutputError, match=r"cannot be written .*; nothing was changed"):
        tt.save(new, tmp_path / "out", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert torch.equal(logits(tt.load(tmp_path / "out"), tokens), logits(old, tokens))


KILLED_WHILE_SAVING = """
import os, signal, sys
import trimtab as tt
from safetensors import torch as weights
from trimtab.core import files
from trimtab.models import saving
from trimtab.models.random import random_model

out, model = sys.argv[1], random_model("llama", 2)
die = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
for place, name in ((saving, "tensor_checksums"), (saving, "sha256_file"), (files, "_take_name"), (files, "_exchange")):
    child = os.fork()
    if child == 0:
        setattr(place, name, die)
        tt.save(model, out, force=True)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, (name, status)
    print(name, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes as Unix does")
def test_a_killed_save_leaves_the_old_result(tmp_path: Path, tokens: Tensor) -> None:
    old, new = random_model("llama", 1), random_model("llama", 3)
    tt.save(old, tmp_path / "out")
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED_WHILE_SAVING), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert run.stdout.split() == ["tensor_checksums", "sha256_file", "_take_name", "_exchange"]
    assert len(list(tmp_path.iterdir())) > 1  # what the killed writers left beside it
    assert torch.equal(logits(tt.load(tmp_path / "out"), tokens), logits(old, tokens))
    check_files(tmp_path / "out")
    tt.save(new, tmp_path / "out", force=True)
    assert torch.equal(logits(tt.load(tmp_path / "out"), tokens), logits(new, tokens))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("small")
    save_file(
        {"a": torch.arange(12.0).view(3, 4), "b": torch.arange(5, dtype=torch.uint8)}, directory / "w.safetensors"
    )
    return directory / "w.safetensors"


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.floats(0, 1))
def test_no_damage_passes(small_checkpoint: Path, place: float, bit: int, cut: float) -> None:
    """A flipped bit or a missing end is an error, or changes neither a name, nor a dtype, a shape or a value."""
    whole = small_checkpoint.read_bytes()
    manifest = {"tensors": checkpoint.tensor_checksums(read_header(small_checkpoint))}
    flipped = bytearray(whole)
    flipped[int(place * len(whole))] ^= 1 << bit
    for content in (bytes(flipped), whole[: int(cut * len(whole))]):
        file = small_checkpoint.with_name("damaged.safetensors")
        file.write_bytes(content)
        try:
            stored = read_header(file)
            checkpoint.check_tensors(stored, manifest, "it")
        except CheckpointError:
            continue
        for name, before in read_header(small_checkpoint).items():
            after = stored[name]
            assert (after.dtype, after.shape) == (before.dtype, before.shape)
            assert content[after.start : after.end] == whole[before.start : before.end]


def test_checksums_see_dtype_and_shape(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    header = '{"x":{"dtype":"F16","shape":[2,3],"data_offsets":[0,12]}}'
    found = set()
    for text in (header, header.replace("F16", "I16"), header.replace("[2,3]", "[3,2]")):
        file.write_bytes(len(text).to_bytes(8, "little") + text.encode() + bytes(range(12)))
        found.add(checkpoint.tensor_checksums(read_header(file))["x"])
    assert len(found) == 3


def test_models_are_unchanged_by_saving(saved: Path) -> None:
    model: PreTrainedModel = random_model("gemma2")
    before = json.dumps(model.config.to_dict(), default=str)
    tt.save(model, saved, force=True)
    after = json.dumps({**model.config.to_dict(), "architectures": None}, default=str)
    assert after == json.dumps({**json.loads(before), "architectures": None}, default=str)
