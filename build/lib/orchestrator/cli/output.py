"""Answers for programs (`--output json|yaml`) and aligned columns for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from orchestrator.api.job import QLoRAJob
from orchestrator.api.queue import QLoRAQueue
from orchestrator.api.words import in_json, in_lines
from orchestrator.cli.console import answers
from orchestrator.cli.formats import DataFormat

GAP = "   "
MIN_FLEXIBLE_WIDTH = 12


def print_data(data: object, form: DataFormat) -> None:
    """JSON types as JSON or YAML on stdout."""
    print_text(_as_yaml(data) if form is DataFormat.YAML else in_json(json.dumps(data, indent=2, ensure_ascii=False)))


def print_text(text: str) -> None:
    """Text without markup, wrapping or color; what would harm a terminal is escaped."""
    console = answers()
    console.file.write(in_lines(text.rstrip("\n")) + "\n")
    console.file.flush()


def wire(item: QLoRAJob | QLoRAQueue) -> dict[str, object]:
    """An object with wire names, without what is not set."""
    data = item.to_wire()
    if isinstance(item, QLoRAJob) and item.spec.tracking.alias is None:
        # Here null is a choice: without it the alias would come back as its default.
        spec = data["spec"]
        assert isinstance(spec, dict)
        spec["tracking"]["alias"] = None
    return data


def _as_yaml(data: object) -> str:
    import yaml  # here, because most commands never need it

    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)
    return text if in_lines(text) == text else yaml.safe_dump(data, sort_keys=False, width=120)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A text with a style of the theme."""

    text: str
    style: str = ""


def columns(header: Sequence[str], rows: Sequence[Sequence[Cell]], *, width: int | None) -> list[Text]:
    """Left-aligned columns as lines; the last column is cut so that a line fits `width`, where there is one."""
    table = [[Cell(text=name, style="label") for name in header], *rows]
    widths = [max(cell_len(row[index].text) for row in table) for index in range(len(header))]
    if width is not None:
        room = width - sum(widths[:-1]) - len(GAP) * (len(widths) - 1)
        widths[-1] = min(widths[-1], max(MIN_FLEXIBLE_WIDTH, room))
    return [_line(row, widths) for row in table]


def print_columns(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    """Columns on stdout; cut to the terminal, whole in a pipe."""
    console = answers()
    for line in columns(header, rows, width=console.width if console.is_terminal else None):
        console.print(line, no_wrap=True, overflow="ignore", crop=False)


def _line(row: Sequence[Cell], widths: Sequence[int]) -> Text:
    line = Text()
    for index, (cell, width) in enumerate(zip(row, widths, strict=True)):
        if index:
            line.append(GAP)
        line.append(_fitted(cell.text, width), style=cell.style)
    line.rstrip()
    return line


def _fitted(text: str, width: int) -> str:
    flat = " ".join(text.split())
    return set_cell_size(flat, width) if cell_len(flat) <= width else set_cell_size(flat, width - 1) + "…"
