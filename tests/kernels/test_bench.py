"""The benchmark and what `doctor` asks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from trimtab.core.errors import ConfigError, NumericsError
from trimtab.kernels import bandwidth, bench


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> bench.Shape:
    monkeypatch.setattr(bench, "read_bandwidth_gbps", lambda: 10.0)
    return bench.Shape(96, 256, 2, traffic_bytes=1 << 16)


def test_entries_and_files(small: bench.Shape, tmp_path: Path) -> None:
    entries = bench.grid_matmul_bench([small], [bench.Form(3), bench.Form(4), bench.Form(4, "levels")])
    systems = ["trimtab/grid-3", "trimtab/grid-4", "trimtab/grid-4-levels", "torch/bf16-linear"]
    assert [entry["system"] for entry in entries] == systems
    assert entries[-1]["time_of_torch"] == 1
    for entry in entries:
        assert entry["bench"] == "grid-matmul"
        assert entry["decode_ms_median"] > 0
        assert entry["bandwidth_share"] == pytest.approx(entry["read_gbps_median"] / 10.0)
    assert entries[1]["weight_bytes"] == 96 * (128 + 2 * 4)
    data, table = bench.write(entries, tmp_path)
    assert json.loads(data.read_text())["entries"] == entries
    assert table.read_text().count("trimtab/grid-") == 3


def test_several_weights_of_one_input(small: bench.Shape) -> None:
    entries = bench.grid_many_bench([(small, small)], [bench.Form(4)])
    assert [entry["system"].removeprefix("trimtab/grid-4-") for entry in entries] == [
        "separate",
        "one-call",
        "prepared",
        "torch/bf16-linear",
    ]
    assert {entry["weight_bytes"] for entry in entries[:3]} == {2 * 96 * (128 + 2 * 4)}


def test_half_linear_entries(small: bench.Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = bench.half_linear_bench([small])
    assert [entry["system"] for entry in entries] == ["trimtab/half-linear", "torch/bf16-linear"]
    assert {(entry["bench"], entry["setting"]) for entry in entries} == {("half-linear", "96x256, batch 2")}
    assert {entry["weight_bytes"] for entry in entries} == {2 * 96 * 256}
    monkeypatch.setattr(bench, "half_linear", lambda x, w: torch.nn.functional.linear(x, w) * 1.01)
    with pytest.raises(NumericsError, match="trimtab/half-linear: .* speed is not reported"):
        bench.half_linear_bench([small])


def test_no_speed_when_parity_is_red(small: bench.Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench.grid_matmul_many
    monkeypatch.setattr(bench, "grid_matmul_many", lambda *a: (right(*a)[0] * 1.01,))
    with pytest.raises(NumericsError, match="speed is not reported"):
        bench.grid_matmul_bench([small], [bench.Form(4)])
    monkeypatch.setattr(bench, "grid_matmul_many", lambda *a: (right(*a)[0] * float("nan"),))
    with pytest.raises(NumericsError):
        bench.grid_matmul_bench([small], [bench.Form(4)])


def test_unknown_benchmark() -> None:
    with pytest.raises(ConfigError, match="grid-matmul"):
        bench.run("grid-matmull")


def test_bandwidth_and_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_BUFFER_BYTES", 8 << 20)
    assert bandwidth.read_bandwidth_gbps() > 0.1
    assert bandwidth._torch_read_gbps(torch.ones(8 << 20, dtype=torch.uint8)) > 0.1
    report = bandwidth.kernel_report()
    assert {entry["backend"] for entry in report} == {"triton", "native", "reference"}
    assert all(entry["available"] or entry["detail"] for entry in report)
