"""What a format cannot hold is refused by layer, part and way out; a writer that fails or is killed leaves nothing."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import PreTrainedModel

import trimtab as tt
from trimtab.core.errors import ConfigError, OutputError, TargetError
from trimtab.models import ModelView, random_model
from trimtab.models.exports import FORMATS, export, hf_directory
from trimtab.models.views import LinearView
from trimtab.tensors.activations import ActivationGrid
from trimtab.tensors.compressed import CompressedTensor
from trimtab.tensors.grid import GridFormat, GroupGrid
from trimtab.tensors.low_rank import svd
from trimtab.tensors.rotation import Rotation
from trimtab.tensors.transform import Chain

from .making import each, grids, llama, replace, with_low_rank

LAYER = "model.layers.0.self_attn.k_proj"
Change = Callable[[LinearView, GroupGrid], CompressedTensor]


def changed(change: Change) -> PreTrainedModel:
    """All layers symmetric 4-bit grids, one of them changed."""
    model = grids(llama(), bits=4, group_size=32)
    linear = next(linear for linear in ModelView.of(model).linears if linear.name == LAYER)
    assert linear.compressed is not None
    grid = linear.compressed.tensor.parts[0]
    assert isinstance(grid, GroupGrid)
    replace(linear, change(linear, grid))
    return model


def requantized(**fmt: Any) -> Change:
    def change(linear: LinearView, grid: GroupGrid) -> CompressedTensor:
        return CompressedTensor((GroupGrid.quantize(grid.dequantize() * 1.01, GridFormat(**fmt)),))

    return change


def low_rank(linear: LinearView, grid: GroupGrid) -> CompressedTensor:
    return CompressedTensor((grid, svd(grid.dequantize(), 2)))


def rotated(linear: LinearView, grid: GroupGrid) -> CompressedTensor:
    return CompressedTensor((grid,), Rotation(size=64, seed=1))


def rounded(linear: LinearView, grid: GroupGrid) -> CompressedTensor:
    return CompressedTensor((grid,), Chain((Rotation(size=64, seed=1), ActivationGrid(size=64, bits=8))))


def two_grids(linear: LinearView, grid: GroupGrid) -> CompressedTensor:
    return CompressedTensor((grid, grid))


PACKED = ["compressed-tensors", "gptq"]
CASES: list[tuple[Change, list[str], str, str]] = [
    # what stands there, who refuses it, why, what is offered
    (low_rank, PACKED, "part 1 of kind 'low_rank' has no place", "gguf .nearest blocks, with type=q8_0., peft"),
    (low_rank, ["gguf"], "part 1 of kind 'low_rank' has no place", "peft"),
    (rotated, [*PACKED, "gguf"], "its input transform has no place", ""),
    (rounded, [*PACKED, "gguf", "peft"], "", "No other format holds it either"),
    (two_grids, [*PACKED, "gguf"], "part 1 is a second grid", ""),
    (requantized(group_size=32, axis="out"), [*PACKED, "gguf"], "part 0 of kind 'grid' has groups along 'out'", ""),
    (requantized(group_size=32, scale_dtype="float32"), ["gptq"], "float32 scales that float16", "q8_0"),
    (requantized(group_size=32, scale_dtype="float32"), ["compressed-tensors"], "float32 scales that no 16", "q8_0"),
    (requantized(group_size=32, symmetric=False, zero_dtype="float16"), [*PACKED, "gguf"], "fractional zero", ""),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "format", "reason", "offered"),
    [(change, format, reason, offered) for change, formats, reason, offered in CASES for format in formats],
)
def test_layers_that_a_format_cannot_hold(
    change: Change, format: str, reason: str, offered: str, tmp_path: Path
) -> None:
    with pytest.raises(TargetError, match=rf"{format} cannot hold layer '{LAYER}': .*{reason}.*{offered}.*Nothing"):
        export(changed(change), tmp_path / "out", format=format)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", PACKED)
def test_conv1d_is_refused(format: str, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"'transformer.h.0.attn.c_attn': its family stores it as Conv1D"):
        export(grids(random_model("gpt2"), group_size=16), tmp_path / "out", format=format)


def test_gptq_wants_layers_alike_and_all_of_them(tmp_path: Path) -> None:
    mixed = each(llama(), lambda linear: {"bits": 8 if linear.role == "down" else 4, "group_size": 32})
    with pytest.raises(TargetError, match=r"down_proj' has 8 bits.*compressed-tensors holds layers that differ"):
        export(mixed, tmp_path / "out", format="gptq")
    partly = each(llama(), lambda linear: None if linear.role == "v" else {"bits": 4, "group_size": 32})
    with pytest.raises(TargetError, match=r"v_proj' is not \(2 such\)"):
        export(partly, tmp_path / "out", format="gptq")
    narrow = grids(random_model("llama", hidden_size=48), bits=2, group_size=16)
    with pytest.raises(TargetError, match=r"2-bit codes of a \[24, 48\] layer do not fill 32-bit words"):
        export(narrow, tmp_path / "out", format="gptq")
    assert not list(tmp_path.iterdir())


def test_nothing_to_export(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="no compressed layers"):
        export(llama(), tmp_path / "out", format="gptq")
    with pytest.raises(ConfigError, match="unknown export format 'gtpq'. Did you mean 'gptq'"):
        export(llama(), tmp_path / "out", format="gtpq")
    with pytest.raises(ConfigError, match="no option 'bits'"):
        export(llama(), tmp_path / "out", format="compressed-tensors", bits=4)


def suitable(format: str) -> PreTrainedModel:
    return with_low_rank(llama()) if format == "peft" else grids(llama(), bits=4, group_size=32)


OPTIONS: dict[str, dict[str, Any]] = {"gguf": {"tokenizer": "none"}}


@pytest.mark.parametrize("format", FORMATS)
def test_occupied_outputs(format: str, tmp_path: Path) -> None:
    out, options = tmp_path / "out", OPTIONS.get(format, {})
    if format == "gguf":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "mine").write_text("mine")
    with pytest.raises(OutputError, match="--force"):
        export(suitable(format), out, format=format, **options)
    assert (out if format == "gguf" else out / "mine").read_text() == "mine"
    export(suitable(format), out, format=format, force=True, **options)
    assert not (out / "mine").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_directory_is_no_gguf_file(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is a directory"):
        export(suitable("gguf"), tmp_path, format="gguf", force=True, tokenizer="none")


def _at_the_end(format: str, monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Do `act` after nearly everything has been written."""
    if format == "gguf":
        written = gguf.GGUFWriter.write_tensors_to_file

        def write(self: Any) -> None:
            written(self)
            act()

        monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", write)
    else:
        written_config = hf_directory._write_weights

        def write_weights(*arguments: Any) -> None:
            written_config(*arguments)
            act()

        monkeypatch.setattr(hf_directory, "_write_weights", write_weights)


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_leaves_nothing(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    _at_the_end(format, monkeypatch, full)
    with pytest.raises(OutputError, match="No space left"):
        export(suitable(format), tmp_path / "out", format=format, **OPTIONS.get(format, {}))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_killed_writer_leaves_nothing_under_the_name(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it was writing lies under a hidden name, which the next writer removes."""
    model = suitable(format)
    pid = os.fork()
    if pid == 0:
        try:
            _at_the_end(format, monkeypatch, lambda: os.kill(os.getpid(), signal.SIGKILL))
            export(model, tmp_path / "out", format=format, **OPTIONS.get(format, {}))
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status)
    assert [path.name for path in tmp_path.iterdir()] == [f".out.partial-{pid}"]
    export(model, tmp_path / "out", format=format, **OPTIONS.get(format, {}))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_model_is_as_it_was(tmp_path: Path) -> None:
    """Exporting changes neither weights nor configuration: the model saves and exports as before."""
    model = grids(llama(), bits=4, group_size=32)
    tt.save(model, tmp_path / "saved")
    loaded = tt.load(tmp_path / "saved")
    before = loaded.config.to_dict()
    state = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    for format in ("compressed-tensors", "gptq", "gguf"):
        export(loaded, tmp_path / format, format=format, **OPTIONS.get(format, {}))
    assert loaded.config.to_dict() == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
