"""Paths behind `file://` and `pvc://` URIs.

Letters that a URI has no room for are percent-encoded (RFC 3986). Nothing in such a URI is a query or a fragment: a
file may be named `a#1.jsonl` or `what?.csv`, and whoever writes that as it is means that file, and none of a shorter
name.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote, unquote

FILE_SCHEME, CLAIM_SCHEME = "file://", "pvc://"
AS_THEY_ARE = "/~!$&'()*+,;=:@"
"""What a path of a URI has room for, beside letters and digits."""


def file_uri(path: Path | str) -> str:
    """The URI of a path, absolute or `./` something."""
    return FILE_SCHEME + quote(str(path), safe=AS_THEY_ARE)


def file_path(uri: str) -> Path | None:
    """The path behind `file:///path` or, as it is written, `file://./path`; None for a URI of another kind."""
    return Path(unquote(uri.removeprefix(FILE_SCHEME))) if uri.startswith(FILE_SCHEME) else None


def claim_and_path(uri: str) -> tuple[str, str] | None:
    """The claim and the path in it behind `pvc://claim/path`; None for a URI of another kind."""
    if not uri.startswith(CLAIM_SCHEME):
        return None
    claim, _, path = uri.removeprefix(CLAIM_SCHEME).partition("/")
    return claim, unquote(path)
