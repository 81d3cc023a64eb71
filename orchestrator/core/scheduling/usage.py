"""What queues and their users have had of the GPUs: whose turn it is, and what goes into a queue's status.

A queue's share is the part of the cluster that it has held of late: GPU time and VRAM time, each over what there is of
it, averaged over the past with weights that halve with every half-life, and of the two the larger one. That is the
dominant share of Ghodsi et al. (Dominant Resource Fairness, NSDI 2011) over GPUs and VRAM, with the decay of SLURM's
fair-share factor. Rules:

- A second of holding is counted once. A status says until when everything is counted; what jobs hold after that is read
  from their attempts. One write moves both, so whoever carries on after a crash neither misses nor repeats anything.
- An attempt is on the account of the queue that gave it its GPU, from then until its end, wherever its job goes.
- Decay is one factor for everybody. It is taken out of what is kept: sums over jobs are of whole numbers, by a common
  reference time, and are changed by the difference that one job makes, in whatever order.
- A job that was just started counts for its minimum run at once, so that queues take turns.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from math import exp2, expm1, log

from orchestrator.api.job import GPU_CLASS_PATTERN, Attempt
from orchestrator.api.queue import (
    MAX_MONTHLY,
    MAX_USERS,
    MonthlyUsage,
    QLoRAQueue,
    QLoRAQueueSpec,
    QLoRAQueueStatus,
    UserUsage,
)
from orchestrator.core.job.status_draft import Draft
from orchestrator.core.scheduling.ordering import EPOCH, SECONDS_AN_HOUR, UNKNOWN_CLASS_GIB
from orchestrator.core.snapshot import Policy, Snapshot
from orchestrator.sizing.hardware import GpuClass

UNIT = 1 << 60
"""Of whole numbers that stand for fractions: a second of a half-life of years is still told to nine digits."""
MOST_HALVES = 64.0
"""Older than so many half-lives is nothing; and nothing is so far in the future."""
LEAST_SECONDS = 0.001
"""Less than that is forgotten."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decay:
    """Weights that double with every half-life; what is weighed by them at `now` has decayed."""

    half_life_seconds: float
    origin: datetime
    """Where the weight is one."""

    @classmethod
    def at(cls, now: datetime, half_life_seconds: float) -> Decay:
        """That of the half-life that `now` lies in, which is the same for everybody who decides then."""
        half_life = timedelta(seconds=half_life_seconds)
        return cls(half_life_seconds=half_life_seconds, origin=EPOCH + (now - EPOCH) // half_life * half_life)

    def weight(self, time: datetime) -> int:
        """Of a time, in UNITs."""
        return round(UNIT * exp2(self._halves(time)))

    def factor(self, now: datetime) -> float:
        """What turns a sum of weights into what it is at `now`."""
        return exp2(-self._halves(now))

    @property
    def mean_life_seconds(self) -> float:
        """GPU time that somebody has who has held one GPU for ever."""
        return self.half_life_seconds / log(2)

    def _halves(self, time: datetime) -> float:
        halves = (time - self.origin).total_seconds() / self.half_life_seconds
        return min(max(halves, -MOST_HALVES), MOST_HALVES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stint:
    """A train attempt's hold on a GPU."""

    queue: str
    user: str
    gpu_class: str
    gib: int
    start: datetime
    end: datetime | None
    """Absent while it holds it."""
    counts_until: datetime | None
    """Its end; of one that has not run for its minimum, that; absent while it counts for what it holds."""


@dataclass(slots=True)
class Held:
    """GPUs and VRAM over time: `had` in UNITs of half-lives by weight, and what is held now."""

    gpus_had: int = 0
    gib_had: int = 0
    gpus: int = 0
    gib: int = 0

    @classmethod
    def of(cls, stint: Stint, since: datetime | None, decay: Decay) -> Held:
        """What a stint makes of it, without what is counted already."""
        start = stint.start if since is None else max(stint.start, since)
        if stint.counts_until is None:
            had = -decay.weight(start)
            return cls(gpus_had=had, gib_had=stint.gib * had, gpus=1, gib=stint.gib)
        had = decay.weight(stint.counts_until) - decay.weight(start) if stint.counts_until > start else 0
        return cls(gpus_had=had, gib_had=stint.gib * had)

    @classmethod
    def sum(cls, all_of_them: Iterable[Held]) -> Held:
        """What they are together."""
        found = cls()
        for each in all_of_them:
            found.add(each, 1)
        return found

    def add(self, other: Held, times: int) -> None:
        """So many times the other comes to it."""
        self.gpus_had += times * other.gpus_had
        self.gib_had += times * other.gib_had
        self.gpus += times * other.gpus
        self.gib += times * other.gib

    def average(self, factor: float) -> tuple[float, float]:
        """GPUs and GiB that were held on average, the past by its weight; `factor` is the decay's."""
        return self.gpus_had / UNIT * factor + self.gpus, self.gib_had / UNIT * factor + self.gib


Share = tuple[float, float]
"""Of the GPUs and of the VRAM that there are, over the queue's weight."""
NOTHING: Share = 0.0, 0.0


def dominant(share: Share, step: Share, steps: int) -> float:
    """The larger part, with so many more jobs started."""
    gpus, gib = share[0] + steps * step[0], share[1] + steps * step[1]
    return gpus if gpus >= gib else gib  # thousands are asked for in one decision


@dataclass(slots=True, kw_only=True)
class Shares:
    """What each queue has had, kept up to date job by job."""

    policy: Policy
    decay: Decay
    weights: Mapping[str, int]
    classes: Mapping[str, GpuClass]
    gpus: int
    """In all; where there are none, shares are of one of a GiB."""
    gib: int
    next: tuple[float, float]
    """GPUs and GiB that one more job holds at first: for its minimum run, the smallest card here."""
    by_user: Mapping[str, dict[str, Held]] = field(default_factory=dict[str, dict[str, Held]])
    """What each user has had of the queues that are shared out by user, by queue."""
    _statuses: dict[str, QLoRAQueueStatus] = field(default_factory=dict[str, QLoRAQueueStatus])
    _counted: dict[str, datetime] = field(default_factory=dict[str, datetime])
    """Until when, by queue."""
    _stints: dict[str, dict[str, tuple[Stint, ...]]] = field(default_factory=dict[str, dict[str, tuple[Stint, ...]]])
    """By queue and job; some may be counted already."""
    _held: dict[str, Held] = field(default_factory=dict[str, Held])

    @classmethod
    def of(cls, snapshot: Snapshot, queues: Mapping[str, QLoRAQueueSpec]) -> Shares:
        """What the queues' statuses say; no job has come to it yet."""
        policy, classes = snapshot.policy, snapshot.gpu_classes
        decay = Decay.at(snapshot.now, policy.usage_half_life_seconds)
        part = -expm1(-policy.minimum_run_seconds / decay.mean_life_seconds)
        shares = cls(
            policy=policy,
            decay=decay,
            weights={name: spec.weight for name, spec in queues.items()},
            by_user={name: {} for name, spec in queues.items() if spec.fair_sharing == "PerUser"},
            classes={each.name: each for each in classes},
            gpus=max(1, sum(each.capacity for each in classes)),
            gib=max(1, sum(each.capacity * each.marketed_gib for each in classes)),
            next=(part, part * min((each.marketed_gib for each in classes), default=UNKNOWN_CLASS_GIB)),
        )
        shares.follow(snapshot)
        return shares

    def follow(self, snapshot: Snapshot) -> None:
        """Bring it up to date with what queues' statuses say, and with the time."""
        decay = Decay.at(snapshot.now, self.policy.usage_half_life_seconds)
        is_moved, self.decay = decay != self.decay, decay
        for queue in snapshot.queues:
            name, status = queue.metadata.name, queue.status
            if is_moved or self._statuses.get(name) is not status or status.counted_until != self._counted.get(name):
                self._statuses[name] = status
                counted = counted_until(status, snapshot)
                if counted is not None:
                    self._counted[name] = counted
                self._recount(name)
        if is_moved:
            for name in self._held.keys() - self._statuses.keys():
                self._recount(name)

    def goes_on(self, snapshot: Snapshot) -> bool:
        """Whether no queue's status says that less is counted than it said before, as one does that is made anew."""
        then = ((self._counted.get(q.metadata.name), counted_until(q.status, snapshot)) for q in snapshot.queues)
        return all(before is None or (counted is not None and counted >= before) for before, counted in then)

    def requeue(self, queues: Mapping[str, QLoRAQueueSpec]) -> None:
        """Go on under what is said of the same queues now."""
        self.weights = {name: spec.weight for name, spec in queues.items()}
        by_user = {name for name, spec in queues.items() if spec.fair_sharing == "PerUser"}
        others = by_user ^ self.by_user.keys()
        self.by_user = {name: self.by_user.get(name, {}) for name in by_user}
        for name in others:
            self._recount(name)

    def stints(self, draft: Draft, account: str) -> tuple[Stint, ...]:
        """Those of a job that are not counted yet; `account` is of attempts that say none.

        None of a job whose status has what no status of ours has: times that cannot be reckoned with.
        """
        attempts = (
            each
            for each in draft.status.attempts
            if each.stage == "train" and (each.gpu_class in self.classes or is_class(each.gpu_class))
        )
        try:
            found = [self._stint(attempt, draft, account) for attempt in attempts]
            return tuple(stint for stint in found if not self._is_counted(stint))
        except (ArithmeticError, TypeError, ValueError):
            return ()

    def count(self, key: str, stints: Iterable[Stint], *, is_there: bool) -> None:
        """A job's stints come to it, or go."""
        for stint in stints:
            of_queue = self._stints.setdefault(stint.queue, {})
            if is_there:
                of_queue[key] = (*of_queue.get(key, ()), stint)
            else:
                of_queue.pop(key, None)
            held = Held.of(stint, self._counted.get(stint.queue), self.decay)
            self._held.setdefault(stint.queue, Held()).add(held, 1 if is_there else -1)
            users = self.by_user.get(stint.queue)
            if users is not None:
                users.setdefault(stint.user, Held()).add(held, 1 if is_there else -1)
                if users[stint.user] == Held():
                    del users[stint.user]

    def at(self, now: datetime) -> Mapping[str, Share]:
        """Each queue's share."""
        factor = self.decay.factor(now)
        return {name: self._share(name, held.average(factor)) for name, held in self._held.items()}

    def users_at(self, queue: str, now: datetime) -> Mapping[str, Share]:
        """The share of each user who has had anything, of a queue that is shared out by user."""
        factor = self.decay.factor(now)
        return {user: self._part(held.average(factor)) for user, held in self.by_user[queue].items()}

    @property
    def user_step(self) -> Share:
        """What one more job adds to its user's share."""
        return self._part(self.next)

    def step(self, queue: str) -> Share:
        """What one more job adds to its queue's share: a minimum run on the smallest card here."""
        return self._share(queue, self.next)

    def is_counted(self, key: str) -> bool:
        """Whether all that a job has had is in the statuses of queues that have one."""
        theirs = (stint for name in self._statuses for stint in self._stints.get(name, {}).get(key, ()))
        return all(map(self._is_counted, theirs))

    def is_put(self, queue: QLoRAQueue) -> bool:
        """Whether the clock was put since the queue's status was written."""
        return queue.status.counted_until != self._counted.get(queue.metadata.name)

    def may_write(self, queue: QLoRAQueue, now: datetime) -> bool:
        """Whether it is so long ago that the queue's status was written."""
        counted = self._counted.get(queue.metadata.name)
        return counted is None or (now - counted).total_seconds() >= self.policy.usage_write_seconds

    def has_more(self, queue: QLoRAQueue) -> bool:
        """Whether the queue's jobs have had anything since, or hold it."""
        stints = (stint for of_job in self._stints.get(queue.metadata.name, {}).values() for stint in of_job)
        return any(not self._is_counted(stint) for stint in stints)

    def counted_on(self, queue: QLoRAQueue, now: datetime) -> QLoRAQueueStatus:
        """The queue's status with everything counted until now."""
        name = queue.metadata.name
        counted = self._counted.get(name)
        stints = (stint for of_job in self._stints.get(name, {}).values() for stint in of_job)
        pieces = sorted(_pieces(stints, counted, now), key=lambda piece: (piece.user, piece.start, piece.gpu_class))
        return queue.status.model_copy(
            update={
                "counted_until": now,
                "usage": tuple(self._by_user(queue.status.usage, counted or now, pieces, now)),
                "months": tuple(self._by_month(queue.status.months, pieces)),
            }
        )

    # --- pieces --------------------------------------------------------------------------------------------------

    def _stint(self, attempt: Attempt, draft: Draft, account: str) -> Stint:
        gpu_class, end = attempt.gpu_class or "", attempt.finish_time
        start = max(attempt.created_time, EPOCH)  # a month before it has no name
        minimum = start + timedelta(seconds=self.policy.minimum_run_seconds)
        return Stint(
            queue=attempt.queue or account,
            user=draft.job.metadata.namespace,
            gpu_class=gpu_class,
            gib=self.classes[gpu_class].marketed_gib if gpu_class in self.classes else UNKNOWN_CLASS_GIB,
            start=start,
            end=end,
            counts_until=end or (minimum if draft.now < minimum else None),
        )

    def _is_counted(self, stint: Stint) -> bool:
        counted = self._counted.get(stint.queue)
        return counted is not None and stint.end is not None and stint.end <= counted

    def _share(self, queue: str, held: tuple[float, float]) -> Share:
        """Its part of what there is, over its weight; a queue that is gone has the least."""
        return self._part(held, self.weights.get(queue, 1))

    def _part(self, held: tuple[float, float], weight: int = 1) -> Share:
        return held[0] / (self.gpus * weight), held[1] / (self.gib * weight)

    def _recount(self, name: str) -> None:
        """Add up one queue, from its status and the stints since."""
        counted, status = self._counted.get(name), self._statuses.get(name, QLoRAQueueStatus())
        users: dict[str, Held] = {}
        if counted is not None:
            by_weight = self.decay.weight(counted) / self.decay.mean_life_seconds
            for each in status.usage:
                gpus_had, gib_had = round(by_weight * each.gpu_seconds), round(by_weight * each.gib_seconds)
                users.setdefault(each.user, Held()).add(Held(gpus_had=gpus_had, gib_had=gib_had), 1)
        left = {
            key: kept
            for key, stints in self._stints.get(name, {}).items()
            if (kept := tuple(stint for stint in stints if not self._is_counted(stint)))
        }
        for stints in left.values():
            for stint in stints:
                users.setdefault(stint.user, Held()).add(Held.of(stint, counted, self.decay), 1)
        self._stints[name], self._held[name] = left, Held.sum(users.values())
        if name in self.by_user:
            self.by_user[name].clear()
            self.by_user[name].update(users)

    def _by_user(
        self, before: Iterable[UserUsage], counted: datetime, pieces: Iterable[Stint], now: datetime
    ) -> Sequence[UserUsage]:
        kept = exp2(-(now - counted).total_seconds() / self.decay.half_life_seconds)
        gpu_seconds = {each.user: kept * each.gpu_seconds for each in before}
        gib_seconds = {each.user: kept * each.gib_seconds for each in before}
        for piece in pieces:
            seconds = self._decayed_seconds(piece, now)
            gpu_seconds[piece.user] = gpu_seconds.get(piece.user, 0.0) + seconds
            gib_seconds[piece.user] = gib_seconds.get(piece.user, 0.0) + seconds * piece.gib
        users = sorted(gib_seconds, key=lambda user: (-gib_seconds[user], user))[:MAX_USERS]
        return [
            UserUsage(user=user, gpu_seconds=round(gpu_seconds[user], 3), gib_seconds=round(gib_seconds[user], 3))
            for user in sorted(users)
            if gpu_seconds[user] >= LEAST_SECONDS
        ]

    def _decayed_seconds(self, piece: Stint, now: datetime) -> float:
        """What is left at `now` of the time of a piece, which has an end."""
        assert piece.end is not None, "pieces have ended"
        mean_life = self.decay.mean_life_seconds
        ago, length = (now - piece.end).total_seconds(), (piece.end - piece.start).total_seconds()
        return mean_life * exp2(-ago / self.decay.half_life_seconds) * -expm1(-length / mean_life)

    def _by_month(self, before: Iterable[MonthlyUsage], pieces: Iterable[Stint]) -> Sequence[MonthlyUsage]:
        known = {(each.month, each.user, each.gpu_class): each for each in before}
        had = {key: (each.gpu_seconds, each.dollars) for key, each in known.items()}
        more: set[tuple[str, str, str]] = set()
        for piece in pieces:
            assert piece.end is not None, "pieces have ended"
            price = self.classes[piece.gpu_class].dollars_per_hour if piece.gpu_class in self.classes else None
            for month, seconds in by_month(piece.start, piece.end):
                key = month, piece.user, piece.gpu_class
                gpu_seconds, dollars = had.get(key, (0.0, 0.0))
                dollars += seconds / SECONDS_AN_HOUR * (price or 0.0)
                had[key] = round(gpu_seconds + seconds, 6), round(dollars, 6)
                more.add(key)
        for key in more:
            month, user, gpu_class = key
            gpu_seconds, dollars = had[key]
            known[key] = MonthlyUsage(
                month=month, user=user, gpu_class=gpu_class, gpu_seconds=gpu_seconds, dollars=dollars
            )
        return [known[key] for key in sorted(known)[-MAX_MONTHLY:]]


def is_class(name: str | None) -> bool:
    """Whether a status can tell of a class of this name: statuses of jobs may hold any text."""
    return name is not None and re.fullmatch(GPU_CLASS_PATTERN, name) is not None


def counted_until(status: QLoRAQueueStatus, snapshot: Snapshot) -> datetime | None:
    """Until when everything is counted, by the clock of `snapshot.now`, which may have been put since.

    A step that nobody noticed shows in a time that is still to come: that is now, as in the statuses of jobs.
    """
    if status.counted_until is None:
        return None
    return min(status.counted_until + timedelta(seconds=snapshot.clock_step_seconds), snapshot.now)


def _pieces(stints: Iterable[Stint], counted: datetime | None, now: datetime) -> Iterator[Stint]:
    """What of the stints is not counted and is over."""
    for stint in stints:
        start = stint.start if counted is None else max(stint.start, counted)
        end = now if stint.end is None else min(stint.end, now)
        if start < end:
            yield Stint(
                queue=stint.queue,
                user=stint.user,
                gpu_class=stint.gpu_class,
                gib=stint.gib,
                start=start,
                end=end,
                counts_until=stint.counts_until,
            )


def by_month(start: datetime, end: datetime) -> Iterator[tuple[str, float]]:
    """The seconds of a time by months (UTC), which are named `2026-11`."""
    start, end = start.astimezone(UTC), end.astimezone(UTC)
    while start < end:
        month = f"{start.year:04d}-{start.month:02d}"
        if (start.year, start.month) == (end.year, end.month):
            yield month, (end - start).total_seconds()
            return
        first = start.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
        next_start = (first + timedelta(days=32)).replace(day=1)
        yield month, (next_start - start).total_seconds()
        start = next_start
