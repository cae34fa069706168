"""`python -m trimtab.app.report RUNS_DIR [REPORT.html]`: draw a report from run records."""

from __future__ import annotations

import sys
from pathlib import Path

from trimtab.app.report.page import write_report
from trimtab.core.errors import TrimtabError


def main(arguments: list[str]) -> int:
    """Draw the report; returns the exit status."""
    if not 1 <= len(arguments) <= 2:
        print("usage: python -m trimtab.app.report RUNS_DIR [REPORT.html]", file=sys.stderr)
        return 2
    try:
        print(write_report(Path(arguments[0]), Path(arguments[1]) if len(arguments) == 2 else None))
    except TrimtabError as error:
        print(f"trimtab: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
