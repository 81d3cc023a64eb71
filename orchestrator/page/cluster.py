"""The page on a cluster as a program: `python -m orchestrator.page.cluster`, with the controller's settings.

It watches jobs, queues and nodes under an account of its own, once for everybody who looks, and shows each visitor what
that visitor's own account may list (`token_gate`). It knows nothing of the controller: whatever becomes of the one, the
other goes on. An API server that is away at the start or later is said on the page, until it is back.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import uvicorn
from pydantic import ValidationError

from orchestrator.adapters.kubernetes.api import KubeApi, RateLimiter, Timeouts
from orchestrator.adapters.kubernetes.nodes import NODES, Node, count_gpus, parse_gpu_classes, read_node
from orchestrator.adapters.kubernetes.pod_logs import PodLogs
from orchestrator.adapters.kubernetes.reviews import Reviews
from orchestrator.adapters.kubernetes.settings import ClusterSettings
from orchestrator.adapters.kubernetes.store import KubernetesStore
from orchestrator.adapters.kubernetes.watch import Cache, Changes
from orchestrator.controller.health import probed
from orchestrator.controller.logs import log_to_stderr
from orchestrator.errors import OrchestratorError, PermanentError, StoreUnavailable
from orchestrator.page.app import Parts, make_app
from orchestrator.page.server import listening, parts, server_of
from orchestrator.page.token_gate import TokenGate
from orchestrator.page.token_login import Cookies
from orchestrator.page.view import Views
from orchestrator.sdk.connection import Connection
from orchestrator.sizing.gpu_table import gpu_table
from orchestrator.sizing.hardware import GpuClass

log = logging.getLogger(__name__)

SETTINGS_EXIT_CODE = 78  # EX_CONFIG: trying again gives the same answer
EVERY_ADDRESS = ""
START_RETRY_SECONDS = 2.0
BEAT_SECONDS = 1.0
SILENCE_SECONDS = 60.0
"""A server whose loop has not come round for so long is not alive."""


def main() -> int:
    """Watch and answer until SIGTERM; the exit code."""
    log_to_stderr()
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(0))  # after the server has come to rest
    try:
        settings = ClusterSettings()  # pyright: ignore[reportCallIssue]  the environment has the rest
    except ValidationError as error:
        log.error("settings: %s", error)
        return SETTINGS_EXIT_CODE
    try:
        with listening(settings.page_port, EVERY_ADDRESS) as listener, watching(settings) as cluster:
            server = server_of(make_app(cluster_parts(settings, cluster)), settings)
            pulse = Pulse()
            with probed(pulse.alive, cluster.ready, settings.health_port):
                log.info("the page answers on port %d", settings.page_port)
                asyncio.run(_serve(server, pulse, listener))
    except PermanentError as error:
        log.error("%s", error)
        return SETTINGS_EXIT_CODE
    return 0


class Cluster:
    """What the page watches: complete once it has started, and kept so; safe to share between threads."""

    def __init__(self, settings: ClusterSettings) -> None:
        timeouts = Timeouts(connect_seconds=settings.page_review_timeout_seconds)
        api = KubeApi(settings.kube_context, timeouts=timeouts)
        changes = Changes(settings.relist_seconds)
        self._store = KubernetesStore(api, namespaces=settings.namespaces, reporter=settings.pod_name, changes=changes)
        self._nodes: Cache[Node] = Cache(api, "v1", NODES, partial(read_node, policy=settings.pod_policy()), changes)
        self._table = gpu_table(settings.gpu_class_definitions)
        self._reachable = parse_gpu_classes(settings.gpu_classes, self._table)
        self._over = threading.Event()
        self._is_complete = threading.Event()
        self._thread = threading.Thread(target=self._start, name="start", daemon=True)
        self.connection = Connection(
            store=self._store,
            is_running=lambda: True,  # the page goes on without a controller, and so do the objects
            gpu_classes=self._gpu_classes,
            logs=PodLogs(api),
            namespace=settings.namespace,
            is_local=False,
        )

    def start(self) -> None:
        """Begin to watch, and try until that works."""
        self._thread.start()

    def close(self) -> None:
        """Watch no more."""
        self._over.set()
        self._thread.join()
        self._nodes.close()
        self._store.close()

    def ready(self) -> str:
        """Empty once everything was listed, whatever comes after it: the page says in words what does not work."""
        return "" if self._is_complete.is_set() else "the cluster has not been listed yet"

    def _start(self) -> None:
        while not self._over.is_set():
            try:
                self._nodes.start()
                self._store.start()
                self._is_complete.set()
                return
            except OrchestratorError as error:
                log.warning("the cluster cannot be watched yet; trying again in %.0f s: %s", START_RETRY_SECONDS, error)
                self._over.wait(START_RETRY_SECONDS)

    def _gpu_classes(self) -> tuple[GpuClass, ...]:
        if not self._is_complete.is_set():
            raise StoreUnavailable("the cluster has not been listed yet; this is tried until it works")
        return count_gpus(self._nodes.values().values(), {}, self._reachable, table=self._table)


@contextmanager
def watching(settings: ClusterSettings) -> Generator[Cluster]:
    """The cluster, watched for as long as the context lasts."""
    cluster = Cluster(settings)
    cluster.start()
    try:
        yield cluster
    finally:
        cluster.close()


def cluster_parts(settings: ClusterSettings, cluster: Cluster) -> Parts:
    """What the page is made of: one view for all, and a gate that knows visitors apart."""
    views = Views(cluster.connection, settings.policy(), settings.page_read_seconds)
    timeouts = Timeouts(
        connect_seconds=settings.page_review_timeout_seconds, answer_seconds=settings.page_review_timeout_seconds
    )
    limiter = RateLimiter(settings.page_reviews_per_second, settings.page_reviews_burst)
    reviews = Reviews(KubeApi(settings.kube_context, timeouts=timeouts, limiter=limiter))
    gate = TokenGate(reviews, settings, lambda: {job.metadata.namespace for job in views.current().snapshot.jobs})
    made = parts(gate, cluster.connection, settings, settings.tracking_uri)
    return replace(made, views=views, cookies=Cookies(settings.page_login_seconds))


@dataclass(slots=True)
class Pulse:
    """Whether the server's loop comes round."""

    beaten: float = field(default_factory=time.monotonic)

    def alive(self) -> str:
        """Empty, or what is wrong."""
        silent_seconds = time.monotonic() - self.beaten
        return "" if silent_seconds < SILENCE_SECONDS else f"the server has not come round for {silent_seconds:.0f} s"

    async def beat(self) -> None:
        """For as long as the loop runs."""
        while True:
            self.beaten = time.monotonic()
            await asyncio.sleep(BEAT_SECONDS)


async def _serve(server: uvicorn.Server, pulse: Pulse, listener: socket.socket) -> None:
    beats = asyncio.create_task(pulse.beat())
    await server.serve(sockets=[listener])
    beats.cancel()


if __name__ == "__main__":
    sys.exit(main())
