"""Where the CLI writes: answers to stdout, everything about the way there to stderr.

Both consoles are made when they are asked for, since tests and shells swap the streams. Without a terminal, and with
NO_COLOR, rich writes plain text; long lines are never wrapped into a file or a pipe.
"""

from __future__ import annotations

import sys

from rich.console import Console
from rich.theme import Theme

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


def answers() -> Console:
    """stdout."""
    return Console(theme=THEME, highlight=False, soft_wrap=not sys.stdout.isatty())


def messages() -> Console:
    """stderr."""
    return Console(theme=THEME, highlight=False, stderr=True, soft_wrap=not sys.stderr.isatty())


def say(text: str, style: str | None = None) -> None:
    """One line to stderr; `text` is never read as markup."""
    messages().print(text, style=style, markup=False)
