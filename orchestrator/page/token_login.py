"""How a visitor shows a token of the cluster: in a header, as programs do, or in a cookie that a form has set.

- The cookie is no script's to read, goes to no page of another site and with no request from one, and ends after a
  time. Nothing is kept of it here. A browser that came by HTTPS sends it by nothing else, to this host alone.
- A form of another page neither logs anybody in nor out: the browser says where a form is from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import parse_qs, urlsplit

COOKIE, SECURE_COOKIE = "qlora-token", "__Host-qlora-token"
"""Browsers take a name with this prefix only of HTTPS, for one host and all of its pages (RFC 6265bis, 4.1.3)."""
TOKEN = re.compile(r"[A-Za-z0-9\-._~+/]+=*")
"""RFC 6750, 2.1; a cookie may have each of these characters."""
MAX_TOKEN_BYTES = 16 << 10
MAX_COOKIE_BYTES = 3800
"""Of a token in a cookie: browsers keep 4096 bytes with its name and attributes."""
MAX_FORM_BYTES = MAX_TOKEN_BYTES * 3 + 64
"""Each byte of a form may be written as three."""
FIELD = "token"


def is_token(text: str) -> bool:
    """Whether it can be one at all."""
    return len(text) <= MAX_TOKEN_BYTES and TOKEN.fullmatch(text) is not None


def shown_token(headers: Mapping[str, str]) -> tuple[str, bool]:
    """The token of a request, empty where there is none, and whether it is a cookie's."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme:
        return (token.strip() if scheme.lower() == "bearer" else ""), False
    pairs = (pair.strip().partition("=") for pair in headers.get("cookie", "").split(";"))
    known = {name: value for name, _, value in pairs}
    return known.get(SECURE_COOKIE) or known.get(COOKIE) or "", True


def posted_token(body: bytes) -> str:
    """The token of a form, empty where there is none; ends of lines that were copied with it are cut."""
    try:
        found = parse_qs(body.decode("ascii"), max_num_fields=4)
    except ValueError:
        return ""
    return "".join(found.get(FIELD, [""])[0].split())


def is_own_form(headers: Mapping[str, str]) -> bool:
    """Whether a form comes from a page of this host."""
    return urlsplit(headers.get("origin", "")).netloc == headers.get("host", "") != ""


@dataclass(frozen=True, slots=True)
class Cookies:
    """What keeps a token in a browser."""

    seconds: int

    def keep(self, token: str, headers: Mapping[str, str]) -> str:
        """The header Set-Cookie for a browser that sent a form with these headers."""
        return self._cookie(token, self.seconds, headers)

    def forget(self, headers: Mapping[str, str]) -> str:
        """The same to have the token forgotten."""
        return self._cookie("", 0, headers)

    def _cookie(self, token: str, seconds: int, headers: Mapping[str, str]) -> str:
        is_secure = urlsplit(headers.get("origin", "")).scheme == "https"
        name, more = (SECURE_COOKIE, "; Secure") if is_secure else (COOKIE, "")
        return f"{name}={token}; Max-Age={seconds}; Path=/; HttpOnly; SameSite=Strict{more}"
