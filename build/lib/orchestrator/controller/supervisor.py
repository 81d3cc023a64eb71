"""Keeps the embedded service up: a daemon that starts the controller again whenever it ends.

`start`, `stop` and `status` are for clients; the daemon is this module run as a program. It waits
longer while the controller keeps ending early, up to a bound, and gives up only where trying again gives the same
answer. It imports neither ray nor mlflow, holds no state, and ends nothing but the controller.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from pathlib import Path

from pydantic import BaseModel, ValidationError

from orchestrator.adapters.local.home import make_private, private_files
from orchestrator.adapters.local.processes import Process, write_durably
from orchestrator.adapters.local.stages import LocalStages
from orchestrator.api.reasons import Reason
from orchestrator.api.words import on_one_line
from orchestrator.controller.logs import log_to_file
from orchestrator.core.snapshot import StagePhase
from orchestrator.errors import ServiceNotRunning
from orchestrator.settings import Settings

log = logging.getLogger(__name__)

LOCK_NAME, RECORD_NAME = "supervisor.lock", "supervisor.json"
CONTROLLER_RECORD_NAME = "controller.json"
SETTINGS_EXIT_CODE = 78  # the controller's word for: trying again gives the same answer
OUTPUT_NAME = "service.out"
OUTPUT_TAIL_BYTES = 4096
START_ATTEMPTS = 5
"""Controllers that may end in a row, without one that has ever decided anything, before the service gives up."""
CLOCK_SECONDS = 1.0
"""Logs keep milliseconds, and clocks are set now and then."""
POLL_SECONDS = 0.1
SETTLE_SECONDS = 0.5
KILL_SECONDS = 5.0
PR_SET_PDEATHSIG = 1
WATCHED = frozenset({signal.SIGCHLD, signal.SIGTERM, signal.SIGINT})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceStatus:
    """The embedded service of one home folder."""

    running: bool
    """Whether the supervisor is up."""
    ready: bool
    """Whether the present controller has made its first decision."""
    home: Path
    tracking_uri: str
    supervisor_pid: int | None = None
    controller_pid: int | None = None


class ProcessRecord(BaseModel, frozen=True):
    """`supervisor.json` and `controller.json`."""

    process: Process


def start(settings: Settings) -> ServiceStatus:
    """Bring the service up, unless it is, and wait for its first decision; raises ServiceNotRunning."""
    began = time.time()
    if not status(settings).running:
        _start_supervisor(settings, began)
    _wait(lambda: status(settings).ready or not status(settings).running, settings.start_timeout_seconds)
    found = status(settings)
    if not found.ready:
        raise ServiceNotRunning(
            f"the service of {settings.home} did not start: {_last_error(settings, began)}; see {settings.logs_folder}"
        )
    return found


def _start_supervisor(settings: Settings, began: float) -> None:
    make_private(settings.home)
    settings.logs_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (settings.logs_folder / OUTPUT_NAME).open("ab") as output:
        started = subprocess.run(
            [sys.executable, "-m", "orchestrator.controller.supervisor"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **settings.environment()},
            timeout=settings.start_timeout_seconds,
            check=False,
        )
    if started.returncode != 0:
        raise ServiceNotRunning(
            f"the service of {settings.home} could not be started: {_last_output(settings, began)}; see {output.name}"
        )


def stop(settings: Settings, *, keep_stages: bool = False) -> None:
    """Take the service down; running stages checkpoint and end, and go on from there with the next `start`.

    With `keep_stages` they run on by themselves. Does nothing if nothing runs.
    """
    patience_seconds = settings.stop_timeout_seconds
    for name, seconds in ((RECORD_NAME, patience_seconds + KILL_SECONDS), (CONTROLLER_RECORD_NAME, KILL_SECONDS)):
        process = _recorded(settings, name)
        if process is None:
            continue
        process.send(signal.SIGTERM)
        if not _wait(lambda process=process: not process.alive, seconds):
            process.send(signal.SIGKILL)
            _wait(lambda process=process: not process.alive, KILL_SECONDS)
    if not keep_stages:
        _stop_stages(settings)


def status(settings: Settings) -> ServiceStatus:
    """Whether the service is up."""
    supervisor, controller = _recorded(settings, RECORD_NAME), _recorded(settings, CONTROLLER_RECORD_NAME)
    return ServiceStatus(
        running=supervisor is not None,
        ready=supervisor is not None and controller is not None,
        home=settings.home,
        tracking_uri=settings.tracking_uri,
        supervisor_pid=supervisor.pid if supervisor else None,
        controller_pid=controller.pid if controller else None,
    )


def _stop_stages(settings: Settings) -> None:
    stages = LocalStages(settings)

    def all_stopped() -> bool:
        running = [stage for stage in stages.all() if stage.phase is StagePhase.RUNNING]
        for stage in running:
            stages.stop(stage, settings.grace_seconds, Reason.DISRUPTED)
        return not running

    # Asked twice: a holder that outlived its controller for a moment may have started one in between.
    for _ in range(2):
        _wait(all_stopped, settings.grace_seconds + KILL_SECONDS)
        time.sleep(SETTLE_SECONDS)


def _recorded(settings: Settings, name: str) -> Process | None:
    """The process that a record names, if it runs."""
    try:
        process = ProcessRecord.model_validate_json((settings.home / name).read_bytes()).process
    except (FileNotFoundError, ValidationError):
        return None
    return process if process.alive else None


def _wait(condition: Callable[[], bool], timeout_seconds: float) -> bool:
    deadline = time.monotonic() + timeout_seconds
    while not (answer := condition()) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return answer


def _last_error(settings: Settings, since_seconds: float) -> str:
    """The last error that a process of the service logged since then, or the last that it wrote."""
    messages: list[str] = []
    for line in _log_lines(settings.logs_folder / "controller.jsonl"):
        if line.get("level") == "ERROR" and _time_seconds(line) >= since_seconds - CLOCK_SECONDS:
            messages.append(str(line.get("traceback") or line.get("message")).strip().splitlines()[-1])
    return messages[-1] if messages else _last_output(settings, since_seconds)


def _time_seconds(line: dict[str, object]) -> float:
    try:
        return datetime.fromisoformat(str(line.get("time"))).timestamp()
    except ValueError:
        return 0.0


def _last_output(settings: Settings, since_seconds: float) -> str:
    """What a process of the service wrote last since then, before it ended, having logged nothing."""
    path = settings.logs_folder / OUTPUT_NAME
    try:
        if path.stat().st_mtime < since_seconds - CLOCK_SECONDS:
            return "no error was logged"
        with path.open("rb") as output:
            output.seek(max(0, output.seek(0, os.SEEK_END) - OUTPUT_TAIL_BYTES))
            lines = output.read().decode(errors="replace").strip().splitlines()
    except FileNotFoundError:
        lines = []
    return on_one_line(lines[-1]) if lines else "no error was logged"


def _log_lines(path: Path) -> Iterator[dict[str, object]]:
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            try:
                yield json.loads(line)
            except ValueError:  # cut off by a kill
                continue


# the daemon


def main() -> None:
    """Detach, and keep the controller running until SIGTERM."""
    settings = Settings()
    private_files()
    make_private(settings.home)
    unsettled = _detach(settings)
    log_to_file(settings, "supervisor")
    lock = os.open(settings.home / LOCK_NAME, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return  # somebody else was faster
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    (settings.home / CONTROLLER_RECORD_NAME).unlink(missing_ok=True)
    write_durably(settings.home / RECORD_NAME, {"process": Process.current()})
    os.close(unsettled)
    _keep_running(settings)
    log.info("the service of %s is down", settings.home)


def _detach(settings: Settings) -> int:
    """Become a daemon; the first process stays until the returned handle, or this process, is closed."""
    settled, unsettled = os.pipe()
    if os.fork():
        os.close(unsettled)
        os.read(settled, 1)
        os._exit(0)
    os.close(settled)
    os.setsid()
    if os.fork():
        os._exit(0)
    os.chdir(settings.home)
    return unsettled


def _keep_running(settings: Settings) -> None:
    failures, was_ready = 0, False
    for number in count(1):
        began = time.monotonic()
        exit_code = _run_controller(settings)
        if exit_code is None:
            return
        if exit_code == SETTINGS_EXIT_CODE:
            log.error("controller %d ended with %d: trying again would not help", number, exit_code)
            return
        was_ready = was_ready or _has_been_ready(settings)
        if not was_ready and number >= START_ATTEMPTS:
            log.error(
                "controller %d ended with %d, as all before it: none of them came to a decision", number, exit_code
            )
            return
        failures = 0 if time.monotonic() - began > settings.restart_backoff_max_seconds else failures + 1
        pause_seconds = _pause_seconds(settings, failures)
        log.warning("controller %d ended with %d; the next starts in %.1f s", number, exit_code, pause_seconds)
        if _asked_to_stop(pause_seconds):
            return


def _has_been_ready(settings: Settings) -> bool:
    """Whether the last controller came to a decision: its record is taken away when the next one starts."""
    return (settings.home / CONTROLLER_RECORD_NAME).exists()


def _pause_seconds(settings: Settings, failures: int) -> float:
    return min(settings.restart_backoff_base_seconds * 2.0 ** min(failures, 30), settings.restart_backoff_max_seconds)


def _run_controller(settings: Settings) -> int | None:
    """Run it to its end; its exit code, or None when the supervisor was asked to stop and stopped it."""
    libc = ctypes.CDLL(None)

    def become_controller() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # none runs without a supervisor
        signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)

    controller = subprocess.Popen([sys.executable, "-m", "orchestrator.controller"], preexec_fn=become_controller)
    log.info("started controller %d", controller.pid)
    while controller.poll() is None:
        if _asked_to_stop(1.0):
            controller.terminate()
            try:
                controller.wait(settings.stop_timeout_seconds)
            except subprocess.TimeoutExpired:
                controller.kill()
                controller.wait()
            return None
    return controller.returncode


def _asked_to_stop(timeout_seconds: float) -> bool:
    """Whether SIGTERM or SIGINT came within the time; ends early, too, when a child ended."""
    signaled = signal.sigtimedwait(WATCHED, timeout_seconds)
    return signaled is not None and signaled.si_signo != signal.SIGCHLD


if __name__ == "__main__":
    main()
