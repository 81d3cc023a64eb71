"""Answers for programs (`--output json|yaml`) and aligned columns for people."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from orchestrator.api.job import QLoRAJob
from orchestrator.api.queue import QLoRAQueue
from orchestrator.api.sweep import QLoRASweep
from orchestrator.api.words import in_json, in_lines, on_one_line
from orchestrator.cli.console import answers
from orchestrator.cli.formats import DataFormat
from orchestrator.errors import AlreadyExists, InvalidObject
from orchestrator.sdk.words import state_word

GAP = "  "
BELOW = "      "
"""Before the last column where it has no room beside the others and goes below them."""
MIN_LAST_CELLS = 20
"""Less of a long text is not worth its column."""


def print_data(data: object, form: DataFormat) -> None:
    """JSON types as JSON or YAML on stdout."""
    print_text(as_yaml(data) if form is DataFormat.YAML else in_json(json.dumps(data, indent=2, ensure_ascii=False)))


def csv_text(header: Sequence[str], rows: Iterable[Mapping[str, object]]) -> str:
    """RFC 4180, with a line of names; what a row has not is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, header, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def print_text(text: str) -> None:
    """Text without markup, wrapping or color; what would harm a terminal is escaped."""
    console = answers()
    console.file.write(in_lines(text.rstrip("\n")) + "\n")
    console.file.flush()


def wire(item: QLoRAJob | QLoRAQueue | QLoRASweep) -> dict[str, object]:
    """An object with wire names, without what is not set; a job with the state that tables show."""
    data = item.to_wire()
    if not isinstance(item, QLoRAJob):
        return data
    if item.spec.tracking.alias is None:
        # Here null is a choice: without it the alias would come back as its default.
        spec = data["spec"]
        assert isinstance(spec, dict)
        spec["tracking"]["alias"] = None
    return {**data, "status": {"state": state_word(item), **item.status.to_wire()}}


def write_new(path: Path, text: str) -> None:
    """A file that was not there before."""
    try:
        with path.open("x") as file:
            file.write(text)
    except FileExistsError as error:
        raise AlreadyExists(f"{path} exists already; name another one: --output") from error
    except OSError as error:
        raise InvalidObject(f"{path}: cannot be written: {error.strerror}") from error


def as_yaml(data: object) -> str:
    """JSON types as YAML, in their order."""
    import yaml  # here, because most commands never need it

    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)
    return text if in_lines(text) == text else yaml.safe_dump(data, sort_keys=False, width=120)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A text with a style of the theme."""

    text: str
    style: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """A table whose last column may be long."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    optional: Sequence[str] = ()
    """Columns that are left out one after the other while there is too little room for the last one."""
    right: Sequence[str] = ()
    """Columns that are aligned at their right; not the last one."""
    wraps: bool = False
    """Whether the last column goes on below instead of being cut."""

    def lines(self, width: int | None) -> Iterator[Text]:
        """The table in lines of `width` cells; whole where there is no width."""
        narrow = self._for(width) if width is not None else self
        widths = narrow._widths()
        room = None if width is None else width - sum(widths[:-1]) - len(GAP) * (len(widths) - 1)
        head = [Cell(text=name, style="label") for name in narrow.header]
        right = [name in narrow.right for name in narrow.header]
        for row in (head, *narrow.rows):
            fixed = Text()
            for cell, cells, at_right in zip(row[:-1], widths, right, strict=False):
                fixed.append(_sized(_flat(cell.text), cells, at_right) + GAP, style=cell.style)
            yield from _lines(fixed, row[-1], room, width, wraps=self.wraps)

    def _for(self, width: int) -> Columns:
        """This table, or one of fewer columns that leaves the last one some room."""
        fewer = self
        for name in self.optional:
            widths = fewer._widths()
            wanted = min(widths[-1], MIN_LAST_CELLS)
            if sum(widths[:-1]) + len(GAP) * (len(widths) - 1) + wanted <= width:
                break
            fewer = fewer._without(name)
        return fewer

    def _without(self, name: str) -> Columns:
        place = list(self.header).index(name)
        rows = [[*row[:place], *row[place + 1 :]] for row in self.rows]
        return replace(self, header=[*self.header[:place], *self.header[place + 1 :]], rows=rows)

    def _widths(self) -> list[int]:
        return [
            max(cell_len(text) for text in (name, *(_flat(row[place].text) for row in self.rows)))
            for place, name in enumerate(self.header)
        ]


def print_columns(console: Console, table: Columns, indent: str = "") -> None:
    """A table: within a terminal's width, whole in a pipe."""
    for line in table.lines(console.width - len(indent) if console.is_terminal else None):
        console.print(Text(indent) + line, no_wrap=True, overflow="ignore", crop=False)


def print_paragraph(console: Console, text: Text) -> None:
    """A text, broken between words on a terminal, whole in a pipe."""
    console.print(text, soft_wrap=not console.is_terminal)


def print_fields(console: Console, fields: Iterable[tuple[str, str]], label_cells: int) -> None:
    """`label  value`, a line each; what is too long for a terminal goes on under its beginning."""
    for label, value in fields:
        for number, part in enumerate(wrapped(value, console.width - label_cells) if console.is_terminal else [value]):
            line = Text.assemble((f"  {'' if number else label:<{label_cells - 2}}", "label"), part)
            console.print(line, no_wrap=True, overflow="ignore", crop=False)


def wrapped(text: str, cells: int) -> list[str]:
    """A text in lines of so many cells, broken between words where that is possible."""
    lines = Text(in_lines(text)).wrap(Console(width=cells), cells)
    return [line.plain.rstrip() for line in lines] or [""]


def _sized(text: str, cells: int, at_right: bool) -> str:
    return " " * (cells - cell_len(text)) + text if at_right else set_cell_size(text, cells)


def _lines(line: Text, last: Cell, room: int | None, width: int | None, *, wraps: bool) -> Iterator[Text]:
    """A row: what stands before the last cell, and the last cell, beside it or below."""
    text = _flat(last.text)
    if room is None or width is None:
        yield _ended(line.append(text, style=last.style))
    elif not wraps:
        yield _ended(line.append(text, style=last.style), width)
    elif room >= MIN_LAST_CELLS or room >= cell_len(text):
        under = Text(" " * line.cell_len)
        for number, part in enumerate(wrapped(text, room)):
            yield _ended((under.copy() if number else line).append(part, style=last.style), width)
    else:
        yield _ended(line, width)
        for part in wrapped(text, width - len(BELOW)) if text else ():
            yield Text(BELOW).append(part, style=last.style)


def _ended(line: Text, width: int | None = None) -> Text:
    """The line without blanks at its end, and with an ellipsis where it is longer than it may be."""
    line.rstrip()
    if width is not None:
        line.truncate(width, overflow="ellipsis")
    return line


def _flat(text: str) -> str:
    """On one line, and as long as it is when its harmful characters are escaped."""
    return on_one_line(" ".join(text.split()))
