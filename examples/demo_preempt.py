"""`make demo-preempt`: an urgent job moves another out of the way, and the other loses nothing.

One slot, three jobs. `calm` runs undisturbed and is the yardstick. `moved` is the same job again; while it trains,
`urgent` comes with a higher priority, takes the slot, and ends. `moved` comes back from its checkpoint, and its adapter
must be the yardstick's, byte for byte. The queue of `urgent` is held until then, since its data are prepared first, and
that may take longer than all of `moved`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml
from rich.console import Console

from examples.demo import HERE, free_name
from orchestrator.api.job import ObjectMeta, QLoRAJobStatus
from orchestrator.api.queue import QLoRAQueue, QLoRAQueueSpec
from orchestrator.api.reasons import ConditionType, Reason
from orchestrator.controller import supervisor
from orchestrator.sdk import Client, JobHandle

STEPS = 12
QUEUE = "demo-urgent"
POLL_SECONDS = 0.5
STAGE_TIMEOUT_SECONDS = 600.0


def main() -> int:
    """Run the three jobs; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, type=Path, help="folder of the base model")
    base = parser.parse_args().model.resolve()
    console = Console()
    client = Client()
    supervisor.start(client.settings)
    console.print("[bold]1.[/] `calm` runs alone, as the yardstick")
    calm = finished(console, client.submit(job(client, base, "calm", priority=0)))
    client.apply_queue(QLoRAQueue(metadata=ObjectMeta(name=QUEUE), spec=QLoRAQueueSpec(stop_policy="Hold")))
    urgent = client.submit(job(client, base, "urgent", priority=100, steps=2, queue=QUEUE))
    wait_until(urgent, lambda status: status.is_true(ConditionType.PREPARED), console)
    console.print("[bold]2.[/] `moved` starts, the same job again")
    moved = client.submit(job(client, base, "moved", priority=0))
    wait_until(moved, lambda status: status.progress is not None and status.progress.step >= STEPS // 3, console)
    console.print("[bold]3.[/] `urgent` comes with priority 100; there is one slot")
    client.hold_queue(QUEUE, hold=False)
    wait_until(moved, lambda status: sum(status.evictions.values()) > 0, console)
    finished(console, urgent)
    console.print("[bold]4.[/] `moved` comes back from its checkpoint")
    finished(console, moved)
    return verdict(console, calm, moved)


def job(
    client: Client, base: Path, stem: str, *, priority: int, steps: int = STEPS, queue: str = "default"
) -> dict[str, object]:
    """A short tuning job on the example's data, under a free name."""
    document = yaml.safe_load((HERE / "job.yaml").read_text())
    spec = document["spec"]
    document["metadata"]["name"] = free_name(client, stem)
    spec["model"]["source"] = base.as_uri()
    spec["dataset"] = {"source": (HERE / "train.jsonl").resolve().as_uri()}
    spec["training"] |= {"maxSteps": steps, "sequenceLength": 256}
    spec["checkpoint"] = {"everySeconds": 5}
    spec["tracking"] = {"experiment": "demo-preempt"}
    spec |= {"priority": priority, "queue": queue}
    return document


def wait_until(handle: JobHandle, reached: Callable[[QLoRAJobStatus], bool], console: Console) -> None:
    """Follow the job's summary until it has come so far; raises TimeoutError, or RuntimeError if it ended first."""
    deadline, said = time.monotonic() + STAGE_TIMEOUT_SECONDS, ""
    while time.monotonic() < deadline:
        status = handle.status()
        if status.summary != said:
            said = status.summary
            console.print(f"   {handle.name}: {said}", highlight=False)
        if reached(status):
            return
        if status.finish_time is not None:
            raise RuntimeError(f"{handle.name} ended too early: {status.summary}")
        time.sleep(POLL_SECONDS)
    raise TimeoutError(f"{handle.name} did not come so far within {STAGE_TIMEOUT_SECONDS:.0f} s: {said}")


def finished(console: Console, handle: JobHandle) -> JobHandle:
    """The handle, once its job has succeeded; raises JobFailed."""
    wait_until(handle, lambda status: status.finish_time is not None, console)
    handle.result()
    return handle


def verdict(console: Console, calm: JobHandle, moved: JobHandle) -> int:
    """Compare the two adapters; the exit code."""
    before, after = calm.status().adapter_digest, moved.status().adapter_digest
    evictions = moved.status().evictions.get(Reason.PREEMPTED, 0)
    console.print(f"\nundisturbed  {before}\nmoved        {after}   (preempted {evictions} time)", highlight=False)
    if before is None or before != after or evictions == 0:
        console.print("[bold red]The adapters differ, or nothing was preempted.[/]")
        return 1
    console.print("[bold green]The same adapter, byte for byte.[/]")
    return 0


if __name__ == "__main__":
    sys.exit(main())
