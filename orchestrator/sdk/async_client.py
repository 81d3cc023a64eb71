"""AsyncClient: the verbs of `Client` for asyncio.

    client = AsyncClient()
    job = await client.submit("job.yaml")
    await job.wait(timeout_seconds=3600)

Thin over the sync client: every call runs in a thread (`asyncio.to_thread`). What waits does so in steps of bounded
length, so that a cancelled task leaves no thread behind for longer than one step.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from orchestrator.api.job import QLoRAJob, QLoRAJobStatus
from orchestrator.api.queue import QLoRAQueue
from orchestrator.api.stage_name import StageKind
from orchestrator.core.commands import Event
from orchestrator.sdk.client import Client, JobLike, QueueLike
from orchestrator.sdk.connection import Connection
from orchestrator.sdk.explanation import Explanation
from orchestrator.sdk.handle import JobHandle, JobResult
from orchestrator.sdk.logs import FOLLOW_POLL_SECONDS, LogLine
from orchestrator.sdk.planning import JobPlan
from orchestrator.settings import Settings


class AsyncClient:
    """An asynchronous client of one service."""

    def __init__(
        self, settings: Settings | None = None, *, namespace: str | None = None, connection: Connection | None = None
    ) -> None:
        self.sync = Client(settings, namespace=namespace, connection=connection)
        """The client that does the work."""

    async def submit(self, job: JobLike, *, replace: bool = False) -> AsyncJobHandle:
        """Check and store a job, with `replace` in the place of a finished one of its name.

        Raises InvalidObject, AlreadyExists, ServiceNotRunning.
        """
        return AsyncJobHandle(await asyncio.to_thread(self.sync.submit, job, replace=replace))

    async def check(self, job: JobLike, *, replace: bool = False) -> QLoRAJob:
        """The job as `submit` would store it; changes nothing."""
        return await asyncio.to_thread(self.sync.check, job, replace=replace)

    async def plan(self, job: JobLike) -> JobPlan:
        """What the job would take and where it would run."""
        return await asyncio.to_thread(self.sync.plan, job)

    async def handle(self, name: str, *, namespace: str | None = None) -> AsyncJobHandle:
        """A handle on a job that exists; raises NotFound."""
        return AsyncJobHandle(await asyncio.to_thread(self.sync.handle, name, namespace=namespace))

    async def get(self, name: str, *, namespace: str | None = None) -> QLoRAJob:
        """A job as it is now; raises NotFound."""
        return await asyncio.to_thread(self.sync.get, name, namespace=namespace)

    async def list(self, *, namespace: str | None = None, all_namespaces: bool = False) -> Sequence[QLoRAJob]:
        """Jobs, ordered by namespace and name."""
        return await asyncio.to_thread(self.sync.list, namespace=namespace, all_namespaces=all_namespaces)

    async def delete(self, name: str, *, namespace: str | None = None) -> None:
        """Remove a job; raises NotFound."""
        await asyncio.to_thread(self.sync.delete, name, namespace=namespace)

    async def apply_queue(self, queue: QueueLike) -> QLoRAQueue:
        """Create or replace a queue; raises InvalidObject."""
        return await asyncio.to_thread(self.sync.apply_queue, queue)

    async def list_queues(self) -> Sequence[QLoRAQueue]:
        """All queues, ordered by name."""
        return await asyncio.to_thread(self.sync.list_queues)


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

    async def wait(self, timeout_seconds: float | None = None) -> QLoRAJob:
        """The job once it has finished, well or not; raises WaitTimedOut, NotFound, ServiceNotRunning."""
        job = await self.object()
        async for job in self.watch(timeout_seconds):  # noqa: B007  the last one is the answer
            pass
        return job

    async def watch(self, timeout_seconds: float | None = None) -> AsyncIterator[QLoRAJob]:
        """The job now and after every change, until it has finished."""
        watch = self.sync.start_watch(timeout_seconds)
        while not watch.ended:
            job = await asyncio.to_thread(watch.step)
            if job is not None:
                yield job

    async def logs(
        self, follow: bool = False, stage: StageKind | None = None, attempt: int | None = None
    ) -> AsyncIterator[LogLine]:
        """Lines of the stages' logs in order; with `follow`, until the job has finished."""
        lines = await asyncio.to_thread(self.sync.log_steps, follow, stage, attempt)
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

    async def delete(self) -> None:
        """Remove the job; a running stage is stopped."""
        await asyncio.to_thread(self.sync.delete)

    async def events(self) -> Sequence[tuple[str, Event]]:
        """What was decided about the job, with RFC 3339 times, oldest first."""
        return await asyncio.to_thread(self.sync.events)

    async def explain(self) -> Explanation:
        """Why the job is where it is, and what would change that."""
        return await asyncio.to_thread(self.sync.explain)

    async def result(self) -> JobResult:
        """Where the adapter is, and how good it became; raises JobFailed unless the job has succeeded."""
        return await asyncio.to_thread(self.sync.result)

    async def adapter(self, into: Path | str) -> Path:
        """Download the adapter as the new folder `into`, every file verified."""
        return await asyncio.to_thread(self.sync.adapter, into)


_END = "end of the log"
