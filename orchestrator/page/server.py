"""`qlora page`: the page on a port of this machine, behind a password that is new with every start, until Ctrl-C.

It shows what the account of the command may read, of the embedded service or of a cluster.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import tempfile
import threading
import webbrowser
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from http import HTTPStatus
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from orchestrator.adapters.mlflow.run_reader import RunFigures, RunReader
from orchestrator.api.job import QLoRAJob
from orchestrator.errors import OrchestratorError, PermanentError, TrackingUnavailable
from orchestrator.page.app import Gate, Parts, Refused, make_app
from orchestrator.page.figures import Figures, ReadRun
from orchestrator.page.outlook import Outlook
from orchestrator.page.sight import EVERYTHING, Sight
from orchestrator.page.view import Views
from orchestrator.sdk.client import Client
from orchestrator.sdk.connection import Connection
from orchestrator.sdk.door import LOOPBACK, Door
from orchestrator.settings import ServiceSettings

log = logging.getLogger(__name__)

COMMAND = "qlora page"
MLFLOW_CALLS = 4
"""Runs that MLflow is asked for at one time."""
KEEP_ALIVE_SECONDS, STOP_SECONDS = 15, 5
MAX_HEADER_BYTES = 32 << 10
BACKLOG = 128


@dataclass(frozen=True, slots=True)
class PasswordGate:
    """Whoever has the password sees what the command's own account sees."""

    door: Door

    def admit(self, headers: Mapping[str, str]) -> Sight | Refused:
        """Everything, or nothing."""
        host, origin, login = headers.get("host", ""), headers.get("origin"), headers.get("authorization", "")
        refusal = self.door.refusal(host, origin, login)
        if refusal is None:
            return EVERYTHING
        status, why = refusal
        asks = {"WWW-Authenticate": self.door.challenge} if status is HTTPStatus.UNAUTHORIZED else {}
        return Refused(status, why, asks)


@dataclass(frozen=True, slots=True, kw_only=True)
class PageTracking:
    """How the page asks MLflow."""

    tracking_uri: str
    tracking_timeout_seconds: float
    tracking_start_seconds: float
    artifact_root: Path | None = None
    mlflow_workers: int = MLFLOW_CALLS


def serve(client: Client, port: int, told: Callable[[str], None]) -> None:
    """Answer until Ctrl-C or SIGTERM; `told` hears the address, with the password. Raises PermanentError for a port
    that cannot be used."""
    with listening(port) as listener, tempfile.TemporaryDirectory(prefix="qlora-page-") as private:
        door = Door(COMMAND, listener.getsockname()[1])
        settings = client.settings
        app = make_app(parts(PasswordGate(door), client_view(client), settings, settings.known_tracking_uri))
        told(door.url)
        if sys.stdout.isatty():
            page = Path(private) / "open.html"  # in a folder that its owner alone can enter
            page.write_text(door.opening_page)
            webbrowser.open(page.as_uri())
        server_of(app, settings).run(sockets=[listener])


def client_view(client: Client) -> Connection:
    """A client's connection, whose namespace is the client's: that is shown where nothing beyond it may be read."""
    return replace(client.connection, namespace=client.namespace)


def parts(gate: Gate, connection: Connection, settings: ServiceSettings, tracking_uri: str | None) -> Parts:
    """What the page of one service is made of; begins to load MLflow's client, which takes seconds."""
    return Parts(
        gate=gate,
        views=Views(connection, settings.policy(), settings.page_read_seconds),
        outlook=Outlook(settings.page_forecast_seconds, settings.page_forecast_events),
        figures=Figures(
            _reads_nothing if tracking_uri is None else _reader(tracking_uri, settings),
            every_seconds=settings.page_mlflow_seconds,
            timeout_seconds=settings.page_mlflow_timeout_seconds,
            kept=settings.page_runs_kept,
        ),
        mlflow_url=settings.page_mlflow_url or tracking_uri or "",
        refresh_seconds=settings.page_refresh_seconds,
    )


def server_of(app: ASGIApp, settings: ServiceSettings) -> uvicorn.Server:
    """What answers requests on a socket, within bounds; a signal ends it, and is raised again then."""
    config = uvicorn.Config(
        app,
        access_log=False,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        http="h11",
        lifespan="off",
        limit_concurrency=settings.page_requests_limit,
        log_level="warning",
        loop="asyncio",
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=STOP_SECONDS,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        ws="none",
    )
    return uvicorn.Server(config)


def listening(port: int, address: str = LOOPBACK) -> socket.socket:
    """A socket, of loopback by default; raises PermanentError."""
    try:
        return socket.create_server((address, port), backlog=BACKLOG)
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise PermanentError(f"port {port} cannot be used: {why}; name another one: --port") from error


def _reader(tracking_uri: str, settings: ServiceSettings) -> ReadRun:
    reader = RunReader(
        PageTracking(
            tracking_uri=tracking_uri,
            tracking_timeout_seconds=settings.page_mlflow_timeout_seconds,
            tracking_start_seconds=settings.tracking_start_seconds,
        )
    )

    def warm() -> None:
        try:
            reader.warm(settings.tracking_start_seconds)
        except OrchestratorError as error:
            log.warning("%s", error)  # as each page will say that asks it

    threading.Thread(target=warm, name="mlflow", daemon=True).start()
    return reader.read


def _reads_nothing(job: QLoRAJob, run_id: str) -> RunFigures:
    raise TrackingUnavailable(
        f"The MLflow that has run {run_id} of {job.key} is not known here; set MLFLOW_TRACKING_URI to an address that "
        "works here"
    )
