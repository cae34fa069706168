"""Bad input and faults: one clear message, status 2, no traceback, nothing changed on disk (the fixture looks)."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Ran

Refused = Callable[..., Ran]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--method", "gtpq"], ["unknown method 'gtpq'", "'gptq'"]),
        (["--method", "rtn", "--set", "bit=4"], ["no option 'bit'", "'bits'"]),
        (["--method", "rtn", "--set", "bits=5"], ["bits", "5"]),
        (["--method", "rtn", "--set", "bits=many"], ["bits", "many"]),
        (["--method", "rtn", "--set", "bits"], ["'bits'", "OPTION=VALUE"]),
        (["--method", "rtn", "--set", "group_size=0"], ["group_size=0"]),
        (["--method", "rtn", "--recipe", "r.yaml"], ["either --method", "--recipe"]),
        ([], ["either --method", "--recipe"]),
        (["--budget", "0.3", "--recipe", "r.yaml"], ["--budget", "--recipe"]),
        (["--budget", "0.3", "--method", "rtn"], ["'rtn' takes no --budget", "'mixed'"]),
        (["--budget", "0.3", "--set", "budget=0.4"], ["'budget' twice"]),
        (["--budget", "five", "--set", "widths=2"], ["five", "20%", "400MB"]),
        (["--method", "mixed"], ["needs the option 'budget'"]),
        (["--recipe", "nowhere.yaml"], ["nowhere.yaml"]),
        (["--method", "rtn", "--text", "nowhere.txt"], ["nowhere.txt"]),
        (["--method", "rtn", "--sequences", "0"], ["--sequences"]),
        (["--method", "rtn", "--mode", "sideways"], ["--mode", "sideways"]),
    ],
)
def test_compress_refuses_before_it_loads_a_model(refused: Refused, options: list[str], names: list[str]) -> None:
    """The model does not exist either: the options are complained about first."""
    refused("compress", "no/such/model", "-o", "out", *options, names=names)


def test_compress_refuses_both_recipe_and_set(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("steps: [{method: rtn}]")
    refused("compress", "ref", "--recipe", "r.yaml", "--set", "bits=3", "-o", "out", names=["--set", "--recipe"])


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        ("steps: [{method: rtm}]", ["unknown method 'rtm'"]),
        ("steps: [{bits: 4}]", ["step 1", "no 'method'"]),
        ("stages: []", ["'steps'"]),
        ("version: 99\nsteps: [{method: rtn}]", ["99", "newer"]),
        ("steps: [{method: rtn}, {method: gptq}]", ["step 2", "already compressed by 'rtn'"]),
        (": : :", ["r.yaml"]),
    ],
)
def test_recipe_files_are_checked(refused: Refused, tmp_path: Path, recipe: str, names: list[str]) -> None:
    (tmp_path / "r.yaml").write_text(recipe)
    refused("compress", "no/such/model", "--recipe", "r.yaml", "-o", "out", names=names)


def test_output_that_is_occupied(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    rtn = ("--method", "rtn")
    refused("compress", "no/such/model", *rtn, "-o", "out", names=["not empty", "--force"])
    refused("compress", "no/such/model", *rtn, "-o", "out", "--force", names=["other files", "config.json"])
    refused("compress", "no/such/model", *rtn, "-o", "out/thesis.txt", names=["is a file"])
    refused("compare", "no/such/model", "--methods", "rtn", "-o", "out", names=["not empty"])
    refused("compare", "no/such/model", "--methods", "rtn", "-o", "out", "--force", names=["other files"])
    refused("demo", "-o", "out", names=["not empty"])


@pytest.mark.parametrize(
    "command",
    [
        ["compress", "{}", "--method", "rtn", "-o", "out"],
        ["generate", "{}", "-p", "text"],
        ["evaluate", "{}", "--tasks", "prose"],
        ["compare", "{}", "--methods", "rtn", "-o", "out"],
        ["modules", "{}"],
        ["plan", "{}"],
    ],
)
def test_unknown_model(refused: Refused, command: list[str]) -> None:
    refused(*[part.format("reff") for part in command], names=["unknown model 'reff'", "'ref'"])


@pytest.mark.parametrize(
    ("command", "names"),
    [
        (["evaluate", "no/model", "--tasks", "prosa"], ["unknown task 'prosa'", "'prose'"]),
        (["evaluate", "no/model", "--tasks", ""], ["--tasks is empty"]),
        (["evaluate", "no/model", "--limit", "0"], ["--limit"]),
        (["evaluate", "no/model", "--text", "nowhere.txt"], ["nowhere.txt"]),
        (["compare", "no/model", "--methods", "rtn,gtpq", "-o", "out"], ["unknown method 'gtpq'"]),
        (["compare", "no/model", "--methods", "rtn,rtn", "-o", "out"], ["rtn", "more than once"]),
        (["compare", "no/model", "--methods", "rtn", "--bits", "4,x", "-o", "out"], ["'x'"]),
        (["compare", "no/model", "--methods", "rtn", "--bits", "5", "-o", "out"], ["bits", "5"]),
        (
            ["compare", "no/model", "--methods", "rtn", "--set", "act_order=true", "-o", "out"],
            ["no option 'act_order'"],
        ),
        (["compare", "no/model", "--methods", "rtn", "--set", "gptq.act_order=1", "-o", "out"], ["'gptq'"]),
        (["compare", "no/model", "--methods", "rtn", "--bits", "4", "--set", "bits=3", "-o", "o"], ["contradict"]),
        (["compare", "no/model", "--methods", "rtn", "--tasks", "prosa", "-o", "out"], ["unknown task 'prosa'"]),
        (["compare", "no/model", "--methods", "kivi", "-o", "out"], ["kivi", "--caches"]),
        (["compare", "no/model", "-o", "out"], ["--methods", "--caches"]),
        (["compare", "no/model", "--methods", "rtn", "--caches", "kivi", "-o", "out"], ["--methods", "--caches"]),
        (["compare", "no/model", "--caches", "kivvi", "-o", "out"], ["unknown cache 'kivvi'", "'kivi'"]),
        (["compare", "no/model", "--caches", "exact,gptq", "-o", "out"], ["'gptq'", "room 'weights'"]),
        (["compare", "no/model", "--caches", "exact,kivi", "--bits", "5", "-o", "out"], ["bits=", "5"]),
        (["compare", "no/model", "--caches", "kivi", "--set", "kivi.windw=64", "-o", "out"], ["'windw'", "'window'"]),
        (["compare", "no/model", "--caches", "kivi", "--set", "gear.bits=2", "-o", "out"], ["'gear'", "not among"]),
        (["compare", "no/model", "--caches", "kivi", "--set", "window=100", "-o", "out"], ["window=100", "group_size"]),
        (["compare", "no/model", "--caches", "kivi", "--text", "t.txt", "-o", "out"], ["--text"]),
        (["evaluate", "no/model", "--cache", "kiwi"], ["unknown cache 'kiwi'", "'kivi'"]),
        (["generate", "no/model", "-p", "text", "--cache", "kivi", "--cache-set", "bits=5"], ["bits", "5"]),
        (["generate", "no/model", "-p", "text", "--cache-set", "bits=4"], ["--cache-set bits", "--cache"]),
        (["generate", "no/model", "-p", "text", "--cache", "kivi", "--cache-set", "bits"], ["--cache-set 'bits'"]),
        (["generate", "no/model", "-p", " "], ["prompt is empty"]),
        (["train", "ref", "--text", "nowhere", "-o", "out"], ["nowhere"]),
        (["claims", "gtpq"], ["gtpq"]),
        (["bench", "no-such-bench"], ["no-such-bench"]),
        (["bench", "kv-decod"], ["kv-decod", "'kv-decode'"]),
        (["bench", "grid-matmul", "--context", "128"], ["--context", "kv-decode"]),
        (["bench", "kv-decode", "--context", "64"], ["context", "64"]),
        (["bench", "kv-decode", "--systems", "lama.cpp"], ["unknown system 'lama.cpp'", "llama.cpp"]),
        (["bench", "kv-decode", "--caches", "gptq-4"], ["gptq-4", "not a cache"]),
        (["bench", "kv-decode", "--threads", "0"], ["--threads", "0"]),
    ],
)
def test_other_commands_refuse_before_they_load_a_model(refused: Refused, command: list[str], names: list[str]) -> None:
    refused(*command, names=names)


def test_generate_refuses_what_does_not_fit(refused: Refused, tiny: Path) -> None:
    refused(
        "generate",
        str(tiny),
        "-p",
        "Once",
        "--max-new-tokens",
        "2048",
        names=["--max-new-tokens 2048", "2048 positions"],
    )


@pytest.mark.parametrize(("content", "names"), [(b"", ["empty"]), (b"caf\xe9", ["not UTF-8"])])
def test_calibration_text_that_cannot_be_read(
    refused: Refused, tmp_path: Path, content: bytes, names: list[str]
) -> None:
    (tmp_path / "text.txt").write_bytes(content)
    refused("compress", "no/model", "--method", "gptq", "--text", "text.txt", "-o", "out", names=["text.txt", *names])


def test_calibration_text_shorter_than_one_sequence(refused: Refused, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("too short")
    command = ("--method", "gptq", "--set", "group_size=32", "--text", "text.txt", "-o", "out")
    refused("compress", str(tiny), *command, names=["fewer than one sequence"])


def test_group_size_that_does_not_divide(refused: Refused, tiny: Path) -> None:
    refused(
        "compress",
        str(tiny),
        "--method",
        "rtn",
        "--set",
        "group_size=48",
        "-o",
        "out",
        names=["q_proj", "48 does not divide 64"],
    )


def test_a_cache_that_does_not_fit_the_model(refused: Refused, tiny: Path) -> None:
    command = ("compare", str(tiny), "--caches", "exact,kivi", "-o", "out")
    refused(*command, names=["group_size=32 does not divide the head dimension 16"])


def test_targets_that_match_nothing(refused: Refused, tiny: Path) -> None:
    refused(
        "compress", str(tiny), "--method", "rtn", "--set", "targets=q_porj", "-o", "out", names=["q_porj", "q_proj"]
    )


def test_a_budget_that_nothing_fits_into(refused: Refused, tiny: Path) -> None:
    refused("compress", str(tiny), "--budget", "0.5", "-o", "out", names=["smallest possible one is", "embeddings"])


def test_compressed_twice(refused: Refused, tiny_rtn: Path) -> None:
    refused("compress", str(tiny_rtn), "--method", "rtn", "-o", "out", names=["already compressed"])


@pytest.fixture
def damaged(tiny_rtn: Path, tmp_path: Path) -> Path:
    """A copy of the compressed model, to be damaged."""
    return Path(shutil.copytree(tiny_rtn, tmp_path / "damaged"))


def _edit(file: Path, change: Callable[[dict[str, object]], object]) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def test_missing_weights(refused: Refused, damaged: Path) -> None:
    (damaged / "model.safetensors").unlink()
    refused("generate", "damaged", "-p", "x", names=["damaged", "safetensors"])


def test_truncated_weights(refused: Refused, damaged: Path) -> None:
    file = damaged / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    refused("generate", "damaged", "-p", "x", names=["model.safetensors"])


@pytest.mark.parametrize("buffer", ["codes", "scales"])
def test_flipped_bytes(refused: Refused, damaged: Path, buffer: str) -> None:
    from trimtab.models.checkpoint import read_header

    file = damaged / "model.safetensors"
    place = next(place for name, place in read_header(file).items() if name.endswith(buffer))
    content = bytearray(file.read_bytes())
    content[place.start] ^= 0xFF
    file.write_bytes(content)
    refused("generate", "damaged", "-p", "x", names=[buffer, "model.safetensors"])


def test_checkpoint_of_a_newer_version(refused: Refused, damaged: Path) -> None:
    for file in ("trimtab.json", "config.json"):
        _edit(damaged / file, lambda data: data.get("quantization_config", data).update(format_version=99))
    refused("generate", "damaged", "-p", "x", names=["format 99", "Update"])


def test_configuration_of_another_architecture(refused: Refused, damaged: Path) -> None:
    _edit(damaged / "config.json", lambda data: data.update(model_type="opt", architectures=["OPTForCausalLM"]))
    refused("generate", "damaged", "-p", "x", names=["opt"])


def test_not_a_number_in_the_weights(refused: Refused, tiny: Path, tmp_path: Path) -> None:
    import trimtab as tt

    model = tt.load(tiny)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    tt.save(model, tmp_path / "broken")
    command = ("--method", "rtn", "--set", "group_size=32", "-o", "out")
    refused("compress", "broken", *command, names=["model.layers.1.mlp.up_proj"])


def test_disk_full_while_saving(
    cli: Callable[..., Ran], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stood at the output stays; finished blocks are kept beside it, for the same command to continue with."""
    from transformers import PreTrainedModel

    out = tmp_path / "out"
    command = ("compress", str(tiny), "--method", "rtn", "--set", "group_size=32", "-o", str(out), "--force")
    assert cli(*command).status == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def full(self: object, directory: Path, **options: object) -> None:
        (Path(directory) / "half").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(PreTrainedModel, "save_pretrained", full)
        ran = cli(*command, "--set", "bits=2")
    assert (ran.status, ran.out) == (2, "")
    assert "No space left" in ran.err
    assert "Traceback" not in ran.err
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert cli(*command, "--set", "bits=2").status == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_interrupted_while_streaming(cli: Callable[..., Ran], tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import GenerationMixin

    def interrupted(self: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(GenerationMixin, "generate", interrupted)
    ran = cli("generate", str(tiny), "-p", "Once")
    assert ran.status == 130
    assert "Traceback" not in ran.err
