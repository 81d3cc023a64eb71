"""Who may look at a page that a command serves on this machine: whoever has the password of this start.

Other users of the machine reach its ports, too, and so do the pages in its browsers.

- HTTP's own Basic scheme: browsers and MLflow's clients know it, and a browser keeps it to one host and port, where a
  cookie would go to every port of this machine.
- A request for another host, or from a page of another, is refused: DNS rebinding and forged forms end here.
"""

from __future__ import annotations

import base64
import html
import secrets
from dataclasses import dataclass, field
from http import HTTPStatus

LOOPBACK = "127.0.0.1"
USER = "qlora"


@dataclass(frozen=True, slots=True)
class Door:
    """Of one server: what it lets in."""

    command: str
    """Which prints the address with the password."""
    port: int
    password: str = field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)

    @property
    def hosts(self) -> tuple[str, str]:
        """By what names its page is asked for."""
        return f"{LOOPBACK}:{self.port}", f"localhost:{self.port}"

    @property
    def url(self) -> str:
        """With the password."""
        return f"http://{USER}:{self.password}@{LOOPBACK}:{self.port}"

    @property
    def challenge(self) -> str:
        """What a browser is asked by, the header WWW-Authenticate."""
        return f'Basic realm="{self.command}", charset="UTF-8"'

    @property
    def opening_page(self) -> str:
        """A page that leads to the address: a browser's command line can be read by everybody on this machine, a file
        in a folder of one's own cannot."""
        return f'<meta http-equiv="refresh" content="0; url={html.escape(self.url)}">'

    def refusal(self, host: str, origin: str | None, authorization: str) -> tuple[HTTPStatus, str] | None:
        """Why a request is not let in; None where it is."""
        if host not in self.hosts:
            return HTTPStatus.FORBIDDEN, f"this is {self.hosts[0]}, not {host[:100]!r}"
        if origin is not None and origin not in [f"http://{known}" for known in self.hosts]:
            return HTTPStatus.FORBIDDEN, "pages of other addresses may not ask"
        expected = "Basic " + base64.b64encode(f"{USER}:{self.password}".encode()).decode()
        if not secrets.compare_digest(authorization.encode(), expected.encode()):
            return HTTPStatus.UNAUTHORIZED, f"the password is in the address that `{self.command}` printed"
        return None
