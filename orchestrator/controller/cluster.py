"""The controller on Kubernetes as a program: `python -m orchestrator.controller.cluster`.

Every replica watches, one leads: it holds the lease, starts Ray's head through the fabric's channel, and loops. SIGTERM
ends it and hands the lease over; stages go on. A leader that could not renew its lease in time ends at once, without
a word to anybody, because somebody else may be about to lead.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType

from pydantic import ValidationError

from orchestrator.adapters.kubernetes.api import KubeApi, RateLimiter, Timeouts
from orchestrator.adapters.kubernetes.lease import Lease, LeaseTimes
from orchestrator.adapters.kubernetes.pods import KubernetesPods
from orchestrator.adapters.kubernetes.settings import ClusterSettings
from orchestrator.adapters.kubernetes.store import KubernetesStore
from orchestrator.adapters.kubernetes.watch import Changes
from orchestrator.adapters.kubernetes.webhook_secrets import SecretReader
from orchestrator.adapters.mlflow.tracking import MlflowTracking
from orchestrator.adapters.ray_fabric.channel import FabricChannel, NamespacedChannel
from orchestrator.adapters.webhooks.http import HttpNotifier
from orchestrator.controller.health import Health, served
from orchestrator.controller.logs import log_to_stderr
from orchestrator.controller.loop import Controller, Ports
from orchestrator.controller.metrics import Metrics
from orchestrator.core.decide import Decider
from orchestrator.errors import OrchestratorError, PermanentError, RuntimeLost

log = logging.getLogger(__name__)

NOT_LEADER_EXIT_CODE = 75  # EX_TEMPFAIL: try again later
SETTINGS_EXIT_CODE = 78  # EX_CONFIG: trying again gives the same answer
START_RETRY_SECONDS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """The cluster as a replica sees it, leader or not."""

    api: KubeApi
    store: KubernetesStore
    runtime: KubernetesPods


def main() -> int:
    """Watch, stand by, lead; the exit code."""
    log_to_stderr()
    stop = _stop_on_signals()
    try:
        settings = ClusterSettings()  # pyright: ignore[reportCallIssue]  the environment has the rest
    except ValidationError as error:
        log.error("settings: %s", error)
        return SETTINGS_EXIT_CODE
    health, metrics = Health(settings.tick_seconds), Metrics()
    try:
        with served(health, metrics.registry, settings.health_port, settings.metrics_port):
            return _work(settings, health, metrics, stop)
    except RuntimeLost as error:
        _step_down(str(error))
    except PermanentError as error:
        log.error("%s", error)
        return SETTINGS_EXIT_CODE
    return 1


def _work(settings: ClusterSettings, health: Health, metrics: Metrics, stop: threading.Event) -> int:
    times = LeaseTimes(
        duration_seconds=settings.lease_duration_seconds,
        renew_seconds=settings.lease_renew_seconds,
        retry_seconds=settings.lease_retry_seconds,
    )
    patience = Timeouts(connect_seconds=times.retry_seconds, answer_seconds=times.renew_seconds / 2)
    with _watching(settings, metrics, stop) as view:
        lease = Lease(
            KubeApi(settings.kube_context, timeouts=patience),
            settings.namespace,
            settings.lease_name,
            settings.pod_name,
            times,
        )
        if _stand_by(lease, health, times, stop):
            lease.hold(_step_down)
            view.api.before_write = lease.check
            _catch_up(view, stop)
            _lead(settings, view, health, metrics, stop)
            lease.release()
    return 0


@contextmanager
def _watching(settings: ClusterSettings, metrics: Metrics, stop: threading.Event) -> Generator[View]:
    """Complete views of jobs, queues, pods and nodes; whoever stands by has them, too, and is quick to take over."""
    limiter = RateLimiter(settings.kube_requests_per_second, settings.kube_requests_burst)
    api = KubeApi(settings.kube_context, limiter=limiter)
    changes = Changes(settings.relist_seconds)
    changes.on_restart = metrics.watch_restarted
    metrics.read_requests = lambda: dict(api.requests)
    store = KubernetesStore(api, namespaces=settings.namespaces, reporter=settings.pod_name, changes=changes)
    runtime = KubernetesPods(
        api, changes, settings.pod_policy(), settings.runtime_bounds(), namespaces=settings.namespaces
    )
    metrics.read_uncounted_gpus = runtime.uncounted_gpus
    while not stop.is_set():
        try:
            runtime.start()
            store.start()
            break
        except OrchestratorError as error:
            log.warning("the cluster cannot be watched yet; trying again in %.0f s: %s", START_RETRY_SECONDS, error)
            stop.wait(START_RETRY_SECONDS)
    try:
        yield View(api=api, store=store, runtime=runtime)
    finally:
        store.close()
        runtime.close()


def _catch_up(view: View, stop: threading.Event) -> None:
    """See all that the leader before wrote: views of a replica that stands by may be behind each other."""
    while not stop.is_set():
        try:
            view.runtime.refresh()
            view.store.refresh()
            return
        except OrchestratorError as error:
            log.warning("the cluster cannot be listed yet; trying again in %.0f s: %s", START_RETRY_SECONDS, error)
            stop.wait(START_RETRY_SECONDS)


def _stand_by(lease: Lease, health: Health, times: LeaseTimes, stop: threading.Event) -> bool:
    """Wait for the lead; False when asked to stop before."""
    log.info("watching; standing by")
    while not stop.is_set():
        try:
            if lease.acquire():
                return True
        except OrchestratorError as error:
            log.warning("the lease cannot be looked at: %s", error)
        health.stands_by()
        stop.wait(times.retry_seconds)
    return False


def _lead(settings: ClusterSettings, view: View, health: Health, metrics: Metrics, stop: threading.Event) -> None:
    log.info("%s leads", settings.pod_name)
    metrics.leads(True)
    tracking = MlflowTracking(settings)
    threading.Thread(target=_connect, args=(tracking,), daemon=True).start()
    with ExitStack() as stack:
        if settings.heads:
            view.runtime.channel = stack.enter_context(NamespacedChannel(settings.ray_fabric_socket, settings.heads))
        elif settings.ray_address:
            view.runtime.channel = stack.enter_context(FabricChannel(settings.ray_fabric_socket))
        secrets = SecretReader(view.api, settings.namespace, settings.webhook_secret)
        notifier = HttpNotifier(settings, secrets)
        ports = Ports(store=view.store, runtime=view.runtime, tracking=tracking, notifier=notifier)
        controller = Controller(settings, ports, Decider().decide, metrics, health, writers=settings.writers)
        controller.run(stop, ready=lambda: None)
    metrics.leads(False)
    log.info("%s leads no more; stages go on: %s", settings.pod_name, controller.metrics.latencies())


def _connect(tracking: MlflowTracking) -> None:
    try:
        tracking.connect()
    except OrchestratorError as error:
        log.warning("%s; jobs are trained all the same and published later", error)


def _step_down(reason: str) -> None:
    """End now: nothing that is under way may be finished by this process."""
    log.error("stepping down: %s", reason)
    logging.shutdown()
    os._exit(NOT_LEADER_EXIT_CODE)


def _stop_on_signals() -> threading.Event:
    stop = threading.Event()

    def ask(number: int, _frame: FrameType | None) -> None:
        log.info("asked to stop by signal %d", number)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)
    return stop


if __name__ == "__main__":
    sys.exit(main())
