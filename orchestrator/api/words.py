r"""Words of strangers, made fit to be shown: on a terminal, in an event, a status or a line of a log.

A model's config, a record, a manifest or another program's exception may hold anything. Escape sequences would drive
the terminal that shows them, bidirectional characters turn what is read around, and line separators forge further
lines. Such characters are written as `\x1b` instead, which harms nobody and hides nothing.
"""

from __future__ import annotations

import re

CONTROL = "\\x00-\\x1f\\x7f-\\x9f"
"""C0 and C1, in a character class."""
DIRECTION = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
"""What turns the direction of writing around."""
LINES = "\u2028\u2029"
"""Line ends that are no control characters."""
BLANKS = "\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000"
"""What looks like a space and is none."""
UNSEEN = "\u00ad\u180e\u200b-\u200d\u2060-\u2065\u206a-\u206f\ufeff"
"""What has no width: allowed in a text, where some languages and emoji need it, and not in a name."""

_HARMFUL = re.compile(f"[{CONTROL}{DIRECTION}{LINES}\ud800-\udfff]")
_HARMFUL_BUT_LINES = re.compile(f"(?![\n\t])[{CONTROL}{DIRECTION}{LINES}\ud800-\udfff]")
_LOGIN = re.compile(r"(?<=://)[^/\s\"'<>]*@")
_LINE_ENDS = re.compile(r"[\r\n\t\v\f\x85\u2028\u2029]+")


def on_one_line(text: str) -> str:
    """The text without line ends, and with whatever else is harmful escaped."""
    if text.isascii() and text.isprintable():
        return text
    return _HARMFUL.sub(_escaped, _LINE_ENDS.sub(" ", text))


def in_lines(text: str) -> str:
    r"""The same for a text of several lines: `\n` and tabs stay."""
    if text.isascii() and text.isprintable():
        return text
    return _HARMFUL_BUT_LINES.sub(_escaped, text)


def in_json(text: str) -> str:
    """JSON that says the same, with what is harmful in its own escapes."""
    if text.isascii():
        return text
    return _HARMFUL_BUT_LINES.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def without_logins(text: str, instead: str = "<credentials>@") -> str:
    """The text without what stands before the host in addresses: a name, a password, a token."""
    return _LOGIN.sub(instead, text)


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
