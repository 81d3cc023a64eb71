"""All jobs together: which stages start now, who makes way, and why everybody else waits.

One `Round` is the whole decision: commands and explanations are both read from it. What is worked out for one job is
contained there (`core/job/containment`): it can fail that job, never the others' round. A `Scheduler` keeps between
rounds what `core/scheduling/index` tells; `schedule` is a round that begins with nothing, and comes to the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice

from orchestrator.api.plan import Estimate
from orchestrator.api.reasons import ConditionType, Reason, Refusal
from orchestrator.api.stage_name import StageKind
from orchestrator.core.commands import Event
from orchestrator.core.job.attempts import admit, request_stop, start_cpu_stage
from orchestrator.core.job.conditions import clip, is_said, words
from orchestrator.core.job.containment import contained
from orchestrator.core.job.lifecycle import is_ready, wait
from orchestrator.core.job.outages import Cause, Outage, current_outages, holds_back
from orchestrator.core.job.recovery import fail
from orchestrator.core.job.revision import Admission
from orchestrator.core.job.setbacks import broken_nodes
from orchestrator.core.job.starting_job import begins_with
from orchestrator.core.job.state_machine import TERMINAL_STATES, JobState, state_of
from orchestrator.core.job.status_draft import Draft
from orchestrator.core.scheduling.admission import Held, Ledger, Placement, depends_on, place, why_blocked
from orchestrator.core.scheduling.cpu_slots import CpuSlots, in_turn
from orchestrator.core.scheduling.defragmentation import Cards, make_room
from orchestrator.core.scheduling.index import Entry, Index
from orchestrator.core.scheduling.line import Fare, RankedLine, fare_of
from orchestrator.core.scheduling.ordering import Claim, created, permission_refusal
from orchestrator.core.scheduling.preemption import (
    Holding,
    Hopeless,
    Preemption,
    Running,
    choose_victims,
    reserve_coming_free,
)
from orchestrator.core.scheduling.usage import NOTHING, dominant
from orchestrator.core.snapshot import Policy, Snapshot

PLACES_TOLD = ((1, "first in line"), (10, "among the first ten in line"), (100, "among the first hundred in line"))
BEYOND = "beyond the first hundred in line"
Kept = tuple[tuple[str, str], str, tuple[str, ...], bool]
"""One of a user's GPUs that is left for a job: queue and user, the job's key and classes, and whether of what comes
free."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What one look at the world leads to."""

    index: Index
    """All jobs as they are by themselves."""
    drafts: Mapping[str, Draft]
    """Of whom something becomes, by key; of all others nothing does."""
    line: RankedLine
    """Who waits for a GPU, those that got one now included."""
    placements: tuple[Placement, ...]
    preemptions: tuple[Preemption, ...]
    refusals: Refusals

    def whole(self, snapshot: Snapshot) -> Schedule:
        """The same, job by job."""
        everyone = self.index.drafts(self.index.entries, snapshot.now)
        return Schedule(
            drafts={**everyone, **self.drafts},
            line=tuple(self.line.in_order()),
            placements=self.placements,
            preemptions=self.preemptions,
            users={
                (queue, user): dominant(share, NOTHING, 0)
                for queue in self.index.shares.by_user
                for user, share in self.index.shares.users_at(queue, snapshot.now).items()
            },
            refusals={key: found for key in everyone if (found := self.refusals.of_job(key)) is not None},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A round, with everybody."""

    drafts: Mapping[str, Draft]
    """Every job, by its key, in the order of the keys."""
    line: tuple[Claim, ...]
    """Who waits for a GPU, in order, those that got one now included."""
    placements: tuple[Placement, ...]
    preemptions: tuple[Preemption, ...]
    users: Mapping[tuple[str, str], float]
    """What part of the cluster users have had of late, by queue and user, of queues that are shared out by user."""
    refusals: Mapping[str, Refusal]
    """Why a waiting job got no GPU now, by its key."""


def schedule(snapshot: Snapshot) -> Schedule:
    """Reconcile each job, then start, evict and refuse."""
    return Scheduler().round(snapshot).whole(snapshot)


@dataclass(slots=True)
class Scheduler:
    """Round after round, each equal to one that begins with nothing."""

    _index: Index | None = None
    _hopeless: Hopeless = field(default_factory=Hopeless)
    _taken: Counter[Held] = field(default_factory=Counter[Held])
    """What the last round gave out, of what was free or coming free."""
    _kept: set[Kept] = field(default_factory=set[Kept])
    """What the last round kept for jobs that are next of their users'."""
    _told: Told = field(default_factory=lambda: Told())

    def round(self, snapshot: Snapshot) -> Round:
        """Look at what has changed, then start, evict and refuse."""
        index = self._follow(snapshot)
        drafts = index.drafts(index.restless, snapshot.now)  # 1. each job by itself
        drafts |= _drained(drafts, index, snapshot)
        drafts |= _start_cpu_stages(drafts, index, snapshot)  # 2. prepare and publish

        outages = _outages(drafts, index, snapshot)
        drafts |= _told_of_outages(drafts, outages, index, snapshot)
        line = RankedLine.of(index.line, index.shares, snapshot.now)  # 3. who wants a GPU, in which order
        held = _held(line, outages, index, snapshot.policy)
        line = line.without(held)
        ledger = index.ledger.copy()
        placements = place(line, ledger)  # 4. who gets one now
        nodes = broken_nodes((index.entries[key].job for key in index.broken), snapshot.now, snapshot.policy)
        blocked = line.without(placement.claim.key for placement in placements)
        chosen, moved = self._who_makes_way(blocked, placements, ledger, index, outages, snapshot)  # 5. who makes way
        preemptions, failed = _worth_a_victim(chosen, nodes, index, snapshot)
        drafts |= failed
        blocked = blocked.without(failed)
        refusals = Refusals.of(blocked, held, preemptions, ledger, index)

        drafts |= _admitted(drafts, placements, nodes, index, snapshot)
        drafts |= _evicted(drafts, preemptions, index, snapshot)
        drafts |= self._told.refused(drafts, refusals, moved, snapshot)  # 6. why everybody else waits
        drafts = {key: drafts[key] for key in sorted(drafts)}
        return Round(
            index=index, drafts=drafts, line=line, placements=placements, preemptions=preemptions, refusals=refusals
        )

    def _follow(self, snapshot: Snapshot) -> Index:
        """The index of the snapshot; with a new one begins what depends on queues and GPUs, too."""
        index = Index.of(snapshot) if self._index is None else self._index.follow(snapshot)
        if index is not self._index:
            self._index, self._hopeless, self._taken = index, Hopeless(), Counter()
        return index

    def _who_makes_way(
        self,
        blocked: RankedLine,
        placements: tuple[Placement, ...],
        ledger: Ledger,
        index: Index,
        outages: Mapping[Cause, Outage],
        snapshot: Snapshot,
    ) -> tuple[tuple[Preemption, ...], set[str]]:
        """What each blocked claim may count on, and of what others have the GPUs than before (`depends_on`)."""
        books = ledger.copy()
        reserved = reserve_coming_free(blocked, index.coming_free(), books)
        taken = Counter((p.claim.queue, p.estimate.gpu_class, p.claim.user) for p in (*placements, *reserved))
        others = [held for held in taken.keys() | self._taken.keys() if taken[held] != self._taken[held]]
        moved = index.moved.union(*(depends_on(queue, (gpu_class,), user) for queue, gpu_class, user in others))
        claims = blocked.line.claims
        kept = {
            (of, key, claims[key].classes, books is each) for each in (ledger, books) for of, key in each.heads.items()
        }
        moved = moved.union(*(depends_on(of[0], (), of[1]) for of, *_ in kept ^ self._kept))
        self._kept = kept
        self._taken = taken
        self._hopeless.forget(moved)
        left = blocked.without(preemption.claim.key for preemption in reserved)
        running = Running(index.movable, partial(index.holdings, snapshot=snapshot), snapshot.policy)
        chosen = (*reserved, *choose_victims(left, running, books, self._hopeless))
        if not snapshot.policy.defragmentation_gain or outages:  # whoever is moved may then not start again
            return chosen, moved
        cards = Cards(occupants=partial(index.occupants, now=snapshot.now), ends=partial(index.ends, snapshot=snapshot))
        left = left.without(preemption.claim.key for preemption in chosen)
        return (*chosen, *make_room(left, running, cards, chosen, books)), moved


# --- queues that are drained ------------------------------------------------------------------------------------


def _drained(drafts: Mapping[str, Draft], index: Index, snapshot: Snapshot) -> dict[str, Draft]:
    """The jobs that hold GPUs of queues with stopPolicy HoldAndDrain, asked to stop."""
    draining = {name for name, spec in index.queues.items() if spec.stops == "HoldAndDrain"}
    if not draining:
        return {}
    changed: dict[str, Draft] = {}
    for key in sorted(set[str]().union(*index.holders.values()) - index.stopping):
        holding = index.entries[key].holding
        if holding is not None and holding.queue in draining:
            message = f"queue {holding.queue} is drained; goes on once it is released"
            ask = partial(request_stop, reason=Reason.QUEUE_DRAINED, message=message)
            changed[key] = contained(drafts.get(key) or index.draft(key, snapshot.now), snapshot, ask)
    return changed


# --- prepare and publish ----------------------------------------------------------------------------------------


def _start_cpu_stages(drafts: Mapping[str, Draft], index: Index, snapshot: Snapshot) -> dict[str, Draft]:
    """Start prepare and publish stages within their bound, each namespace in its turn.

    Nothing is prepared for a queue that the job may not use; what is trained is published all the same.
    """
    idle = index.drafts(index.idle, snapshot.now).values()
    crowded = _crowded(idle, index, snapshot)
    changed: dict[str, Draft] = {}
    runnable: list[Draft] = []
    for draft in idle:
        if not is_ready(draft, snapshot.policy):
            continue
        refusal = crowded.get(draft.job.key) or (
            permission_refusal(draft.job, index.queues) if draft.state is JobState.NEW else None
        )
        if refusal is None:
            begun = begins_with(draft, index.job)
            refusal, draft = (begun, draft) if isinstance(begun, Refusal) else (None, begun)
        if draft.state in TERMINAL_STATES:
            changed[draft.job.key] = draft
        elif refusal is not None:
            changed[draft.job.key] = wait(draft, refusal.reason, refusal.message)
        elif draft.state is JobState.TRAINED and draft.status.mlflow.run_id is None:
            message = "the adapter is safe in the store; waits for MLflow to give the job a run"
            changed[draft.job.key] = wait(draft, Reason.TRACKING_UNAVAILABLE, message)
        else:
            runnable.append(draft)
    if not runnable:
        return changed
    slots = CpuSlots.of((drafts[key] for key in index.in_cpu_stage), snapshot)
    namespaces = {draft.job.metadata.namespace for draft in runnable}
    served = {
        name: min(max(index.served[name].values()), snapshot.now) for name in namespaces if index.served.get(name)
    }
    for draft in in_turn(runnable, served, slots):
        changed[draft.job.key] = _in_cpu_slot(draft, slots, snapshot)
    return changed


def _crowded(idle: Iterable[Draft], index: Index, snapshot: Snapshot) -> dict[str, Refusal]:
    """Who is not prepared because as many of his user's jobs wait as the queue lets; the oldest come first."""
    limits = {name: spec.per_user.waiting for name, spec in index.queues.items() if spec.per_user.waiting is not None}
    if not limits:
        return {}
    found: dict[str, Refusal] = {}
    waiting = Counter(index.waiting)
    new = [d for d in idle if d.state is JobState.NEW and d.job.spec.queue in limits and is_ready(d, snapshot.policy)]
    for draft in sorted(new, key=lambda draft: (created(draft.job, draft.now), draft.job.key)):
        queue, namespace = draft.job.spec.queue, draft.job.metadata.namespace
        if waiting[queue, namespace] < limits[queue]:
            waiting[queue, namespace] += 1
            continue
        message = (
            f"queue {queue} lets {limits[queue]} jobs of a namespace wait (perUser.waiting), and so many of "
            f"{namespace} do; waits for one of them to start, or raise the limit"
        )
        found[draft.job.key] = Refusal(reason=Reason.USER_LIMIT, message=message)
    return found


def _in_cpu_slot(draft: Draft, slots: CpuSlots, snapshot: Snapshot) -> Draft:
    """The job with its next CPU stage begun, or with why it waits."""
    stage: StageKind = "prepare" if draft.state is JobState.NEW else "publish"
    why = slots.take(draft.job.metadata.namespace)
    if why:
        return wait(draft, Reason.PREPARING if stage == "prepare" else Reason.PUBLISHING, why)
    return contained(draft, snapshot, partial(start_cpu_stage, stage=stage, snapshot=snapshot))


# --- train ------------------------------------------------------------------------------------------------------


def _outages(drafts: Mapping[str, Draft], index: Index, snapshot: Snapshot) -> Mapping[Cause, Outage]:
    """The outages that are on; hardly ever does any cause keep enough jobs waiting to be one."""
    if max(index.causes.values(), default=0) < snapshot.policy.outage_jobs:
        return {}
    everyone = {**index.drafts(index.entries, snapshot.now), **drafts}
    return current_outages(((draft.job, draft.status) for draft in everyone.values()), snapshot)


def _held(line: RankedLine, outages: Mapping[Cause, Outage], index: Index, policy: Policy) -> dict[str, Refusal]:
    """Whom an outage would stop; of each outage the first in line tries whether it is over."""
    if not outages:
        return {}
    probed = {cause for cause, outage in outages.items() if outage.probe is not None}
    held: dict[str, Refusal] = {}
    for claim in line.in_order():
        outage = holds_back(outages, index.entries[claim.key].job, "train", policy)
        if outage is not None and outage.cause in probed:
            held[claim.key] = Refusal(reason=Reason.OUTAGE, message=outage.sentence)
        elif outage is not None:
            probed.add(outage.cause)
    return held


def _told_of_outages(
    drafts: Mapping[str, Draft], outages: Mapping[Cause, Outage], index: Index, snapshot: Snapshot
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
            draft = changed.get(key) or drafts.get(key) or index.draft(key, snapshot.now)
            changed[key] = draft.tell(told)
    return changed


# --- what comes of it -------------------------------------------------------------------------------------------


def _storable_admission(draft: Draft, estimate: Estimate, nodes: tuple[str, ...], snapshot: Snapshot) -> Draft:
    admitted = admit(draft, estimate, snapshot, nodes)
    admitted.close()
    return admitted


def _tried_admission(draft: Draft, estimate: Estimate, nodes: tuple[str, ...], snapshot: Snapshot) -> Draft:
    """Nothing of an admission is a changed copy, which nobody has checked."""
    admitted = admit(draft, estimate, snapshot, nodes)
    admitted.check()
    return admitted


def _worth_a_victim(
    preemptions: Iterable[Preemption], nodes: tuple[str, ...], index: Index, snapshot: Snapshot
) -> tuple[tuple[Preemption, ...], dict[str, Draft]]:
    """The preemptions for jobs that could be admitted and have that stored; the other jobs fail, and move nobody.

    Nor does one whose claim is not on record yet: what it claims by may be what no store takes.
    """
    worth: list[Preemption] = []
    failed: dict[str, Draft] = {}
    for preemption in preemptions:
        key = preemption.claim.key
        known = index.entries[key].draft
        if state_of(known.job.status) is not JobState.QUEUED:
            continue
        admission = Admission(estimate=preemption.estimate, nodes=nodes, policy=snapshot.policy)
        if known.status is not known.job.status or index.entries[key].revision.storable != admission:
            trial = partial(_tried_admission, estimate=preemption.estimate, nodes=nodes, snapshot=snapshot)
            draft = contained(index.draft(key, snapshot.now), snapshot, trial)
            if draft.defect:
                failed[key] = draft
                continue
            if known.status is known.job.status:
                index.entries[key].revision.storable = admission
        worth.append(preemption)
    return tuple(worth), failed


def _admitted(
    drafts: Mapping[str, Draft],
    placements: Iterable[Placement],
    nodes: tuple[str, ...],
    index: Index,
    snapshot: Snapshot,
) -> dict[str, Draft]:
    return {
        p.claim.key: contained(
            drafts.get(p.claim.key) or index.draft(p.claim.key, snapshot.now),
            snapshot,
            partial(_storable_admission, estimate=p.estimate, nodes=nodes, snapshot=snapshot),
        )
        for p in placements
    }


def _evicted(
    drafts: Mapping[str, Draft], preemptions: Iterable[Preemption], index: Index, snapshot: Snapshot
) -> dict[str, Draft]:
    changed: dict[str, Draft] = {}
    for preemption in preemptions:
        victim = preemption.victim
        if victim is not None:
            message = _eviction_sentence(preemption, victim)
            draft = drafts.get(victim.key) or index.draft(victim.key, snapshot.now)
            changed[victim.key] = request_stop(draft, preemption.reason, message, preemption.onto or None)
    return changed


def _eviction_sentence(preemption: Preemption, victim: Holding) -> str:
    claim = preemption.claim
    if preemption.reason is Reason.QUOTA_RECLAIMED:
        return (
            f"queue {claim.queue} needs the {victim.gpu_class} GPU that queue {victim.queue} has beyond its own, for "
            f"{claim.key}"
        )
    if preemption.reason is Reason.TURN_ENDED:
        return f"its turn on {victim.gpu_class} is over (turnSeconds of queue {victim.queue}); {claim.key} is next"
    if preemption.reason is Reason.DEFRAGMENTED:
        return (
            f"makes room on {victim.gpu_class} for {claim.key}, which starts about {preemption.gain_seconds / 60:.0f} "
            f"minutes sooner; goes on on a free {preemption.onto}, which costs {victim.lost_seconds:.0f} GPU-seconds"
        )
    return f"makes way on {victim.gpu_class} for {claim.key}: priority {claim.priority} over {victim.priority}"


# --- why everybody else waits -----------------------------------------------------------------------------------


def _coming_sentence(preemption: Preemption) -> str:
    gpu_class = preemption.estimate.gpu_class
    if preemption.finishing:
        return f"waits for a job on {gpu_class} that is about to end"
    return f"waits for a job on {gpu_class} to checkpoint, stop and free its GPU"


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusals:
    """Why each waiting job gets no GPU in a round, worked out for whoever asks: most have heard it."""

    blocked: RankedLine
    held: Mapping[str, Refusal]
    coming: Mapping[str, str]
    """What those wait for whose GPU is coming free, by key."""
    front: Mapping[str, str]
    """Where in line they are, by key: of those who are near its beginning."""
    ledger: Ledger
    index: Index
    _whys: dict[Fare, Refusal] = field(default_factory=dict[Fare, Refusal])
    _rest: dict[Fare, Refusal] = field(default_factory=dict[Fare, Refusal])
    _said: dict[Fare, tuple[Reason, str]] = field(default_factory=dict[Fare, tuple[Reason, str]])

    @classmethod
    def of(
        cls,
        blocked: RankedLine,
        held: Mapping[str, Refusal],
        preemptions: Iterable[Preemption],
        ledger: Ledger,
        index: Index,
    ) -> Refusals:
        """Those of the jobs that are blocked, or held back."""
        coming = {preemption.claim.key: _coming_sentence(preemption) for preemption in preemptions}
        front = dict(_places_in_words(blocked.in_order()))
        return cls(blocked=blocked, held=held, coming=coming, front=front, ledger=ledger, index=index)

    def of_job(self, key: str) -> Refusal | None:
        """Why the job gets none; None where it gets one, or does not ask for one."""
        claim = self.blocked.line.claims.get(key)
        if claim is None:
            return self.index.entries[key].refusal
        if key in self.blocked.absent:
            return self.held.get(key)
        message = self.coming.get(key)
        if message is None:
            return self.of_fare(claim)
        return Refusal(reason=Reason.WAITING_FOR_PREEMPTION, message=message)

    def of_fare(self, claim: Claim) -> Refusal:
        """Why everybody waits who fits the same in the same queue."""
        fare = fare_of(claim)
        if fare not in self._whys:
            head = self.blocked.line.claims.get(self.ledger.heads.get((claim.queue, claim.user), ""), claim)
            self._whys[fare] = why_blocked(head if fare_of(head) == fare else claim, self.ledger)
        return self._whys[fare]

    def with_place(self, key: str) -> Refusal | None:
        """The same with where in line the job is, for whoever may not see the others.

        In words: a figure would be another with every job that starts, and a status is not written for a figure.
        """
        claim = self.blocked.line.claims.get(key)
        if claim is not None and key not in self.front and key not in self.coming and key not in self.blocked.absent:
            return self._of_the_rest(claim)
        refusal = self.of_job(key)
        if refusal is None or claim is None or key in self.blocked.absent:
            return refusal
        return replace(refusal, message=f"{refusal.message}; {self.front.get(key, BEYOND)}")

    def _of_the_rest(self, claim: Claim) -> Refusal:
        """What those of a fare are told who are not near the front."""
        fare = fare_of(claim)
        if fare not in self._rest:
            refusal = self.of_fare(claim)
            self._rest[fare] = replace(refusal, message=f"{refusal.message}; {BEYOND}")
        return self._rest[fare]

    def is_said(self, entry: Entry) -> bool:
        """Whether a job that only waits, as everybody of its fare, says so already; False says nothing."""
        claim = entry.claim
        if claim is None or entry.changed is not None:
            return False
        fare = fare_of(claim)
        said = self._said.get(fare)
        if said is None:
            refusal = self._of_the_rest(claim)
            said = self._said[fare] = refusal.reason, words(clip(refusal.message))
        return entry.revision.said == said

    def exceptions(self) -> dict[str, tuple[str, str]]:
        """What is not said to everybody of a fare, by key of those to whom it is not."""
        found = {key: (self.coming.get(key, ""), self.front.get(key, "")) for key in (*self.coming, *self.front)}
        for key in self.blocked.absent:
            found[key] = "absent", self.held[key].message if key in self.held else ""
        return found


def _places_in_words(blocked: Iterator[Claim]) -> Iterator[tuple[str, str]]:
    place = 0
    for bound, told in PLACES_TOLD:
        for claim in islice(blocked, bound - place):
            yield claim.key, told
        place = bound


@dataclass(slots=True)
class Told:
    """Who has heard why it waits: of thousands only those are looked at for whom something changed."""

    _news: set[str] = field(default_factory=set[str])
    """Of whom a status says something else."""
    _words: dict[Fare, tuple[Reason, str]] = field(default_factory=dict[Fare, tuple[Reason, str]])
    """What everybody of a fare is told, but for figures."""
    _exceptions: dict[str, tuple[str, str]] = field(default_factory=dict[str, tuple[str, str]])

    def refused(
        self, drafts: Mapping[str, Draft], refusals: Refusals, moved: Set[str], snapshot: Snapshot
    ) -> dict[str, Draft]:
        """The drafts of those of whom a status says something else than is so. `moved` is of what others have the GPUs
        than in the last round (`depends_on`)."""
        index, found = refusals.index, dict[str, Draft]()
        looked_at = {key for key in index.changed if key in index.line.claims or key in index.refused}
        looked_at |= self._of_changed_fares(refusals, moved)
        exceptions = refusals.exceptions()
        differs = exceptions.items() ^ self._exceptions.items()
        self._exceptions = exceptions
        looked_at |= {key for key, _ in differs if key in index.line.claims}
        self._news = {key for key in self._news if key in index.line.claims or key in index.refused}
        for key in looked_at | self._news:
            entry, draft = index.entries[key], drafts.get(key)
            if draft is None and key not in exceptions and refusals.is_said(entry):
                self._news.discard(key)
                continue
            refusal = refusals.with_place(key)
            if draft is None and _has_heard(entry, refusal):
                self._news.discard(key)
                continue
            refused = _refused(draft or index.draft(key, snapshot.now), refusal, snapshot.policy)
            if refused is not None and refused.says_something_new:
                self._news.add(key)
                found[key] = refused
            else:
                self._news.discard(key)
        return found

    def _of_changed_fares(self, refusals: Refusals, moved: Set[str]) -> set[str]:
        by_fare, found = refusals.index.line.by_fare, set[str]()
        for fare, places in by_fare.items():
            if fare in self._words and moved.isdisjoint(depends_on(*fare)):
                continue
            refusal = refusals.of_fare(refusals.index.line.claims[places[0][-1]])
            said = refusal.reason, words(refusal.message)
            if self._words.get(fare) != said:
                self._words[fare] = said
                found.update(place[-1] for place in places)
        for fare in self._words.keys() - by_fare.keys():
            del self._words[fare]  # whoever joins it is looked at alone
        return found


def _has_heard(entry: Entry, refusal: Refusal | None) -> bool:
    """Whether a job that only waits says so already: of thousands of drafts most would say nothing new."""
    if entry.changed is not None or refusal is None or refusal.reason is Reason.DOES_NOT_FIT:
        return False
    job = entry.job
    return is_said(job.status, ConditionType.ADMITTED, refusal.reason, refusal.message, job.metadata.generation)


def _refused(draft: Draft, refusal: Refusal | None, policy: Policy) -> Draft | None:
    """Say why; where no other GPU can ever appear, a job that fits none is told so for good."""
    if refusal is None:
        return None
    if refusal.reason is Reason.DOES_NOT_FIT and policy.gpu_classes_are_fixed:
        return fail(draft, refusal.reason, refusal.message)
    return wait(draft, refusal.reason, refusal.message)
