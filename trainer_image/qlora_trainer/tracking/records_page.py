"""The page and the table of a run that show training records with their masks."""

from __future__ import annotations

from html import escape

from orchestrator.api.formats import ShownRecord, ShownRecords
from orchestrator.api.words import in_lines

PAGE_PATH = "data/records.html"
"""Where it lies among the run's artifacts."""
TABLE_PATH = "data/records.json"
"""Where the same lies as a table, which MLflow shows by itself."""
STYLE = (
    "body{font:14px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222;background:#fff}"
    "pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f4f4f4;padding:1em;color:#666}"
    "mark{background:#cdeac0;color:#0b3d0b}li{color:#8a4b00}"
)


def records_page(shown: ShownRecords) -> str:
    """An HTML page of its own: what carries loss is marked, whatever the records hold is text."""
    warnings = "".join(f"<li>{_text(warning)}</li>" for warning in shown.warnings)
    records = "".join(_record(number, record) for number, record in enumerate(shown.records, start=1))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Training records</title><style>{STYLE}</style>'
        f"<h1>Training records</h1><p>What carries loss is <mark>marked</mark>; the rest is context.</p>"
        f"{f'<ul>{warnings}</ul>' if warnings else ''}{records}</html>"
    )


def records_table(shown: ShownRecords) -> dict[str, list[object]]:
    """The records as MLflow keeps a table: what carries loss stands between brackets."""
    columns: list[object] = ["record, ⟦what carries loss⟧", "tokens", "of them with loss"]
    texts = [
        "".join(f"⟦{part.text}⟧" if part.supervised else part.text for part in each.parts) for each in shown.records
    ]
    lines = zip(texts, shown.records, strict=True)
    return {"columns": columns, "data": [[text, each.tokens, each.supervised_tokens] for text, each in lines]}


def _record(number: int, record: ShownRecord) -> str:
    parts = "".join(
        f"<mark>{_text(part.text)}</mark>" if part.supervised else _text(part.text) for part in record.parts
    )
    answer = f", {record.answer}" if record.answer is not None else ""
    return (
        f"<h2>Record {number}{answer}</h2><p>{record.tokens} tokens, {record.supervised_tokens} of them with loss</p>"
        f"<pre>{parts}</pre>"
    )


def _text(text: str) -> str:
    return escape(in_lines(text))
