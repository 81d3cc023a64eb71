"""The StageRuntime of one machine, on a local Ray; the only file that imports ray.

Ray places: every stage that has not ended is held by one named task, the holder, with a resource such as
`{"vram_24": 1}`. It starts the stage's shim, or adopts one that runs, and is the trainer's agent until the stage ends.
(A task and not an actor, because tasks share warm worker processes: a stage starts 1.5 s sooner.) What is true of a
stage is on disk (`stages`), so `observe` needs no answer from Ray, and the stages outlive it:

- A holder that died is made again by the next `observe`; it adopts what runs.
- When Ray itself is gone, calls raise RuntimeLost; the controller ends, its supervisor starts it again with a new Ray.
- GPU slots are chosen under a lock on disk, not by Ray, which forgets who has what when it dies.
"""

from __future__ import annotations

import importlib
import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from orchestrator.adapters.local.listening import listening_elsewhere
from orchestrator.adapters.local.processes import Process, child_processes
from orchestrator.adapters.local.slots import Slot, find_slots
from orchestrator.adapters.local.stages import PROGRESS_NAME, LocalStages, Stage, clean_environment
from orchestrator.api.reasons import Reason
from orchestrator.api.results import ProgressReport
from orchestrator.api.task import StageTask
from orchestrator.core.scheduling.cpu_slots import GUARANTEED_SLOTS
from orchestrator.core.snapshot import StageFact, StagePhase
from orchestrator.errors import PermanentError, RuntimeLost
from orchestrator.settings import Settings
from orchestrator.sizing.gpu_table import gpu_table
from orchestrator.sizing.hardware import GpuClass
from orchestrator.stage_agent import StageAgent

log = logging.getLogger(__name__)

RAY_NAMESPACE = "qlora"
CPU_STAGE_RESOURCE = "cpu_stage"
RAY_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # its name for: all of this Ray listens on loopback alone
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # nothing is packaged and sent: it is this machine
    "RAY_worker_niceness": "0",  # by default 15, which trainers would inherit
    "RAY_memory_monitor_refresh_ms": "0",  # memory is what the controller plans
    "RAY_kill_child_processes_on_worker_exit_with_raylet_subreaper": "false",  # shims outlive Ray
}
RAY_PROCESSES = ("gcs_server", "raylet")
HOLD_POLL_SECONDS = 0.2
SLOT_POLL_SECONDS = 0.5
LOST_EXIT_CODE = 70


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """What a holder is told."""

    settings: Settings
    namespace: str
    name: str
    slots: tuple[Slot, ...] | None
    """Slots of the stage's GPU class; None for a stage that needs no GPU."""
    environment: Mapping[str, str]


def hold(holding: Holding) -> None:
    """The task: hold one stage from its start, or from where it is found, to its end."""
    stages = LocalStages(holding.settings)
    stage = stages.get(holding.namespace, holding.name)
    with StageAgent(stages.socket_path(stage)) as agent:
        while not stages.launch(stage, holding.slots, holding.environment):
            time.sleep(SLOT_POLL_SECONDS)
        _attend(stage, agent)


def _attend(stage: Stage, agent: StageAgent) -> None:
    """Pass progress to disk and the request to stop to the trainer."""
    written: ProgressReport | None = None
    asked = False
    ended = False
    while not ended:
        time.sleep(HOLD_POLL_SECONDS)
        # Looked at first, so that the last words are written, too.
        ended = stage.phase is StagePhase.EXITED or stage.record is None
        stop = stage.stop_request
        if stop is not None and not asked:
            agent.preempt(stop.remaining_seconds)
            asked = True
        if agent.progress is not None and agent.progress is not written:
            written = agent.progress
            _write_progress(stage, written)


def _write_progress(stage: Stage, report: ProgressReport) -> None:
    temporary = stage.folder / f".{PROGRESS_NAME}.{os.getpid()}"
    try:
        temporary.write_text(report.model_dump_json(by_alias=True))
        temporary.replace(stage.folder / PROGRESS_NAME)
    except OSError as error:  # the stage was deleted, or the disk is full: progress may be lost
        log.info("progress of %s is not written: %s", stage.key, error)


class RayStages:
    """`ports.StageRuntime` on a Ray of its own. One process at a time has one: the leading controller."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._slots = find_slots(settings.gpu_classes, gpu_table(settings.gpu_class_definitions))
        self._stages = LocalStages(settings)
        self._stages.sweep()
        self._holders: dict[str, Any] = {}  # Any: Ray's references are untyped
        self._environment = clean_environment(os.environ)
        self._folder = _prepare_folders(settings)
        self._ray = _start_ray(settings, self._folder, self._resources())
        self._processes = _ray_processes()
        self._hold: Any = self._ray.remote(num_cpus=0, max_retries=0)(hold)

    def ensure(self, task: StageTask, gpu_class: str | None) -> None:
        """Make the stage's folder; its holder follows with the next `observe`."""
        self._stages.ensure(task, gpu_class)

    def observe(self) -> Mapping[str, StageFact]:
        """All stages, read from disk; makes the holders that are missing. Raises RuntimeLost."""
        facts = self._stages.observe()
        self._require_ray()
        unfinished = {key for key, fact in facts.items() if fact.phase is not StagePhase.EXITED}
        self._answered(lambda: self._hold_all(unfinished))
        return facts

    def taken_names(self) -> frozenset[str]:
        """None: nobody else makes stages in this home."""
        return frozenset()

    def stop(self, namespace: str, name: str, grace_seconds: int, reason: Reason) -> None:
        """Ask the stage to end, by a file and a signal; its holder passes the request on over the socket, too."""
        self._stages.stop(self._stages.get(namespace, name), grace_seconds, reason)

    def delete(self, namespace: str, name: str, *, recorded: bool = False) -> None:  # noqa: ARG002 - one view
        """Forget an ended stage."""
        self._stages.delete(self._stages.get(namespace, name))

    def gpu_classes(self) -> Sequence[GpuClass]:
        """The GPU classes of this machine, without cards that a stage holds which does not end."""
        held = self._stages.stranded()
        return tuple(replace(known, capacity=known.capacity - held[known.name]) for known in self._slots.classes)

    def close(self) -> None:
        """End Ray; the stages go on."""
        self._ray.shutdown()

    def _resources(self) -> dict[str, float]:
        by_class = {_resource(known.name): float(known.capacity) for known in self._slots.classes}
        return {**by_class, CPU_STAGE_RESOURCE: float(self._settings.cpu_stages_limit + GUARANTEED_SLOTS)}

    def _hold_all(self, unfinished: set[str]) -> None:
        """One live holder for each unfinished stage. Those of ended stages end by themselves."""
        references = list(self._holders.values())
        ended: list[Any] = self._ray.wait(references, num_returns=len(references), timeout=0)[0] if references else []
        for key, reference in list(self._holders.items()):
            if reference in ended:
                del self._holders[key]
                self._report_failure(key, reference)
        for key in sorted(unfinished - self._holders.keys()):
            namespace, _, name = key.partition("/")
            self._start_holder(self._stages.get(namespace, name))

    def _report_failure(self, key: str, reference: Any) -> None:
        try:
            self._ray.get(reference, timeout=0)
        except Exception as error:  # noqa: BLE001 - whatever it is, a new holder takes over
            log.warning("the holder of stage %s ended early: %s", key, str(error).strip().splitlines()[-1])

    def _start_holder(self, stage: Stage) -> None:
        record = stage.record
        if record is None:
            return
        resource = _resource(record.gpu_class) if record.gpu_class else CPU_STAGE_RESOURCE
        holding = Holding(
            settings=self._settings,
            namespace=stage.namespace,
            name=stage.name,
            slots=self._slots.by_class.get(record.gpu_class, ()) if record.gpu_class else None,
            environment=self._environment,
        )
        self._holders[stage.key] = self._hold.options(name=f"hold {stage.key}", resources={resource: 1}).remote(holding)

    def _require_ray(self) -> None:
        gone = [name for name, process in self._processes.items() if not process.alive]
        if gone:
            raise RuntimeLost(f"Ray's {', '.join(gone)} ended; the controller starts over, running stages go on")
        lost = [path for path in (self._folder, self._settings.sockets_folder) if not path.is_dir()]
        if lost:
            raise RuntimeLost(f"{lost[0]} is gone, swept away by somebody; the controller starts over with a new one")

    def _answered(self, call: Callable[[], None]) -> None:
        """Carry out a call to Ray, which may never return when Ray is ill, within its time."""
        answer: Future[None] = Future()

        def carry_out() -> None:
            try:
                answer.set_result(call())
            except Exception as error:  # noqa: BLE001 - whatever it is, it is raised where it can be handled
                answer.set_exception(error)

        threading.Thread(target=carry_out, name="ray call", daemon=True).start()
        try:
            answer.result(self._settings.ray_answer_seconds)
        except Exception as error:
            detail = str(error) or "no answer in time"
            raise RuntimeLost(f"Ray failed ({detail}); the controller starts over, running stages go on") from error


def _resource(gpu_class: str) -> str:
    """`vram_24` for class `24Gi`, `vram_cpu` for `cpu`."""
    return f"vram_{gpu_class.removesuffix('Gi')}"


def _start_ray(settings: Settings, folder: Path, resources: dict[str, float]) -> Any:
    """A Ray of this process's own, which ends with it. Returns the module."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        del os.environ[name]  # a shell's wishes, such as RAY_AUTH_MODE=disabled, are for other Rays
    os.environ.update(RAY_ENVIRONMENT)
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # nobody else on this machine may use it
    too_late = threading.Timer(settings.ray_start_seconds, _give_up_starting, args=(settings.ray_start_seconds,))
    too_late.daemon = True
    too_late.start()
    ray: Any = importlib.import_module("ray")  # Any: half of Ray's own types are unknown
    ray.init(
        address="local",
        num_cpus=1,
        num_gpus=0,
        resources=resources,
        object_store_memory=settings.ray_object_store_bytes,
        namespace=RAY_NAMESPACE,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        _temp_dir=str(folder),
    )
    too_late.cancel()
    _refuse_open_ports()
    return ray


def _refuse_open_ports() -> None:
    """Whoever reaches Ray can ask it for more than it should give; what it was told is checked against the kernel."""
    found = listening_elsewhere(os.getpid())
    if found:
        raise PermanentError(
            f"the service must be reached from this machine alone, but {', '.join(found)} can be reached from others: "
            f"ray {version('ray')} does not do as it is told; install another version"
        )


def _give_up_starting(seconds: float) -> None:
    log.error("Ray did not start within %.0f s; the controller starts over", seconds)
    os._exit(LOST_EXIT_CODE)


def _prepare_folders(settings: Settings) -> Path:
    """Ray's folder: short because of its sockets, private, linked from the home folder, bounded in number."""
    runtime = settings.runtime_folder
    runtime.mkdir(mode=0o700, exist_ok=True)
    found = runtime.lstat()
    if runtime.is_symlink() or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise RuntimeLost(f"{runtime} is not a folder that belongs to this user alone; remove it")
    settings.sockets_folder.mkdir(mode=0o700, exist_ok=True)
    folder = runtime / "ray"
    folder.mkdir(mode=0o700, exist_ok=True)
    link = settings.home / "ray"
    if not link.is_symlink() or link.readlink() != folder:
        link.unlink(missing_ok=True)
        link.symlink_to(folder)
    sessions = sorted(path for path in folder.glob("session_*") if not path.is_symlink())
    for session in sessions[: -settings.ray_sessions_limit]:
        shutil.rmtree(session, ignore_errors=True)
    return folder


def _ray_processes() -> dict[str, Process]:
    """The processes that this Ray stands and falls with, by program; they are children of this one."""
    found = {name: process for name, process in child_processes() if name in RAY_PROCESSES}
    assert set(found) == set(RAY_PROCESSES), f"Ray started {sorted(found)}"
    return found
