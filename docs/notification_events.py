"""The table of docs/notifications.md that says what webhooks are told, from the contract."""

from __future__ import annotations

from pathlib import Path

from orchestrator.api.notification import EVENT_MEANINGS

PAGE = Path(__file__).parent / "notifications.md"
BEGIN, END = "<!-- events: written by `make docs` -->\n", "<!-- end of events -->"


def page() -> str:
    """The page with the table as it should be."""
    before, begin, rest = PAGE.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, "docs/notifications.md has lost the place of its table of events"
    rows = ["| event | what has happened |", "|---|---|"]
    rows += [f"| `{event}` | {meaning} |" for event, meaning in EVENT_MEANINGS.items()]
    return f"{before}{begin}{chr(10).join(rows)}\n{end}{after}"
