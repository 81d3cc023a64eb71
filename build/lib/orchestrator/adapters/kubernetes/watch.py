"""Caches that are kept up to date by watches: what the controller sees of the cluster.

Reading one asks no server. Rules:

- Complete before anybody reads: `start` returns after the first list. A cache that has not been heard of for
  `stale_seconds` raises when it is read, so nothing is decided on an old view.
- It never goes back: a list older than what the watch has told is refused, an object gives way only to a newer one.
  (Resource versions of one resource are numbers that grow: etcd's revisions.)
- Our own writes are put into it from the server's answers, so whoever wrote reads what was written. Where the watch
  is further than that answer, and the object is not here, it may have told of the object's end: the answer is dropped.
- An object that cannot be read is left out, and logged once a version: whoever may write one must not stop everybody.
- Events only update the cache and wake the loop; no decision hangs on one event, and what a faulty connection
  swallowed is found by the list that is made every `relist_seconds`, or by the conflict that it leads to (`correct`).

Two caches are not one snapshot, and the core relies on one thing across them
(`core/job/stage_commands.leftover_commands`): that a stage in the view of pods has its attempt in the view of jobs.
`pods` says how that is kept.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

from orchestrator.adapters.kubernetes.api import Gone, Json, KubeApi, Stream, path_of, resource_of
from orchestrator.errors import OrchestratorError, StoreUnavailable

log = logging.getLogger(__name__)

PAGE_OBJECTS = 200
"""A page is parsed as a whole, and takes four times its size meanwhile."""
WATCH_SECONDS = (240, 480)
"""The server ends a watch after a random time in this range, so that not all start again at once."""
SILENCE_SECONDS = 130.0
"""The server sends a bookmark about every minute; a connection that is silent for longer is dead."""
BACKOFF_SECONDS = (0.2, 15.0)
"""The first and the longest pause before a watch that broke is begun anew."""
STALE_SECONDS = 180.0
RELIST_SECONDS = 600.0
EVERYWHERE = ("",)

Value = TypeVar("Value")


class Changes:
    """What all caches of a process share. Counts changes and lets threads wait for the next one."""

    def __init__(
        self,
        relist_seconds: float = RELIST_SECONDS,
        *,
        stale_seconds: float = STALE_SECONDS,
        backoff_seconds: tuple[float, float] = BACKOFF_SECONDS,
    ) -> None:
        self.relist_seconds = relist_seconds
        """Every cache lists anew so often, whatever its watch has told."""
        self.stale_seconds = stale_seconds
        """A view that has heard nothing for longer is not decided on."""
        self.backoff_seconds = backoff_seconds
        """The first and the longest pause before a watch that broke is begun anew."""
        self._changed = threading.Condition()
        self._count = 0
        self.on_restart: Callable[[str, str], None] = lambda _resource, _reason: None
        """Told when a watch has to be begun anew, with the resource and a word for why."""

    def note(self) -> None:
        """Something changed."""
        with self._changed:
            self._count += 1
            self._changed.notify_all()

    def wait(self, since: str, timeout_seconds: float) -> str:
        """The cursor once it differs from `since`, at the latest after the timeout."""
        with self._changed:
            self._changed.wait_for(lambda: str(self._count) != since, max(0.0, timeout_seconds))
            return str(self._count)


class Cache(Generic[Value]):
    """The objects of one resource in all namespaces, or in some, each projected by `parse`."""

    def __init__(
        self,
        api: KubeApi,
        group_version: str,
        resource: str,
        parse: Callable[[Json], Value | None],
        changes: Changes,
        *,
        namespaces: Sequence[str] = EVERYWHERE,
        selector: str = "",
        on_deleted: Callable[[Json], None] = lambda _item: None,
    ) -> None:
        """What `parse` returns None for is left out. `on_deleted` is told an object's last state, if the watch is."""
        self._feeds = {
            namespace: Feed(api, path_of(group_version, resource, namespace), parse, changes, selector, on_deleted)
            for namespace in namespaces
        }

    @property
    def started(self) -> bool:
        """Whether it is kept up to date."""
        return all(feed.started for feed in self._feeds.values())

    def start(self) -> None:
        """List once, then watch in threads of their own. Raises what the list raises."""
        for feed in self._feeds.values():
            feed.start()

    def refresh(self) -> None:
        """List anew, now: whatever anybody wrote before this call is seen after it."""
        for feed in self._feeds.values():
            feed.refresh()

    def close(self) -> None:
        """Watch no more."""
        for feed in self._feeds.values():
            feed.close()

    def values(self) -> Mapping[str, Value]:
        """Every object by `namespace/name`. Raises StoreUnavailable where the view is too old to decide on."""
        return {key: value for feed in self._feeds.values() for key, value in feed.values()}

    def find(self, key: str) -> Value | None:
        """One of them."""
        feed = self._feed(key)
        return feed.find(key) if feed else None

    def put(self, item: Json, value: Value | None) -> None:
        """Take over the server's answer to a write of our own, unless the watch knows better."""
        if (feed := self._feed(key_of(item))) is not None:
            feed.put(item, value)

    def correct(self, item: Json, value: Value | None) -> None:
        """Take over what the server says now, where the watch seems to have missed it."""
        if (feed := self._feed(key_of(item))) is not None:
            feed.correct(item, value)

    def drop(self, key: str) -> None:
        """Forget an object that the server says is gone."""
        if (feed := self._feed(key)) is not None:
            feed.drop(key)

    def _feed(self, key: str) -> Feed[Value] | None:
        return self._feeds.get("") or self._feeds.get(key.partition("/")[0])


class Feed(Generic[Value]):
    """A list and the watches that follow it."""

    def __init__(
        self,
        api: KubeApi,
        path: str,
        parse: Callable[[Json], Value | None],
        changes: Changes,
        selector: str,
        on_deleted: Callable[[Json], None],
    ) -> None:
        self._on_deleted = on_deleted
        self._listing = threading.Lock()
        self._api = api
        self._path = path
        self._parse = parse
        self._changes = changes
        self._query: dict[str, str | int] = {"labelSelector": selector} if selector else {}
        self._lock = threading.Lock()
        self._items: dict[str, tuple[int, Value | None]] = {}
        self._seen_version = 0
        """All that happened up to here has been told."""
        self._heard_at = self._listed_at = time.monotonic()
        self._stream: Stream | None = None
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def started(self) -> bool:
        """Whether it is kept up to date."""
        return self._thread is not None

    def start(self) -> None:
        """List once, then watch."""
        if self._thread is None:
            self._list()
            self._thread = threading.Thread(target=self._follow, name=f"watch {self._path}", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Watch no more."""
        self._over.set()
        if (stream := self._stream) is not None:
            stream.close()
        if self._thread is not None:
            self._thread.join()

    def values(self) -> list[tuple[str, Value]]:
        """What there is; raises StoreUnavailable where nobody knows."""
        silent_seconds = time.monotonic() - self._heard_at
        if silent_seconds > self._changes.stale_seconds:
            raise StoreUnavailable(
                f"nothing was heard of {self._path} for {silent_seconds:.0f} s, so nothing is decided; "
                "the watch is begun anew until the API server answers"
            )
        with self._lock:
            return [(key, value) for key, (_, value) in self._items.items() if value is not None]

    def find(self, key: str) -> Value | None:
        """One of them."""
        with self._lock:
            return self._items.get(key, (0, None))[1]

    def put(self, item: Json, value: Value | None) -> None:
        """An answer to our own write: newer than what is here, unless the watch has told of it already."""
        with self._lock:
            may_exist = version_of(item) > self._seen_version or key_of(item) in self._items
            taken = may_exist and self._take(item, value)
        if taken:
            self._changes.note()

    def correct(self, item: Json, value: Value | None) -> None:
        """What the server says now."""
        with self._lock:
            taken = self._take(item, value)
        if taken:
            self._changes.note()

    def drop(self, key: str) -> None:
        """Gone."""
        with self._lock:
            dropped = self._items.pop(key, None)
        if dropped is not None:
            self._changes.note()

    def _read(self, item: Json) -> Value | None:
        """The object; one that cannot be read is left out, and does not keep anybody from seeing the others."""
        try:
            return self._parse(item)
        except MemoryError:
            raise
        except Exception:
            log.exception("%s of %s cannot be read and is left out", key_of(item), self._path)
            return None

    def _is_news(self, item: Json) -> bool:
        """Whether it is newer than what is here; an answer and the watch tell of every write of ours twice."""
        return version_of(item) > self._items.get(key_of(item), (0, None))[0]

    def _take(self, item: Json, value: Value | None) -> bool:
        """Keep an object, if it is news."""
        if not self._is_news(item):
            return False
        self._items[key_of(item)] = (version_of(item), value)
        return True

    # the thread

    def _follow(self) -> None:
        failures = 0
        while not self._over.is_set():
            try:
                if not self._seen_version or time.monotonic() - self._listed_at > self._changes.relist_seconds:
                    self._list()
                self._watch()
                failures = 0
            except Gone:
                self._restart("expired", f"the watch of {self._path} expired; listing anew")
            except OrchestratorError as error:
                failures += 1
                self._changes.on_restart(resource_of(self._path), "error")
                self._rest(failures, error)
            except Exception as error:
                log.exception("an event of %s could not be read; listing anew", self._path)
                self._restart("unreadable", str(error))
                failures += 1
                self._rest(failures, error)

    def _restart(self, reason: str, message: str) -> None:
        log.info("%s", message)
        self._changes.on_restart(resource_of(self._path), reason)
        self._listed_at = float("-inf")

    def _rest(self, failures: int, error: Exception) -> None:
        base, longest = self._changes.backoff_seconds
        seconds = random.uniform(0.5, 1.0) * min(base * 2.0 ** min(failures, 30), longest)  # noqa: S311  jitter
        log.info("watching %s again in %.1f s: %s", self._path, seconds, error)
        self._over.wait(seconds)

    def refresh(self) -> None:
        """List anew."""
        self._list()

    def _list(self) -> None:
        """Replace everything by a list that is as new as the server's storage."""
        with self._listing:
            self._replace()

    def _replace(self) -> None:
        listed_at, version, found = time.monotonic(), 0, set[str]()
        query: dict[str, str | int] = {**self._query, "limit": PAGE_OBJECTS}
        while True:
            page = self._api.get(self._path, **query)
            version = int(page["metadata"]["resourceVersion"])  # the same on every page
            if version < self._seen_version:
                raise StoreUnavailable(f"a list of {self._path} at {version} is older than {self._seen_version}")
            with self._lock:
                for item in filter(self._is_news, page["items"]):
                    self._take(item, self._read(item))
            found.update(map(key_of, page["items"]))
            if not (token := page["metadata"].get("continue")):
                break
            query["continue"] = token
        with self._lock:
            for key in [key for key, (known, _) in self._items.items() if key not in found and known <= version]:
                del self._items[key]
            self._seen_version = max(self._seen_version, version)
        self._heard_at, self._listed_at = time.monotonic(), listed_at
        self._changes.note()

    def _watch(self) -> None:
        """Follow one stream to its end."""
        query: dict[str, str | int] = {
            **self._query,
            "resourceVersion": self._seen_version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": min(random.randint(*WATCH_SECONDS), max(1, int(self._changes.relist_seconds))),  # noqa: S311
        }
        self._stream = self._api.watch(self._path, SILENCE_SECONDS, **query)
        self._heard_at = time.monotonic()
        if self._over.is_set():
            self._stream.close()
        for event in self._stream:
            self._hear(event["type"], event["object"])
            self._heard_at = time.monotonic()

    def _hear(self, kind: str, item: Json) -> None:
        version, changed = version_of(item), False
        with self._lock:
            if version >= self._seen_version and kind == "DELETED":
                changed = self._items.pop(key_of(item), None) is not None
            elif version >= self._seen_version and kind != "BOOKMARK" and self._is_news(item):
                changed = self._take(item, self._read(item))
            self._seen_version = max(self._seen_version, version)
        if kind == "DELETED" and changed:
            self._on_deleted(item)
        if changed:
            self._changes.note()


def key_of(item: Json) -> str:
    """`namespace/name`; `/name` for what has no namespace."""
    meta = item["metadata"]
    return f"{meta.get('namespace', '')}/{meta['name']}"


def version_of(item: Json) -> int:
    """How new an object is, or a bookmark."""
    return int(item["metadata"]["resourceVersion"])
