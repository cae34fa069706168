"""The frame of the command line: help without torch, exit statuses, suggestions, environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trimtab.app.cli import SECTIONS
from trimtab.core.registry import methods

COMMANDS = [module.__name__.rpartition(".")[2] for members in SECTIONS.values() for module in members]
_HEAVY = ("torch", "transformers", "pydantic_core", "numpy", "matplotlib", "jinja2")


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "120"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["list", "--json"], ["compress", "--help"]])
def test_answers_without_importing_anything_heavy(arguments: list[str]) -> None:
    heavy = [name for name in _HEAVY if name != "pydantic_core"]  # typer itself may import pydantic
    ran = run_python(
        "import sys\nfrom trimtab.app.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        f"print(sorted(set({heavy!r}) & set(sys.modules)), file=sys.stderr)"
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.strip() == "[]"


def test_help_shows_every_command_and_examples(cli) -> None:
    ran = cli("--help")
    assert ran.status == 0
    for command in COMMANDS:
        assert f" {command} " in ran.out
    assert "Examples" in ran.out
    assert "TRIMTAB_DEBUG" in ran.out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_ends_with_examples_of_it(cli, command: str) -> None:
    ran = cli(command, "--help")
    assert ran.status == 0
    assert f"trimtab {command}" in ran.out.partition("Examples")[2]


def test_every_example_parses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The options in the examples exist: each example is parsed by its command, which is not run."""
    import shlex

    import typer

    from trimtab.app import cli as package

    (tmp_path / "my-prose").mkdir()
    monkeypatch.chdir(tmp_path)
    root = typer.main.get_command(package.app)
    examples = [*package.EXAMPLES, *(e for members in SECTIONS.values() for m in members for e in m.EXAMPLES)]
    for example in examples:
        program, command, *rest = shlex.split(example, comments=True)
        assert program == "trimtab"
        parser = root.commands[command]  # type: ignore[attr-defined]
        parser.make_context(command, rest)


def test_unknown_command_suggests(refused) -> None:
    refused("lst", names=["'lst'", "'list'"])


def test_unknown_option_is_a_usage_error(refused) -> None:
    refused("list", "--jsn", names=["--jsn"])


def test_unknown_method_suggests(refused) -> None:
    refused("describe", "gtpq", names=["unknown method 'gtpq'", "gptq"])


def test_unknown_room_suggests(refused) -> None:
    refused("list", "--room", "wieghts", names=["'wieghts'", "'weights'"])


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.app.cli import main
    from trimtab.core.errors import ConfigError

    monkeypatch.setenv("TRIMTAB_DEBUG", "1")
    with pytest.raises(ConfigError):
        main(["describe", "no-such-method"])


def test_interrupt_exits_130_without_traceback(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    import trimtab.core.registry

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trimtab.app.cli.list.methods", interrupted)
    assert trimtab.core.registry.methods is not interrupted
    ran = cli("list")
    assert ran.status == 130
    assert "Traceback" not in ran.err


def test_a_full_disk_is_no_traceback(refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(document: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trimtab.app.cli.list.emit_json", full)
    refused("list", "--json", names=["No space left on device"])


def test_options_come_from_the_environment(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_LIST_ROOM", "steering")
    monkeypatch.setenv("TRIMTAB_VERSION", "0.1")  # a variable that people set for other ends
    ran = cli("list", "--json")
    assert ran.status == 0
    assert all(entry["room"] == "steering" for entry in ran.json)


def test_list_json_has_name_room_summary_paper(cli) -> None:
    ran = cli("list", "--json")
    assert ran.status == 0
    assert [entry["name"] for entry in ran.json] == list(methods())
    assert {"gptq", "rtn"} <= {entry["name"] for entry in ran.json}
    for entry in ran.json:
        assert list(entry) == ["name", "room", "summary", "paper"]
        assert all(entry.values())


def test_list_table_names_every_method(cli) -> None:
    ran = cli("list")
    assert all(name in ran.out for name in methods())


def test_version(cli) -> None:
    from trimtab import __version__

    assert cli("--version").out.strip() == f"trimtab {__version__}"
