"""All jobs together: which stages start now, who makes way, and why everybody else waits.

One `Schedule` is the whole decision: commands and explanations are both read from it. What is worked out for one job is
contained there (`core/job/containment`): it can fail that job, never the others' round.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from orchestrator.api.job import QLoRAJob
from orchestrator.api.plan import Estimate
from orchestrator.api.queue import QLoRAQueueSpec
from orchestrator.api.reasons import Reason, Refusal
from orchestrator.api.stage_name import StageKind
from orchestrator.core.commands import Event
from orchestrator.core.job.attempts import admit, request_stop, start_cpu_stage
from orchestrator.core.job.containment import abandon, contained, failed_by_defect
from orchestrator.core.job.lifecycle import is_ready, reconcile, wait
from orchestrator.core.job.outages import Cause, Outage, current_outages, holds_back
from orchestrator.core.job.recovery import fail
from orchestrator.core.job.setbacks import avoided_classes, broken_nodes
from orchestrator.core.job.stage_commands import unexplained_holders
from orchestrator.core.job.state_machine import GPU_STATES, JobState, state_of
from orchestrator.core.job.status_draft import Draft
from orchestrator.core.scheduling.admission import Ledger, Placement, Quotas, place, why_blocked
from orchestrator.core.scheduling.cpu_slots import CpuSlots, in_turn
from orchestrator.core.scheduling.ordering import (
    NO_QUEUE,
    Claim,
    account,
    created,
    in_order,
    next_shares,
    permission_refusal,
    queue_refusal,
    queue_shares,
    queue_specs,
    standing,
)
from orchestrator.core.scheduling.preemption import EVICTIONS_BY_US, Holding, Preemption, choose_victims, lost_seconds
from orchestrator.core.snapshot import Policy, Snapshot, StagePhase
from orchestrator.sizing.hardware import GpuClass
from orchestrator.sizing.margins import DEFAULT, Margins, learned
from orchestrator.sizing.plan_search import candidates
from orchestrator.sizing.step_time import Work


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """What one look at the world leads to."""

    drafts: Mapping[str, Draft]
    """Every job, by its key, in the order of the keys."""
    line: tuple[Claim, ...]
    """Who waits for a GPU, in order, those that got one now included."""
    placements: tuple[Placement, ...]
    preemptions: tuple[Preemption, ...]
    refusals: Mapping[str, Refusal]
    """Why a waiting job got no GPU now, by its key."""


def schedule(snapshot: Snapshot) -> Schedule:
    """Reconcile each job, then start, evict and refuse."""
    jobs = sorted(snapshot.jobs, key=lambda job: job.key)
    drafts = {job.key: _reconciled(job, snapshot) for job in jobs}  # 1. each job by itself
    queues = queue_specs(snapshot.queues)
    drafts |= _start_cpu_stages(drafts.values(), queues, snapshot)  # 2. prepare and publish

    outages = current_outages(((draft.job, draft.status) for draft in drafts.values()), snapshot)
    drafts |= _told_of_outages(drafts, outages, snapshot)
    claims, refusals, failed = _claims(drafts.values(), queues, snapshot)  # 3. who wants a GPU
    drafts |= failed
    line = _line(claims, drafts.values(), queues, snapshot)  # 4. in which order
    line, held = _without_held(line, drafts, outages, snapshot.policy)
    refusals |= held
    holdings = _holdings(drafts.values(), queues, snapshot)
    ledger = _ledger(holdings, queues, snapshot)
    placements = place(line, ledger)  # 5. who gets one now
    placed = {placement.claim.key for placement in placements}
    blocked = [claim for claim in line if claim.key not in placed]
    chosen = choose_victims(blocked, holdings, ledger, snapshot.policy)  # 6. who makes way
    nodes = broken_nodes(snapshot.jobs, snapshot.now, snapshot.policy)
    preemptions, failed = _worth_a_victim(drafts, chosen, nodes, snapshot)
    drafts |= failed
    blocked = [claim for claim in blocked if claim.key not in failed]
    refusals |= _blocked_refusals(blocked, preemptions, ledger)

    drafts |= _admitted(drafts, placements, nodes, snapshot)
    drafts |= _evicted(drafts, preemptions)
    drafts |= _refused(drafts, refusals | _with_places(refusals, blocked), snapshot)
    return Schedule(drafts=drafts, line=tuple(line), placements=placements, preemptions=preemptions, refusals=refusals)


def _reconciled(job: QLoRAJob, snapshot: Snapshot) -> Draft:
    """The job by itself; one of which nothing can come takes part in nothing, and ends."""
    opened = Draft.open(job, snapshot.now)
    refused = snapshot.refused.get(job.metadata.uid)
    if refused is not None:
        return contained(opened, snapshot, partial(abandon, snapshot=snapshot, message=refused))
    return contained(opened, snapshot, lambda _: reconcile(job, snapshot))


# --- prepare and publish ----------------------------------------------------------------------------------------


def _start_cpu_stages(
    drafts: Iterable[Draft], queues: Mapping[str, QLoRAQueueSpec], snapshot: Snapshot
) -> dict[str, Draft]:
    """Start prepare and publish stages within their bound, each namespace in its turn.

    Nothing is prepared for a queue that the job may not use; what is trained is published all the same.
    """
    policy, everyone = snapshot.policy, list(drafts)
    ready = [d for d in everyone if d.state in (JobState.NEW, JobState.TRAINED) and is_ready(d, policy)]
    changed: dict[str, Draft] = {}
    runnable: list[Draft] = []
    for draft in ready:
        refusal = permission_refusal(draft.job, queues) if draft.state is JobState.NEW else None
        if refusal is not None:
            changed[draft.job.key] = wait(draft, refusal.reason, refusal.message)
        elif draft.state is JobState.TRAINED and draft.status.mlflow.run_id is None:
            message = "the adapter is safe in the store; waits for MLflow to give the job a run"
            changed[draft.job.key] = wait(draft, Reason.TRACKING_UNAVAILABLE, message)
        else:
            runnable.append(draft)
    slots = CpuSlots.of(everyone, snapshot)
    for draft in in_turn(runnable, everyone, slots):
        changed[draft.job.key] = _in_cpu_slot(draft, slots, snapshot)
    return changed


def _in_cpu_slot(draft: Draft, slots: CpuSlots, snapshot: Snapshot) -> Draft:
    """The job with its next CPU stage begun, or with why it waits."""
    stage: StageKind = "prepare" if draft.state is JobState.NEW else "publish"
    why = slots.take(draft.job.metadata.namespace)
    if why:
        return wait(draft, Reason.PREPARING if stage == "prepare" else Reason.PUBLISHING, why)
    return contained(draft, snapshot, partial(start_cpu_stage, stage=stage, snapshot=snapshot))


# --- train: who wants a GPU, who has one ------------------------------------------------------------------------


def _claims(
    drafts: Iterable[Draft], queues: Mapping[str, QLoRAQueueSpec], snapshot: Snapshot
) -> tuple[list[Claim], dict[str, Refusal], dict[str, Draft]]:
    """The claims of all jobs ready to train, why some of them have none, and those that cannot be sized at all."""
    claims: list[Claim] = []
    refusals: dict[str, Refusal] = {}
    failed: dict[str, Draft] = {}
    margins = learned(snapshot.jobs)
    for draft in drafts:
        if draft.state is not JobState.QUEUED or not is_ready(draft, snapshot.policy):
            continue
        try:
            found = queue_refusal(draft.job, queues) or _estimates(draft, snapshot, margins)
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this job's failure
            failed[draft.job.key] = failed_by_defect(draft.job, snapshot, error)
            continue
        if isinstance(found, Refusal):
            refusals[draft.job.key] = found
        else:
            claims.append(_claim(draft, found))
    return claims, refusals, failed


def _claim(draft: Draft, estimates: tuple[Estimate, ...]) -> Claim:
    job = draft.job
    return Claim(
        key=job.key,
        uid=job.metadata.uid,
        queue=job.spec.queue,
        priority=job.spec.priority,
        created=created(job, draft.now),
        estimates=estimates,
        classes=tuple(estimate.gpu_class for estimate in estimates),
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
    avoided = avoided_classes(draft.status, draft.now, snapshot.policy)
    if isinstance(found, Refusal) or not avoided:
        return found
    others = tuple(estimate for estimate in found if estimate.gpu_class not in avoided)
    if others or draft.status.estimate is None:
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
    """Where the job may train by what it needs."""
    status, spec = draft.status, draft.job.spec
    exact_resume = spec.training.deterministic and status.checkpoint is not None
    if status.estimate is not None and (exact_resume or status.step_ups > 0):
        here = {c.name for c in snapshot.gpu_classes if c.capacity > 0}
        if status.estimate.gpu_class in here:
            return (status.estimate,)
    return _sized(draft, snapshot, margins)


def _sized(
    draft: Draft, snapshot: Snapshot, margins: Mapping[tuple[str, str], Margins]
) -> tuple[Estimate, ...] | Refusal:
    """Every class here that the job fits."""
    spec, prepared = draft.job.spec, draft.status.prepared
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


def _line(
    claims: Sequence[Claim], drafts: Iterable[Draft], queues: Mapping[str, QLoRAQueueSpec], snapshot: Snapshot
) -> list[Claim]:
    shares = queue_shares(drafts, queues, snapshot.gpu_classes, snapshot.policy)
    return in_order(claims, shares, next_shares(claims, queues, snapshot.gpu_classes, snapshot.policy))


def _without_held(
    line: list[Claim], drafts: Mapping[str, Draft], outages: Mapping[Cause, Outage], policy: Policy
) -> tuple[list[Claim], dict[str, Refusal]]:
    """The line without those that an outage would stop; of each outage the first in line tries whether it is over."""
    if not outages:
        return line, {}
    probed = {cause for cause, outage in outages.items() if outage.probe is not None}
    kept: list[Claim] = []
    held: dict[str, Refusal] = {}
    for claim in line:
        outage = holds_back(outages, drafts[claim.key].job, "train", policy)
        if outage is not None and outage.cause in probed:
            held[claim.key] = Refusal(reason=Reason.OUTAGE, message=outage.sentence)
            continue
        if outage is not None:
            probed.add(outage.cause)
        kept.append(claim)
    return kept, held


def _told_of_outages(
    drafts: Mapping[str, Draft], outages: Mapping[Cause, Outage], snapshot: Snapshot
) -> dict[str, Draft]:
    """One event for each outage that has just begun, at the first of its jobs."""
    if not outages:
        return {}
    known = current_outages(((job, job.status) for job in snapshot.jobs), snapshot)
    changed: dict[str, Draft] = {}
    for cause, outage in outages.items():
        if cause not in known:
            key = outage.jobs[0]
            told = Event(reason=Reason.OUTAGE, message=outage.sentence, warning=True)
            changed[key] = changed.get(key, drafts[key]).tell(told)
    return changed


def _holdings(drafts: Iterable[Draft], queues: Mapping[str, QLoRAQueueSpec], snapshot: Snapshot) -> tuple[Holding, ...]:
    """The GPUs that train stages have: admitted, running, or stopping."""
    return tuple(_holding(draft, queues, snapshot) for draft in drafts if draft.state in GPU_STATES)


def _holding(draft: Draft, queues: Mapping[str, QLoRAQueueSpec], snapshot: Snapshot) -> Holding:
    attempt, job = draft.attempt, draft.job
    assert attempt is not None, "a GPU is held by an attempt"
    since = attempt.start_time or attempt.created_time
    return Holding(
        key=job.key,
        uid=job.metadata.uid,
        queue=account(job.metadata.namespace, job.spec.queue, queues),
        priority=standing(job, queues),
        gpu_class=attempt.gpu_class or "",
        stopping=attempt.stop_time is not None,
        run_seconds=max(0.0, (snapshot.now - since).total_seconds()),
        lost_seconds=lost_seconds(draft.status, snapshot.now, snapshot.policy),
        was_evicted=any(reason.value in draft.status.evictions for reason in EVICTIONS_BY_US),
    )


def _ledger(holdings: Iterable[Holding], queues: Mapping[str, QLoRAQueueSpec], snapshot: Snapshot) -> Ledger:
    ledger = Ledger(capacity={c.name: c.capacity for c in snapshot.gpu_classes}, quotas=Quotas.of(queues))
    for holding in holdings:
        ledger.take(holding.queue, holding.gpu_class)
    for job in snapshot.unreadable:
        fact = snapshot.stages.get(f"{job.namespace}/{job.stage}")
        if fact is not None and fact.phase is not StagePhase.EXITED and job.gpu_class is not None:
            ledger.take(account(job.namespace, job.queue, queues), job.gpu_class)
    for fact in unexplained_holders(snapshot):
        for _ in range(fact.gpus):
            ledger.take(NO_QUEUE, fact.gpu_class or "")
    return ledger


# --- what comes of it -------------------------------------------------------------------------------------------


def _blocked_refusals(
    blocked: Iterable[Claim], preemptions: Iterable[Preemption], ledger: Ledger
) -> dict[str, Refusal]:
    coming = {preemption.claim.key: preemption.estimate.gpu_class for preemption in preemptions}
    whys: dict[tuple[str, tuple[str, ...]], Refusal] = {}
    refusals: dict[str, Refusal] = {}
    for claim in blocked:
        gpu_class, kind = coming.get(claim.key), (claim.queue, claim.classes)
        if gpu_class is not None:
            message = f"waits for a job on {gpu_class} to checkpoint, stop and free its GPU"
            refusals[claim.key] = Refusal(reason=Reason.WAITING_FOR_PREEMPTION, message=message)
            continue
        if kind not in whys:
            whys[kind] = why_blocked(claim, ledger)
        refusals[claim.key] = whys[kind]
    return refusals


def _with_places(refusals: Mapping[str, Refusal], blocked: Sequence[Claim]) -> dict[str, Refusal]:
    """The refusals of those in line with where in it they are, for whoever may not see the others.

    In words: a figure would be another with every job that starts, and a status is not written for a figure.
    """
    return {
        claim.key: replace(refusal, message=f"{refusal.message}; {_place_in_words(place)}")
        for place, claim in enumerate(blocked)
        if (refusal := refusals.get(claim.key)) is not None
    }


def _place_in_words(place: int) -> str:
    if place == 0:
        return "first in line"
    named = next((words for bound, words in ((10, "ten"), (100, "hundred"), (1000, "thousand")) if place < bound), None)
    return f"among the first {named} in line" if named else "beyond the first thousand in line"


def _worth_a_victim(
    drafts: Mapping[str, Draft], preemptions: Iterable[Preemption], nodes: tuple[str, ...], snapshot: Snapshot
) -> tuple[tuple[Preemption, ...], dict[str, Draft]]:
    """The preemptions for jobs that could be admitted and have that stored; the other jobs fail, and move nobody.

    Nor does one whose claim is not on record yet: what it claims by may be what no store takes.
    """
    worth: list[Preemption] = []
    failed: dict[str, Draft] = {}
    for preemption in preemptions:
        draft = drafts[preemption.claim.key]
        if state_of(draft.job.status) is not JobState.QUEUED:
            continue
        admission = partial(_storable_admission, estimate=preemption.estimate, nodes=nodes, snapshot=snapshot)
        tried = contained(draft, snapshot, admission)
        if tried.defect:
            failed[preemption.claim.key] = tried
        else:
            worth.append(preemption)
    return tuple(worth), failed


def _storable_admission(draft: Draft, estimate: Estimate, nodes: tuple[str, ...], snapshot: Snapshot) -> Draft:
    admitted = admit(draft, estimate, snapshot, nodes)
    admitted.close()
    return admitted


def _admitted(
    drafts: Mapping[str, Draft], placements: Iterable[Placement], nodes: tuple[str, ...], snapshot: Snapshot
) -> dict[str, Draft]:
    return {
        p.claim.key: contained(
            drafts[p.claim.key],
            snapshot,
            partial(_storable_admission, estimate=p.estimate, nodes=nodes, snapshot=snapshot),
        )
        for p in placements
    }


def _evicted(drafts: Mapping[str, Draft], preemptions: Iterable[Preemption]) -> dict[str, Draft]:
    changed: dict[str, Draft] = {}
    for preemption in preemptions:
        victim = preemption.victim
        if victim is not None:
            message = _eviction_sentence(preemption, victim)
            changed[victim.key] = request_stop(drafts[victim.key], preemption.reason, message)
    return changed


def _eviction_sentence(preemption: Preemption, victim: Holding) -> str:
    claim = preemption.claim
    if preemption.reason is Reason.QUOTA_RECLAIMED:
        return (
            f"queue {claim.queue} needs the {victim.gpu_class} GPU that queue {victim.queue} has beyond its own, for "
            f"{claim.key}"
        )
    return f"makes way on {victim.gpu_class} for {claim.key}: priority {claim.priority} over {victim.priority}"


def _refused(drafts: Mapping[str, Draft], refusals: Mapping[str, Refusal], snapshot: Snapshot) -> dict[str, Draft]:
    """Say why; where no other GPU can ever appear, a job that fits none is told so for good."""
    for_good = snapshot.policy.gpu_classes_are_fixed
    changed: dict[str, Draft] = {}
    for key, refusal in refusals.items():
        if refusal.reason is Reason.DOES_NOT_FIT and for_good:
            changed[key] = fail(drafts[key], refusal.reason, refusal.message)
        else:
            changed[key] = wait(drafts[key], refusal.reason, refusal.message)
    return changed
