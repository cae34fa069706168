"""`trimtab bench decode`, `linear` and `compress`: what is measured, and that what is wrong gives no speed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trimtab.core.errors import ConfigError, NumericsError
from trimtab.evaluation import compress_time, linear_speed, weight_decode
from trimtab.evaluation.beside import run as shared_run
from trimtab.evaluation.beside.base import System
from trimtab.evaluation.compress_time import measure as compress_measure
from trimtab.evaluation.compress_time import sessions
from trimtab.evaluation.kv_decode._run import make_model
from trimtab.evaluation.kv_decode.measure import PARITY_BOUND
from trimtab.evaluation.linear_speed import makers
from trimtab.evaluation.linear_speed import measure as linear_measure
from trimtab.evaluation.weight_decode import _run, measure, quantizing, trimtab_session
from trimtab.evaluation.weight_decode.peer_sessions import open_peer
from trimtab.evaluation.weight_decode.systems import PRUNED
from trimtab.models.compressed_linear import CompressedLinear
from trimtab.tensors.compressed import CompressedTensor
from trimtab.tensors.grid import GridFormat, GroupGrid

TINY: dict[str, int] = {"layers": 2, "hidden": 64, "query_heads": 4, "kv_heads": 2, "head_dim": 32, "mlp": 128}
SETTING = weight_decode.Setting(context=80, prompt=96, steps=3, vocabulary=131, **TINY)
GRID: dict[str, Any] = {"method": "rtn", "settings": {"bits": 4, "group_size": 64}}


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("decode") / "model"
    make_model(directory, SETTING, gguf=False)
    return directory


class Scripted:
    """A session that keeps a journal; `wrong` is added to its logits against those of its reference."""

    def __init__(self, wrong: float | None) -> None:
        self.wrong = wrong
        self.journal: list[tuple[str, Any]] = []

    def prefill(self, tokens: Sequence[int]) -> None:
        self.journal.append(("prefill", list(tokens)))

    def step(self, token: int) -> None:
        self.journal.append(("step", token))

    def logits(self) -> list[float]:
        return [3.0, 4.0 + (self.wrong or 0.0)]

    def weight_bytes(self) -> int:
        return 1000

    def embedding_bytes(self) -> int:
        return 100

    def reference_step(self, token: int) -> list[float] | None:
        self.journal.append(("reference", token))
        return None if self.wrong is None else [3.0, 4.0]

    def facts(self) -> dict[str, Any]:
        return {"library": "scripted"}


def test_steps_follow_the_context_and_the_reference_sees_the_same() -> None:
    session = Scripted(wrong=0.0)
    figures = measure.measure(session, SETTING)
    tokens = SETTING.tokens()
    prompt, context, following = tokens[:96], tokens[:80], tokens[80:83]
    assert session.journal == [
        *[("prefill", prompt)] * 4,
        ("prefill", context),
        ("reference", following[0]),
        ("prefill", context),
        *[("step", token) for token in following],
    ]
    assert (figures["weight_bytes"], figures["read_bytes"], figures["prefills"]) == (1000, 900, 3)
    assert (figures["parity"], figures["logits"], figures["library"]) == (0.0, [3.0, 4.0], "scripted")


def test_no_speed_where_parity_is_red() -> None:
    for wrong in (0.5, float("nan")):
        with pytest.raises(NumericsError, match="speed is not reported"):
            measure.measure(Scripted(wrong), SETTING)


def test_no_speed_for_another_model() -> None:
    assert _run.agreement([3.0, 4.0], [6.0, 8.0], demanded=True) == pytest.approx(1.0)
    assert _run.agreement([-4.0, 3.0], [3.0, 4.0], demanded=False) == pytest.approx(0.0)
    for found in ([-4.0, 3.0], [math.nan, 1.0], [0.0, 0.0]):
        with pytest.raises(NumericsError, match="does not compute the same model"):
            _run.agreement(found, [3.0, 4.0], demanded=True)


def test_a_trimtab_session_knows_its_bytes_and_its_reference(model_directory: Path) -> None:
    session = trimtab_session.open_trimtab(model_directory, SETTING, **GRID, rank=4, outliers=0.01)
    figures = measure.measure(session, SETTING)
    per_layer = 64 * 128 + 2 * 64 * 64 + 128 * 64 + 3 * 64 * 128  # q, k and v, o, MLP
    grids = 2 * per_layer * (4 + 16 / 64) / 8
    norms, head = 5 * 64 * 2, 131 * 64 * 2
    assert figures["read_bytes"] > grids + head + norms  # and the terms
    assert figures["read_bytes"] < 1.6 * (grids + head + norms)
    assert figures["weight_bytes"] - figures["read_bytes"] == head  # the embedding is as large
    assert figures["parity"] < PARITY_BOUND
    expected = _run.dense_logits(model_directory, SETTING)
    assert _run.agreement(figures["logits"], expected, demanded=True) > 0.8
    plain = open_peer(model_directory, SETTING, name="torch/bf16")
    plain.prefill(SETTING.tokens()[:80])
    assert _run.agreement(plain.logits(), expected, demanded=True) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("name", PRUNED)
def test_pruned_models_compute_what_they_stand_for(model_directory: Path, name: str) -> None:
    (system,) = weight_decode.choose([f"trimtab/{name}"])
    session = trimtab_session.open_trimtab(model_directory, SETTING, **system.options)
    figures = measure.measure(session, SETTING)
    assert (figures["parity"] is None) if "rsparse" in name else (figures["parity"] < PARITY_BOUND)
    head, norms, weights = 131 * 64 * 2, 5 * 64 * 2, 2 * (64 * 128 + 2 * 64 * 64 + 128 * 64 + 3 * 64 * 128)
    bits = {"dense": 16, "sparse-50": 9, "sparse-60": 7.4, "sparse-2:4": 9, "sparse-50+4bit": 3.3}
    if name in bits:  # and offsets
        assert figures["read_bytes"] - head - norms == pytest.approx(weights * bits[name] / 8, rel=0.15)
    expected = _run.dense_logits(model_directory, SETTING)
    assert _run.agreement(figures["logits"], expected, demanded=True) > (0.99 if name == "dense" else 0.4)


def test_terms_hold_what_the_grid_leaves() -> None:
    weight = torch.randn(48, 64)
    layer = CompressedLinear(CompressedTensor((GroupGrid.quantize(weight, GridFormat(bits=2, group_size=32)),)))
    errors = [
        float((trimtab_session.with_terms(layer, weight, rank, share).dequantize() - weight).norm())
        for rank, share in ((0, 0.0), (8, 0.0), (8, 0.05))
    ]
    assert errors[0] > 1.05 * errors[1] > 1.05 * 1.05 * errors[2]


def test_a_run_compares_with_the_dense_model_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_run, "read_bandwidth_gbps", lambda threads: 10.0)
    systems = [
        System("other/absent", "x:y", needs={"no_such_module": "no-such-package"}),
        System("other/broken", "no_such_session:open_it"),
        *weight_decode.choose(["trimtab/grid-4"]),
    ]
    absent, broken, done = weight_decode.run(systems, SETTING, threads=1)
    assert "no-such-package" in absent["skipped"]
    assert "no_such_session" in broken["error"]
    assert "logits" not in done
    assert done["agreement"] > 0.8
    assert done["bandwidth_share"] == pytest.approx(done["read_bytes"] / done["decode_ms_median"] / 1e6 / 10.0)


def test_names_of_systems() -> None:
    names = [system.name for system in weight_decode.choose()]
    assert names[:4] == ["trimtab/grid-4", "trimtab/grid-3", "trimtab/grid-2", "trimtab/grid-8"]
    assert {"torch/bf16", "quanto/int4", "bitsandbytes/nf4", "torchao/int4", "torchao/int8", "hqq/4"} < set(names)
    assert {f"llama.cpp/{kind}" for kind in ("f16", "q8_0", "q4_0", "q4_k_m", "q2_k")} < set(names)
    (system,) = weight_decode.choose(["trimtab/nf-4-128+rank-16+outliers-0.5"])
    assert system.options == {
        "method": "nf",
        "settings": {"bits": 4, "group_size": 128},
        "rank": 16,
        "outliers": 0.005,
    }
    cached = weight_decode.choose(cache="kivi-4")
    assert [system.name for system in cached] == [
        "trimtab/grid-4+kivi-4",
        *(f"llama.cpp/q4_0+kv-{kind}" for kind in ("f16", "q8_0", "q4_0")),
    ]
    assert cached[0].options["cache"] == {"method": "kivi", "options": {"bits": 4}}
    assert all("llama.cpp" not in system.name for system in linear_speed.choose())
    pruned = [system.name for system in weight_decode.choose(["pruned"])]
    assert pruned[:2] == ["trimtab/dense", "trimtab/sparse-50"]
    assert not set(pruned) & set(names)
    dense, sparse = linear_speed.choose(pruned[:2])
    assert (dense.opener, sparse.opener) == ("makers:whole_models_only", "makers:trimtab_maker")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["trimtab/grid-x"], "METHOD-BITS"),
        (["trimtab/grid-4+rank-a"], "rank-a"),
        (["trimtab/kivi-4"], "not of weights"),
        (["lama.cpp"], "Did you mean 'llama.cpp'"),
    ],
)
def test_unknown_names_are_refused(names: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        weight_decode.choose(names)


def test_single_layers_are_compared_before_they_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_measure, "_LEAST_SECONDS", 0.0)
    setting = linear_speed.Setting(shapes=((48, 64), (64, 128)), rows=(1, 9, 65), traffic_bytes=1 << 14)
    make = makers.trimtab_maker(Path(), setting, **GRID, rank=2)
    products = linear_measure.measure(make, setting)["products"]
    assert [(product["shape"], product["rows"]) for product in products] == [
        ([out, inner], rows) for out, inner in ((48, 64), (64, 128)) for rows in (1, 9, 65)
    ]
    assert products[0]["weight_bytes"] == 48 * 64 // 2 + 48 * (2 + 1) + 2 * 2 * (48 + 64)
    assert all(product["parity"] < 1e-2 and 0.01 < product["distance"] < 0.3 for product in products)
    dense = linear_measure.measure(makers.peer_maker(Path(), setting, name="torch/bf16"), setting)["products"]
    assert dense[0]["parity"] is None
    assert dense[0]["distance"] < 1e-2

    def wrong(weight: torch.Tensor) -> linear_measure.Layer:
        made = make(weight)
        return linear_measure.Layer(lambda x: made.call(x) * 1.1, made.nbytes, made.dense)

    with pytest.raises(NumericsError, match="speed is not reported"):
        linear_measure.measure(wrong, setting)


def test_a_run_of_single_layers_has_one_entry_per_product(monkeypatch: pytest.MonkeyPatch) -> None:
    products = [{"shape": [8, 4], "rows": 1, "weight_bytes": 4_000_000, "decode_ms_median": 2.0}] * 2
    monkeypatch.setattr(shared_run, "read_bandwidth_gbps", lambda threads: 10.0)
    monkeypatch.setattr(
        shared_run,
        "measure_system",
        lambda system, *_: {"error": "it broke"} if system.library == "torch" else {"products": products},
    )
    own, again, broken = linear_speed.run(linear_speed.choose(["trimtab/grid-4", "torch"]), linear_speed.Setting())
    assert own == again
    assert (own["read_gbps_median"], own["bandwidth_share"], own["rows"]) == (2.0, 0.2, 1)
    assert broken["error"] == "it broke"
    (llama,) = linear_speed.choose(["llama.cpp/q4_0"])
    with pytest.raises(ConfigError, match="whole models only"):
        makers.whole_models_only(Path(), linear_speed.Setting(), **llama.options)


def test_heads_stay_dense_and_everything_else_counts() -> None:
    module = nn.ModuleDict({"a": nn.Linear(4, 4), "lm_head": nn.Linear(4, 4)})
    assert [attribute for _, attribute, _ in quantizing.linears(module)] == ["a"]
    module["a"].meta = {"scale": torch.zeros(3)}  # type: ignore[assignment]
    assert sum(tensor.numel() for tensor in quantizing.weight_tensors(module)) == 2 * 20 + 3


@pytest.mark.parametrize(
    "session",
    [
        sessions.TrimtabGptq,
        sessions.TrimtabLoftq,
        functools.partial(sessions.TrimtabPruning, method="sparsegpt"),
        functools.partial(sessions.TrimtabPruning, method="wanda"),
    ],
)
def test_compressing_is_timed_and_checked(
    session: Callable[[Path, compress_time.Setting], sessions.TorchSession],
    model_directory: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    setting = compress_time.Setting(sequences=2, length=32, rank=4)
    sessions.write_tokens(model_directory, torch.randint(131, (2, 32)))
    made = session(model_directory, setting)
    figures = compress_measure.measure(made, setting)
    assert figures["compress_s"] > 0
    assert figures["peak_rss_bytes"] > 50 << 20
    assert 1e-3 < figures["weight_error"] < made.largest_error
    untouched = session(model_directory, setting)
    monkeypatch.setattr(untouched, "compress", lambda: None)
    with pytest.raises(NumericsError, match="not the model as it was to be compressed"):
        compress_measure.measure(untouched, setting)


def test_a_run_of_compressing_gives_all_systems_the_same_data(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, bytes]] = []

    def measured(system: System, folder: Path, *_: Any) -> dict[str, Any]:
        seen.append((system.name, (folder / sessions.TOKENS_FILE).read_bytes()))
        return {"compress_s": 1.0}

    monkeypatch.setattr(shared_run, "read_bandwidth_gbps", lambda threads: 10.0)
    monkeypatch.setattr(shared_run, "measure_system", measured)
    setting = compress_time.Setting(model="ref", sequences=2, length=64)
    entries = compress_time.run(compress_time.choose(["trimtab"]), setting, threads=1)
    assert [name for name, _ in seen] == [
        f"trimtab/{method}" for method in ("gptq-4", "loftq-4", "sparsegpt-50", "wanda-50")
    ]
    assert len({tokens for _, tokens in seen}) == 1
    assert [(entry["model"], entry["compress_s"]) for entry in entries] == [("ref", 1.0)] * 4
    with pytest.raises(ConfigError, match="Did you mean 'peft'"):
        compress_time.choose(["pefft"])
