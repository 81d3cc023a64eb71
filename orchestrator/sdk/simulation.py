"""What if: this service as it is, with more cards, other quotas, or a job more, by the very code that decides.

The world is what `explain` decides over. Changes are made to a copy of it; nothing is stored and nothing carried out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from orchestrator.api.job import QLoRAJob, QLoRAJobStatus
from orchestrator.api.queue import Quota
from orchestrator.api.results import PrepareResult
from orchestrator.core.explain import listed, span
from orchestrator.core.forecast import MOST_EVENTS, Expectation
from orchestrator.core.job.state_machine import JobState
from orchestrator.core.simulate import Prospect, Simulation, simulate
from orchestrator.core.snapshot import Snapshot
from orchestrator.errors import InvalidObject, NotFound
from orchestrator.sdk.planning import JobPlan
from orchestrator.sizing.gpu_table import gpu_table
from orchestrator.sizing.hardware import priced

SAME_SECONDS = 1.0
"""Less is no difference."""
MOST_GPUS = 1_000_000
"""Of a class, as in quotas."""
_CHANGE = re.compile(r"(?:(?P<queue>[^:=]+):)?(?P<gpu_class>[^:=]+)=(?P<sign>[+-]?)(?P<count>[0-9]{1,7})", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIf:
    """What changes would mean for everybody who needs a GPU."""

    simulation: Simulation
    notes: tuple[str, ...]
    """What comes of it, and how far it was looked, in sentences."""

    @property
    def jobs(self) -> Sequence[Prospect]:
        """As they start with the changes."""
        return self.simulation.jobs

    def to_wire(self) -> dict[str, object]:
        """JSON types with wire names; times as RFC 3339."""
        jobs = [
            {
                "job": each.job,
                "queue": each.queue,
                "state": each.state.value,
                "before": _expected(each.before),
                "after": _expected(each.after),
                "laterSeconds": each.later_seconds,
            }
            for each in self.jobs
        ]
        forecasts = {"before": self.simulation.before, "after": self.simulation.after}
        cuts = {which: _time(each.until) if each.is_cut else None for which, each in forecasts.items()}
        return {"now": _time(self.simulation.now), "cutAt": cuts, "jobs": jobs, "notes": list(self.notes)}


def what_if(present: Snapshot, gpus: Sequence[str], quotas: Sequence[str], added: Sequence[QLoRAJob]) -> WhatIf:
    """The present beside what it would be with these changes; raises InvalidObject, NotFound."""
    keys = [job.key for job in added]
    if len(set(keys)) < len(keys):
        raise InvalidObject(f"--job: each must have a name of its own, not {', '.join(keys)}")
    changed = with_changes(replace(present, jobs=(*present.jobs, *added)), gpus, quotas)
    found = simulate(present, changed)
    return WhatIf(simulation=found, notes=tuple(_notes(found, keys)))


def with_changes(present: Snapshot, gpus: Sequence[str], quotas: Sequence[str]) -> Snapshot:
    """The same with other numbers of GPUs and other quotas; raises InvalidObject, NotFound."""
    changed = present
    for text in gpus:
        changed = _with_gpus(changed, text)
    for text in quotas:
        changed = _with_quota(changed, text)
    return changed


def as_submitted(job: QLoRAJob, plan: JobPlan, now: datetime) -> QLoRAJob:
    """The job as if it were submitted and prepared this moment, by what its plan knows; raises InvalidObject where
    that does not say how many steps it has."""
    data, training = plan.data, job.spec.training
    steps = data.steps if data is not None else training.max_steps
    if steps is None:
        raise InvalidObject(
            f"job {job.metadata.name}: its data is not on this machine, so nobody knows how long it takes; name "
            "training.maxSteps, or submit it and look again once it is prepared"
        )
    sequences = data.sequences if data is not None else steps * training.global_batch_size
    tokens = data.tokens if data is not None else sequences * training.sequence_length
    prepared = PrepareResult(
        digest=f"sha256:{'0' * 64}",
        uri="file:///simulated",
        model=plan.facts,
        train_records=data.records if data is not None else sequences,
        train_sequences=sequences,
        train_tokens=tokens,
        supervised_tokens=tokens,
        eval_records=0,
        eval_sequences=0,
        steps=steps,
    )
    meta = {"uid": f"simulated-{job.key}", "creation_timestamp": now}
    metadata = job.metadata.model_copy(update=meta)
    return job.model_copy(update={"metadata": metadata, "status": QLoRAJobStatus(prepared=prepared, attempts_total=1)})


# --- changes ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Change:
    """Of a number of GPUs of a class, as it is written: `48Gi=+2`, `research:48Gi=6`."""

    text: str
    queue: str
    """Empty where it is of no queue."""
    gpu_class: str
    sign: str
    count: int

    @classmethod
    def parse(cls, text: str, snapshot: Snapshot, *, of_queue: bool = False) -> _Change:
        """InvalidObject where it is not one, or of no class."""
        option, example = ("quota", "research:48Gi=+2") if of_queue else ("gpus", "48Gi=+2")
        found = _CHANGE.fullmatch(text)
        if found is None or (found["queue"] is not None) != of_queue:
            raise InvalidObject(f"--{option} {text}: must be such as {example}, with +2 more, -2 fewer, or 2 in all")
        names = gpu_table(snapshot.policy.gpu_class_definitions).names
        name, known = found["gpu_class"], {*names, *(each.name for each in snapshot.gpu_classes)}
        if name not in known:
            raise InvalidObject(f"--{option} {text}: must name a GPU class ({', '.join(names)})")
        return cls(text=text, queue=found["queue"] or "", gpu_class=name, sign=found["sign"], count=int(found["count"]))

    def of(self, present: int) -> int:
        """What becomes of so many GPUs."""
        number = {"+": present + self.count, "-": present - self.count}.get(self.sign, self.count)
        if not 0 <= number <= MOST_GPUS:
            raise InvalidObject(f"{self.text}: there are {present}, which makes {number}; must be 0 to {MOST_GPUS}")
        return number


def _with_gpus(snapshot: Snapshot, text: str) -> Snapshot:
    """More or fewer cards: like those that are there, else like the slowest of the class."""
    change = _Change.parse(text, snapshot)
    classes = {each.name: each for each in snapshot.gpu_classes}
    found = classes.get(change.gpu_class)
    if found is None:
        table = gpu_table(snapshot.policy.gpu_class_definitions)
        found = priced([table.gpu_class(change.gpu_class, 0)], snapshot.policy.gpu_prices)[0]
    classes[found.name] = replace(found, capacity=change.of(found.capacity))
    return replace(snapshot, gpu_classes=tuple(classes.values()))


def _with_quota(snapshot: Snapshot, text: str) -> Snapshot:
    """Another quota of a queue that is there."""
    change = _Change.parse(text, snapshot, of_queue=True)
    queues = {queue.metadata.name: queue for queue in snapshot.queues}
    queue = queues.get(change.queue)
    if queue is None:
        raise NotFound(f"--quota {text}: there is no queue {change.queue}; list them with: qlora get queues")
    quotas = {quota.gpu_class: quota for quota in queue.spec.quotas}
    if not quotas and change.sign:
        raise InvalidObject(
            f"--quota {text}: queue {change.queue} has no limit that could be changed; leave out the sign"
        )
    found = quotas.get(change.gpu_class) or Quota(gpu_class=change.gpu_class, nominal=0)
    quotas[found.gpu_class] = found.model_copy(update={"nominal": change.of(found.nominal)})
    spec = queue.spec.model_copy(update={"quotas": tuple(quotas.values())})
    queues[change.queue] = queue.model_copy(update={"spec": spec})
    return replace(snapshot, queues=tuple(queues.values()))


# --- words ------------------------------------------------------------------------------------------------------


def _notes(found: Simulation, added: Sequence[str]) -> Iterator[str]:
    for key in added:
        yield f"{key} counts as prepared this moment: how long that takes is not known."
    changes = [later for each in found.jobs if (later := each.later_seconds) is not None]
    sooner, later = (
        sum(1 for each in changes if each <= -SAME_SECONDS),
        sum(1 for each in changes if each >= SAME_SECONDS),
    )
    yield f"Sooner: {sooner}; later: {later}; the same: {len(changes) - sooner - later}."
    unprepared = [each.job for each in found.jobs if each.state in (JobState.NEW, JobState.PREPARING)]
    if unprepared:
        yield f"Not prepared yet, so nobody knows what they need: {listed(unprepared)}."
    endless = sorted({*found.before.endless, *found.after.endless})
    if endless:
        yield f"Nobody knows for how long these hold a GPU: {listed(endless)}."
    cuts = [each.until for each in (found.before, found.after) if each.is_cut]
    if cuts:
        yield (
            f"It is not told what comes later than in {span(min(cuts) - found.now)}: either forecast looks at "
            f"{MOST_EVENTS} stages that end."
        )


def _expected(expected: Expectation) -> dict[str, object]:
    return {"start": _time(expected.start), "end": _time(expected.end), "gpuClass": expected.gpu_class}


def _time(time: datetime | None) -> str | None:
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if time is not None else None
