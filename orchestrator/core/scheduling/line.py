"""The line for GPUs, kept in order while claims come and go.

Within a queue, or for each user of one that is shared out by user, the order never changes: priority, age, uid. Where
they meet it does, since shares grow with time; so the lines of queues and users are kept, and a decision merges as much
of them as it needs. Claims that fit the same classes in the same queue, a *fare*, fare alike: they have a line of their
own, too.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from datetime import datetime
from heapq import heapify, heappop, heapreplace

from orchestrator.core.scheduling.ordering import Claim
from orchestrator.core.scheduling.usage import NOTHING, Share, Shares, dominant

Fare = tuple[str, tuple[str, ...], str]
"""Queue, classes, and the user where the queue tells its users apart."""
Kind = tuple[str, int, tuple[str, ...], str]
"""The same with the priority: what a victim depends on."""
Place = tuple[int, datetime, str, str]
"""Priority below zero, age, uid, key: the order within a queue."""
Rank = tuple[int, float, datetime, str, str]
"""Priority below zero, share, age, uid, key: the order of all."""
MANY = 8
"""More than one in so many is sorted anew; fewer are put in their places."""


def place_of(claim: Claim) -> Place:
    """Where in its queue a claim stands."""
    return -claim.priority, claim.since, claim.uid, claim.key


def fare_of(claim: Claim) -> Fare:
    """What decides whether a free GPU does."""
    return claim.queue, claim.classes, claim.user


def kind_of(claim: Claim) -> Kind:
    """What decides whether somebody may make way."""
    return claim.queue, claim.priority, claim.classes, claim.user


@dataclass(slots=True)
class Line:
    """Everybody who waits for a GPU."""

    claims: dict[str, Claim] = field(default_factory=dict[str, Claim])
    """By the key of the job."""
    by_queue: dict[str, list[Place]] = field(default_factory=dict[str, list[Place]])
    by_user: dict[str, dict[str, list[Place]]] = field(default_factory=dict[str, dict[str, list[Place]]])
    """By queue and user, of queues that tell their users apart."""
    by_fare: dict[Fare, list[Place]] = field(default_factory=dict[Fare, list[Place]])
    by_kind: dict[Kind, dict[str, Claim]] = field(default_factory=dict[Kind, dict[str, Claim]])

    def change(self, gone: Iterable[Claim], came: Iterable[Claim]) -> None:
        """Some leave the line, then others join it."""
        for claim in gone:
            self._remove(claim)
        kinds: defaultdict[Kind, list[Claim]] = defaultdict(list)
        for claim in came:
            kinds[kind_of(claim)].append(claim)
        queues: dict[str, list[Place]] = {}
        users: dict[tuple[str, str], list[Place]] = {}
        fares: dict[Fare, list[Place]] = {}
        for kind, claims in kinds.items():
            queue, _, classes, user = kind
            by_key = {claim.key: claim for claim in claims}
            self.claims.update(by_key)
            self.by_kind.setdefault(kind, {}).update(by_key)
            places = sorted(map(place_of, claims))
            queues.setdefault(queue, []).extend(places)
            fares.setdefault((queue, classes, user), []).extend(places)
            if user:
                users.setdefault((queue, user), []).extend(places)
        for queue, places in queues.items():
            _join(self.by_queue.setdefault(queue, []), places)
        for (queue, user), places in users.items():
            _join(self.by_user.setdefault(queue, {}).setdefault(user, []), places)
        for fare, places in fares.items():
            _join(self.by_fare.setdefault(fare, []), places)

    def _remove(self, claim: Claim) -> None:
        place, fare, kind = place_of(claim), fare_of(claim), kind_of(claim)
        del self.claims[claim.key]
        for places in (self.by_queue[claim.queue], self.by_fare[fare]):
            del places[bisect_left(places, place)]
        del self.by_kind[kind][claim.key]
        if not self.by_kind[kind]:
            del self.by_kind[kind]
        if not self.by_fare[fare]:
            del self.by_fare[fare]
        if not self.by_queue[claim.queue]:
            del self.by_queue[claim.queue]
        if claim.user:
            users = self.by_user[claim.queue]
            del users[claim.user][bisect_left(users[claim.user], place)]
            if not users[claim.user]:
                del users[claim.user]


def _join(places: list[Place], added: list[Place]) -> None:
    if len(added) * MANY > len(places):
        places += added
        places.sort()
        return
    for place in added:
        insort(places, place)


class UsersInTurn:
    """A queue's line as its users have their turns, as far as somebody has asked.

    The k-th claim in a user's own line counts as if those before it had started.
    """

    def __init__(self, lines: Mapping[str, list[Place]], shares: Mapping[str, Share], step: Share) -> None:
        self._lines, self._shares, self._step = lines, shares, step
        self._heads = [(self._rank(user, 0), user, 0) for user in lines]
        heapify(self._heads)
        self._places: list[Place] = []
        self._positions: dict[str, int] = {}

    def at(self, index: int) -> Place | None:
        """Who stands there; None beyond the end."""
        while len(self._places) <= index and self._heads:
            self._next()
        return self._places[index] if index < len(self._places) else None

    def position(self, place: Place) -> int:
        """Where somebody stands who is in the line."""
        while place[-1] not in self._positions:
            self._next()
        return self._positions[place[-1]]

    def _next(self) -> None:
        _, user, index = self._heads[0]
        place = self._lines[user][index]
        self._positions[place[-1]] = len(self._places)
        self._places.append(place)
        if index + 1 < len(self._lines[user]):
            heapreplace(self._heads, (self._rank(user, index + 1), user, index + 1))
        else:
            heappop(self._heads)

    def _rank(self, user: str, index: int) -> Rank:
        place = self._lines[user][index]
        return place[0], dominant(self._shares.get(user, NOTHING), self._step, index), *place[1:]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedLine:
    """The line as it is at one moment, without some.

    Priority first, then share, then age, then uid. The k-th claim in a queue's own line counts as if those before it
    had started, so queues take turns even when nobody has run yet. So do users, where a queue is shared out by user.
    """

    line: Line
    shares: Mapping[str, Share]
    """What each queue has had."""
    steps: Mapping[str, Share]
    """What one more job adds to that."""
    users: Mapping[str, UsersInTurn] = field(default_factory=dict[str, UsersInTurn])
    """The order within queues that are shared out by user and in which more than one waits."""
    absent: Set[str] = frozenset()
    """Keys of claims that are passed over."""

    @classmethod
    def of(cls, line: Line, shares: Shares, now: datetime) -> RankedLine:
        """Everybody, by the shares of the moment."""
        return cls(
            line=line,
            shares=shares.at(now),
            steps={queue: shares.step(queue) for queue in line.by_queue},
            users={
                queue: UsersInTurn(line.by_user[queue], shares.users_at(queue, now), shares.user_step)
                for queue in shares.by_user
                if len(line.by_user.get(queue, ())) > 1
            },
        )

    def without(self, keys: Iterable[str]) -> RankedLine:
        """The same line; those who are left keep their ranks."""
        absent = self.absent | set(keys)
        return self if len(absent) == len(self.absent) else replace(self, absent=absent)

    def in_order(self) -> Iterator[Claim]:
        """The claims, the first in line first."""
        heads = [
            (self._rank(queue, 0, place), queue, 0) for queue in self.line.by_queue if (place := self._at(queue, 0))
        ]
        heapify(heads)
        claims, absent = self.line.claims, self.absent
        while heads:
            (_, _, _, _, key), queue, index = heads[0]
            if key not in absent:
                yield claims[key]
            index += 1
            place = self._at(queue, index)
            if place is not None:
                heapreplace(heads, (self._rank(queue, index, place), queue, index))
            else:
                heappop(heads)

    def in_order_of(self, fares: Set[Fare]) -> Iterator[Claim]:
        """Those of some fares, the first in line first; who takes a fare from the set meanwhile sees no more of it."""
        heads = [head for fare in fares if (head := self._head(fare, 0)) is not None]
        heapify(heads)
        while heads:
            rank, fare, index = heads[0]
            yield self.line.claims[rank[-1]]
            head = self._head(fare, index + 1) if fare in fares else None
            if head is not None:
                heapreplace(heads, head)
            else:
                heappop(heads)

    def _head(self, fare: Fare, index: int) -> tuple[Rank, Fare, int] | None:
        """The first of a fare, from a place in its line on, that is not passed over."""
        places = self.line.by_fare[fare]
        while index < len(places) and places[index][-1] in self.absent:
            index += 1
        if index == len(places):
            return None
        place, queue = places[index], fare[0]
        return self._rank(queue, self._position(queue, place), place), fare, index

    def _at(self, queue: str, index: int) -> Place | None:
        """Who stands there in a queue's line; None beyond its end."""
        if queue in self.users:
            return self.users[queue].at(index)
        places = self.line.by_queue[queue]
        return places[index] if index < len(places) else None

    def _position(self, queue: str, place: Place) -> int:
        """Where in its queue's line a claim stands."""
        if queue in self.users:
            return self.users[queue].position(place)
        return bisect_left(self.line.by_queue[queue], place)

    def _rank(self, queue: str, index: int, place: Place) -> Rank:
        before, since, uid, key = place
        return before, dominant(self.shares.get(queue, NOTHING), self.steps[queue], index), since, uid, key
