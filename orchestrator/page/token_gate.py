"""Who may look at the page of a cluster, and at what: each visitor, at what the own token's account may list there.

- The API server says whose a token is and what that account may list; both count for `page_review_seconds`, and where
  it cannot be asked, nobody is let in on what it said before.
- One visitor is asked about at one time, and all of them together within a rate, so that however many look, the API
  server has little of it. Tokens that were never seen have a rate of their own: a flood of them holds up newcomers.
- Of a token a digest is kept, in as many entries as a setting says.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from http import HTTPStatus
from typing import Generic, TypeVar

from orchestrator.adapters.kubernetes.nodes import NODES
from orchestrator.adapters.kubernetes.reviews import Account, Reviews
from orchestrator.adapters.kubernetes.settings import ClusterSettings
from orchestrator.adapters.kubernetes.store import JOBS, QUEUES
from orchestrator.api.base import API_VERSION
from orchestrator.controller.throttle import Allowance
from orchestrator.errors import OrchestratorError
from orchestrator.page.app import Refused
from orchestrator.page.sight import Sight
from orchestrator.page.token_login import is_token, shown_token

log = logging.getLogger(__name__)

Value = TypeVar("Value")

GROUP = API_VERSION.partition("/")[0]
SAVED_SECONDS = 4.0
"""As many newcomers as come in this time may come at once after a pause."""
AWAY_SECONDS = 1.0
"""An API server that could not be asked is asked again after so long."""
CHALLENGE = {"WWW-Authenticate": 'Bearer realm="qlora page"'}
NO_TOKEN = Refused(
    HTTPStatus.UNAUTHORIZED,
    "this page asks for a token of your own account; programs send it as `Authorization: Bearer TOKEN`",
    CHALLENGE,
)
NOBODYS = Refused(
    HTTPStatus.UNAUTHORIZED, "the API server takes this token for nobody's: it has expired, or is another's", CHALLENGE
)
FLOODED = Refused(
    HTTPStatus.TOO_MANY_REQUESTS,
    "more new tokens come than are looked at (QLORA_PAGE_STRANGERS_PER_SECOND): try again in some seconds",
    {"Retry-After": "5"},
)
BUSY = Refused(
    HTTPStatus.SERVICE_UNAVAILABLE,
    "more visitors come than the API server is asked about in time: try again in some seconds",
    {"Retry-After": "5"},
)
AWAY = Refused(
    HTTPStatus.SERVICE_UNAVAILABLE,
    "the API server cannot be asked what your account may see, so nothing is shown; the page's log says why, and it is "
    "asked again until it answers",
    {"Retry-After": "5"},
)


class TokenGate:
    """Lets in who has a token; safe to share between threads."""

    def __init__(
        self,
        reviews: Reviews,
        settings: ClusterSettings,
        namespaces: Callable[[], Iterable[str]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`namespaces` are those with jobs."""
        self._reviews = reviews
        self._settings = settings
        self._namespaces = namespaces
        self._clock = clock
        self._asking = threading.Lock()
        self._is_away, self._away_until = False, float("-inf")
        self._lock = threading.Lock()
        self._visitors: _Kept[Sight] = _Kept(settings.page_visitors_kept)
        self._strangers: _Kept[Refused] = _Kept(settings.page_visitors_kept)
        self._newcomers = Allowance(settings.page_strangers_per_second, SAVED_SECONDS, clock)

    def admit(self, headers: Mapping[str, str]) -> Sight | Refused:
        """What the account of the request's token may see."""
        token, is_cookie = shown_token(headers)
        found = self.look(token) if token else NO_TOKEN
        return replace(found, has_login=True) if is_cookie and isinstance(found, Sight) else found

    def look(self, token: str) -> Sight | Refused:
        """What a token's account may see."""
        if not is_token(token):
            return NOBODYS
        key = hashlib.sha256(token.encode()).digest()
        with self._lock:
            found = self._fresh(key)
            if found is not None:
                return found
            if not self._visitors.has(key) and not self._newcomers.take():
                return FLOODED
        return self._in_turn(key, token)

    @property
    def kept(self) -> tuple[int, int]:
        """How many visitors are remembered, and how many tokens that are nobody's."""
        return len(self._visitors), len(self._strangers)

    def _fresh(self, key: bytes) -> Sight | Refused | None:
        since = self._clock() - self._settings.page_review_seconds
        return self._visitors.find(key, since) or self._strangers.find(key, since)

    def _in_turn(self, key: bytes, token: str) -> Sight | Refused:
        """The answer to one visitor after the other; whoever comes for one that was just given is given it.

        Where the API server does not answer, one waits for it at a time, and the others are told so at once.
        """
        if not self._asking.acquire(timeout=0 if self._is_away else self._settings.page_review_timeout_seconds):
            return AWAY if self._is_away else BUSY
        try:
            with self._lock:
                found = self._fresh(key)
            if found is not None:
                return found
            if self._clock() < self._away_until:
                return AWAY
            answer = self._keep(key, self._asked(token))
            self._is_away = False
            return answer
        except OrchestratorError as error:
            log.warning("nobody can be asked about: %s", error)
            self._is_away, self._away_until = True, self._clock() + AWAY_SECONDS
            return AWAY
        finally:
            self._asking.release()

    def _keep(self, key: bytes, found: Sight | None) -> Sight | Refused:
        with self._lock:
            if found is None:
                self._visitors.drop(key)
                return self._strangers.put(key, NOBODYS, self._clock())
            return self._visitors.put(key, found, self._clock())

    def _asked(self, token: str) -> Sight | None:
        account = self._reviews.account(token)
        if account is None:
            return None
        namespaces, unasked = self._seen_by(account)
        return Sight(
            namespaces=namespaces,
            queues=self._reviews.may_list(account, GROUP, QUEUES),
            cards=self._reviews.may_list(account, "", NODES),
            unasked=unasked,
        )

    def _seen_by(self, account: Account) -> tuple[frozenset[str] | None, int]:
        """The namespaces whose jobs it may list, None for all, and how many were not asked about."""
        if self._reviews.may_list(account, GROUP, JOBS):
            return None, 0
        with_jobs = sorted(self._namespaces(), key=lambda name: (name != account.namespace, name))
        asked = with_jobs[: self._settings.page_namespaces_limit]
        seen = (name for name in asked if self._reviews.may_list(account, GROUP, JOBS, name))
        return frozenset(seen), len(with_jobs) - len(asked)


class _Kept(Generic[Value]):
    """The answers that were asked for last, in so many entries; not safe by itself."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._entries: OrderedDict[bytes, tuple[float, Value]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def has(self, key: bytes) -> bool:
        """Whether there is an answer, however old."""
        return key in self._entries

    def find(self, key: bytes, since: float) -> Value | None:
        """One that was given since then."""
        found = self._entries.get(key)
        if found is None or found[0] < since:
            return None
        self._entries.move_to_end(key)
        return found[1]

    def put(self, key: bytes, value: Value, now: float) -> Value:
        """The answer, which is kept."""
        self._entries[key] = now, value
        self._entries.move_to_end(key)
        while len(self._entries) > self._most:
            self._entries.popitem(last=False)
        return value

    def drop(self, key: bytes) -> None:
        """Forget it."""
        self._entries.pop(key, None)
