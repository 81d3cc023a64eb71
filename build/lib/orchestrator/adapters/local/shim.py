"""The shim: one small process that sees one stage through, whatever becomes of the service.

    python -m orchestrator.adapters.local.shim <stage folder> <slot lock>

`stages.launch` starts it. It leaves its parents behind (two forks, its own session), claims the folder, starts
the trainer as its child, passes stop requests on, kills at the deadline, and records the exit code durably. Rules:

- A folder is claimed once, by writing `process.json` under the folder's lock: no stage is ever started twice.
- The slot lock, a file handle that it inherits, guards the choice of a GPU slot, until the claim is on disk.
- The trainer dies with the shim (PR_SET_PDEATHSIG), so a stage without a shim has no trainer either.
- Requests are files, signals only hasten their reading: nothing is lost if either side dies in between.
- Standard library only: it starts in a fraction of 100 ms and stays small.

It reads `launch.json` and `stop.json`, and writes `process.json` and `exit.json` (`stages` says what is in them).
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from orchestrator.adapters.local.processes import Process, write_durably

LAUNCH_NAME, PROCESS_NAME, STOP_NAME, EXIT_NAME = "launch.json", "process.json", "stop.json", "exit.json"
TERMINATION_NAME = "termination.json"
LOCK_NAME, SHIM_LOG_NAME = "shim.lock", "shim.log"

POLL_SECONDS = 0.5
RECORD_RETRY_SECONDS = 1.0
RECORD_RETRIES = 3600
CANNOT_START = 127  # as a shell says it
PR_SET_PDEATHSIG = 1
WATCHED = frozenset({signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP})

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Detach, claim, run, record."""
    folder, slot_lock = Path(sys.argv[1]), int(sys.argv[2])
    unsettled = _detach(folder)
    start_time = datetime.now(UTC).isoformat()
    if not _claim(folder, start_time):
        return
    os.close(slot_lock)
    os.close(unsettled)
    exit_code, disrupted = _run(folder, start_time)
    _record(folder, exit_code, disrupted)


def _detach(folder: Path) -> int:
    """Become a child of init in a session of its own.

    The first process stays until the returned handle is closed, by hand or by this process's end, so that whoever
    waits for it knows that the claim is settled.
    """
    settled, unsettled = os.pipe()
    if os.fork():
        os.close(unsettled)
        os.read(settled, 1)
        os._exit(0)
    os.close(settled)
    os.setsid()
    if os.fork():
        os._exit(0)
    os.chdir(folder)
    null = os.open(os.devnull, os.O_RDONLY)
    log = os.open(folder / SHIM_LOG_NAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    return unsettled


def _claim(folder: Path, start_time: str) -> bool:
    """Whether this shim may start the stage: nobody else has or does."""
    # Held, and so left open, until this process ends.
    lock = os.open(folder / LOCK_NAME, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    if (folder / PROCESS_NAME).exists() or (folder / EXIT_NAME).exists():
        return False
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    _write_process(folder, start_time, None)
    return True


def _write_process(folder: Path, start_time: str, trainer: Process | None) -> None:
    found = {"shim": Process.current(), "trainer": trainer, "start_time": start_time}
    write_durably(folder / PROCESS_NAME, found)


def _run(folder: Path, start_time: str) -> tuple[int, bool]:
    """Run the trainer to its end; its exit code, and whether the machine, not the service, asked it to stop."""
    launch = json.loads((folder / LAUNCH_NAME).read_text())
    try:
        trainer = _start(launch["command"], Path(launch["log"]))
    except OSError as error:
        message = f"the stage cannot be started: {error}; check QLORA_TRAINER_COMMAND: {launch['command']}"
        failure = {"failure": {"reason": "InternalError", "message": message[:2000]}}
        write_durably(folder / TERMINATION_NAME, json.dumps(failure))
        return CANNOT_START, False
    _write_process(folder, start_time, Process.of(trainer.pid))
    return _watch(folder, trainer, launch["grace_seconds"])


def _start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    log.parent.mkdir(parents=True, exist_ok=True)
    shim_pid = os.getpid()
    with log.open("wb") as output:
        # Safe here: this process has one thread.
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=lambda: _die_with(shim_pid),
        )


def _die_with(parent_pid: int) -> None:
    """Ties the child to its parent's life, before it becomes the trainer."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it died before it could be watched
        os._exit(CANNOT_START)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)


def _watch(folder: Path, trainer: subprocess.Popen[bytes], grace_seconds: int) -> tuple[int, bool]:
    deadline: float | None = None
    disrupted = False
    while not _ended(trainer):
        asked = signal.sigtimedwait(WATCHED, POLL_SECONDS)
        if deadline is None:
            remaining = _stop_request(folder)
            if remaining is None and asked is not None and asked.si_signo != signal.SIGCHLD:
                remaining, disrupted = float(grace_seconds), True
            if remaining is not None:
                deadline = time.monotonic() + remaining
                trainer.send_signal(signal.SIGTERM)
        elif time.monotonic() >= deadline:
            os.killpg(trainer.pid, signal.SIGKILL)
    # Not reaped yet, so the group's number is still its own: nothing that the trainer started outlives it.
    os.killpg(trainer.pid, signal.SIGKILL)
    return trainer.wait(), disrupted


def _ended(trainer: subprocess.Popen[bytes]) -> bool:
    return os.waitid(os.P_PID, trainer.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _stop_request(folder: Path) -> float | None:
    """Seconds that a requested stop has left; None when nobody asked."""
    try:
        request = json.loads((folder / STOP_NAME).read_text())
    except FileNotFoundError:
        return None
    elapsed = time.time() - request["time_seconds"]
    return min(max(0.0, request["grace_seconds"] - elapsed), request["grace_seconds"])


def _record(folder: Path, exit_code: int, disrupted: bool) -> None:
    """Record the end; on a full disk, as soon as there is room."""
    found = {"exit_code": exit_code, "disrupted": disrupted, "finish_time": datetime.now(UTC).isoformat()}
    for _ in range(RECORD_RETRIES):
        try:
            write_durably(folder / EXIT_NAME, found)
        except FileNotFoundError:  # the folder was taken away: nobody wants to know
            return
        except OSError as error:
            print(f"cannot record exit code {exit_code}: {error}", file=sys.stderr)  # noqa: T201 - the shim's log
            time.sleep(RECORD_RETRY_SECONDS)
        else:
            return


if __name__ == "__main__":
    main()
