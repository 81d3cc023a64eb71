"""The stages' JSON log lines as people read them; anything else is shown as it is."""

from __future__ import annotations

from typing import cast

from orchestrator.api.json_text import read_json

_INDENT = " " * 10
_SHOWN_APART = frozenset({"time", "level", "message", "traceback", "stage", "job", "attempt", "logger"})


def log_text(line: str) -> str:
    """`12:03:11 warning  the message  key=value`, with a traceback below."""
    if not line.startswith("{"):
        return line
    try:
        fields = cast(dict[str, object], read_json(line))
    except ValueError:
        return line
    if "message" not in fields:
        return line
    time = str(fields.get("time", ""))[11:19]
    level = str(fields.get("level", ""))
    shown = "" if level in ("", "info") else f"{level.upper()} "
    more = "".join(f"  {name}={value}" for name, value in fields.items() if name not in _SHOWN_APART)
    # What a message has after its first line is set in: nobody's words begin a line that looks like another record.
    message = str(fields["message"]).replace("\n", f"\n{_INDENT}")
    text = f"{time}  {shown}{message}{more}"
    return f"{text}\n{fields['traceback']}" if "traceback" in fields else text
