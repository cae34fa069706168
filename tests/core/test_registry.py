"""Listing reads file names and docstrings, and imports nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from trimtab.core.errors import ConfigError
from trimtab.core.method import Method
from trimtab.core.registry import method_class, method_info, methods, read_info


def test_every_method_imports_and_is_what_its_file_says() -> None:
    assert {"rtn", "gptq"} <= set(methods())
    for name, info in methods().items():
        cls = method_class(name)
        assert issubclass(cls, Method)
        assert cls.room == info.room
        assert cls.name() == name
        assert info.summary
        assert info.paper


def test_an_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"unknown method 'gtpq'. Did you mean 'gptq'\?"):
        method_info("gtpq")


def test_dashes_and_case_do_not_matter() -> None:
    assert method_info("GPTQ").name == "gptq"


def test_a_method_file_without_its_parts_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "lone.py"
    file.write_text('"""Summary only."""\n__all__ = ["Lone"]\n')
    with pytest.raises(ConfigError, match="'Paper:'"):
        read_info(file, "weights")


def test_the_paper_may_span_lines(tmp_path: Path) -> None:
    file = tmp_path / "some.py"
    file.write_text('"""Does this.\n\nPaper: A, "T",\n2020.\n\nMore.\n"""\n__all__ = ["Some"]\n')
    info = read_info(file, "weights")
    assert (info.name, info.summary, info.paper, info.class_name) == ("some", "Does this.", 'A, "T", 2020.', "Some")


def test_importing_and_listing_load_no_heavy_library() -> None:
    program = (
        "import sys, trimtab\nfrom trimtab.core.registry import methods\nassert methods()\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'rich', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
