"""`trimtab export`: what it writes and prints, and what it refuses before it loads a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Ran

Cli = Callable[..., Ran]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import trimtab as tt
    from trimtab.models import random_model

    model = random_model("llama", hidden_size=64, intermediate_size=96)
    tt.compress(model, tt.weights.Rtn(bits=4, group_size=32, symmetric=True), progress=False)
    return tt.save(model, tmp_path_factory.mktemp("model") / "rtn4")


def test_export_to_a_directory_and_load_it_back(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    import trimtab as tt

    out = tmp_path / "out"
    ran = cli("export", str(checkpoint), "--format", "compressed-tensors", "-o", str(out))
    assert ran.status == 0, ran.err
    for part in ("int4", "14", str(out)):
        assert part in ran.out
    assert tt.load(out).trimtab.source == str(out)
    again = cli("export", str(out), "--format", "gptq", "-o", str(tmp_path / "gptq"), "--json")
    assert again.status == 0, again.err
    assert (again.json["format"], again.json["options"]) == ("gptq", {"checkpoint_format": "gptq"})
    assert len(again.json["layers"]) == 14


def test_export_to_a_file_tells_the_error_of_rounding(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    options = ["--set", "tokenizer=none", "--set", "type=q4_1", "--set", "dense=f16"]
    ran = cli("export", str(checkpoint), "-f", "gguf", *options, "-o", str(out), "--json")
    assert ran.status == 0, ran.err
    assert ran.json["nbytes"] == out.stat().st_size
    assert ran.json["options"]["dense"] == "f16"
    assert {entry["stored_as"] for entry in ran.json["layers"]} == {"q4_1"}
    projected = cli("export", str(checkpoint), "-f", "gguf", "--set", "tokenizer=none", "--set", "type=q4_k", "--set",
                    "fallback=q4_0", "-o", str(out), "--force")  # fmt: skip
    assert projected.status == 0, projected.err
    assert "q4_0" in projected.out


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--format", "onnx"], ["unknown export format 'onnx'", "compressed-tensors, gguf, gptq, peft"]),
        (["--format", "gguf", "--set", "type=q5_0"], ["type='q5_0'"]),
        (["--format", "gptq", "--set", "bits=4"], ["no option 'bits'"]),
        (["--format", "peft", "--set", "alpha=-1"], ["alpha=-1"]),
    ],
)
def test_options_are_refused_before_a_model_is_loaded(
    refused: Cli, tmp_path: Path, options: list[str], names: list[str]
) -> None:
    refused("export", "no/such/model", *options, "-o", "out", names=names)


def test_outputs_in_the_way(refused: Cli, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letters").write_text("mine")
    (tmp_path / "m.gguf").write_text("mine")
    refused("export", "no/such/model", "-f", "gptq", "-o", "full", names=["not empty"])
    refused("export", "no/such/model", "-f", "gptq", "-o", "full", "--force", names=["no config.json"])
    refused("export", "no/such/model", "-f", "gguf", "-o", "full", names=["is a directory"])
    refused("export", "no/such/model", "-f", "gguf", "-o", "m.gguf", names=["m.gguf exists", "--force"])


def test_a_layer_that_a_format_cannot_hold(refused: Cli, checkpoint: Path) -> None:
    refused("export", str(checkpoint), "-f", "peft", "-o", "out", names=["no layer has a low-rank part"])
    refused("export", "ref-mini", "-f", "gptq", "-o", "out", names=["no compressed layers"])


def test_help_names_all_formats(cli: Cli) -> None:
    from trimtab.models.exports import FORMATS

    ran = cli("export", "--help")
    text = " ".join(ran.out.replace("│", " ").split())
    assert all(name in text for name in FORMATS)
