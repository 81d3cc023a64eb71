"""What a terminal, or a reader of lines, does not merely show: by Unicode's own properties."""

from __future__ import annotations

import unicodedata

_EMBEDDING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
_MARKS = {"LEFT-TO-RIGHT MARK", "RIGHT-TO-LEFT MARK", "ARABIC LETTER MARK"}


def harmful(text: str) -> list[str]:
    """The characters in it that move a cursor, end a line, or turn the direction of writing, in escapes."""
    return [ascii(character) for character in text if _is_harmful(character)]


def _is_harmful(character: str) -> bool:
    ends_lines = unicodedata.category(character) in {"Cc", "Cs", "Zl", "Zp"}
    turns = unicodedata.bidirectional(character) in _EMBEDDING or unicodedata.name(character, "") in _MARKS
    return ends_lines or turns
