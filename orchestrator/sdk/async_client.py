"""AsyncClient: the verbs of `Client` for asyncio.

    client = AsyncClient()
    job = await client.submit("job.yaml")
    await job.wait(timeout_seconds=3600)

Thin over the sync client: every call runs in a thread (`asyncio.to_thread`). What waits does so in steps of bounded
length, so that a cancelled task leaves no thread behind for longer than one step.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.api.formats import ShownRecords
from orchestrator.api.job import QLoRAJob, QLoRAJobStatus
from orchestrator.api.queue import QLoRAQueue
from orchestrator.api.stage_name import StageKind
from orchestrator.api.sweep import QLoRASweep
from orchestrator.core.commands import Event
from orchestrator.errors import WaitTimedOut
from orchestrator.sdk.chat import DEFAULT_ANSWER_TOKENS
from orchestrator.sdk.client import SWEEP_STEP_SECONDS, Client, JobLike, QueueLike, SweepLike
from orchestrator.sdk.connection import Connection
from orchestrator.sdk.explanation import Explanation
from orchestrator.sdk.handle import PROMOTE_SECONDS, JobHandle, JobResult
from orchestrator.sdk.logs import FOLLOW_POLL_SECONDS, LogLine, last_lines
from orchestrator.sdk.notebook import JobList
from orchestrator.sdk.planning import JobPlan
from orchestrator.sdk.progress import News
from orchestrator.sdk.records import Records
from orchestrator.sdk.simulation import WhatIf
from orchestrator.sdk.trace import TracePlayed
from orchestrator.sdk.usage import UsageBy, UsageRow
from orchestrator.settings import Settings
from orchestrator.sizing.margins import Bound

if TYPE_CHECKING:
    from pandas import DataFrame  # pyright: ignore[reportMissingTypeStubs]  it has none


class AsyncClient:
    """An asynchronous client of one service."""

    def __init__(
        self, settings: Settings | None = None, *, namespace: str | None = None, connection: Connection | None = None
    ) -> None:
        self.sync = Client(settings, namespace=namespace, connection=connection)
        """The client that does the work."""

    async def tune(
        self, model: str, data: Records, *, name: str | None = None, replace: bool = False, **spec: object
    ) -> AsyncJobHandle:
        """Fine-tune a model on a file, a list of records or a DataFrame, in one call.

        Raises InvalidObject, AlreadyExists, ServiceNotRunning.
        """
        return AsyncJobHandle(await asyncio.to_thread(self.sync.tune, model, data, name=name, replace=replace, **spec))

    async def submit(
        self, job: JobLike, *, replace: bool = False, told: Callable[[str], None] | None = None
    ) -> AsyncJobHandle:
        """Check and store a job, with `replace` in the place of a finished one of its name.

        `told` hears, in another thread, how far an upload is. Raises InvalidObject, AlreadyExists, ServiceNotRunning.
        """
        return AsyncJobHandle(await asyncio.to_thread(self.sync.submit, job, replace=replace, told=told))

    async def check(self, job: JobLike, *, replace: bool = False) -> QLoRAJob:
        """The job as `submit` would store it; changes nothing."""
        return await asyncio.to_thread(self.sync.check, job, replace=replace)

    async def plan(self, job: JobLike) -> JobPlan:
        """What the job would take and where it would run."""
        return await asyncio.to_thread(self.sync.plan, job)

    async def records(self, job: JobLike, count: int = 3) -> ShownRecords:
        """The first training records with their masks, read on this machine as prepare would."""
        return await asyncio.to_thread(self.sync.records, job, count)

    async def calibration(self) -> Sequence[Bound]:
        """What finished jobs have taught about the memory model, each namespace for itself."""
        return await asyncio.to_thread(self.sync.calibration)

    async def usage(self, month: str = "", by: UsageBy = "user") -> Sequence[UsageRow]:
        """What was had of the GPUs in a month, by user, queue or job."""
        return await asyncio.to_thread(self.sync.usage, month, by)

    async def simulate(
        self, *, gpus: Sequence[str] = (), quotas: Sequence[str] = (), jobs: Sequence[JobLike] = ()
    ) -> WhatIf:
        """When each job is expected to start and end, as things are and with other GPUs, quotas and jobs."""
        return await asyncio.to_thread(self.sync.simulate, gpus=gpus, quotas=quotas, jobs=jobs)

    async def simulate_trace(
        self, trace: str | Path, *, gpus: Sequence[str] = (), quotas: Sequence[str] = ()
    ) -> TracePlayed:
        """What would become of a file's jobs on the queues and cards that are here, and with others."""
        return await asyncio.to_thread(self.sync.simulate_trace, trace, gpus=gpus, quotas=quotas)

    async def handle(self, name: str, *, namespace: str | None = None) -> AsyncJobHandle:
        """A handle on a job that exists; raises NotFound."""
        return AsyncJobHandle(await asyncio.to_thread(self.sync.handle, name, namespace=namespace))

    async def get(self, name: str, *, namespace: str | None = None) -> QLoRAJob:
        """A job as it is now; raises NotFound."""
        return await asyncio.to_thread(self.sync.get, name, namespace=namespace)

    async def list(self, *, namespace: str | None = None, all_namespaces: bool = False) -> JobList:
        """Jobs, ordered by namespace and name."""
        return await asyncio.to_thread(self.sync.list, namespace=namespace, all_namespaces=all_namespaces)

    async def wait_all(
        self, handles: Iterable[AsyncJobHandle], timeout_seconds: float | None = None, *, progress: bool = False
    ) -> Sequence[QLoRAJob]:
        """The jobs once all have finished, well or not; raises WaitTimedOut, NotFound, ServiceNotRunning."""
        return await asyncio.gather(*(handle.wait(timeout_seconds, progress=progress) for handle in handles))

    async def delete(self, name: str, *, namespace: str | None = None) -> None:
        """Remove a job; raises NotFound."""
        await asyncio.to_thread(self.sync.delete, name, namespace=namespace)

    async def promote(self, name: str, *, namespace: str | None = None, force: bool = False, reason: str = "") -> str:
        """Move the alias of spec.tracking.promote to a published job's version, and say what came of it."""
        return await asyncio.to_thread(self.sync.promote, name, namespace=namespace, force=force, reason=reason)

    async def sweep(self, sweep: SweepLike, *, told: Callable[[str], None] | None = None) -> QLoRASweep:
        """Check and store a sweep."""
        return await asyncio.to_thread(self.sync.sweep, sweep, told=told)

    async def check_sweep(self, sweep: SweepLike) -> QLoRASweep:
        """The sweep as `sweep` would store it; changes nothing."""
        return await asyncio.to_thread(self.sync.check_sweep, sweep)

    async def list_sweeps(self, *, namespace: str | None = None, all_namespaces: bool = False) -> Sequence[QLoRASweep]:
        """Sweeps, ordered by namespace and name."""
        return await asyncio.to_thread(self.sync.list_sweeps, namespace=namespace, all_namespaces=all_namespaces)

    async def get_sweep(self, name: str, *, namespace: str | None = None) -> QLoRASweep:
        """A sweep as it is now; raises NotFound."""
        return await asyncio.to_thread(self.sync.get_sweep, name, namespace=namespace)

    async def wait_sweep(
        self, name: str, timeout_seconds: float | None = None, *, namespace: str | None = None
    ) -> QLoRASweep:
        """The sweep once it is over; raises WaitTimedOut, NotFound, ServiceNotRunning."""
        deadline = None if timeout_seconds is None else asyncio.get_running_loop().time() + timeout_seconds
        while True:
            left = None if deadline is None else deadline - asyncio.get_running_loop().time()
            step = SWEEP_STEP_SECONDS if left is None else min(SWEEP_STEP_SECONDS, left)
            try:
                return await asyncio.to_thread(self.sync.wait_sweep, name, step, namespace=namespace)
            except WaitTimedOut:
                if left is not None and left <= step:
                    raise

    async def cancel_sweep(self, name: str, *, namespace: str | None = None) -> None:
        """End a sweep and its trials for good. Raises NotFound."""
        await asyncio.to_thread(self.sync.cancel_sweep, name, namespace=namespace)

    async def delete_sweep(self, name: str, *, namespace: str | None = None) -> None:
        """Remove a sweep and its trials. Raises NotFound."""
        await asyncio.to_thread(self.sync.delete_sweep, name, namespace=namespace)

    async def apply_queue(self, queue: QueueLike) -> QLoRAQueue:
        """Create or replace a queue; raises InvalidObject."""
        return await asyncio.to_thread(self.sync.apply_queue, queue)

    async def list_queues(self) -> Sequence[QLoRAQueue]:
        """All queues, ordered by name."""
        return await asyncio.to_thread(self.sync.list_queues)

    async def get_queue(self, name: str) -> QLoRAQueue:
        """A queue as it is now; raises NotFound."""
        return await asyncio.to_thread(self.sync.get_queue, name)

    async def hold_queue(self, name: str, *, hold: bool = True, drain: bool = False) -> QLoRAQueue:
        """Admit none of its jobs, or some again; those that run go on, unless it is drained. Raises NotFound."""
        return await asyncio.to_thread(self.sync.hold_queue, name, hold=hold, drain=drain)

    async def delete_queue(self, name: str) -> None:
        """Remove a queue; jobs that name it wait until it is there again. Raises NotFound."""
        await asyncio.to_thread(self.sync.delete_queue, name)


class AsyncJobHandle:
    """One job of one service."""

    def __init__(self, handle: JobHandle) -> None:
        self.sync = handle
        """The handle that does the work."""
        self.namespace, self.name, self.uid = handle.namespace, handle.name, handle.uid

    async def object(self) -> QLoRAJob:
        """The job as it is now; raises NotFound."""
        return await asyncio.to_thread(self.sync.object)

    async def status(self) -> QLoRAJobStatus:
        """What has come of the job so far."""
        return await asyncio.to_thread(self.sync.status)

    async def state(self) -> str:
        """Where the job is now, in the word that tables show; raises NotFound."""
        return await asyncio.to_thread(lambda: self.sync.state)

    async def wait(self, timeout_seconds: float | None = None, *, progress: bool = False) -> QLoRAJob:
        """The job once it has finished, well or not; raises WaitTimedOut, NotFound, ServiceNotRunning.

        `progress`: print a line for what changes on the way.
        """
        job, news = await self.object(), News()
        async for job in self.watch(timeout_seconds):
            if progress:
                news.tell(job)
        return job

    async def watch(self, timeout_seconds: float | None = None) -> AsyncIterator[QLoRAJob]:
        """The job now and after every change, until it has finished."""
        watch = self.sync.start_watch(timeout_seconds)
        while not watch.ended:
            job = await asyncio.to_thread(watch.step)
            if job is not None:
                yield job

    async def logs(
        self,
        follow: bool = False,
        stage: StageKind | None = None,
        attempt: int | None = None,
        tail: int | None = None,
    ) -> AsyncIterator[LogLine]:
        """Lines of the stages' logs in order; with `follow`, until the job has finished.

        `tail`: of what is there already, only so many of the last lines.
        """
        lines = last_lines(await asyncio.to_thread(self.sync.log_steps, follow, stage, attempt), tail)
        while (line := await asyncio.to_thread(next, lines, _END)) is not _END:
            if isinstance(line, LogLine):
                yield line
            else:
                await asyncio.sleep(FOLLOW_POLL_SECONDS)

    async def cancel(self) -> QLoRAJob:
        """Ask for the job to be ended for good; what it has saved stays."""
        return await asyncio.to_thread(self.sync.cancel)

    async def suspend(self) -> QLoRAJob:
        """Hold the job: a running stage saves a checkpoint and stops."""
        return await asyncio.to_thread(self.sync.suspend)

    async def resume(self) -> QLoRAJob:
        """Let a suspended job go on from its checkpoint."""
        return await asyncio.to_thread(self.sync.resume)

    async def check_promotion(self, *, force: bool = False, reason: str = "") -> str:
        """What `promote` would do, in a sentence; raises what it would raise at once, and changes nothing."""
        return await asyncio.to_thread(self.sync.check_promotion, force=force, reason=reason)

    async def promote(self, *, force: bool = False, reason: str = "", timeout_seconds: float = PROMOTE_SECONDS) -> str:
        """Move the alias of spec.tracking.promote to the job's version, and say what came of it."""
        return await asyncio.to_thread(self.sync.promote, force=force, reason=reason, timeout_seconds=timeout_seconds)

    async def delete(self, *, wait_seconds: float = 0.0) -> None:
        """Remove the job; a running stage is stopped. Raises WaitTimedOut if it is there after `wait_seconds`."""
        await asyncio.to_thread(self.sync.delete, wait_seconds=wait_seconds)

    async def events(self) -> Sequence[tuple[str, Event]]:
        """What was decided about the job, with RFC 3339 times, oldest first."""
        return await asyncio.to_thread(self.sync.events)

    async def explain(self) -> Explanation:
        """Why the job is where it is, and what would change that."""
        return await asyncio.to_thread(self.sync.explain)

    async def records(self) -> ShownRecords:
        """The first training records with their masks, as prepare kept them; raises NotFound before it has ended."""
        return await asyncio.to_thread(self.sync.records)

    async def metrics(self) -> DataFrame:
        """The job's figures as a pandas DataFrame: a row a step, a column a metric; raises NotFound, MissingExtra."""
        return await asyncio.to_thread(self.sync.metrics)

    async def result(self) -> JobResult:
        """Where the adapter is, and how good it became; raises JobFailed unless the job has succeeded."""
        return await asyncio.to_thread(self.sync.result)

    async def adapter(self, into: Path | str) -> Path:
        """Download the adapter as the new folder `into`, every file verified."""
        return await asyncio.to_thread(self.sync.adapter, into)

    async def chat(self, prompt: str | None = None, *, max_new_tokens: int = DEFAULT_ANSWER_TOKENS) -> None:
        """Print the adapter's greedy answer to a prompt, or to each line of standard input."""
        await asyncio.to_thread(self.sync.chat, prompt, max_new_tokens=max_new_tokens)


_END = "end of the log"
