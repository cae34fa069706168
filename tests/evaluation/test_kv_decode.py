"""`trimtab bench kv-decode`: what is measured, and how a run survives a system that fails."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab.core.errors import ConfigError, NumericsError
from trimtab.evaluation.beside import run as shared_run
from trimtab.evaluation.beside.base import System
from trimtab.evaluation.kv_decode import Setting, _run, choose, measure, torch_sessions
from trimtab.evaluation.kv_decode.systems import CACHES

TINY: dict[str, int] = {"layers": 2, "hidden": 64, "query_heads": 4, "kv_heads": 2, "head_dim": 32, "mlp": 96}
SETTING = Setting(context=192, steps=4, vocabulary=131, **TINY)
TOKEN_BYTES = 2 * 2 * 2 * 2 * 32  # layers, keys and values, KV heads, bytes, head dimension


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("kv-decode") / "model"
    _run.make_model(directory, SETTING, gguf=False)
    return directory


def test_torch_session_computes_what_one_pass_over_the_text_does(model_directory: Path) -> None:
    session = torch_sessions.open_dynamic(model_directory, SETTING, fast_linear=False)
    tokens = SETTING.tokens()
    for _ in range(2):  # a second prompt starts from an empty cache
        session.prefill(tokens[:-3])
        for token in tokens[-3:]:
            session.step(token)
        with torch.inference_mode():
            expected = session._model(input_ids=torch.tensor([tokens])).logits[0, -1].float()
        found = torch.tensor(session.logits())
        assert (found - expected).norm() < 0.03 * expected.norm()
        assert session.kv_bytes() == len(tokens) * TOKEN_BYTES


class Scripted:
    """A session that keeps a journal; `wrong` is added to its logits against those of its reference."""

    def __init__(self, wrong: float | None) -> None:
        self.wrong, self.journal, self.held = wrong, [], 0

    def prefill(self, tokens: Sequence[int]) -> None:
        self.journal.append(("prefill", list(tokens)))
        self.held = len(tokens)

    def step(self, token: int) -> None:
        self.journal.append(("step", token))
        self.held += 1

    def logits(self) -> list[float]:
        return [3.0, 4.0 + (self.wrong or 0.0)]

    def kv_bytes(self) -> int:
        return 10 * self.held

    def reference_step(self, token: int) -> list[float] | None:
        self.journal.append(("reference", token))
        return None if self.wrong is None else [3.0, 4.0]

    def facts(self) -> dict[str, Any]:
        return {"library": "scripted"}


def test_every_system_gets_the_same_tokens_and_the_reference_the_same_state() -> None:
    session = Scripted(wrong=0.0)
    figures = measure.measure(session, SETTING)
    prompt, following = SETTING.tokens()[:192], SETTING.tokens()[192:]
    steps = [("step", token) for token in following]
    assert session.journal == [
        ("prefill", prompt[:64]),
        *steps,
        ("prefill", prompt),
        ("reference", following[0]),
        ("prefill", prompt),
        *steps,
    ]
    assert figures["short_kv_bytes"] == 10 * (64 + 4)
    assert figures["kv_bytes"] == 10 * (192 + 4)
    assert figures["attention_ms_median"] == figures["decode_ms_median"] - figures["short_decode_ms_median"]
    assert (figures["parity"], figures["prefills"], figures["library"]) == (0.0, 2, "scripted")


def test_no_speed_where_parity_is_red() -> None:
    assert measure.measure(Scripted(wrong=0.05), SETTING)["parity"] == pytest.approx(0.01)
    assert measure.measure(Scripted(wrong=None), SETTING)["parity"] is None
    for wrong in (0.5, float("nan")):
        with pytest.raises(NumericsError, match="speed is not reported"):
            measure.measure(Scripted(wrong), SETTING)


def test_bytes_count_each_storage_once_and_whole() -> None:
    class Layer:
        def __init__(self) -> None:
            self.keys = torch.zeros(10, 8)
            self.values = self.keys[:3]
            self.more = [(torch.zeros(5, dtype=torch.int8)[:1], {"scale": torch.zeros(2)}), self]

    Layer.__module__ = "trimtab.example"
    assert torch_sessions.tensor_bytes(Layer()) == 10 * 8 * 4 + 5 + 2 * 4


def test_a_run_lists_what_is_absent_and_what_fails_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_run, "read_bandwidth_gbps", lambda threads: 10.0)
    systems = [
        System("other/absent", "torch_sessions:open_dynamic", needs={"no_such_module.part": "no-such-package"}),
        System("other/broken", "no_such_session:open_it"),
        System("transformers/dynamic-bf16", "torch_sessions:open_dynamic", {"fast_linear": False}),
    ]
    told: list[str] = []
    absent, broken, done = _run.run(systems, SETTING, threads=1, tell=told.append)
    assert "no-such-package" in absent["skipped"]
    assert "pip install" in absent["skipped"]
    assert "no_such_session" in broken["error"]
    assert done["kv_bytes"] == 196 * TOKEN_BYTES
    assert done["read_gbps_median"] / 10.0 == pytest.approx(done["bandwidth_share"], nan_ok=True)
    assert done["peak_rss_bytes"] >= done["loaded_rss_bytes"] > 50 << 20
    assert {entry["context"] for entry in (absent, broken, done)} == {192}
    assert [line for line in told if "other/absent" in line and "skipped" in line]


def test_a_killed_system_is_an_error_with_the_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho last words >&2\nkill -SEGV $$\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    figures = shared_run.measure_system(choose(["transformers"])[0], tmp_path, SETTING, 1)
    assert "SIGSEGV" in figures["error"]
    assert "last words" in figures["error"]


@contextmanager
def _only(name: str, value: str | None) -> Iterator[None]:
    before = os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


@pytest.mark.parametrize("value", [None, "native"])
def test_reference_step_changes_the_kernels_for_this_step_only(model_directory: Path, value: str | None) -> None:
    session = torch_sessions.open_dynamic(model_directory, SETTING, fast_linear=False)
    assert session.reference_step(1) is None
    session = torch_sessions.open_dynamic(model_directory, SETTING, fast_linear=True)
    seen: list[tuple[str | None, bool]] = []
    head = session._model.lm_head
    with _only("TRIMTAB_KERNELS", value):
        session.prefill(SETTING.tokens()[:8])
        head.register_forward_hook(lambda *_: seen.append((os.environ.get("TRIMTAB_KERNELS"), "forward" in vars(head))))
        session.reference_step(1)
        session.step(2)
    assert session._fast is not None
    assert seen == [("reference", False), (value, bool(session._fast.names))]


@pytest.mark.parametrize("name", ["exact", "kivi-2", "rotatekv-4"])
def test_own_caches(model_directory: Path, name: str) -> None:
    """Also those that learn from text first. The ledger is what the tensors hold, without the model's rotations."""
    system = choose([f"trimtab/{name}"])[0]
    session = torch_sessions.open_trimtab(model_directory, SETTING, **system.options)
    with _only("TRIMTAB_KERNELS", "reference"):
        session.prefill(SETTING.tokens()[:-2])
        expected = session.reference_step(5)
        assert expected is not None
        session.prefill(SETTING.tokens()[:-2])
        session.step(5)
        assert measure.demand_parity(session.logits(), expected) < 1e-6
    found = torch_sessions.tensor_bytes(session._cache)
    assert session.kv_bytes() < found if name == "rotatekv-4" else session.kv_bytes() == found


def test_an_attention_that_is_a_tenth_too_large_is_red(model_directory: Path) -> None:
    session = torch_sessions.open_trimtab(model_directory, SETTING, method="kivi", options={"bits": 4})
    prompt = SETTING.tokens()[:-2]
    with _only("TRIMTAB_KERNELS", "reference"):
        session.prefill(prompt)
        expected = session.reference_step(5)
        assert expected is not None
        session.prefill(prompt)
        for layer in session._model.model.layers:
            layer.self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 1.1,))
        session.step(5)
    with pytest.raises(NumericsError):
        measure.demand_parity(session.logits(), expected)


def test_systems_by_name_by_library_and_all() -> None:
    names = [system.name for system in choose(["llama.cpp", "transformers/quanto-4"])]
    assert names == ["transformers/quanto-4", "llama.cpp/f16", "llama.cpp/q8_0", "llama.cpp/q4_0"]
    assert [system.name for system in choose(["llama.cpp/f16"], ["exact"])] == ["trimtab/exact", "llama.cpp/f16"]
    everything = [system.name for system in choose()]
    assert everything[: len(CACHES)] == [f"trimtab/{name}" for name in CACHES]
    assert {name.partition("/")[0] for name in everything} == {"trimtab", "transformers", "kvpress", "llama.cpp"}
    own = choose(None, ["kivi-3"])[0]
    assert (own.name, own.options) == ("trimtab/kivi-3", {"method": "kivi", "options": {"bits": 3}})


@pytest.mark.parametrize(
    ("systems", "caches", "names"),
    [
        (["lama.cpp"], None, "'lama.cpp'.*llama.cpp"),
        (["trimtab/kivvi-4"], None, "kivvi"),
        (None, ["gptq-4"], "weights, not a cache"),
    ],
)
def test_unknown_systems_are_refused(systems: list[str] | None, caches: list[str] | None, names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        choose(systems, caches)


@pytest.mark.parametrize("options", [{"context": 64}, {"steps": 0}, {"layers": 0}])
def test_settings_that_cannot_be_measured(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        Setting(**options)
