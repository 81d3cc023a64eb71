"""A waiting job's claim on a GPU: what it may run on, preferred first, or why it has none now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from orchestrator.api.job import QLoRAJobSpec
from orchestrator.api.plan import Estimate
from orchestrator.api.queue import QLoRAQueueSpec
from orchestrator.api.reasons import Reason, Refusal
from orchestrator.core.job.setbacks import avoided_classes
from orchestrator.core.job.status_draft import Draft
from orchestrator.core.scheduling.ordering import Claim, queue_refusal, user_of
from orchestrator.core.scheduling.turns import waits_since
from orchestrator.core.snapshot import Snapshot
from orchestrator.sizing.hardware import GpuClass
from orchestrator.sizing.margins import DEFAULT, Margins
from orchestrator.sizing.plan_search import candidates
from orchestrator.sizing.step_time import Work


def claim_of(
    draft: Draft,
    queues: Mapping[str, QLoRAQueueSpec],
    closed: Mapping[str, Refusal],
    snapshot: Snapshot,
    margins: Mapping[tuple[str, str], Margins],
) -> Claim | Refusal:
    """The claim of a job that is ready to train.

    `closed` are the queues that admit nobody; `margins` are those learned, by namespace and architecture.
    """
    found = queue_refusal(draft.job, queues, closed) or _estimates(draft, snapshot, margins)
    if isinstance(found, Refusal):
        return found
    return _claim(draft, found, queues.get(draft.job.spec.queue))


def in_queue(claim: Claim, draft: Draft, spec: QLoRAQueueSpec | None) -> Claim:
    """The claim of the same job by what its queue says of it now."""
    user, since = user_of(draft.job.metadata.namespace, spec), waits_since(draft, spec)
    return claim if (claim.user, claim.since) == (user, since) else replace(claim, user=user, since=since)


def _claim(draft: Draft, estimates: tuple[Estimate, ...], spec: QLoRAQueueSpec | None) -> Claim:
    job = draft.job
    return Claim(
        key=job.key,
        uid=job.metadata.uid,
        queue=job.spec.queue,
        priority=job.spec.priority,
        since=waits_since(draft, spec),
        estimates=estimates,
        classes=tuple(estimate.gpu_class for estimate in estimates),
        user=user_of(job.metadata.namespace, spec),
    )


def _estimates(
    draft: Draft, snapshot: Snapshot, margins: Mapping[tuple[str, str], Margins]
) -> tuple[Estimate, ...] | Refusal:
    """Where the job may train; one that must go on just as it began keeps its class and plan.

    A class that failed the job lately is passed over while another fits: a job that ran out of memory goes to none of
    less. Where none is left, they are tried again, with the pauses that failures bring.
    """
    spot = draft.job.spec.resources.spot
    classes = _on_machines(spot, snapshot.gpu_classes)
    if snapshot.gpu_classes and not classes:
        return Refusal(reason=Reason.WAITING_FOR_GPU, message=_NO_SUCH_MACHINE[spot])
    snapshot = snapshot if classes == snapshot.gpu_classes else replace(snapshot, gpu_classes=classes)
    found = _fitting(draft, snapshot, margins)
    if isinstance(found, Refusal) or not draft.status.attempts:
        return found
    avoided = avoided_classes(draft.status, draft.now, snapshot.policy)
    if not avoided:
        return found
    others = tuple(estimate for estimate in found if estimate.gpu_class not in avoided)
    if others or draft.status.estimate is None or draft.job.spec.resources.class_change == "forbidden":
        return others or found
    elsewhere = _sized(draft, snapshot, margins)  # what goes on just as it began goes on otherwise before it waits
    if isinstance(elsewhere, Refusal):
        return found
    least = draft.status.estimate.usable_bytes if draft.status.step_ups > 0 else 0
    others = tuple(e for e in elsewhere if e.gpu_class not in avoided and e.usable_bytes >= least)
    return others or found


def _fitting(
    draft: Draft, snapshot: Snapshot, margins: Mapping[tuple[str, str], Margins]
) -> tuple[Estimate, ...] | Refusal:
    """Where the job may train by what it needs: one that goes on, on the class that it began on before any other."""
    status, spec, began = draft.status, draft.job.spec, draft.status.estimate
    if began is None or (status.checkpoint is None and status.step_ups == 0):
        return _sized(draft, snapshot, margins)
    if spec.resources.class_change == "forbidden":
        return (began,)
    if began.gpu_class not in {c.name for c in snapshot.gpu_classes if c.capacity > 0}:
        return _sized(draft, snapshot, margins)
    if not may_change_class(spec):
        return (began,)
    sized = _sized(draft, snapshot, margins)
    least = began.usable_bytes if status.step_ups > 0 else 0
    others = () if isinstance(sized, Refusal) else sized
    return (began, *(e for e in others if e.gpu_class != began.gpu_class and e.usable_bytes >= least))


def may_change_class(spec: QLoRAJobSpec) -> bool:
    """Whether the job may go on from a checkpoint on another class than it was written on."""
    change = spec.resources.class_change
    return change == "allowed" or (change == "auto" and not spec.training.deterministic)


def _sized(
    draft: Draft, snapshot: Snapshot, margins: Mapping[tuple[str, str], Margins]
) -> tuple[Estimate, ...] | Refusal:
    """Every class here that the job fits."""
    spec, prepared = draft.job.spec.settled(draft.status.start), draft.status.prepared
    assert prepared is not None, "a queued job is prepared"
    of_model = margins.get((draft.job.metadata.namespace, prepared.model.architecture), DEFAULT)
    return candidates(spec, prepared.model, snapshot.gpu_classes, work=Work.of(prepared), margins=of_model)


_NO_SUCH_MACHINE: Mapping[str, str] = {
    "required": "resources.spot is required, and no GPU here is on a spot machine; waits for one, or allow others",
    "forbidden": "resources.spot is forbidden, and every GPU here is on a spot machine; waits for another, or allow it",
}


def _on_machines(spot: str, classes: Sequence[GpuClass]) -> tuple[GpuClass, ...]:
    """Classes with a GPU on the kind of machine that the job asks for: nobody makes way for one that cannot start."""
    if spot == "allowed":
        return tuple(classes)
    return tuple(c for c in classes if c.spot is None or (c.spot > 0 if spot == "required" else c.spot < c.capacity))
