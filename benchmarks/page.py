"""How long the service's page takes to be made, with many jobs and cards.

    python -m benchmarks.page [--jobs 1000] [--cards 100] [--repetitions 20] [--save page]

A real store with jobs of every state in eight namespaces and 20 queues. Milliseconds on the processor of a whole
request, from its first byte to its last: when what is shown was read before, when it is read for this request, and
that of a job that waits, with the decision of the moment in words. No job changes between two requests, so none is
parsed anew; what it takes to parse them all is the first look's milliseconds. Milliseconds of the outlook, which is
worked out beside requests, and bytes of the page.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from statistics import median

from starlette.types import ASGIApp, Message

from benchmarks.report import argument_parser, emit
from orchestrator.adapters.sqlite.store import SqliteStore
from orchestrator.page.app import make_app
from orchestrator.page.outlook import Outlook, look_ahead
from orchestrator.page.server import parts
from orchestrator.page.view import Views, read_view
from tests.page.gates import OpenGate
from tests.page.paper_world import PaperWorld


def main() -> None:
    """Measure, and print."""
    parser = argument_parser(__doc__)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--cards", type=int, default=100)
    parser.add_argument("--repetitions", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qlora-page-") as folder:
        world = PaperWorld(Path(folder), arguments.jobs, arguments.cards)
        emit(measure(world, arguments.repetitions), save=arguments.save)


def measure(world: PaperWorld, repetitions: int) -> dict[str, object]:
    """Each kind of request, again and again."""
    snapshot = read_view(world.connection, world.settings.policy()).snapshot
    ahead_ms = _milliseconds(lambda: look_ahead(snapshot, world.settings.page_forecast_events), 1)
    known, anew = (_app(world, read_seconds) for read_seconds in (3600.0, 1e-9))
    waits = next(job for job in snapshot.jobs if job.status.prepared and not job.status.mlflow.run_id)
    return {
        "jobs": len(snapshot.jobs),
        "cards": sum(each.capacity for each in world.classes),
        "overview_ms": _milliseconds(lambda: get(known, "/"), repetitions),
        "overview_read_anew_ms": _milliseconds(lambda: get(anew, "/"), repetitions),
        "job_ms": _milliseconds(lambda: get(known, f"/jobs/{waits.key}"), repetitions),
        "first_look_ms": _milliseconds(lambda: SqliteStore(world.settings).list_jobs(), 3),
        "outlook_ms": ahead_ms,
        "overview_bytes": len(get(known, "/")),
    }


def _app(world: PaperWorld, read_seconds: float) -> ASGIApp:
    """The page, which has looked ahead already, and has no run to ask MLflow for."""
    found = parts(OpenGate(), world.connection, world.settings, None)
    views = Views(world.connection, world.settings.policy(), read_seconds, rest=0.0)
    outlook = Outlook(3600.0, 1)
    while outlook.latest(views.current().snapshot) is None:
        time.sleep(0.1)
    return make_app(replace(found, views=views, outlook=outlook))


def get(app: ASGIApp, path: str) -> bytes:
    """The body of an answer, by way of ASGI; nothing listens."""
    body = bytearray()
    status: list[int] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            status.append(message["status"])
        body.extend(message.get("body", b""))

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [],
        "server": ("127.0.0.1", 80),
        "client": ("127.0.0.1", 1),
    }
    asyncio.run(app(scope, receive, send))  # pyright: ignore[reportArgumentType]  a coroutine, which Awaitable is said
    assert status == [HTTPStatus.OK], f"{path} answers {status}"
    return bytes(body)


def _milliseconds(request: Callable[[], object], repetitions: int) -> float:
    """The median, after a first one that warms; of the processor, so that a busy machine does not count."""
    seconds: list[float] = []
    for _ in range(repetitions + (repetitions > 1)):
        began = time.process_time()
        request()
        seconds.append(time.process_time() - began)
    return round(1000 * median(seconds[repetitions > 1 :]), 1)


if __name__ == "__main__":
    main()
