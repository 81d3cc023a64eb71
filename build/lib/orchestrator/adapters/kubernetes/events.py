"""Kubernetes events about jobs: what `kubectl describe` shows of the decisions.

Events are for people: they may be late, and one that cannot be sent is logged and lost. So `Recorder` has
a thread of its own, which waits DELAY_SECONDS and tells what came together about one job, such as "prepared" and
"admitted", in one object: its reason is the last one's, its note has all the sentences. Warnings are told one by one.
It tells of JOBS_PER_SECOND jobs at the most: when there is more to tell it comes later and more of it comes
together, so that words never crowd out deeds. The server keeps events for about an hour.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from orchestrator.adapters.kubernetes.api import Json, KubeApi, path_of
from orchestrator.api.base import API_VERSION
from orchestrator.api.job import ObjectMeta, QLoRAJob
from orchestrator.api.reasons import Reason
from orchestrator.core.commands import Event
from orchestrator.errors import AlreadyExists, OrchestratorError

log = logging.getLogger(__name__)

EVENTS_VERSION, EVENTS = "events.k8s.io/v1", "events"
KIND = "QLoRAJob"
REPORTER = "qlora.dev/controller"
NOTE_BYTES = 1024
"""The API server's bound on notes."""
DELAY_SECONDS = 2.0
WAITING_LIMIT = 10_000
"""Jobs with events to be told; what finds no room is lost."""
EVENTS_OF_A_JOB_LIMIT = 100
"""Events about one job that wait; the oldest ones are lost."""
JOBS_PER_SECOND = 5.0
CLOSE_SECONDS = 5.0
"""How long the end may be put off in order to tell what is left."""
SEPARATOR = "\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """Something that happened to a job."""

    meta: ObjectMeta
    event: Event
    time: datetime


class Recorder:
    """Sends events: at once, or after `start` from a thread of its own."""

    def __init__(
        self,
        api: KubeApi,
        reporter: str,
        *,
        delay_seconds: float = DELAY_SECONDS,
        jobs_per_second: float = JOBS_PER_SECOND,
    ) -> None:
        self._delay_seconds = delay_seconds
        self._pause_seconds = 1 / jobs_per_second
        self._api = api
        self._reporter = reporter[:128]
        self._waiting: dict[str, list[Told]] = {}
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Makes events go to a thread, which sends them later."""
        self._thread = threading.Thread(target=self._drive, name="events", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Send what is left, as far as there is time for it, and end."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def record(self, job: QLoRAJob, event: Event) -> None:
        """Tell of an event."""
        told = Told(meta=job.metadata, event=event, time=datetime.now(UTC))
        if self._thread is None:
            self._send([told])
            return
        with self._lock:
            if len(self._waiting) < WAITING_LIMIT or job.metadata.uid in self._waiting:
                waiting = self._waiting.setdefault(job.metadata.uid, [])
                waiting.append(told)
                del waiting[:-EVENTS_OF_A_JOB_LIMIT]

    def list(self, job: QLoRAJob) -> Sequence[tuple[str, Event]]:
        """A job's events that the server still has, oldest first."""
        selector = f"regarding.uid={job.metadata.uid},reportingController={REPORTER}"
        path = path_of(EVENTS_VERSION, EVENTS, job.metadata.namespace)
        items: list[Json] = self._api.get(path, fieldSelector=selector)["items"]
        items.sort(key=lambda item: str(item["eventTime"]))
        return [(str(item["eventTime"]), _parsed(item)) for item in items]

    def _drive(self) -> None:
        while not self._over.wait(self._pause_seconds):
            self._send_about_one_job(self._delay_seconds)
        deadline = time.monotonic() + CLOSE_SECONDS
        while self._waiting and time.monotonic() < deadline:
            self._send_about_one_job(0.0)
        if self._waiting:
            log.warning("events about %d jobs are lost: there was no time left to tell them", len(self._waiting))

    def _send_about_one_job(self, delay_seconds: float) -> None:
        """What there is to tell about the job that has waited longest, once that is long enough."""
        with self._lock:
            uid = next(iter(self._waiting), None)
            if uid is None or _age_seconds(self._waiting[uid][0]) < delay_seconds:
                return
            told = self._waiting.pop(uid)
        for together in _grouped(told):
            about = f"{together[0].meta.namespace}/{together[0].meta.name}"
            try:
                self._send(together)
            except OrchestratorError as error:
                log.warning("an event about job %s is lost: %s", about, error)
            except Exception:
                log.exception("an event about job %s is lost", about)

    def _send(self, together: Sequence[Told]) -> None:
        body = _wire(together, self._reporter)
        try:
            self._api.create(path_of(EVENTS_VERSION, EVENTS, body["metadata"]["namespace"]), body)
        except AlreadyExists:  # sent before, and only the answer was lost
            log.debug("event %s exists", body["metadata"]["name"])


def _age_seconds(told: Told) -> float:
    return (datetime.now(UTC) - told.time).total_seconds()


def _grouped(told: Sequence[Told]) -> list[list[Told]]:
    """One after another, with neighbors that are no warnings together."""
    groups: list[list[Told]] = []
    for each in told:
        if groups and not each.event.warning and not groups[-1][-1].event.warning:
            groups[-1].append(each)
        else:
            groups.append([each])
    return groups


def _wire(together: Sequence[Told], reporter: str) -> Json:
    last = together[-1]
    meta, reason = last.meta, last.event.reason.value
    note = _clipped(SEPARATOR.join(told.event.message for told in together))
    when = last.time.isoformat(timespec="microseconds").replace("+00:00", "Z")
    digest = hashlib.sha256(f"{meta.uid} {reason} {note} {when}".encode()).hexdigest()[:16]
    return {
        "apiVersion": EVENTS_VERSION,
        "kind": "Event",
        "metadata": {"name": f"{meta.name}.{digest}", "namespace": meta.namespace},
        "regarding": {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "name": meta.name,
            "namespace": meta.namespace,
            "uid": meta.uid,
        },
        "eventTime": when,
        "type": "Warning" if last.event.warning else "Normal",
        "reason": reason,
        "action": reason,
        "note": note,
        "reportingController": REPORTER,
        "reportingInstance": reporter,
    }


def _clipped(text: str) -> str:
    data = text.encode()
    return text if len(data) <= NOTE_BYTES else data[: NOTE_BYTES - 3].decode(errors="ignore") + "..."


def _parsed(item: Json) -> Event:
    return Event(
        reason=Reason(item["reason"]), message=str(item.get("note", "")), warning=item.get("type") == "Warning"
    )
