"""What finished jobs teach about the memory model: measured peaks held against predicted ones, and the margin from it.

A namespace learns from its own jobs: what one team's pods say they measured moves nobody else's margins.

Nothing is stored for it: every attempt in a job's status has what was predicted and what was measured, and a job
outlives the controller. What is learned is forgotten with the last job that taught it (`ttlSecondsAfterFinished`).

The bound is one-sided split-conformal (Vovk et al., 2005; Lei et al., 2018): of n measured shares the
ceil((n + 1) x COVERAGE)-th smallest is not exceeded by the next one with a probability of at least COVERAGE, whatever
their distribution, as long as their order says nothing. Too few observations for that widen the margin to the worst
of them, and never tighten it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from math import ceil
from operator import is_

from orchestrator.api.job import Attempt, QLoRAJob, QLoRAJobStatus
from orchestrator.api.plan import MemoryPlan
from orchestrator.api.reasons import Reason
from orchestrator.sizing.hardware import CLASS_NAMES, gpu_class

COVERAGE = 0.98
OBSERVATIONS_KEPT = 200
"""The newest of one kind; older ones are forgotten."""
LARGEST_SHARE = 0.25
"""More than this is no error of the model: something else was on the card."""

Kind = str
"""What kind of plan: how much it recomputes, and what of it is on the host."""


def plan_kind(recompute_layers: int, num_layers: int, on_host: Iterable[str]) -> Kind:
    """Plans of one kind take their bytes at the same moments."""
    recomputed = "kept" if recompute_layers == 0 else "recomputed" if recompute_layers >= num_layers else "mixed"
    return "+".join((recomputed, *on_host))


def _on_host(plan: MemoryPlan) -> tuple[str, ...]:
    kept = ("kept",) if plan.offloaded_layers else ()
    layers = ("layers",) if plan.streamed_layers else ()
    return (*plan.offload, *kept, *layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One attempt's peak."""

    namespace: str
    architecture: str
    kind: Kind
    versions: str
    time: datetime
    share: float
    """Measured over predicted, less one. Of an attempt that ran out of memory: what it found too little."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """What a namespace knows of one kind of plan on one architecture under the versions that trained last."""

    namespace: str
    architecture: str
    kind: Kind
    versions: str
    observations: int
    worst_share: float
    """The largest of them."""
    share: float
    """The margin that follows, of what is predicted."""
    certain: bool
    """Whether there are enough observations for the coverage to hold."""

    def to_wire(self) -> dict[str, object]:
        """JSON types with wire names."""
        return {
            "namespace": self.namespace,
            "architecture": self.architecture,
            "kind": self.kind,
            "versions": self.versions,
            "observations": self.observations,
            "worstShare": round(self.worst_share, 5),
            "marginShare": round(self.share, 5),
            "certain": self.certain,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Margins:
    """The learned margins of one architecture.

    A kind that has not been seen yet has the widest of them, so that no plan escapes into the unknown.
    """

    shares: tuple[tuple[Kind, float, bool], ...] = ()
    """Kind, share, and whether it may be narrower than the model's own."""

    def share(self, plan: MemoryPlan, num_layers: int, recompute_layers: int, default: float) -> float:
        """The margin for a plan, of what is predicted for it."""
        kind = plan_kind(recompute_layers, num_layers, _on_host(plan))
        for known, share, certain in self.shares:
            if known == kind:
                return share if certain else max(share, default)
        return max(default, *(share for _, share, _ in self.shares)) if self.shares else default


DEFAULT = Margins()


def learned(jobs: Iterable[QLoRAJob]) -> Mapping[tuple[str, str], Margins]:
    """The margins by namespace and architecture.

    The controller asks in every pass, and jobs that teach seldom change in between.
    """
    teaching = [job for job in jobs if teaches(job.status)]
    return _learned(_Statuses(tuple(job.status for job in teaching), tuple(job.metadata.namespace for job in teaching)))


def bounds(jobs: Iterable[QLoRAJob]) -> tuple[Bound, ...]:
    """Everything that is known, by namespace, architecture and kind."""
    return _bounds((job.metadata.namespace, job.status) for job in jobs if teaches(job.status))


def teaches(status: QLoRAJobStatus) -> bool:
    """Whether an attempt came to its end, or ran out of memory."""
    return status.adapter_uri is not None or bool(status.step_ups)


class _Statuses:
    """Statuses as one key, by identity: to compare ten thousand of them by value takes longer than to ask them again.

    A status stays with its job, so that the namespaces need no comparison.

    A store that watches gives the same object as long as a job is unchanged.
    """

    __slots__ = ("namespaces", "statuses")

    def __init__(self, statuses: tuple[QLoRAJobStatus, ...], namespaces: tuple[str, ...]) -> None:
        self.statuses = statuses
        self.namespaces = namespaces

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Statuses) or len(self.statuses) != len(other.statuses):
            return False
        return all(map(is_, self.statuses, other.statuses))

    def __hash__(self) -> int:
        return hash(tuple(map(id, self.statuses)))


@lru_cache(maxsize=1)
def _learned(known: _Statuses) -> Mapping[tuple[str, str], Margins]:
    found: defaultdict[tuple[str, str], list[tuple[Kind, float, bool]]] = defaultdict(list)
    for bound in _bounds(zip(known.namespaces, known.statuses, strict=True)):
        found[bound.namespace, bound.architecture].append((bound.kind, bound.share, bound.certain))
    return {key: Margins(shares=tuple(shares)) for key, shares in found.items()}


def _bounds(statuses: Iterable[tuple[str, QLoRAJobStatus]]) -> tuple[Bound, ...]:
    observed: defaultdict[tuple[str, str, Kind], list[Observation]] = defaultdict(list)
    for observation in _observations(statuses):
        observed[observation.namespace, observation.architecture, observation.kind].append(observation)
    return tuple(_bound(observed[key]) for key in sorted(observed))


def _bound(observed: Sequence[Observation]) -> Bound:
    newest = sorted(observed, key=lambda each: (each.time, each.share), reverse=True)
    versions = newest[0].versions
    shares = [each.share for each in newest if each.versions == versions][:OBSERVATIONS_KEPT]
    quantile = conformal_bound(shares, COVERAGE)
    share = max(shares) if quantile is None else quantile
    return Bound(
        namespace=newest[0].namespace,
        architecture=newest[0].architecture,
        kind=newest[0].kind,
        versions=versions,
        observations=len(shares),
        worst_share=max(shares),
        share=min(max(share, 0.0), LARGEST_SHARE),
        certain=quantile is not None,
    )


def conformal_bound(shares: Sequence[float], coverage: float) -> float | None:
    """What the next share does not exceed with this probability; None where there are too few to tell."""
    place = ceil((len(shares) + 1) * coverage)
    return sorted(shares)[place - 1] if place <= len(shares) else None


def _observations(statuses: Iterable[tuple[str, QLoRAJobStatus]]) -> Iterator[Observation]:
    """What the attempts have measured."""
    for namespace, status in statuses:
        for attempt in status.attempts:
            if attempt.predicted_bytes and (share := _share(attempt, attempt.predicted_bytes)) is not None:
                yield from _observation(namespace, status, attempt, share)


def _share(attempt: Attempt, predicted_bytes: int) -> float | None:
    """An attempt that ended early may not have seen its peak, so only whole ones and those without room count."""
    if attempt.measured_bytes is not None and attempt.reason is Reason.SUCCEEDED:
        return attempt.measured_bytes / predicted_bytes - 1
    if attempt.reason is Reason.OUT_OF_MEMORY and attempt.gpu_class in CLASS_NAMES:
        return gpu_class(attempt.gpu_class, 0).usable_bytes / predicted_bytes - 1
    return None


def _observation(namespace: str, status: QLoRAJobStatus, attempt: Attempt, share: float) -> Iterator[Observation]:
    """Nothing where the record lacks what training comes with: one job's status must not spoil others' margins."""
    prepared, plan, time = status.prepared, attempt.plan, attempt.finish_time
    if prepared is None or plan is None or time is None:
        return
    yield Observation(
        namespace=namespace,
        architecture=prepared.model.architecture,
        kind=plan_kind(plan.recompute_layers, prepared.model.num_layers, _on_host(plan)),
        versions=attempt.versions or "",
        time=time,
        share=share,
    )
