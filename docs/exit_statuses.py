"""The table of docs/ci.md that says what exit statuses mean, from the command line's own."""

from __future__ import annotations

from pathlib import Path

from orchestrator.cli.exits import ExitStatus

PAGE = Path(__file__).parent / "ci.md"
BEGIN, END = "<!-- exits: written by `make docs` -->\n", "<!-- end of exits -->"


def page() -> str:
    """The page with the table as it should be."""
    before, begin, rest = PAGE.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, "docs/ci.md has lost the place of its table of exit statuses"
    rows = ["| status | meaning |", "|---|---|", *(f"| {int(status)} | {status.meaning} |" for status in ExitStatus)]
    return f"{before}{begin}{chr(10).join(rows)}\n{end}{after}"
