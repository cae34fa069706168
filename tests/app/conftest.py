"""Stand-ins that keep these tests small: run records with made-up figures, and the command line in process."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from trimtab.core.run_record import RunRecord


class Ran(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The document on the last line of standard output."""
        return json.loads(self.out.strip().splitlines()[-1])


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run the command line in this process: `cli("list", "--json")`."""
    from trimtab.app.cli import main

    def run(*arguments: str) -> Ran:
        with pytest.raises(SystemExit) as exit_:
            main(list(arguments))
        captured = capsys.readouterr()
        return Ran(int(exit_.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def refused(cli: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """Run a command in `tmp_path` that must be refused: status 2, one message on standard error, nothing changed.

    `names` are parts of the message.
    """
    monkeypatch.chdir(tmp_path)

    def content() -> dict[str, bytes]:
        return {str(p): p.read_bytes() if p.is_file() else b"" for p in sorted(tmp_path.rglob("*"))}

    def run(*arguments: str, names: Sequence[str]) -> Ran:
        before = content()
        ran = cli(*arguments)
        assert ran.status == 2, ran
        assert ran.out == ""
        assert "Traceback" not in ran.err
        message = " ".join(ran.err.replace("│", " ").split())
        for name in names:
            assert name in message
        assert content() == before
        return ran

    return run


def record(label: str, method: str | None, bits: int | None, size: int, kl: float, bpb: float) -> RunRecord:
    def interval(value: float, width: float) -> dict[str, float]:
        return {"value": value, "low": value - width, "high": value + width}

    return RunRecord(
        command="compare",
        config={"label": label, "method": method, "bits": bits, "model": "ref", "options": {}},
        seconds={} if method is None else {"compress": 1.5 + (bits or 0)},
        ledger={
            "bytes_at_rest": size,
            "keep_fraction": size / 14e6,
            "bits_per_weight": None if bits is None else bits + 0.3,
        },
        metrics={
            "tasks": {
                "prose": {"bits_per_byte": interval(bpb, 0.02), "perplexity": interval(20 * bpb, 1.0)},
                "recall": {"answer_nats": interval(kl, 0.1), "exact_match": interval(0.9 - kl, 0.05)},
            },
            "main_metrics": [["recall", "exact_match"], ["prose", "bits_per_byte"]],
            "fidelity": {} if method is None else {"kl_nats_per_token": interval(kl, kl / 10)},
            "speed": {"decode_tokens_per_second_median": 812.5},
        },
        changed=[{"name": "model.layers.0.mlp.up_proj"}] if method else [],
    )


@pytest.fixture
def records() -> list[RunRecord]:
    rows: list[tuple[Any, ...]] = [("uncompressed", None, None, 13_800_000, 0.0, 1.20)]
    for bits, size in ((4, 5_300_000), (3, 4_600_000), (2, 3_900_000)):
        rows.append((f"rtn {bits}-bit", "rtn", bits, size, 0.8 / bits**3 * 4, 1.2 + 1.5 / bits**2))
        rows.append((f"gptq {bits}-bit", "gptq", bits, size, 0.4 / bits**3 * 4, 1.2 + 0.9 / bits**2))
    return [record(*row) for row in rows]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of two blocks with ref's tokenizer, as a directory; do not change it."""
    import trimtab as tt
    from trimtab.models import info_of
    from trimtab.models.info import find_tokenizer

    assets = Path(tt.__file__).parent / "assets" / "ref"
    tokenizer = find_tokenizer(str(assets))
    assert tokenizer is not None
    sizes = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 2048}
    model = tt.models.random_model("llama", vocab_size=len(tokenizer), **sizes)
    info_of(model).tokenizer = tokenizer
    return tt.save(model, tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_rtn(tiny: Path) -> Path:
    """The same, compressed at 4 bits."""
    import trimtab as tt

    model = tt.compress(tt.load(tiny), tt.weights.Rtn(bits=4, group_size=32), progress=False)
    return tt.save(model, tiny.parent / "tiny-rtn")
