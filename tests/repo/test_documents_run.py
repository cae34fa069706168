"""The documentation's code runs.

A fenced block of `bash` or `python` is executed if the line before it is `<!-- run -->`, or `<!-- run: slow -->` where
it takes longer than a few seconds. The blocks of a page run from top to bottom in one empty directory; neighbouring
Python blocks share their names. Slow blocks run in the slow tier, in their place among the quick ones.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"^<!-- run(?P<slow>: slow)? -->\n```(?P<language>\w+)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)
MARK = re.compile(r"^<!-- run.*-->$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    slow: bool


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [Block(m["language"], m["code"], bool(m["slow"])) for m in BLOCK.finditer(text)]


RUNNABLE = [page for page in PAGES if page.exists() and blocks(page)]


def _environment(folder: Path) -> dict[str, str]:
    """The environment of a reader who has trimtab installed and no network."""
    commands = folder / "bin"
    commands.mkdir()
    trimtab = commands / "trimtab"
    trimtab.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m trimtab "$@"\n', encoding="utf-8")
    python = commands / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
    for command in (trimtab, python):
        command.chmod(0o755)
    return os.environ | {
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
        "NO_COLOR": "1",
    }


def _run(page: Path, folder: Path, *, with_slow: bool) -> None:
    environment = _environment(folder)
    work = folder / "work"
    work.mkdir()
    # All Python blocks before a shell block run in one process, so that names carry over.
    session: list[str] = []

    def flush() -> None:
        if session:
            _execute(page, [sys.executable, "-W", "ignore", "-c", "\n".join(session)], work, environment)
            session.clear()

    for block in blocks(page):
        if block.slow and not with_slow:
            continue
        if block.language == "python":
            session.append(block.code)
        else:
            flush()
            _execute(page, ["bash", "-euo", "pipefail", "-c", block.code], work, environment)
    flush()


def _execute(page: Path, command: list[str], work: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, (
        f"{page.relative_to(ROOT)}: this block ends with status {done.returncode}\n\n{command[-1]}\n"
        f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    )


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: str(page.relative_to(ROOT)))
def test_quick_blocks_run(page: Path, tmp_path: Path) -> None:
    if all(block.slow for block in blocks(page)):
        pytest.skip("all blocks of this page are slow")
    _run(page, tmp_path, with_slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in RUNNABLE if any(b.slow for b in blocks(p))], ids=lambda p: p.name)
def test_all_blocks_run(page: Path, tmp_path: Path) -> None:
    _run(page, tmp_path, with_slow=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_mark_is_lost(page: Path) -> None:
    """A mark that is not directly above a fenced block would run nothing."""
    text = page.read_text(encoding="utf-8")
    assert len(MARK.findall(text)) == len(blocks(page))
    assert all(block.language in ("bash", "python") for block in blocks(page))


def test_the_front_page_and_the_quickstart_run() -> None:
    names = {str(page.relative_to(ROOT)) for page in RUNNABLE}
    assert {"README.md", "docs/quickstart.md"} <= names
