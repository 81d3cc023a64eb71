"""What a job's object says by itself: worked out once for each revision of it, and forgotten with the object.

Nothing of an object changes, and a store that watches gives the same one until its job is written again. So what
depends on the object alone is the same in every decision, those that begin with nothing included: they meet the objects
again that others have met. Whatever else such a fact depends on is kept beside it, and is compared by whoever asks.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from weakref import ref

from orchestrator.api.job import QLoRAJob
from orchestrator.api.plan import Estimate
from orchestrator.api.reasons import ConditionType, Reason, Refusal
from orchestrator.core.job.conditions import words
from orchestrator.core.job.finalizer import outstanding
from orchestrator.core.job.promotion import awaits_mlflow
from orchestrator.core.snapshot import Policy
from orchestrator.sizing.hardware import GpuClass
from orchestrator.sizing.margins import Margins, teaches


@dataclass(frozen=True, slots=True, kw_only=True)
class Sized:
    """What a job fits, and by what."""

    gpu_classes: tuple[GpuClass, ...]
    margins: Margins
    found: tuple[Estimate, ...] | Refusal
    names: tuple[str, ...]
    """Of the classes that it fits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """All that an admission is made of, beside the job and the time."""

    estimate: Estimate
    nodes: tuple[str, ...]
    """On none of these machines."""
    policy: Policy


@dataclass(slots=True, kw_only=True)
class Revision:
    """The facts of one object. Those that take long are None until somebody has worked them out.

    What is asked of each of thousands of jobs is here, together: to look it up in ten thousand objects takes longer.
    """

    key: str
    uid: str
    namespace: str
    queue: str
    priority: int
    created: datetime | None
    spot: str
    architecture: str
    """Empty where it is not known yet."""
    has_begun: bool
    """Whether what it fits may depend on what came of it before."""
    is_untried: bool
    """Whether the job is prepared, has never had a GPU, and nothing that it says itself makes it another."""
    asks_mlflow: bool
    """Whether MLflow is to be asked something about it, if that is not known."""
    tells: bool
    """Whether webhooks are to be told something of it."""
    teaches: bool
    """Whether something is learned from it about what jobs take."""
    said: tuple[Reason, str] | None
    """Why it is told to wait for a GPU, in words without figures; None where it is not told of this generation."""
    sized: Sized | None = None
    storable: Admission | None = None
    """The last that was tried, and whose status the store would take."""

    @classmethod
    def of(cls, job: QLoRAJob) -> Revision:
        """What the object says."""
        status, spec, meta = job.status, job.spec, job.metadata
        tells = bool(outstanding(status))
        admitted = status.condition(ConditionType.ADMITTED)
        is_said = (
            admitted is not None and admitted.status == "False" and admitted.observed_generation == meta.generation
        )
        return cls(
            key=job.key,
            uid=meta.uid,
            namespace=meta.namespace,
            queue=spec.queue,
            priority=spec.priority,
            created=meta.creation_timestamp,
            spot=spec.resources.spot,
            architecture=status.prepared.model.architecture if status.prepared is not None else "",
            has_begun=bool(status.attempts) or status.estimate is not None,
            is_untried=(
                status.prepared is not None
                and not status.attempts
                and status.finish_time is None
                and status.release_since is None
                and status.retry_after is None
                and status.adapter_uri is None
                and not tells
                and status.observed_generation == meta.generation
                and not spec.suspend
                and spec.active_deadline_seconds is None
                and not job.cancelled
            ),
            asks_mlflow=awaits_mlflow(job) or (status.mlflow.run_id is None and status.prepared is not None),
            tells=tells,
            teaches=teaches(status),
            said=(admitted.reason, words(admitted.message)) if admitted is not None and is_said else None,
        )


class _Known(ref[QLoRAJob]):
    """An object that is there, and its facts."""

    __slots__ = ("number", "revision")

    number: int
    revision: Revision


_known: dict[int, _Known] = {}
"""By the identity of the object, as long as that is there: to compare jobs by value takes longer than to ask anew."""


def revision_of(job: QLoRAJob) -> Revision:
    """The facts of the object."""
    known = _known.get(id(job))
    if known is not None and known() is job:
        return known.revision
    known = _Known(job, _forget)
    known.number, known.revision = id(job), Revision.of(job)
    _known[known.number] = known
    return known.revision


def _forget(gone: ref[QLoRAJob]) -> None:
    assert isinstance(gone, _Known), "only these are asked to tell"
    if _known.get(gone.number) is gone:
        del _known[gone.number]
