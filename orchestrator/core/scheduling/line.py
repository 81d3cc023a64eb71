"""The line for GPUs, kept in order while claims come and go.

Within a queue the order never changes: priority, age, uid. Where queues meet it does, since shares grow with time; so
the queues' own lines are kept, and a decision merges as much of them as it needs. Claims that fit the same classes in
the same queue, a *fare*, fare alike: they have a line of their own, too.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from datetime import datetime
from heapq import heapify, heappop, heapreplace

from orchestrator.core.scheduling.ordering import Claim
from orchestrator.core.scheduling.usage import NOTHING, Share, Shares, dominant

Fare = tuple[str, tuple[str, ...], str]
"""Queue, classes, and the user where the queue counts users' GPUs."""
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
    return -claim.priority, claim.created, claim.uid, claim.key


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
    by_fare: dict[Fare, list[Place]] = field(default_factory=dict[Fare, list[Place]])
    by_kind: dict[Kind, dict[str, Claim]] = field(default_factory=dict[Kind, dict[str, Claim]])

    def change(self, gone: Iterable[Claim], came: Iterable[Claim]) -> None:
        """Some leave the line, then others join it."""
        for claim in gone:
            self._remove(claim)
        queues: dict[str, list[Place]] = {}
        fares: dict[Fare, list[Place]] = {}
        for claim in came:
            place = place_of(claim)
            self.claims[claim.key] = claim
            queues.setdefault(claim.queue, []).append(place)
            fares.setdefault(fare_of(claim), []).append(place)
            self.by_kind.setdefault(kind_of(claim), {})[claim.key] = claim
        for queue, places in queues.items():
            _join(self.by_queue.setdefault(queue, []), places)
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


def _join(places: list[Place], added: list[Place]) -> None:
    if len(added) * MANY > len(places):
        places += added
        places.sort()
        return
    for place in added:
        insort(places, place)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankedLine:
    """The line as it is at one moment, without some.

    Priority first, then share, then age, then uid. The k-th claim in a queue's own line counts as if those before it
    had started, so queues take turns even when nobody has run yet.
    """

    line: Line
    shares: Mapping[str, Share]
    """What each queue has had."""
    steps: Mapping[str, Share]
    """What one more job adds to that."""
    absent: Set[str] = frozenset()
    """Keys of claims that are passed over."""

    @classmethod
    def of(cls, line: Line, shares: Shares, now: datetime) -> RankedLine:
        """Everybody, by the shares of the moment."""
        return cls(line=line, shares=shares.at(now), steps={queue: shares.step(queue) for queue in line.by_queue})

    def without(self, keys: Iterable[str]) -> RankedLine:
        """The same line; those who are left keep their ranks."""
        absent = self.absent | set(keys)
        return self if len(absent) == len(self.absent) else replace(self, absent=absent)

    def in_order(self) -> Iterator[Claim]:
        """The claims, the first in line first."""
        queues = self.line.by_queue
        heads = [(self._rank(queue, 0, places[0]), queue, 0) for queue, places in queues.items()]
        heapify(heads)
        while heads:
            rank, queue, index = heads[0]
            if rank[-1] not in self.absent:
                yield self.line.claims[rank[-1]]
            places, index = queues[queue], index + 1
            if index < len(places):
                heapreplace(heads, (self._rank(queue, index, places[index]), queue, index))
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
        return self._rank(queue, bisect_left(self.line.by_queue[queue], place), place), fare, index

    def _rank(self, queue: str, index: int, place: Place) -> Rank:
        share = dominant(self.shares.get(queue, NOTHING), self.steps[queue], index)
        return place[0], share, *place[1:]
