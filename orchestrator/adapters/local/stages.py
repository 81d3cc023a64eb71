"""Stages as folders on this machine: what is true of them is what is on disk, whoever looks.

Nothing here knows Ray. A stage is `<stages>/<namespace>/<name>/`:

    stage.json        what to run and on which GPU class; the folder appears together with it
    launch.json       how: command, log, GPU slot, grace; written by `launch`, read by the shim
    process.json      the shim and the trainer; its presence is the claim that makes every start the only one
    progress.json     the last progress report, written by the agent; for people
    stop.json         the request to stop: when, with what grace, why
    termination.json  the trainer's result
    exit.json         exit code and time; written by the shim, or here for a stage stopped before it started

    no process.json, no exit.json        PENDING
    exit.json                            EXITED
    process.json, shim or trainer alive  RUNNING, unless it was to be killed so long ago that it is given up: EXITED
    process.json, neither alive          EXITED without an exit code: lost

A stage's log is `<logs>/stages/<namespace>/<name>.log` and outlives the folder.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

from pydantic import BaseModel

from orchestrator.adapters.local.processes import Process, sync_folder, write_durably
from orchestrator.adapters.local.shim import EXIT_NAME, LAUNCH_NAME, PROCESS_NAME, STOP_NAME, TERMINATION_NAME
from orchestrator.adapters.local.slots import Slot
from orchestrator.api.reasons import ExitCode, Reason
from orchestrator.api.results import ProgressReport, StageResult
from orchestrator.api.task import (
    AGENT_SOCKET_VARIABLE,
    TERMINATION_LOG_VARIABLE,
    TRACKING_URI_VARIABLE,
    StageTask,
    task_variables,
)
from orchestrator.core.snapshot import StageFact, StagePhase
from orchestrator.errors import TransientError
from orchestrator.settings import Settings

log = logging.getLogger(__name__)

STAGE_NAME, PROGRESS_NAME = "stage.json", "progress.json"
SLOT_LOCK_NAME = ".slots.lock"
NEW_PREFIX, DELETED_PREFIX = ".new-", ".deleted-"
LAUNCH_TIMEOUT_SECONDS = 30.0
UNANSWERED_SECONDS = 15.0
"""A stage that is there so long after it was to be killed has a shim that does not answer, and is killed from here."""
STRANDED_SECONDS = 60.0
"""One that is still there after so long, because a card or a disk holds it in the kernel, is given up: its job goes on,
and its slot is nobody's until it is gone."""
PRIVATE_VARIABLES = ("RAY_", "CUDA_VISIBLE_DEVICES")
"""Not handed on to trainers: they belong to the process that launches."""

Edge = TypeVar("Edge", bound=BaseModel)


class StageRecord(BaseModel, frozen=True):
    """`stage.json`."""

    task: StageTask
    gpu_class: str | None


class LaunchRecord(BaseModel, frozen=True):
    """`launch.json`."""

    command: tuple[str, ...]
    log: str
    grace_seconds: int
    slot: str | None


class ProcessRecord(BaseModel, frozen=True):
    """`process.json`."""

    shim: Process
    trainer: Process | None
    start_time: datetime

    @property
    def alive(self) -> bool:
        """Whether anything of the stage runs."""
        return self.shim.alive or (self.trainer is not None and self.trainer.alive)


class StopRecord(BaseModel, frozen=True):
    """`stop.json`."""

    time_seconds: float
    grace_seconds: int
    reason: Reason

    @property
    def remaining_seconds(self) -> float:
        """Until the stage is killed."""
        return max(0.0, -self.overdue_seconds)

    @property
    def overdue_seconds(self) -> float:
        """Since the stage was to be killed; below zero until then."""
        return time.time() - self.time_seconds - self.grace_seconds


class ExitRecord(BaseModel, frozen=True):
    """`exit.json`."""

    exit_code: int
    disrupted: bool
    """Whether the machine, not the service, asked the stage to stop."""
    finish_time: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage's folder."""

    folder: Path

    @property
    def namespace(self) -> str:
        """The job's namespace."""
        return self.folder.parent.name

    @property
    def name(self) -> str:
        """`<job>-<stage>-<attempt>`."""
        return self.folder.name

    @property
    def key(self) -> str:
        """`namespace/name`."""
        return f"{self.namespace}/{self.name}"

    @property
    def record(self) -> StageRecord | None:
        """What it was made to run; None when it is gone."""
        return _read(self.folder / STAGE_NAME, StageRecord)

    @property
    def stop_request(self) -> StopRecord | None:
        """The request to stop, if there is one."""
        return _read(self.folder / STOP_NAME, StopRecord)

    @property
    def phase(self) -> StagePhase:
        """Where it is; an end is final."""
        if (self.folder / EXIT_NAME).exists():
            return StagePhase.EXITED
        process = _read(self.folder / PROCESS_NAME, ProcessRecord)
        if process is None:
            return StagePhase.PENDING
        return StagePhase.RUNNING if process.alive and not self._is_stranded else StagePhase.EXITED

    @property
    def holds_slot(self) -> bool:
        """Whether something of it may use a GPU, given up or not."""
        process = _read(self.folder / PROCESS_NAME, ProcessRecord)
        return process is not None and not (self.folder / EXIT_NAME).exists() and process.alive

    @property
    def _is_stranded(self) -> bool:
        stop = self.stop_request
        return stop is not None and stop.overdue_seconds > STRANDED_SECONDS

    def fact(self) -> StageFact | None:
        """What is known of it; None when it is gone."""
        record = self.record
        if record is None:
            return None
        phase = self.phase  # before everything else: what an ended stage left behind does not change any more
        process = _read(self.folder / PROCESS_NAME, ProcessRecord)
        end = _read(self.folder / EXIT_NAME, ExitRecord) if phase is StagePhase.EXITED else None
        return StageFact(
            namespace=self.namespace,
            name=self.name,
            uid=record.task.uid,
            phase=phase,
            start_time=process.start_time if process else None,
            finish_time=self._finish_time(end) if phase is StagePhase.EXITED else None,
            exit_code=end.exit_code if end else None,
            result=_result(self.folder / TERMINATION_NAME) if phase is StagePhase.EXITED else None,
            disruption=self._disruption(process, end) if phase is StagePhase.EXITED else None,
            progress=_read(self.folder / PROGRESS_NAME, ProgressReport),
        )

    def _finish_time(self, end: ExitRecord | None) -> datetime:
        if end is not None:
            return end.finish_time
        # Lost: the last sign of life.
        signs = [path for name in (PROCESS_NAME, PROGRESS_NAME) if (path := self.folder / name).exists()]
        return datetime.fromtimestamp(max(path.stat().st_mtime for path in signs or [self.folder]), tz=UTC)

    def _disruption(self, process: ProcessRecord | None, end: ExitRecord | None) -> Reason | None:
        stop = self.stop_request
        by_service = stop is not None and stop.reason is Reason.DISRUPTED
        by_machine = end.disrupted if end else process is not None and not process.shim.of_this_boot
        return Reason.DISRUPTED if by_service or by_machine else None


class LocalStages:
    """The stages of one home folder. Any number of processes may use it at one time."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._folder = settings.stages_folder
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def get(self, namespace: str, name: str) -> Stage:
        """The folder of this name, whether there or not."""
        return Stage(folder=self._folder / namespace / name)

    def all(self) -> Iterator[Stage]:
        """Every stage that exists, by name."""
        for folder in sorted(self._folder.glob("*/*")):
            if not folder.name.startswith("."):
                yield Stage(folder=folder)

    def observe(self) -> Mapping[str, StageFact]:
        """What is known of every stage, by `namespace/name`."""
        facts = (stage.fact() for stage in self.all())
        return {fact.key: fact for fact in facts if fact is not None}

    def ensure(self, task: StageTask, gpu_class: str | None) -> None:
        """Make the stage's folder unless there is one; it starts nothing."""
        stage = self.get(task.namespace, task.stage_name)
        existing = stage.record
        if existing is not None and existing.task.uid != task.uid:
            self._make_way(stage)
        elif existing is not None:
            return
        new = stage.folder.with_name(f"{NEW_PREFIX}{stage.name}-{uuid4().hex}")
        new.mkdir(parents=True, mode=0o700)
        write_durably(new / STAGE_NAME, StageRecord(task=task, gpu_class=gpu_class).model_dump_json())
        try:
            new.rename(stage.folder)
        except OSError:
            shutil.rmtree(new)
            if stage.record is None:
                raise
        sync_folder(stage.folder.parent)
        sync_folder(self._folder)

    def _make_way(self, stage: Stage) -> None:
        """An earlier job of the same name left a stage of this name."""
        if stage.phase is not StagePhase.EXITED:
            self.stop(stage, self._settings.grace_seconds, Reason.CANCELLED)
            raise TransientError(f"stage {stage.key} of an earlier job of this name is still ending; it is waited for")
        self.delete(stage)

    def launch(self, stage: Stage, slots: Sequence[Slot] | None, environment: Mapping[str, str]) -> bool:
        """Start the stage's shim if it is pending; False while no slot of its class is free.

        `slots` are those of its class, None for a stage that needs no GPU. One launch at a time, in all processes.
        """
        with self._slot_lock() as lock:
            record = stage.record
            if record is None or stage.phase is not StagePhase.PENDING:
                return True
            if stage.stop_request is not None:
                _record_unstarted(stage)
                return True
            slot = self._free_slot(slots) if slots is not None else None
            if slots is not None and slot is None:
                return False
            launch = self._launch_record(stage, record, slot)
            write_durably(stage.folder / LAUNCH_NAME, launch.model_dump_json())
            _start_shim(stage, lock, {**environment, **self._trainer_environment(stage, record.task, slot)})
        return stage.phase is not StagePhase.PENDING

    def _free_slot(self, slots: Sequence[Slot]) -> Slot | None:
        launches = [_read(s.folder / LAUNCH_NAME, LaunchRecord) for s in self.all() if s.holds_slot]
        taken = {launch.slot for launch in launches if launch is not None}
        return next((slot for slot in slots if slot.name not in taken), None)

    def _launch_record(self, stage: Stage, record: StageRecord, slot: Slot | None) -> LaunchRecord:
        return LaunchRecord(
            command=(*shlex.split(self._settings.trainer_command), record.task.stage),
            log=str(stage_log(self._settings, stage.namespace, stage.name)),
            grace_seconds=record.task.grace_seconds,
            slot=slot.name if slot else None,
        )

    def _trainer_environment(self, stage: Stage, task: StageTask, slot: Slot | None) -> dict[str, str]:
        return {
            **task_variables(task.model_dump_json(by_alias=True)),
            TERMINATION_LOG_VARIABLE: str(stage.folder / TERMINATION_NAME),
            AGENT_SOCKET_VARIABLE: str(self.socket_path(stage)),
            TRACKING_URI_VARIABLE: self._settings.tracking_uri,
            "CUDA_VISIBLE_DEVICES": slot.device or "" if slot else "",
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            "OMP_NUM_THREADS": str(task.threads),
            "PYTHONUNBUFFERED": "1",
        }

    def socket_path(self, stage: Stage) -> Path:
        """Where the agent of this stage listens."""
        record = stage.record
        return self._settings.sockets_folder / f"{record.task.uid[:13] if record else ''}-{_stage_number(stage)}.sock"

    def stop(self, stage: Stage, grace_seconds: int, reason: Reason) -> None:
        """Ask for a checkpoint and an end; the shim kills at the deadline. The first request stands."""
        if stage.record is None or stage.phase is StagePhase.EXITED:
            return
        request = stage.stop_request
        if request is None:
            request = StopRecord(time_seconds=time.time(), grace_seconds=grace_seconds, reason=reason)
            write_durably(stage.folder / STOP_NAME, request.model_dump_json())
        process = _read(stage.folder / PROCESS_NAME, ProcessRecord)
        if process is None:
            with self._slot_lock():  # nobody is launching it now
                if stage.phase is StagePhase.PENDING:
                    _record_unstarted(stage)
        elif request.overdue_seconds > UNANSWERED_SECONDS:
            log.warning("stage %s was to end %.0f s ago; it is killed", stage.key, request.overdue_seconds)
            for each in (process.shim, process.trainer):
                if each is not None:
                    each.send(signal.SIGKILL)
        else:
            process.shim.send(signal.SIGTERM)

    def delete(self, stage: Stage) -> None:
        """Forget an ended stage; its log stays until newer ones crowd it out."""
        if stage.record is None:
            return
        if stage.phase is not StagePhase.EXITED:
            log.warning("stage %s has not ended and is not deleted", stage.key)
            return
        if stage.holds_slot:
            return  # given up; its folder says who has the slot
        self.socket_path(stage).unlink(missing_ok=True)
        gone = stage.folder.with_name(f"{DELETED_PREFIX}{stage.name}-{uuid4().hex}")
        try:
            stage.folder.rename(gone)
        except FileNotFoundError:
            return
        shutil.rmtree(gone, ignore_errors=True)
        self._prune_logs()

    def stranded(self) -> Counter[str]:
        """GPUs that stages hold which were given up, by class."""
        given_up = (stage for stage in self.all() if stage.phase is StagePhase.EXITED and stage.holds_slot)
        records = (stage.record for stage in given_up)
        return Counter(record.gpu_class for record in records if record is not None and record.gpu_class is not None)

    def sweep(self) -> None:
        """Take away what interrupted calls left. Only while no other controller is at work."""
        for prefix in (NEW_PREFIX, DELETED_PREFIX):
            for folder in self._folder.glob(f"*/{prefix}*"):
                shutil.rmtree(folder, ignore_errors=True)

    def _prune_logs(self) -> None:
        logs = sorted((self._settings.logs_folder / "stages").glob("*/*.log"), key=lambda path: path.stat().st_mtime)
        kept = {stage_log(self._settings, stage.namespace, stage.name) for stage in self.all()}
        ended = [path for path in logs if path not in kept]
        for path in ended[: max(0, len(ended) - self._settings.stage_logs_limit)]:
            path.unlink(missing_ok=True)

    @contextmanager
    def _slot_lock(self) -> Generator[int]:
        """Held by one launcher at a time, and by its shim until that has claimed its stage."""
        handle = os.open(self._folder / SLOT_LOCK_NAME, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield handle
        finally:
            os.close(handle)  # not LOCK_UN, which would take it from a shim that inherited it, too


def stage_log(settings: Settings, namespace: str, name: str) -> Path:
    """Where a stage's log is, while it runs and after."""
    return settings.logs_folder / "stages" / namespace / f"{name}.log"


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """A controller's environment without what is its own."""
    return {name: value for name, value in environment.items() if not name.startswith(PRIVATE_VARIABLES)}


def _start_shim(stage: Stage, lock: int, environment: Mapping[str, str]) -> None:
    command = [sys.executable, "-m", "orchestrator.adapters.local.shim", str(stage.folder), str(lock)]
    try:
        subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=dict(environment),
            pass_fds=(lock,),
            timeout=LAUNCH_TIMEOUT_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        log.error("the shim of stage %s did not start: %s; it is tried again", stage.key, error)


def _record_unstarted(stage: Stage) -> None:
    """The end of a stage that was stopped before it started: nothing was lost."""
    end = ExitRecord(exit_code=ExitCode.PREEMPTED, disrupted=False, finish_time=datetime.now(UTC))
    write_durably(stage.folder / EXIT_NAME, end.model_dump_json())


def _stage_number(stage: Stage) -> str:
    return stage.name.rpartition("-")[2]


def _read(path: Path, kind: type[Edge]) -> Edge | None:
    """A file of a stage's folder; None if it is absent, or does not parse, which the log tells."""
    return _parsed(path, kind.model_validate_json)


def _result(path: Path) -> StageResult | None:
    """A stage's termination message; None as of other files."""
    return _parsed(path, lambda data: StageResult.from_termination_message(data.decode()))


def _parsed(path: Path, parse: Callable[[bytes], Edge]) -> Edge | None:
    try:
        return parse(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        log.warning("%s does not parse and is not used: %s", path, error)
        return None
