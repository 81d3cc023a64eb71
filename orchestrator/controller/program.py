"""The controller as a program: `python -m orchestrator.controller`, kept running by `supervisor`.

It takes the lead of its home folder (one controller at a time), starts Ray, and loops. SIGTERM ends it and leaves
stages running. When Ray is lost it exits with LOST_EXIT_CODE, without waiting for anything, and is started again.
"""

from __future__ import annotations

import fcntl
import getpass
import json
import logging
import os
import signal
import sys
import threading
import time
from types import FrameType

from orchestrator.adapters.local.home import make_private, private_files
from orchestrator.adapters.local.processes import Process, write_durably
from orchestrator.adapters.local.ray_stages import LOST_EXIT_CODE, RayStages
from orchestrator.adapters.mlflow.tracking import MlflowTracking
from orchestrator.adapters.sqlite.store import SqliteStore
from orchestrator.adapters.webhooks.http import HttpNotifier
from orchestrator.adapters.webhooks.secrets import EnvironmentSecrets
from orchestrator.api.job import ObjectMeta
from orchestrator.api.queue import QLoRAQueue
from orchestrator.controller.logs import log_to_file
from orchestrator.controller.loop import Controller, Ports
from orchestrator.core.decide import Decider
from orchestrator.core.scheduling.ordering import DEFAULT_QUEUE
from orchestrator.errors import OrchestratorError, PermanentError, RuntimeLost
from orchestrator.ports import Store
from orchestrator.settings import Settings

log = logging.getLogger(__name__)

NOT_LEADER_EXIT_CODE = 75  # EX_TEMPFAIL: try again later
SETTINGS_EXIT_CODE = 78  # EX_CONFIG: trying again gives the same answer
LOCK_NAME = "controller.lock"
READY_NAME = "controller.json"


def main() -> int:
    """Lead and loop; the exit code."""
    settings = Settings()
    private_files()
    make_private(settings.home)
    log_to_file(settings, "controller")
    if not _take_lead(settings):
        log.warning("another controller leads %s", settings.home)
        return NOT_LEADER_EXIT_CODE
    (settings.home / READY_NAME).unlink(missing_ok=True)
    try:
        _work(settings)
    except RuntimeLost as error:
        log.error("%s", error)
        logging.shutdown()
        os._exit(LOST_EXIT_CODE)  # Ray's own clean-up would wait for a Ray that is gone
    except PermanentError as error:
        log.error("%s", error)
        return SETTINGS_EXIT_CODE
    except Exception:
        log.exception("the controller ends and is started again")
        return 1
    return 0


def _person() -> str | None:
    """Whose service this is, if the system has a name for it."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return None


def _work(settings: Settings) -> None:
    tracking = MlflowTracking(settings, user=_person())
    is_new = tracking.is_new
    connecting = threading.Thread(target=_connect, args=(tracking,), daemon=True)
    connecting.start()  # while Ray starts, which takes as long
    store = SqliteStore(settings)
    _describe_default(store)
    runtime = RayStages(settings)
    if is_new:
        connecting.join()  # two processes must not make a new database at once, and trainers would try
    stop = threading.Event()
    # After Ray, which sets a handler of its own.
    signal.signal(signal.SIGTERM, lambda number, frame: _ask_to_stop(stop, number, frame))
    signal.signal(signal.SIGINT, lambda number, frame: _ask_to_stop(stop, number, frame))
    notifier = HttpNotifier(settings, EnvironmentSecrets(os.environ))
    ports = Ports(store=store, runtime=runtime, tracking=tracking, notifier=notifier)
    controller = Controller(settings, ports, Decider().decide)
    log.info("the controller of %s works", settings.home)
    controller.run(stop, ready=_Ready(settings))
    log.info("the controller ends, running stages go on: %s", controller.metrics.latencies())
    runtime.close()


def _describe_default(store: Store) -> None:
    """Make the queue that jobs name by default, as the chart does: what its jobs have had is kept in its status."""
    if all(queue.metadata.name != DEFAULT_QUEUE for queue in store.list_queues()):
        store.apply_queue(QLoRAQueue(metadata=ObjectMeta(name=DEFAULT_QUEUE)))


def _connect(tracking: MlflowTracking) -> None:
    try:
        tracking.connect()
    except OrchestratorError as error:
        log.warning("%s; jobs are trained all the same and published later", error)


def _ask_to_stop(stop: threading.Event, number: int, _frame: FrameType | None) -> None:
    log.info("asked to stop by signal %d", number)
    stop.set()


def _take_lead(settings: Settings) -> bool:
    """Whether this process is now the one controller of the home folder, until it ends."""
    settings.home.mkdir(parents=True, exist_ok=True)
    # Never closed; and never inherited, so that no child keeps the lead when this process is gone.
    handle = os.open(settings.home / LOCK_NAME, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class _Ready:
    """Says once that this controller has decided for the first time."""

    def __init__(self, settings: Settings) -> None:
        self._path = settings.home / READY_NAME
        self._said = False

    def __call__(self) -> None:
        if not self._said:
            write_durably(self._path, json.dumps({"process": Process.current(), "ready_time_seconds": time.time()}))
            self._said = True


if __name__ == "__main__":
    sys.exit(main())
