"""A waiting job's claim on a GPU: what it may run on, preferred first, or why it has none now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple

from orchestrator.api.job import QLoRAJob, QLoRAJobSpec, QLoRAJobStatus
from orchestrator.api.plan import Estimate
from orchestrator.api.queue import QLoRAQueueSpec
from orchestrator.api.reasons import Reason, Refusal
from orchestrator.api.results import PrepareResult
from orchestrator.core.job.revision import Revision, Sized, revision_of
from orchestrator.core.job.setbacks import avoided_classes
from orchestrator.core.scheduling.ordering import Claim, queue_refusal, user_of
from orchestrator.core.scheduling.turns import waits_since
from orchestrator.core.snapshot import Policy
from orchestrator.sizing.hardware import GpuClass
from orchestrator.sizing.margins import DEFAULT, Margins
from orchestrator.sizing.plan_search import candidates
from orchestrator.sizing.step_time import Work

TERMS_KEPT = 4096


class Terms(NamedTuple):
    """What a queue says to all jobs of one namespace and priority."""

    refusal: Refusal | None
    """Why it admits none of them, if so."""
    user: str
    """Whose they are, where the queue tells its users apart."""
    turns: QLoRAQueueSpec | None
    """The queue, where it gives turns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claims:
    """What every claim is made by: what queues say, the GPUs that there are, and what is learned of models."""

    queues: Mapping[str, QLoRAQueueSpec]
    closed: Mapping[str, Refusal]
    """Queues that admit nobody, and why."""
    gpu_classes: tuple[GpuClass, ...]
    policy: Policy
    margins: Mapping[tuple[str, str], Margins]
    """Those learned, by namespace and architecture."""
    _by_spot: dict[str, tuple[GpuClass, ...]] = field(default_factory=dict[str, tuple[GpuClass, ...]])
    _terms: dict[tuple[str, str, int], Terms] = field(default_factory=dict[tuple[str, str, int], Terms])
    """By queue, namespace and priority."""

    def of(self, job: QLoRAJob, status: QLoRAJobStatus, revision: Revision, now: datetime) -> Claim | Refusal:
        """The claim of a job that is ready to train, by what its status is to be."""
        terms = self._terms_of(job, revision)
        if terms.refusal is not None:
            return terms.refusal
        classes = self._on_machines(revision.spot)
        if status is job.status and not revision.has_begun and classes:
            sized = self._by_revision(job, revision, classes)
            found, names = sized.found, sized.names
        else:
            found = self._estimates(job, status, now)
            names = _names(found)
        if isinstance(found, Refusal):
            return found
        since = (revision.created or now) if terms.turns is None else waits_since(job, status, now, terms.turns)
        return Claim(revision.key, revision.uid, revision.queue, revision.priority, since, found, names, terms.user)

    def _terms_of(self, job: QLoRAJob, revision: Revision) -> Terms:
        of = revision.queue, revision.namespace, revision.priority
        known = self._terms.get(of)
        if known is None:
            if len(self._terms) >= TERMS_KEPT:
                self._terms.clear()
            spec = self.queues.get(revision.queue)
            known = self._terms[of] = Terms(
                refusal=queue_refusal(job, self.queues, self.closed),
                user=user_of(revision.namespace, spec),
                turns=spec if spec is not None and spec.turn_seconds is not None else None,
            )
        return known

    def _estimates(self, job: QLoRAJob, status: QLoRAJobStatus, now: datetime) -> tuple[Estimate, ...] | Refusal:
        """Where the job may train; one that must go on just as it began keeps its class and plan.

        A class that failed the job lately is passed over while another fits: a job that ran out of memory goes to none
        of less. Where none is left, they are tried again, with the pauses that failures bring.
        """
        resources = job.spec.resources
        classes = self._on_machines(resources.spot)
        if self.gpu_classes and not classes:
            return Refusal(reason=Reason.WAITING_FOR_GPU, message=_NO_SUCH_MACHINE[resources.spot])
        if not status.attempts and status.estimate is None:
            return self._sized(job, status, classes)
        found = self._going_on(job, status, classes)
        if isinstance(found, Refusal) or not status.attempts:
            return found
        found = _smaller_first(found, status)
        avoided = avoided_classes(status, now, self.policy)
        if not avoided:
            return found
        others = tuple(estimate for estimate in found if estimate.gpu_class not in avoided)
        if others or status.estimate is None or resources.class_change == "forbidden":
            return others or found
        elsewhere = self._sized(job, status, classes)  # what goes on just as it began goes on otherwise before it waits
        if isinstance(elsewhere, Refusal):
            return found
        least = status.estimate.usable_bytes if status.step_ups > 0 else 0
        others = tuple(e for e in elsewhere if e.gpu_class not in avoided and e.usable_bytes >= least)
        return others or found

    def smaller(self, job: QLoRAJob, status: QLoRAJobStatus, now: datetime) -> tuple[Estimate, ...]:
        """Where a job that trains could go on from a checkpoint on a class of less memory than it has."""
        here = status.estimate
        if here is None or status.step_ups > 0 or not may_change_class(job.spec):
            return ()
        found = self._sized(job, status, self._on_machines(job.spec.resources.spot))
        if isinstance(found, Refusal):
            return ()
        avoided = avoided_classes(status, now, self.policy)
        return tuple(e for e in found if e.usable_bytes < here.usable_bytes and e.gpu_class not in avoided)

    def _going_on(
        self, job: QLoRAJob, status: QLoRAJobStatus, classes: tuple[GpuClass, ...]
    ) -> tuple[Estimate, ...] | Refusal:
        """Where the job may train by what it needs: one that goes on, on the class that it began on before others."""
        spec, began = job.spec, status.estimate
        if began is None or (status.checkpoint is None and status.step_ups == 0):
            return self._sized(job, status, classes)
        if spec.resources.class_change == "forbidden":
            return (began,)
        if began.gpu_class not in {c.name for c in classes if c.capacity > 0}:
            return self._sized(job, status, classes)
        if not may_change_class(spec):
            return (began,)
        sized = self._sized(job, status, classes)
        least = began.usable_bytes if status.step_ups > 0 else 0
        others = () if isinstance(sized, Refusal) else sized
        return (began, *(e for e in others if e.gpu_class != began.gpu_class and e.usable_bytes >= least))

    def _sized(
        self, job: QLoRAJob, status: QLoRAJobStatus, classes: tuple[GpuClass, ...]
    ) -> tuple[Estimate, ...] | Refusal:
        """Every class here that the job fits."""
        prepared = status.prepared
        assert prepared is not None, "a queued job is prepared"
        if prepared is job.status.prepared:
            return self._by_revision(job, revision_of(job), classes).found
        margins = self.margins.get((job.metadata.namespace, prepared.model.architecture), DEFAULT)
        return _fitting(job, prepared, classes, margins)

    def _by_revision(self, job: QLoRAJob, revision: Revision, classes: tuple[GpuClass, ...]) -> Sized:
        """The same by what is stored: worked out once for the same GPUs and margins."""
        margins = self.margins.get((revision.namespace, revision.architecture), DEFAULT)
        known = revision.sized
        if known is None or (known.gpu_classes, known.margins) != (classes, margins):
            prepared = job.status.prepared
            assert prepared is not None, "a queued job is prepared"
            found = _fitting(job, prepared, classes, margins)
            known = revision.sized = Sized(gpu_classes=classes, margins=margins, found=found, names=_names(found))
        return known

    def _on_machines(self, spot: str) -> tuple[GpuClass, ...]:
        """Classes with a GPU on the kind of machine that a job asks for: nobody makes way for one that cannot start."""
        if spot == "allowed":
            return self.gpu_classes
        found = self._by_spot.get(spot)
        if found is None:
            found = self._by_spot[spot] = tuple(
                c
                for c in self.gpu_classes
                if c.spot is None or (c.spot > 0 if spot == "required" else c.spot < c.capacity)
            )
        return found


def _fitting(
    job: QLoRAJob, prepared: PrepareResult, classes: tuple[GpuClass, ...], margins: Margins
) -> tuple[Estimate, ...] | Refusal:
    spec = job.spec.settled(prepared.start)
    return candidates(spec, prepared.model, classes, work=Work.of(prepared), margins=margins)


def _names(found: tuple[Estimate, ...] | Refusal) -> tuple[str, ...]:
    return () if isinstance(found, Refusal) else tuple([estimate.gpu_class for estimate in found])


def _smaller_first(found: tuple[Estimate, ...], status: QLoRAJobStatus) -> tuple[Estimate, ...]:
    """The same, but who has made room on a large card prefers smaller ones: it would take that one back."""
    began = status.estimate
    if began is None or status.attempts[-1].reason is not Reason.DEFRAGMENTED:
        return found
    return tuple(sorted(found, key=lambda estimate: estimate.usable_bytes >= began.usable_bytes))


def may_change_class(spec: QLoRAJobSpec) -> bool:
    """Whether the job may go on from a checkpoint on another class than it was written on."""
    change = spec.resources.class_change
    return change == "allowed" or (change == "auto" and not spec.training.deterministic)


_NO_SUCH_MACHINE: Mapping[str, str] = {
    "required": "resources.spot is required, and no GPU here is on a spot machine; waits for one, or allow others",
    "forbidden": "resources.spot is forbidden, and every GPU here is on a spot machine; waits for another, or allow it",
}
