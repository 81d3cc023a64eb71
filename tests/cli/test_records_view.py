"""Records with their masks, as a terminal and a pipe get them."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from orchestrator.api.formats import ShownPart, ShownRecord, ShownRecords
from orchestrator.api.job import DatasetSource, ModelSource, QLoRAJobSpec
from orchestrator.cli.console import THEME
from orchestrator.cli.records_view import legend, show_records, template_words

SHOWN = ShownRecords(
    records=(
        ShownRecord(
            tokens=12,
            supervised_tokens=5,
            parts=(
                ShownPart(text="<|user|>hello [bold]there[/bold]<|end|>\n", supervised=False),
                ShownPart(text="good morning " * 20 + "<|end|>", supervised=True),
            ),
        ),
    )
)


def console(width: int, *, terminal: bool, color: bool) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    system = "standard" if color else None
    return Console(theme=THEME, file=file, width=width, force_terminal=terminal, color_system=system), file


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_gets_color_and_whole_words_within_its_width(width: int) -> None:
    shown, file = console(width, terminal=True, color=True)
    show_records(shown, SHOWN)
    written = file.getvalue()
    assert "\x1b[32mgood morning" in written
    assert "⟦" not in written
    assert "[bold]there[/bold]" in written, "a record is no markup"
    plain = written.replace("\x1b[32m", "").replace("\x1b[2m", "").replace("\x1b[0m", "")
    assert all(cell_len(line) <= width for line in plain.splitlines())
    assert "green" in legend(shown)


def test_a_terminal_without_color_gets_brackets() -> None:
    shown, file = console(80, terminal=True, color=False)
    show_records(shown, SHOWN)
    assert "⟦good morning" in file.getvalue()
    assert "⟦" in legend(shown)


def test_a_pipe_gets_brackets_and_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    shown, _ = console(80, terminal=False, color=False)
    show_records(shown, SHOWN)
    assert f"⟦{'good morning ' * 20}<|end|>⟧\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("form", "template", "words"),
    [
        ("messages", None, "chat template: the one of hf://acme/small"),
        ("sharegpt", "chatml", "chat template: chatml in spec.model.chatTemplate"),
        ("messages", "{{ messages }}", "chat template: the text in spec.model.chatTemplate"),
        ("text", None, "chat template: none, records of the format text are trained as they stand"),
    ],
)
def test_the_chat_template_is_named(form: Any, template: str | None, words: str) -> None:
    spec = QLoRAJobSpec(
        model=ModelSource(source="hf://acme/small", chat_template=template),
        dataset=DatasetSource(source="file:///a.jsonl", format=form),
    )
    assert template_words(spec) == words
