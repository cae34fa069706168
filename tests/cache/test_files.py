"""A saved and loaded cache goes on bit for bit; what does not fit is refused; a failed save destroys nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.cache import load, save
from trimtab.cache._files import _digest
from trimtab.cache.base import CacheMethod
from trimtab.cache.exact import Exact
from trimtab.cache.gear import Gear
from trimtab.cache.kivi import Kivi
from trimtab.cache.streaming import Streaming
from trimtab.core.errors import CheckpointError, CompositionError, OutputError
from trimtab.core.files import sha256_file
from trimtab.models.random import random_model
from trimtab.models.segments import SegmentCache

KIVI = Kivi(bits=2, group_size=16, window=32)
METHODS = [
    Exact(),
    KIVI,
    Gear(bits=4, group_size=16, buffer=32, outliers_keys=0.1, outliers_values=0.1),
    Streaming(sinks=3, window=20),
]


def big_heads(seed: int = 0, **options: Any) -> PreTrainedModel:
    return random_model("llama", seed=seed, head_dim=16, max_position_embeddings=512, **options)


@torch.no_grad()
def feed(model: PreTrainedModel, cache: SegmentCache, rows: int, sizes: list[int], seed: int) -> Tensor:
    ids = torch.randint(3, 131, (rows, sum(sizes)), generator=torch.Generator().manual_seed(seed))
    return torch.cat([model(part, past_key_values=cache).logits for part in ids.split(sizes, dim=1)], dim=1)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).name())
def test_a_loaded_cache_goes_on_the_same(method: CacheMethod, tmp_path: Path) -> None:
    model = big_heads()
    cache = method.new(model)
    feed(model, cache, 2, [90, 1, 40], 1)
    cache.reorder([1, 0, 1])
    cache.key_bias = {1: torch.randn(3, 4, 7)}
    assert save(cache, tmp_path / "a" / "cache.safetensors") == tmp_path / "a" / "cache.safetensors"
    twin = big_heads()
    loaded = load(tmp_path / "a" / "cache.safetensors", twin)
    wanted = feed(model, cache, 3, [1, 1, 70, 1], 2)
    assert torch.equal(feed(twin, loaded, 3, [1, 1, 70, 1], 2), wanted)


def test_padded_rows_and_empty_caches(tmp_path: Path) -> None:
    model = big_heads()
    cache = KIVI.new(model)
    save(cache, tmp_path / "empty")
    assert load(tmp_path / "empty", model).get_seq_length() == 0
    ids, mask = torch.randint(3, 131, (3, 80)), torch.ones((3, 80), dtype=torch.long)
    mask[0, :50], mask[1, :] = 0, 0
    with torch.no_grad():
        model(ids, past_key_values=cache, attention_mask=mask)
        save(cache, tmp_path / "padded")
        twin = load(tmp_path / "padded", model)
        assert twin.segment_layers[0].lengths == [30, 0, 80]
        more = torch.ones((3, 81), dtype=torch.long)
        more[:, :80] = mask
        found = [model(ids[:, :1], past_key_values=each, attention_mask=more).logits for each in (cache, twin)]
    assert torch.equal(found[0], found[1])


def test_shared_tensors_are_stored_once(tmp_path: Path) -> None:
    model = big_heads()
    cache = KIVI.new(model)
    feed(model, cache, 1, [200], 1)
    save(cache, tmp_path / "one")
    cache.reorder([0, 0, 0, 0])
    save(cache, tmp_path / "four")
    windows = cache.bytes_by_part()["window of keys"] + cache.bytes_by_part()["window of values"]
    assert (tmp_path / "four").stat().st_size - (tmp_path / "one").stat().st_size < windows
    loaded = load(tmp_path / "four", model).segment_layers[0].groups[0].keys.runs
    assert len({id(run) for runs in loaded for run in runs}) == len(loaded[0])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    model, path = big_heads(), tmp_path_factory.mktemp("caches") / "cache"
    cache = KIVI.new(model)
    feed(model, cache, 1, [100], 1)
    return model, save(cache, path)


@given(st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files_are_refused(saved: tuple[PreTrainedModel, Path], tmp_path: Path, data: st.DataObject) -> None:
    model, path = saved
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    (tmp_path / "damaged").write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged|truncated|cannot be read|no cache"):
        load(tmp_path / "damaged", model)


def rewritten(path: Path, target: Path, **changes: object) -> Path:
    """The file with other entries in its description, and a digest that fits."""
    with safe_open(path, framework="pt") as file:
        entry = json.loads(file.metadata()["trimtab_cache"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    text = json.dumps(entry | changes)
    save_file(tensors, target, metadata={"trimtab_cache": text, "digest": _digest(text, tensors)})
    return target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2, "trimtab_version": "9.0"}, "written by trimtab 9.0 in cache format 2.*Update"),
        ({"method": "kivvi"}, "unknown method 'kivvi'.*Did you mean 'kivi'"),
        ({"method": "rtn", "options": {}}, "'rtn' is no cache"),
        ({"options": {"bits": 2, "colour": 3}}, "no option 'colour'"),
        ({"options": {"bits": 2, "group_size": 7}}, "group_size=7"),
        ({"options": {"bits": 4, "group_size": 16, "window": 32}}, "other tables"),
        ({"model": "0"}, "another model"),
        ({"layers": [{}]}, "damaged: it has 1 layers, the model 2"),
        ({"runs": []}, "damaged"),
    ],
)
def test_descriptions_that_do_not_fit(
    saved: tuple[PreTrainedModel, Path], tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    model, path = saved
    with pytest.raises(CheckpointError, match=message):
        load(rewritten(path, tmp_path / "changed", **changes), model)


def test_wrong_shapes_are_refused(saved: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    """Whoever writes a file can write a digest that fits: kernels must never see what would make them read outside."""
    model, path = saved
    with safe_open(path, framework="pt") as file:
        entry = json.loads(file.metadata()["trimtab_cache"])
    for field, value in {"tokens": 4000, "bits": 8, "heads": 3, "group_channels": 5, "group_tokens": 48}.items():
        runs = json.loads(json.dumps(entry["runs"]))
        for run in runs:
            if run["spec"].get(field):
                run["spec"][field] = value
        with pytest.raises(CheckpointError, match="damaged"):
            load(rewritten(path, tmp_path / field, runs=runs), model)
    runs = json.loads(json.dumps(entry["runs"]))
    runs[0]["tensors"]["codes"] = runs[0]["tensors"]["scale"]
    with pytest.raises(CheckpointError, match="'codes' of a run"):
        load(rewritten(path, tmp_path / "codes", runs=runs), model)


def test_other_models_and_files(saved: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    _, path = saved
    with pytest.raises(CheckpointError, match="another model"):
        load(path, big_heads(seed=1))
    with pytest.raises(CheckpointError, match="another model"):
        load(path, random_model("llama"))
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(tmp_path / "missing", big_heads())
    save_file({"a": torch.zeros(2)}, tmp_path / "foreign")
    with pytest.raises(CheckpointError, match="no cache"):
        load(tmp_path / "foreign", big_heads())


def test_a_failed_save_destroys_nothing(saved: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    model, path = saved
    cache = load(path, model)
    before = sha256_file(path)
    cache.begin()
    with pytest.raises(CompositionError, match="open draft"):
        save(cache, path)
    cache.rollback()
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match="is a directory"):
        save(cache, tmp_path / "folder")
    with pytest.raises(OutputError, match="nothing was changed"):
        save(cache, path / "below-a-file")
    cache.plan.options["bits"] = 3
    with pytest.raises(CompositionError, match="plan of its own"):
        save(cache, path)
    assert sha256_file(path) == before
    assert sorted(p.name for p in path.parent.iterdir()) == ["cache"]


def test_a_full_disk_leaves_the_old_file(
    saved: tuple[PreTrainedModel, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = saved
    cache, before = load(path, model), sha256_file(path)

    def fails(tensors: object, filename: Path, metadata: object) -> None:
        Path(filename).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trimtab.cache._files.save_file", fails)
    with pytest.raises(OutputError, match="No space left"):
        save(cache, path)
    assert sha256_file(path) == before
    assert sorted(p.name for p in path.parent.iterdir()) == ["cache"]
