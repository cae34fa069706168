"""The commands on a tiny model: what they write, in JSON and on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Ran

Cli = Callable[..., Ran]
NUMBERS = {"value", "low", "high"}


def test_compress_saves_a_checkpoint_and_says_what_changed(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    ran = cli("compress", str(tiny), "--method", "rtn", "--set", "bits=3", "--set", "group-size=32", "--set",
              "targets=gate,up", "-o", str(out), "--json")  # fmt: skip
    assert ran.status == 0, ran.err
    told = ran.json
    assert told["recipe"]["steps"][0]["bits"] == 3
    assert {entry["role"] for entry in told["changed"]} == {"gate", "up"}
    assert {"module": "model.layers.0.mlp.down_proj", "reason": "no pattern in `targets` matches it"} in told[
        "unchanged"
    ]
    assert told["ledger"]["after"]["bytes_at_rest"] < told["ledger"]["before"]["bytes_at_rest"]
    assert type(AutoModelForCausalLM.from_pretrained(out)).__name__ == "LlamaForCausalLM"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_compress_to_a_budget_says_what_it_expects_and_what_it_lost(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    small = ("--set", "quantizer=rtn", "--set", "widths=2,4", "--set", "group_sizes=32", "--sequences", "8")
    command = ("compress", str(tiny), *small, "--length", "64", "-o", str(tmp_path / "out"))
    ran = cli(*command, "--budget", "2.13MB", "--json")
    assert ran.status == 0, ran.err
    told = ran.json
    assert told["recipe"]["steps"][0]["budget"] == "2.13MB"
    assert told["ledger"]["after"]["bytes_at_rest"] == told["plan"]["planned_bytes"] <= 2_130_000
    assert set(told["plan"]["choices"]) == {entry["linear"] for entry in told["changed"]}
    assert set(told["measured"]["kl_nats_per_token"]) >= NUMBERS
    # random weights far from any training: only the order of size can be right
    expected = told["plan"]["expected_kl_nats_per_token"]
    assert expected / 2 < told["measured"]["kl_nats_per_token"]["value"] < 2 * expected
    table = cli(*command, "--budget", "2.14MB", "--force")
    assert table.status == 0, table.err
    for part in ("expected KL to the original", "measured on held-out prose", "rtn-4-32", "2.14 MB"):
        assert part in table.out


def test_compress_from_a_recipe_file_as_a_table(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("version: 1\nsteps:\n  - {method: gptq, bits: 4, group_size: 32}\n")
    ran = cli("compress", str(tiny), "--recipe", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out"),
              "--sequences", "4", "--length", "64", "--mode", "dense")  # fmt: skip
    assert ran.status == 0, ran.err
    for part in ("down", "bytes at rest", "left alone: 1 x embeddings are never compressed", str(tmp_path / "out")):
        assert part in ran.out


def test_compress_replaces_a_checkpoint_only_with_force(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    command = ("compress", str(tiny), "--method", "rtn", "--set", "group_size=32", "-o", str(tmp_path / "out"))
    assert cli(*command).status == 0
    assert cli(*command).status == 2
    assert cli(*command, "--set", "bits=2", "--force", "--json").json["recipe"]["steps"][0]["bits"] == 2


def test_generate_streams_and_json_agree(cli: Cli, tiny_rtn: Path) -> None:
    command = ("generate", str(tiny_rtn), "-p", "Once upon", "--max-new-tokens", "5")
    told = cli(*command, "--json")
    assert told.json["tokens"] == 5
    assert cli(*command).out.strip("\n") == "Once upon" + told.json["text"]


def test_generate_with_a_temperature_repeats_with_the_seed(cli: Cli, tiny: Path) -> None:
    command = ("generate", str(tiny), "-p", "Once", "--max-new-tokens", "8", "--temperature", "1.5", "--json", "--seed")
    first, again, other = (cli(*command, seed).json["text"] for seed in ("1", "1", "2"))
    assert first == again
    assert first != other


def test_evaluate_json(cli: Cli, tiny: Path, tiny_rtn: Path) -> None:
    ran = cli("evaluate", str(tiny_rtn), "--tasks", "prose,facts", "--limit", "3", "--reference", str(tiny), "--json")
    assert ran.status == 0, ran.err
    tasks = ran.json["tasks"]
    assert list(tasks) == ["prose", "facts"]
    assert all(set(metric) >= NUMBERS for task in tasks.values() for metric in task.values())
    assert {"task", "metric", "difference", "recovery"} <= set(ran.json["comparisons"][0])


def test_evaluate_table_and_own_text(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("A short text of one's own. " * 20)
    ran = cli("evaluate", str(tiny), "--tasks", "prose", "--text", str(tmp_path / "own.txt"))
    assert ran.status == 0, ran.err
    assert "bits_per_byte" in ran.out
    assert "smaller is better" in ran.out


def test_modules(cli: Cli, tiny: Path, tiny_rtn: Path) -> None:
    told = cli("modules", str(tiny), "--json").json
    assert len(told["linears"]) == 14
    first = told["linears"][0]
    assert first["name"] == "model.layers.0.self_attn.q_proj"
    assert first["parameters"] == first["out_features"] * first["in_features"]
    assert "CompressedLinear" in cli("modules", str(tiny_rtn)).out


def test_describe(cli: Cli) -> None:
    told = cli("describe", "gptq", "--json").json
    options = {option["name"]: option for option in told["options"]}
    assert options["bits"]["default"] == 4
    assert options["bits"]["type"] == "2 | 3 | 4 | 8"
    assert all(option["help"] for option in options.values())
    assert "2210.17323" in cli("describe", "gptq").out


def test_describe_every_method_documents_every_option(cli: Cli) -> None:
    for entry in cli("list", "--json").json:
        options = cli("describe", entry["name"], "--json").json["options"]
        assert [o["name"] for o in options if not o["help"]] == [], entry["name"]


def test_compare_measures_all_and_writes_a_report(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "comparison"
    command = ("compare", str(tiny), "--set", "group_size=32", "--tasks", "prose,facts", "--limit", "2", "--sequences",
               "4", "--length", "64", "--mode", "dense", "-o", str(out))  # fmt: skip
    ran = cli(*command, "--methods", "rtn,gptq", "--bits", "3", "--set", "gptq.act_order=true", "--json")
    assert ran.status == 0, ran.err
    assert [record["config"]["label"] for record in ran.json] == ["uncompressed", "rtn 3-bit", "gptq 3-bit"]
    rtn, gptq = ran.json[1], ran.json[2]
    assert "act_order" not in rtn["config"]["recipe"]["steps"][0]
    assert gptq["config"]["recipe"]["steps"][0]["act_order"] is True
    assert rtn["ledger"]["keep_fraction"] == gptq["ledger"]["keep_fraction"] < 1
    assert all(record["metrics"]["fidelity"]["kl_nats_per_token"]["value"] > 0 for record in (rtn, gptq))
    assert len(list((out / "runs").glob("*.json"))) == 3
    assert "gptq 3-bit" in (out / "report.html").read_text(encoding="utf-8")

    again = cli(*command, "--methods", "rtn", "--force")
    assert again.status == 0, again.err
    assert "uncompressed" in again.out
    assert sorted(p.name for p in (out / "runs").iterdir()) == ["00-uncompressed.json", "01-rtn-4-bit.json"]


def test_compare_caches(cli: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.app import cache_comparison

    monkeypatch.setattr(cache_comparison, "LENGTH", 256)
    monkeypatch.setattr(cache_comparison, "SPEED_PROMPT", 16)
    out = tmp_path / "caches"
    command = ("compare", str(tiny), "--caches", "exact,kivi", "--set", "kivi.group_size=16", "--bits", "2,4",
               "--limit", "2", "--tasks", "facts", "-o", str(out))  # fmt: skip
    ran = cli(*command, "--json")
    assert ran.status == 0, ran.err
    assert [record["config"]["label"] for record in ran.json] == ["uncompressed", "exact", "kivi 2-bit", "kivi 4-bit"]
    plain, exact, two, four = (record["metrics"] for record in ran.json)
    assert abs(exact["divergence"]["kl_nats_per_token"]["value"]) < 1e-6
    assert two["divergence"]["kl_nats_per_token"]["value"] > four["divergence"]["kl_nats_per_token"]["value"] > 0
    assert exact["bits"]["bits"] > four["bits"]["bits"] > two["bits"]["bits"] > 2
    assert two["bits"]["encoded"] == two["bits"]["formula"] == 4.0
    assert set(plain["recall"]) == set(two["recall"])
    assert set(plain["tasks"]) == set(two["tasks"]) == {"facts"}
    assert all(record["metrics"]["speed"]["decode_ms_median"] > 0 for record in ran.json)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 2
    assert "kivi 4-bit" in page
    assert "bits / element" in page


def test_generate_and_evaluate_with_a_cache(cli: Cli, tiny: Path) -> None:
    cache = ("--cache", "kivi", "--cache-set", "group-size=16", "--cache-set", "window=16")
    command = ("generate", str(tiny), "-p", "Once upon", "--max-new-tokens", "5", "--json")
    told, plain = cli(*command, *cache).json, cli(*command).json
    assert told["text"] == plain["text"]  # all within the exact window
    assert told["cache"]["method"] == "kivi"
    assert told["cache"]["bytes"] > 0
    long = ("generate", str(tiny), "-p", "0" * 2040, "--max-new-tokens", "20", "--json")
    assert cli(*long).status == 2
    endless = cli(*long, "--cache", "streaming", "--cache-set", "window=12")
    assert endless.status == 0, endless.err
    assert endless.json["tokens"] == 20
    asked = ("evaluate", str(tiny), "--tasks", "prose", "--limit", "2", "--json")
    ran = cli(*asked, *cache, "--reference", str(tiny))
    assert ran.status == 0, ran.err
    assert ran.json["cache"]["group_size"] == 16
    assert ran.json["comparisons"][0]["difference"]["value"] != 0


def test_claims_status_and_json(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab import claims
    from trimtab.claims.base import Verdict

    def verdict(holds: bool) -> Verdict:
        return Verdict("rtn", "a paper", "a claim", "an experiment", {"kl": 0.1}, {"kl": 0.2}, holds, 1.5)

    for answers, status in (([True, True], 0), ([True, False], 3)):
        monkeypatch.setattr(
            claims, "run_claims", lambda name, answers=answers: [verdict(a) for a in answers], raising=False
        )
        ran = cli("claims", "rtn", "--json")
        assert ran.status == status
        fields = ["system", "paper", "claim", "experiment", "measured", "baseline", "holds", "seconds"]
        assert all(list(entry)[:8] == fields for entry in ran.json)
        table = cli("claims")
        assert table.status == status
        assert ("does not hold" in table.out) == (status == 3)


def test_train_hands_over_to_the_trainer(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess
    import sys

    from trimtab.training.reference import __main__ as trainer

    asked: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 7)

    monkeypatch.setattr(subprocess, "run", run)
    ran = cli("train", "ref-mini", "--text", str(tmp_path), "-o", str(tmp_path / "out"), "--no-compile")
    assert ran.status == 7
    python, dash_m, module, *arguments = asked[0]
    assert (python, dash_m, module) == (sys.executable, "-m", trainer.__package__)
    trained: list[object] = []
    monkeypatch.setattr(trainer, "train", lambda *given: trained.extend(given))
    assert trainer.main(arguments) == 0
    assert trained[:3] == [tmp_path, tmp_path / "out", "ref-mini"]
    assert trained[4] is False


def test_doctor(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.kernels.bandwidth._BUFFER_BYTES", 1 << 20)
    told = cli("doctor", "--json").json
    assert told["versions"]["torch"]
    assert told["machine"]["cores"] >= 1
    assert told["read_bandwidth_gbps"] > 0
    assert {"operation", "backend", "available", "detail"} <= set(told["kernels"][0])
    assert all(entry["detail"] for entry in told["kernels"] if not entry["available"])
    ran = cli("doctor")
    assert "GB/s" in ran.out
    assert "reference" in ran.out


def test_bench(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.kernels import bench

    shapes = [bench.Shape(64, 128, 1, traffic_bytes=1 << 16), bench.Shape(64, 128, 4, traffic_bytes=1 << 16)]
    monkeypatch.setattr("trimtab.kernels.bandwidth._BUFFER_BYTES", 1 << 20)
    monkeypatch.setattr(bench, "BENCHMARKS", {"grid-matmul": lambda: bench.grid_matmul_bench(shapes, bench.PLAIN[:1])})
    told = cli("bench", "grid-matmul", "--json").json
    assert len(told) == 4
    assert all({"bench", "system", "setting", "decode_ms_median"} <= set(entry) for entry in told)
    table = cli("bench").out
    assert table.count("torch/bf16-linear") == 2
    assert "bandwidth" in table


def test_bench_of_decoding_with_a_long_context(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.evaluation.beside import run as shared_run
    from trimtab.evaluation.kv_decode import _run

    figures = {
        "decode_ms_median": 1.5,
        "attention_ms_median": 0.5,
        "prefill_s_median": 2.5,
        "kv_bytes": 123456,
        "short_kv_bytes": 456,
        "peak_rss_bytes": 7654321,
    }
    monkeypatch.setattr("trimtab.kernels.bandwidth._BUFFER_BYTES", 1 << 20)
    monkeypatch.setattr(
        shared_run,
        "measure_system",
        lambda system, *_: {"error": "it broke"} if system.library == "llama.cpp" else dict(figures),
    )
    monkeypatch.setattr("trimtab.evaluation.beside.base._is_installed", lambda module: module not in ("hqq", "kvpress"))
    monkeypatch.setattr(_run, "make_model", lambda *_, **__: None)
    command = ("bench", "kv-decode", "--context", "128", "--systems", "transformers,kvpress,llama.cpp/f16")
    told = cli(*command, "--json")
    entries = {entry["system"]: entry for entry in told.json}
    measured = entries["transformers/dynamic-bf16"]
    assert {"bench", "context", "bandwidth_share"} <= set(measured)
    assert figures.items() <= measured.items()
    assert "pip install" in entries["transformers/hqq-4"]["skipped"]
    assert entries["llama.cpp/f16"]["error"] == "it broke"
    assert "transformers/quanto-4" in told.err
    table = cli(*command).out
    assert "123,456" in table
    assert "transformers/hqq-4: skipped" in table
    assert "llama.cpp/f16: error: it broke" in table
