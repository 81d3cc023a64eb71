"""What is kept of a snapshot between decisions, and what a changed object invalidates.

- A job's own outcome holds while the job, its stages, its run and what its namespace has taught of its model are the
  same, until the time that `core/job/rest` tells. A job of which something becomes now is looked at in every decision.
- What is counted over all jobs (the line, the books of GPUs, shares, who teaches, where cards broke) is changed by the
  difference that a job makes.
- Where something else is said of a queue, its jobs are looked at again, and those who have no claim.
- Where queues came or went, or classes of GPUs or jobs that do not parse changed, only jobs' own outcomes are kept;
  where settings changed, the clock, or what the store takes, nothing is.

So the index never depends on how it came about: one that has followed a thousand changes equals one that is new.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from heapq import heappop, heappush
from itertools import compress, count
from operator import is_not

from orchestrator.api.job import QLoRAJob, QLoRAJobStatus
from orchestrator.api.queue import QLoRAQueueSpec
from orchestrator.api.reasons import Reason, Refusal
from orchestrator.core.job.containment import abandon, contained, failed_by_defect
from orchestrator.core.job.eviction_budget import protected_seconds
from orchestrator.core.job.lifecycle import is_ready, reconcile
from orchestrator.core.job.outages import Cause, hit_by
from orchestrator.core.job.remaining import remaining_seconds, surely_remaining_seconds
from orchestrator.core.job.rest import FOR_EVER, is_expired, rests_until, waits_untried
from orchestrator.core.job.revision import Revision, revision_of
from orchestrator.core.job.stage_commands import accounts_for, claimant_of, stage_of
from orchestrator.core.job.state_machine import GPU_STATES, JobState
from orchestrator.core.job.status_draft import Draft
from orchestrator.core.job.unreadable import job_key_of
from orchestrator.core.scheduling.admission import Held, Ledger, Quotas, depends_on
from orchestrator.core.scheduling.claims import Claims, may_change_class
from orchestrator.core.scheduling.cpu_slots import IN_CPU_STAGE, last_served
from orchestrator.core.scheduling.defragmentation import Occupant
from orchestrator.core.scheduling.line import Line
from orchestrator.core.scheduling.ordering import (
    NO_QUEUE,
    Claim,
    account,
    closures,
    queue_refusal,
    queue_specs,
    standing,
    user_of,
)
from orchestrator.core.scheduling.preemption import (
    EVICTIONS_BY_US,
    Holding,
    Movable,
    is_left_alone,
    lost_seconds,
    move,
    nobody,
)
from orchestrator.core.scheduling.turns import is_turn_over, turn_ends
from orchestrator.core.scheduling.usage import Shares, Stint
from orchestrator.core.snapshot import Snapshot, StageFact, StagePhase
from orchestrator.sizing.margins import Margins, learned


@dataclass(slots=True, kw_only=True)
class Entry:
    """What is known of one job. Nothing changes it; to say so takes longer than all else about most of them."""

    job: QLoRAJob
    revision: Revision
    looked_at: datetime
    changed: Draft | None
    """As it is to be by itself; None of a job that `waits_untried`, which is as it is stored."""
    until: datetime
    """When it has to be looked at again, whatever else happens."""
    claim: Claim | None
    refusal: Refusal | None
    """Why it is ready to train and has no claim."""
    holding: Holding | None = None
    left_alone: bool = False
    stints: tuple[Stint, ...] = ()
    """What it has had and has, as far as that is not counted in a queue's status."""
    wanted: tuple[str, ...] = ()
    """Keys of the stages that its stored attempt stands for."""
    is_expired: bool = False
    cause: Cause | None = None
    """What it waits for, if others may wait for the same."""

    @property
    def draft(self) -> Draft:
        """As it is to be by itself."""
        if self.changed is None:
            self.changed = Draft.untried(self.job, self.looked_at)
        return self.changed

    @property
    def is_restless(self) -> bool:
        """Whether something becomes of the job now."""
        return self.until <= self.looked_at

    @property
    def may_move(self) -> bool:
        """Whether it may be asked to give its GPU back, as far as that is its own affair."""
        return self.holding is not None and not self.holding.stopping and not self.left_alone

    def moves_like(self, other: Entry) -> bool:
        """Whether it makes the same of the books: who may be moved for whom."""
        return self._standing() == other._standing()

    def _standing(self) -> tuple[object, ...] | None:
        held = self.holding
        if held is None:
            return None
        may_move = held.stopping, self.left_alone, held.turn_is_over, held.moves_to
        return held.queue, held.user, held.gpu_class, held.priority, may_move


@dataclass(slots=True, kw_only=True)
class Index:
    """All of it, of one snapshot; `follow` makes it that of a later one, and nothing else changes it."""

    queues: Mapping[str, QLoRAQueueSpec]
    closed: Mapping[str, Refusal]
    """Queues that admit nobody, and why."""
    ledger: Ledger
    """Who has how many GPUs, those of unexplained stages included."""
    shares: Shares
    _seen: Snapshot
    _known: Mapping[str, Entry]
    """Entries of an index before, while this one is made."""
    _claims: Claims
    entries: dict[str, Entry] = field(default_factory=dict[str, Entry])
    """By the job's key."""
    line: Line = field(default_factory=Line)
    margins: Mapping[tuple[str, str], Margins] = field(default_factory=dict[tuple[str, str], Margins])
    restless: set[str] = field(default_factory=set[str])
    """Of whom something becomes now."""
    idle: set[str] = field(default_factory=set[str])
    """Who is ready to prepare or to publish."""
    in_cpu_stage: set[str] = field(default_factory=set[str])
    refused: set[str] = field(default_factory=set[str])
    """Who is ready to train and has no claim."""
    holders: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Who has a GPU, by class."""
    movable: Movable = field(default_factory=nobody)
    """Of those, who may be asked to give it back."""
    stopping: set[str] = field(default_factory=set[str])
    """Whose GPU is coming free."""
    runners: set[str] = field(default_factory=set[str])
    """About whom MLflow is to be asked something."""
    telling: set[str] = field(default_factory=set[str])
    """Of whom webhooks are to be told something."""
    expired: set[str] = field(default_factory=set[str])
    """Finished jobs whose objects are to go, once nothing outside is left of them."""
    broken: set[str] = field(default_factory=set[str])
    """On whom a card broke."""
    causes: Counter[Cause] = field(default_factory=Counter[Cause])
    """How many wait for each."""
    pending: defaultdict[str, dict[str, datetime]] = field(default_factory=lambda: defaultdict(dict))
    """Who is ready to train and holds no GPU, by queue, and since when."""
    waiting: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    """How many are prepared, or being prepared, and hold no GPU, by queue and namespace."""
    served: defaultdict[str, dict[str, datetime]] = field(default_factory=lambda: defaultdict(dict))
    """When each job last began a CPU stage, by namespace."""
    uids: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    """Keys of jobs by uid."""
    stages: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Keys of stages by the key of the job that they are named after."""
    wanted: set[str] = field(default_factory=set[str])
    """Stages that stored attempts stand for."""
    changed: set[str] = field(default_factory=set[str])
    """Whose entries the last update made or removed."""
    moved: set[str] = field(default_factory=set[str])
    """Of what the last update changed who holds it: classes, and users (`depends_on`)."""
    _teaching: dict[str, QLoRAJob] = field(default_factory=dict[str, QLoRAJob])
    _unexplained: dict[str, StageFact] = field(default_factory=dict[str, StageFact])
    """Stages with GPUs that no status accounts for: jobs that are gone left them, or a stranger made them."""
    _extra: tuple[Held, ...] = ()
    """What is in the books for them, and for jobs that do not parse."""
    _lent: Mapping[tuple[str, str], int] | None = None
    """As long as nobody else holds anything."""
    _due: list[tuple[datetime, str]] = field(default_factory=list[tuple[datetime, str]])
    _gone: list[Claim] = field(default_factory=list[Claim])
    _came: list[Claim] = field(default_factory=list[Claim])

    def holdings(self, gpu_class: str, snapshot: Snapshot) -> Iterator[Holding]:
        """The GPUs of a class that jobs have, by the snapshot's time."""
        for key in self.holders[gpu_class]:
            entry = self.entries[key]
            is_new = entry.looked_at == snapshot.now
            found = entry.holding if is_new else holding_of(entry.draft, self.queues, snapshot)
            if found is not None:
                yield found

    def occupants(self, gpu_class: str, now: datetime) -> Mapping[str, Callable[[], Occupant | None]]:
        """Who has a GPU of the class, may be moved and may change its class: by key, to be sized by whoever asks."""
        return {
            key: partial(self._occupant, key, now)
            for key in self.holders.get(gpu_class, ())
            if self.entries[key].may_move and may_change_class(self.entries[key].job.spec)
        }

    def _occupant(self, key: str, now: datetime) -> Occupant | None:
        """What of less would do for it; None where its queue would not start it again, or it cannot be sized."""
        entry = self.entries[key]
        job, status = entry.job, entry.draft.status
        if status.estimate is None or queue_refusal(job, self.queues, self.closed) is not None:
            return None
        try:
            return Occupant(estimate=status.estimate, smaller=self._claims.smaller(job, status, now))
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001 - who cannot be sized stays where it is
            return None

    def ends(self, gpu_class: str, snapshot: Snapshot) -> Mapping[str, float]:
        """In how many seconds who holds a GPU of the class is expected to end; of one long overdue nobody knows."""
        policy, found = snapshot.policy, dict[str, float]()
        late = policy.restart_cost_seconds + policy.stop_cost_seconds
        for key in self.holders.get(gpu_class, set[str]()) - self.stopping:
            left = remaining_seconds(self.entries[key].draft.status, policy, snapshot.now)
            if left is not None and left > -late:
                found[key] = max(0.0, left)
        return found

    def coming_free(self) -> Iterator[Held]:
        """What stages hold that are stopping already."""
        for key in self.stopping:
            holding = self.entries[key].holding
            if holding is not None:
                yield holding.queue, holding.gpu_class, holding.user

    def lent(self) -> Mapping[tuple[str, str], int]:
        """What queues lend, by queue and class."""
        if self._lent is None:
            self._lent = self.ledger.lent()
        return self._lent

    def given_back(self) -> set[str]:
        """Queues one of whose GPUs comes free now, though that is not stored yet."""
        drafts = (self.entries[key].draft for key in self.restless)
        return {
            attempt.queue or draft.job.spec.queue
            for draft in drafts
            if draft.attempt is None
            and (attempt := draft.job.status.active_attempt) is not None
            and attempt.stage == "train"
        }

    def job(self, key: str) -> QLoRAJob | None:
        """A job by its key."""
        entry = self.entries.get(key)
        return entry.job if entry is not None else None

    def drafts(self, keys: Iterable[str], now: datetime) -> dict[str, Draft]:
        """The drafts of some jobs, by key in the keys' order, as of now."""
        return {key: self.draft(key, now) for key in sorted(keys)}

    def draft(self, key: str, now: datetime) -> Draft:
        """A job's draft as of now."""
        found = self.entries[key]
        return found.draft if found.looked_at == now else Draft.open(found.job, now)

    def follow(self, snapshot: Snapshot) -> Index:
        """That of a snapshot: this one, brought up to date, or a new one where more than jobs and stages changed."""
        if not _continues(self._seen, snapshot):
            return Index.of(snapshot)
        if not (_is_alike(self._seen, snapshot) and self.shares.goes_on(snapshot)):
            return Index.of(snapshot, self)
        self._update(snapshot)
        return self

    @classmethod
    def of(cls, snapshot: Snapshot, before: Index | None = None) -> Index:
        """That of a snapshot, from nothing, or with what jobs were by themselves under other queues and GPUs."""
        queues = queue_specs(snapshot.queues)
        closed = closures(snapshot.queues, snapshot.now)
        index = cls(
            queues=queues,
            closed=closed,
            ledger=Ledger(capacity={c.name: c.capacity for c in snapshot.gpu_classes}, quotas=Quotas.of(queues)),
            shares=Shares.of(snapshot, queues),
            _seen=replace(snapshot, jobs=(), stages={}, runs={}, deliveries={}),
            _known={} if before is None else before._unchanged(snapshot),
            _claims=_claims(queues, closed, snapshot, {}),
        )
        index._update(snapshot)
        index.changed -= index._as_before()
        index.moved |= index.ledger.capacity.keys()
        index._known = {}
        return index

    def _as_before(self) -> set[str]:
        """Whose entries say the same as those that they were made of."""
        pairs = ((key, known, self.entries.get(key)) for key, known in self._known.items())
        return {
            key
            for key, known, new in pairs
            if new is not None and new.changed is known.changed and new.claim == known.claim and new.refusal is None
        }

    def _unchanged(self, snapshot: Snapshot) -> Mapping[str, Entry]:
        """The jobs that are by themselves as they were."""
        stages = _changed_stages(self._seen.stages, snapshot.stages)
        changed = {job_key_of_stage(key) for key in stages} | self.restless
        changed |= {key for uid in _changed_runs(self._seen, snapshot) for key in self.uids.get(uid, ())}
        return {key: entry for key, entry in self.entries.items() if key not in changed and entry.until > snapshot.now}

    def _update(self, snapshot: Snapshot) -> None:
        left, came = _difference(self._seen.jobs, snapshot.jobs)
        stages = _changed_stages(self._seen.stages, snapshot.stages)
        runs = _changed_runs(self._seen, snapshot)
        self._seen = snapshot
        self.changed, self.moved = set(), set()
        requeued = self._requeued(snapshot)
        self.shares.follow(snapshot)
        jobs = {(revision := revision_of(job)).key: (job, revision) for job in came}
        gone = {revision_of(job).key for job in left} - jobs.keys()
        self._note_stages(stages, snapshot)
        dirty = {job_key_of_stage(key) for key in stages} | self.restless
        dirty |= {key for uid in runs for key in self.uids.get(uid, ())}
        dirty |= self._due_by(snapshot.now)
        dirty |= self._taught(jobs, gone) | requeued
        dirty = (dirty & self.entries.keys()) - jobs.keys() - gone
        for key in gone:
            self._replace(key, None)
        jobs |= {key: (self.entries[key].job, self.entries[key].revision) for key in dirty}
        for key, (job, revision) in jobs.items():
            self._replace(key, self._entry(job, revision, snapshot))
        self.line.change(self._gone, self._came)
        self._gone, self._came = [], []
        theirs = (stage for key in (*jobs, *gone) for stage in self.stages.get(key, ()))
        self._explain_stages({*stages, *theirs}, snapshot)
        self._book_extra(snapshot)
        if self.moved:
            self._lent = None

    # --- what has to be looked at --------------------------------------------------------------------------------

    def _requeued(self, snapshot: Snapshot) -> set[str]:
        """The jobs of queues of which something else is said, and all without a claim: their reasons name others."""
        queues, closed = queue_specs(snapshot.queues), closures(snapshot.queues, snapshot.now)
        changed = {name for name, spec in queues.items() if spec != self.queues.get(name)}
        if not changed and closed == self.closed:
            return set()
        others = {name for name in queues if closed.get(name) != self.closed.get(name)} | changed
        self.queues, self.closed = queues, closed
        self._claims = _claims(queues, closed, snapshot, self.margins)
        if changed:
            self.shares.requeue(queues)
            self._book_anew()
            self.moved |= self.ledger.capacity.keys() | {
                name for _, classes, _ in self.line.by_fare for name in classes
            }
        return {key for key, entry in self.entries.items() if entry.revision.queue in others} | self.refused

    def _book_anew(self) -> None:
        """The same books, by other quotas."""
        self.ledger = Ledger(capacity=self.ledger.capacity, quotas=Quotas.of(self.queues))
        holdings = (self.entries[key].holding for keys in self.holders.values() for key in keys)
        held = (booked for each in holdings if each is not None for booked in _booked(each))
        for each in (*held, *self._extra):
            self.ledger.take(*each)

    def _note_stages(self, changed: Iterable[str], snapshot: Snapshot) -> None:
        for key in changed:
            job = job_key_of_stage(key)
            if key in snapshot.stages:
                self.stages[job].add(key)
            else:
                self.stages[job].discard(key)
                if not self.stages[job]:
                    del self.stages[job]

    def _due_by(self, now: datetime) -> set[str]:
        """Whose time has come."""
        found: set[str] = set()
        while self._due and self._due[0][0] <= now:
            until, key = heappop(self._due)
            entry = self.entries.get(key)
            if entry is not None and entry.until == until:
                found.add(key)
        return found

    def _taught(self, jobs: Mapping[str, tuple[QLoRAJob, Revision]], gone: Iterable[str]) -> set[str]:
        """Learn from jobs that changed; the keys of those who wait and are to be sized anew."""
        before = len(self._teaching)
        removed = [self._teaching.pop(key) for key in (*jobs, *gone) if key in self._teaching]
        for key, (job, revision) in jobs.items():
            if revision.teaches:
                self._teaching[key] = job
        if not removed and len(self._teaching) == before:
            return set()
        known, self.margins = self.margins, learned(self._teaching[key] for key in sorted(self._teaching))
        if known == self.margins:
            return set()
        self._claims = replace(self._claims, margins=self.margins)
        changed = {of for of in known.keys() | self.margins.keys() if known.get(of) != self.margins.get(of)}
        waiting = (*self.line.claims, *self.refused)
        return {key for key in waiting if _model_of(self.entries[key].job) in changed}

    # --- one job -------------------------------------------------------------------------------------------------

    def _entry(self, job: QLoRAJob, revision: Revision, snapshot: Snapshot) -> Entry:
        known = self._known.get(revision.key)
        if known is not None and known.job is not job:
            known = None
        claim: Claim | Refusal | Draft | None = None
        if waits_untried(job, snapshot):
            draft = claim = self._claim(job, job.status, revision, snapshot)
            if not isinstance(draft, Draft):
                return _untried(job, revision, draft, snapshot.now)
        else:
            draft = known.draft if known is not None else _reconciled(job, snapshot)
            if draft.state is JobState.QUEUED and is_ready(draft, snapshot.policy):
                claim = self._claim(job, draft.status, revision, snapshot)
        if isinstance(claim, Draft):
            draft, claim = claim, None
        holding = holding_of(draft, self.queues, snapshot)
        attempt = job.status.active_attempt
        fact = stage_of(job, attempt, snapshot) if attempt is not None else None
        claimant = claimant_of(job, attempt, snapshot) if attempt is not None and fact is None else None
        is_known = known is not None and known.changed is draft
        until = known.until if known is not None and is_known else _until(draft, fact, claim, snapshot)
        return Entry(
            job=job,
            revision=revision,
            looked_at=draft.now,
            changed=draft,
            until=min(until, self._turn_ends(draft, snapshot)),
            claim=claim if isinstance(claim, Claim) else None,
            refusal=claim if isinstance(claim, Refusal) else None,
            holding=holding,
            left_alone=holding is not None and is_left_alone(holding, snapshot.policy),
            stints=self.shares.stints(draft, account(job.metadata.namespace, job.spec.queue, self.queues)),
            wanted=tuple(found.key for found in (fact, claimant) if found is not None) if attempt is not None else (),
            is_expired=is_expired(draft) if known is None else known.is_expired,
            cause=hit_by((job, draft.status), snapshot.policy),
        )

    def _turn_ends(self, draft: Draft, snapshot: Snapshot) -> datetime:
        """When a running job's turn will be over, so that it may be moved."""
        ends = turn_ends(draft, self.queues, snapshot.policy)
        return ends if ends is not None and ends > snapshot.now else FOR_EVER

    def _claim(
        self, job: QLoRAJob, status: QLoRAJobStatus, revision: Revision, snapshot: Snapshot
    ) -> Claim | Refusal | Draft:
        """The claim of a job that is ready to train, or why it has none; where that raises, the job failed."""
        try:
            return self._claims.of(job, status, revision, snapshot.now)
        except MemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this job's failure
            return failed_by_defect(job, snapshot, error)

    def _replace(self, key: str, new: Entry | None) -> None:
        old = self.entries.pop(key, None)
        self.changed.add(key)
        if old is not None:
            self._count(key, old, is_there=False)
        if new is not None:
            self.entries[key] = new
            self._count(key, new, is_there=True)
            if new.until is not FOR_EVER and not new.is_restless:
                heappush(self._due, (new.until, key))
        if old is not None and new is not None and old.moves_like(new):
            return
        for entry in (old, new):
            if entry is not None and entry.holding is not None:
                for queue, gpu_class, user in _booked(entry.holding):
                    self.moved.update(depends_on(queue, (gpu_class,), user))

    def _count(self, key: str, entry: Entry, *, is_there: bool) -> None:
        """The difference that a job makes."""
        revision, put = entry.revision, _PUT[is_there]
        uid, queue = revision.uid, revision.queue
        if entry.is_restless:
            put(self.restless, key)
        if entry.refusal is not None:
            put(self.refused, key)
        if entry.claim is not None:
            (self._came if is_there else self._gone).append(entry.claim)
        if entry.claim is not None or entry.refusal is not None:
            if is_there:
                self.pending[queue][key] = _ready_since(entry)
            else:
                del self.pending[queue][key]
        if revision.asks_mlflow:
            put(self.runners, key)
        if revision.tells:
            put(self.telling, key)
        keys = self.uids.get(uid, ())
        if is_there:
            self.uids[uid] = (*keys, key)
        elif len(keys) > 1:
            self.uids[uid] = tuple(other for other in keys if other != key)
        else:
            del self.uids[uid]
        if entry.changed is None:  # that is all of one that only waits
            self.waiting[queue, revision.namespace] += 1 if is_there else -1
            return
        job, draft = entry.job, entry.changed
        if draft.state in (JobState.NEW, JobState.TRAINED):
            put(self.idle, key)
        elif draft.state in IN_CPU_STAGE:
            put(self.in_cpu_stage, key)
        if draft.state in (JobState.PREPARING, JobState.QUEUED):
            self.waiting[queue, revision.namespace] += 1 if is_there else -1
        self.shares.count(key, entry.stints, is_there=is_there)
        if entry.holding is not None:
            put(self.holders[entry.holding.gpu_class], key)
            book = self.ledger.take if is_there else self.ledger.release
            for booked in _booked(entry.holding):
                book(*booked)
            if entry.holding.stopping:
                put(self.stopping, key)
            if entry.may_move:
                move(self.movable, entry.holding, 1 if is_there else -1)
        if entry.is_expired:
            put(self.expired, key)
        if job.status.attempts and any(attempt.reason is Reason.BROKEN_GPU for attempt in job.status.attempts):
            put(self.broken, key)
        if entry.cause is not None:
            self.causes[entry.cause] += 1 if is_there else -1
        for stage in entry.wanted:
            put(self.wanted, stage)
        served = last_served(draft) if draft.status.attempts else None
        if served is not None:
            of_namespace = self.served[job.metadata.namespace]
            if is_there:
                of_namespace[key] = served
            else:
                of_namespace.pop(key, None)

    # --- stages that no job accounts for -------------------------------------------------------------------------

    def _explain_stages(self, keys: Set[str], snapshot: Snapshot) -> None:
        unreadable = {f"{job.namespace}/{job.stage}" for job in snapshot.unreadable}
        for key in keys:
            fact = snapshot.stages.get(key)
            self._unexplained.pop(key, None)
            if fact is None or fact.gpus == 0 or fact.gpu_class is None or key in unreadable:
                continue
            owner = self.entries.get(job_key_of_stage(key))
            attempts = owner.job.status.attempts if owner is not None else ()
            if owner is None or not any(accounts_for(owner.job, attempt, fact) for attempt in attempts):
                self._unexplained[key] = fact

    def _book_extra(self, snapshot: Snapshot) -> None:
        """Put into the books what stages hold beside those of the jobs."""
        extra = tuple(sorted((*self._of_unreadable(snapshot), *self._of_strangers())))
        if extra == self._extra:
            return
        for held in self._extra:
            self.ledger.release(*held)
        for held in extra:
            self.ledger.take(*held)
        self.moved |= {gpu_class for _, gpu_class, _ in (*self._extra, *extra)}
        self._extra = extra

    def _of_strangers(self) -> Iterator[Held]:
        for fact in self._unexplained.values():
            for _ in range(fact.gpus):
                yield NO_QUEUE, fact.gpu_class or "", ""

    def _of_unreadable(self, snapshot: Snapshot) -> Iterator[Held]:
        for job in snapshot.unreadable:
            fact = snapshot.stages.get(f"{job.namespace}/{job.stage}")
            if fact is not None and fact.phase is not StagePhase.EXITED and job.gpu_class is not None:
                yield account(job.namespace, job.queue, self.queues), job.gpu_class, ""


def _claims(
    queues: Mapping[str, QLoRAQueueSpec],
    closed: Mapping[str, Refusal],
    snapshot: Snapshot,
    margins: Mapping[tuple[str, str], Margins],
) -> Claims:
    return Claims(
        queues=queues, closed=closed, gpu_classes=snapshot.gpu_classes, policy=snapshot.policy, margins=margins
    )


def _untried(job: QLoRAJob, revision: Revision, found: Claim | Refusal, now: datetime) -> Entry:
    """Of a job that `waits_untried`; one without a time of creation is younger in every decision."""
    claim, refusal = (found, None) if isinstance(found, Claim) else (None, found)
    until = FOR_EVER if claim is None or revision.created is not None else now
    return Entry(job=job, revision=revision, looked_at=now, changed=None, until=until, claim=claim, refusal=refusal)


def _ready_since(entry: Entry) -> datetime:
    """Since when a job that waits for a GPU does: the end of its last attempt."""
    attempts = () if entry.changed is None else entry.changed.status.attempts
    last = attempts[-1].finish_time if attempts else None
    return last or entry.revision.created or entry.looked_at


def _booked(holding: Holding) -> Iterator[Held]:
    """What is taken for a job that holds a GPU: that one, and the one that is kept for it."""
    yield holding.queue, holding.gpu_class, holding.user
    if holding.moves_to:
        yield holding.queue, holding.moves_to, ""


def holding_of(draft: Draft, queues: Mapping[str, QLoRAQueueSpec], snapshot: Snapshot) -> Holding | None:
    """The GPU that a job's train stage has: admitted, running, or stopping."""
    if draft.state not in GPU_STATES:
        return None
    attempt, job, now = draft.attempt, draft.job, snapshot.now
    assert attempt is not None, "a GPU is held by an attempt"
    since = attempt.start_time or attempt.created_time
    return Holding(
        key=job.key,
        uid=job.metadata.uid,
        queue=account(job.metadata.namespace, job.spec.queue, queues),
        user=user_of(job.metadata.namespace, queues.get(job.spec.queue)),
        priority=standing(job, queues),
        gpu_class=attempt.gpu_class or "",
        stopping=attempt.stop_time is not None,
        run_seconds=max(0.0, (now - since).total_seconds()),
        lost_seconds=lost_seconds(draft.status, now, snapshot.policy),
        remaining_seconds=surely_remaining_seconds(draft.status, snapshot.policy, now),
        turn_is_over=is_turn_over(draft, queues, snapshot),
        moves_to=attempt.moves_to or "",
        was_evicted=not EVICTIONS_BY_US.isdisjoint(draft.status.evictions),
        protected_seconds=protected_seconds(job.spec, draft.status, snapshot.policy, now),
    )


def _reconciled(job: QLoRAJob, snapshot: Snapshot) -> Draft:
    """The job by itself; one of which nothing can come takes part in nothing, and ends."""
    opened = Draft.open(job, snapshot.now)
    refused = snapshot.refused.get(job.metadata.uid)
    if refused is not None:
        return contained(opened, snapshot, partial(abandon, snapshot=snapshot, message=refused))
    return contained(opened, snapshot, lambda draft: reconcile(draft, snapshot))


def _until(draft: Draft, fact: StageFact | None, claim: Claim | Refusal | None, snapshot: Snapshot) -> datetime:
    """Until when an entry holds; one whose times cannot be reckoned with holds for this moment."""
    if isinstance(claim, Claim) and draft.job.metadata.creation_timestamp is None:
        return draft.now
    try:
        return rests_until(draft, fact, snapshot.policy)
    except (ArithmeticError, TypeError, ValueError):
        return draft.now


def _model_of(job: QLoRAJob) -> tuple[str, str] | None:
    prepared = job.status.prepared
    return None if prepared is None else (job.metadata.namespace, prepared.model.architecture)


_PUT: Mapping[bool, Callable[[set[str], str], None]] = {True: set[str].add, False: set[str].discard}


def job_key_of_stage(key: str) -> str:
    """The key of the job that a stage of this key is named after."""
    namespace, _, name = key.partition("/")
    return job_key_of(namespace, name)


# --- what two snapshots differ in --------------------------------------------------------------------------------


def _continues(seen: Snapshot, snapshot: Snapshot) -> bool:
    """Whether what jobs were by themselves they still are: time went on, under the same settings."""
    return (
        seen.now <= snapshot.now
        and not snapshot.clock_step_seconds
        and not seen.clock_step_seconds
        and seen.refused == snapshot.refused
        and (seen.policy is snapshot.policy or seen.policy == snapshot.policy)
    )


def _is_alike(seen: Snapshot, snapshot: Snapshot) -> bool:
    """Whether there are the same queues and GPUs, whatever is said of the queues."""
    return (
        {queue.metadata.name for queue in seen.queues} == {queue.metadata.name for queue in snapshot.queues}
        and seen.gpu_classes == snapshot.gpu_classes
        and seen.unreadable == snapshot.unreadable
    )


def _difference(before: Sequence[QLoRAJob], after: Sequence[QLoRAJob]) -> tuple[Sequence[QLoRAJob], Sequence[QLoRAJob]]:
    """The objects that are gone, and those that came; a store that watches gives unchanged jobs as they were."""
    if before == after:  # which looks at no object that is the same
        return (), ()
    shorter = min(len(before), len(after))
    first = next(compress(count(), map(is_not, before, after)), shorter)
    last = next(compress(count(), map(is_not, reversed(before), reversed(after))), shorter)
    last = min(last, shorter - first)
    old, new = before[first : len(before) - last], after[first : len(after) - last]
    known, now_known = set(map(id, old)), set(map(id, new))
    return [job for job in old if id(job) not in now_known], [job for job in new if id(job) not in known]


def _changed_stages(before: Mapping[str, StageFact], after: Mapping[str, StageFact]) -> list[str]:
    if before is after:
        return []
    came = [key for key, fact in after.items() if (known := before.get(key)) is not fact and known != fact]
    return came + [key for key in before if key not in after]


def _changed_runs(seen: Snapshot, snapshot: Snapshot) -> set[str]:
    """Uids of jobs about whose run, or of what is told of whom, something else is known."""
    before, after = seen.runs, snapshot.runs
    changed = {uid for uid in before.keys() | after.keys() if before.get(uid) is not after.get(uid)}
    told, now_told = seen.deliveries, snapshot.deliveries
    return changed | {uid for uid in told.keys() | now_told.keys() if told.get(uid) != now_told.get(uid)}
