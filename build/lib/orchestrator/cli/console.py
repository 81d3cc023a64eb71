"""Where the CLI writes: answers to stdout, everything about the way there to stderr.

Both consoles are made when they are asked for, since tests and shells swap the streams. Without a terminal, and with
NO_COLOR, rich writes plain text; long lines are never wrapped into a file or a pipe. Whatever is printed, only rich
itself moves the cursor: harmful characters of strangers' texts are escaped here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderableType, RenderHook
from rich.segment import Segment
from rich.theme import Theme

from orchestrator.api.words import in_lines

THEME = Theme(
    {
        "good": "green",
        "bad": "red",
        "busy": "cyan",
        "current": "bold cyan",
        "waiting": "yellow",
        "quiet": "dim",
        "label": "dim",
        "bar.complete": "cyan",
        "bar.finished": "green",
        "progress.percentage": "default",
    }
)


class _Harmless(RenderHook):
    """Has everything printed through `in_lines`."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Each of them, with its text made fit to be shown."""
        return [_HarmlessRenderable(renderable) for renderable in renderables]


@dataclass(frozen=True, slots=True)
class _HarmlessRenderable:
    renderable: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for segment in console.render(self.renderable, options):
            yield segment if segment.control else Segment(in_lines(segment.text), segment.style)


def answers() -> Console:
    """stdout."""
    return _harmless(Console(theme=THEME, highlight=False, soft_wrap=not sys.stdout.isatty()))


def messages() -> Console:
    """stderr."""
    return _harmless(Console(theme=THEME, highlight=False, stderr=True, soft_wrap=not sys.stderr.isatty()))


def _harmless(console: Console) -> Console:
    console.push_render_hook(_Harmless())
    return console


def say(text: str, style: str | None = None) -> None:
    """One line to stderr; `text` is never read as markup."""
    messages().print(text, style=style, markup=False)
