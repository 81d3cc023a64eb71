"""JSON of strangers: what a text holds, or ValueError."""

from __future__ import annotations

import json


def read_json(text: str | bytes) -> object:
    """The value in a JSON text. Raises ValueError for any other text, one that is nested too deeply included."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("its lists and objects are nested too deeply") from error
