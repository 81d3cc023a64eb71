"""The page's addresses, and what all of its answers have in common.

- Nothing but GET and HEAD, and a form to log in and out where visitors have tokens; whoever may not look is told so in
  words, before anything is read.
- Scripts and styles come from files of our own alone, nothing from elsewhere, and no page may frame this one.
- Every text that a template is given is escaped; control characters and what turns writing around are shown as such.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Protocol

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator.api.words import in_lines
from orchestrator.errors import OrchestratorError
from orchestrator.page.figures import Figures
from orchestrator.page.job_page import job_page
from orchestrator.page.outlook import Outlook
from orchestrator.page.overview import Asked, overview
from orchestrator.page.sight import NOTHING, Sight
from orchestrator.page.token_login import MAX_COOKIE_BYTES, MAX_FORM_BYTES, Cookies, is_own_form, posted_token
from orchestrator.page.view import View, Views
from orchestrator.sdk.explanation import NOT_RUNNING

HERE = Path(__file__).parent
MAX_WORD = 63
"""Of a namespace or queue that is asked for: none has more."""
MAX_PAGE = 10_000
MAX_ADDRESS_BYTES = 2048
FORM_SECONDS = 10.0
"""How long a form may take to come."""
LOG_IN, LOG_OUT, STATIC = "/login", "/logout", "/static"
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # without one a browser does not say where a form is from
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
SEES_NO_QUEUES = "Queues are not this account's to read."
SEES_NO_CARDS = "Cards are not this account's to read."
OTHER_FORM = "This form was sent by a page of another address. Open the page itself, and log in there."
TOO_LONG = (
    f"This token is longer than the {MAX_COOKIE_BYTES} characters that a browser keeps. Programs may send it as "
    "`Authorization: Bearer TOKEN`; for a browser make a shorter one: kubectl create token"
)


@dataclass(frozen=True, slots=True)
class Refused:
    """Why a request is not answered."""

    status: HTTPStatus
    why: str
    headers: Mapping[str, str] = field(default_factory=dict[str, str])


class Gate(Protocol):
    """Who may look. It may take its time: it is asked in a thread."""

    def admit(self, headers: Mapping[str, str]) -> Sight | Refused:
        """What whoever sends these headers may see; names of headers are in small letters."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What the page shows, and to whom."""

    gate: Gate
    views: Views
    outlook: Outlook
    figures: Figures
    mlflow_url: str
    refresh_seconds: float
    cookies: Cookies | None = None
    """What keeps visitors' tokens in their browsers; without it there is no form to log in."""


def make_app(parts: Parts) -> ASGIApp:
    """The page as an ASGI application."""
    pages = _Pages(parts)
    routes = [
        Route("/", pages.overview, methods=["GET"]),
        Route("/jobs/{namespace}/{name}", pages.job, methods=["GET"]),
        Mount(STATIC, StaticFiles(directory=HERE / "static")),
    ]
    if parts.cookies is not None:
        routes += [Route(LOG_IN, pages.log_in, methods=["POST"]), Route(LOG_OUT, pages.log_out, methods=["POST"])]
    handlers = {HTTPException: pages.missing, OrchestratorError: pages.unavailable, Exception: pages.broken}
    return _Guarded(Starlette(routes=routes, exception_handlers=handlers), parts, pages)


class _Pages:
    """Answers, each in a thread of its own: Starlette does so for functions that are not asynchronous."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._templates = Environment(
            loader=FileSystemLoader(HERE / "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            finalize=_harmless,
            trim_blocks=True,
            lstrip_blocks=True,
        )

    def overview(self, request: Request) -> Response:
        """Cards, queues, jobs."""
        asked, sight = _asked(request), _sight(request)
        view = self._parts.views.current()
        ahead = self._parts.outlook.latest(view.snapshot) if view.whole and sight.whole else None
        page = overview(view, ahead, asked, sight)
        return self._shown("overview.html", view, _notices(view, sight), sight, page=page, root="./")

    def job(self, request: Request) -> Response:
        """One job."""
        sight, view = _sight(request), self._parts.views.current()
        namespace, name = request.path_params["namespace"], request.path_params["name"]
        job = view.jobs.get(f"{namespace}/{name}") if sight.sees(namespace) else None
        if job is None:
            raise HTTPException(HTTPStatus.NOT_FOUND, "There is no job of this name that this account may see.")
        ahead = self._parts.outlook.latest(view.snapshot) if view.whole and sight.whole else None
        run = self._parts.figures.of(job)
        page = job_page(job, view, ahead, sight, run, self._parts.mlflow_url)
        notices = (view.trouble,) if view.trouble else ()
        return self._shown("job.html", view, notices, sight, page=page, root="../../")

    async def log_in(self, request: Request) -> Response:
        """Keep the form's token in the browser, if it is somebody's."""
        cookies, headers = self._cookies(), dict(request.headers)
        if not is_own_form(headers):
            return self._refused(request, HTTPStatus.FORBIDDEN, OTHER_FORM)
        token = posted_token(await _body(request))
        if len(token) > MAX_COOKIE_BYTES:
            return self.asks_for_token(request, Refused(HTTPStatus.UNPROCESSABLE_ENTITY, TOO_LONG))
        found = await run_in_threadpool(self._parts.gate.admit, {"authorization": f"Bearer {token}"})
        if isinstance(found, Refused):
            return self.asks_for_token(request, found)
        return RedirectResponse("./", HTTPStatus.SEE_OTHER, {"Set-Cookie": cookies.keep(token, headers)})

    async def log_out(self, request: Request) -> Response:
        """Have the browser forget its token."""
        cookies, headers = self._cookies(), dict(request.headers)
        if not is_own_form(headers):
            return self._refused(request, HTTPStatus.FORBIDDEN, OTHER_FORM)
        return RedirectResponse("./", HTTPStatus.SEE_OTHER, {"Set-Cookie": cookies.forget(headers)})

    def turned_away(self, request: Request, found: Refused) -> Response:
        """What whoever may not look is told: a browser on a page, programs in a line."""
        if self._parts.cookies is None or "text/html" not in request.headers.get("accept", ""):
            return Response(f"{found.why}\n", found.status, dict(found.headers), media_type="text/plain")
        if found.status is HTTPStatus.UNAUTHORIZED:
            return self.asks_for_token(request, found)
        answer = self._refused(request, found.status, f"{found.why[:1].upper()}{found.why[1:]}.")
        answer.headers.update(found.headers)
        return answer

    def asks_for_token(self, request: Request, found: Refused) -> Response:
        """A form."""
        template, frame = self._templates.get_template("token.html"), self._frame(request, 0)
        text = template.render(why=found.why, here=frame["root"] if request.method == "POST" else "", **frame)
        return HTMLResponse(text, found.status, dict(found.headers))

    def _cookies(self) -> Cookies:
        assert self._parts.cookies is not None, "there is no such address without them"
        return self._parts.cookies

    def missing(self, request: Request, error: Exception) -> Response:
        """Nothing is at this address."""
        assert isinstance(error, HTTPException), "it is called for these"
        return self._refused(request, HTTPStatus(error.status_code), error.detail)

    def unavailable(self, request: Request, error: Exception) -> Response:
        """What is shown cannot be read."""
        return self._refused(request, HTTPStatus.SERVICE_UNAVAILABLE, f"{error}.")

    def broken(self, request: Request, error: Exception) -> Response:
        """A defect of the page; the log has its traceback."""
        told = f"The page could not be made: {type(error).__name__}. That is a defect; the log of the page says more."
        return self._refused(request, HTTPStatus.INTERNAL_SERVER_ERROR, told)

    def _refused(self, request: Request, status: HTTPStatus, why: str) -> Response:
        passes = status in (HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.TOO_MANY_REQUESTS)  # it looks again by itself
        frame = self._frame(request, self._parts.refresh_seconds if passes else 0)
        text = self._templates.get_template("refusal.html").render(what=status.phrase, why=why, **frame)
        return HTMLResponse(text, status)

    def _frame(self, request: Request, refresh_seconds: float) -> Mapping[str, object]:
        """What is around a page that shows nothing of the service."""
        root = "../" * max(0, request.url.path.count("/") - 1) or "./"
        refresh = f"{refresh_seconds:g}" if refresh_seconds else ""
        return {"root": root, "refresh_seconds": refresh, "as_of": None, "notices": (), "has_login": False}

    def _shown(
        self, template: str, view: View, notices: tuple[str, ...], sight: Sight, **values: object
    ) -> HTMLResponse:
        text = self._templates.get_template(template).render(
            as_of=view.snapshot.now,
            notices=notices,
            refresh_seconds=f"{self._parts.refresh_seconds:g}",
            has_login=sight.has_login,
            **values,
        )
        return HTMLResponse(text)


class _Guarded:
    """Asks the gate first, and puts the same headers on every answer."""

    def __init__(self, inner: ASGIApp, parts: Parts, pages: _Pages) -> None:
        self._inner = inner
        self._gate = parts.gate
        self._has_form = parts.cookies is not None
        self._pages = pages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        assert scope["type"] == "http", "no web socket is offered, and no life span"

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                named = {name for name, _ in own}
                kept = [(name, value) for name, value in message["headers"] if name.lower() not in named]
                message = {**message, "headers": [*kept, *own]}
            await send(message)

        found = await self._admitted(scope)
        if isinstance(found, Sight):
            scope.setdefault("state", {})["sight"] = found
            await self._inner(scope, receive, send_with_headers)
        else:
            answer = self._pages.turned_away(Request(scope), found)
            await answer(scope, receive, send_with_headers)

    async def _admitted(self, scope: Scope) -> Sight | Refused:
        """What is seen of the service: nothing by forms that say who comes, nor by what they are drawn with."""
        if self._has_form and scope["method"] == "POST" and scope["path"] in (LOG_IN, LOG_OUT):
            return NOTHING
        if scope["method"] not in ("GET", "HEAD"):
            return Refused(HTTPStatus.METHOD_NOT_ALLOWED, "this page only shows: GET and HEAD", {"Allow": "GET, HEAD"})
        if len(scope["raw_path"]) + len(scope["query_string"]) > MAX_ADDRESS_BYTES:
            return Refused(HTTPStatus.REQUEST_URI_TOO_LONG, f"an address has at most {MAX_ADDRESS_BYTES} bytes")
        if self._has_form and scope["path"].startswith(f"{STATIC}/"):
            return NOTHING
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        return await run_in_threadpool(self._gate.admit, headers)


async def _body(request: Request) -> bytes:
    """What a form has sent, a beginning of one that is too long; nothing of one that takes too long."""
    body = b""
    try:
        async with asyncio.timeout(FORM_SECONDS):
            async for piece in request.stream():
                body += piece
                if len(body) > MAX_FORM_BYTES:
                    return body
    except (TimeoutError, ClientDisconnect):
        return b""
    return body


def _harmless(value: object) -> object:
    """What a template shows, before it is escaped."""
    return in_lines(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _sight(request: Request) -> Sight:
    sight = request.state.sight
    assert isinstance(sight, Sight), "the guard has put it there"
    return sight


def _asked(request: Request) -> Asked:
    """What the address asks for; whatever makes no sense finds nothing, and a page beyond the last is the last."""
    words = {name: request.query_params.get(name, "")[:MAX_WORD] for name in ("namespace", "queue", "state")}
    page = request.query_params.get("page", "1")
    number = int(page) if page.isascii() and page.isdecimal() and len(page) < 9 else 1
    return Asked(**words, page=min(max(1, number), MAX_PAGE))


def _notices(view: View, sight: Sight) -> tuple[str, ...]:
    notices = (
        view.trouble,
        "" if view.running else NOT_RUNNING,
        "" if view.sees_queues and sight.queues else SEES_NO_QUEUES,
        "" if view.sees_cards and sight.whole else SEES_NO_CARDS,
        _unasked(sight.unasked) if sight.unasked else "",
    )
    return tuple(filter(None, notices))


def _unasked(count: int) -> str:
    return (
        f"Jobs of {count} more namespaces are not shown: nobody has asked whether this account may list them "
        "(QLORA_PAGE_NAMESPACES_LIMIT)."
    )
