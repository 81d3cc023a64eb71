"""What a job's stages wrote: attempts in order, line by line, from wherever the service keeps it.

`StageLogs` is the place: a folder of the embedded service, or the pods of a cluster, and for attempts that neither has
any more the copy in the job's store. Following goes on to the next attempt by itself.
"""

from __future__ import annotations

import json
import shlex
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import get_args
from urllib.parse import urlsplit

from orchestrator.adapters.job_store import stored_adapter
from orchestrator.api.formats import EARLIER_LOG_NAME, LOG_NAME, log_folder
from orchestrator.api.job import QLoRAJob
from orchestrator.api.stage_name import StageKind, StageName
from orchestrator.api.words import in_lines
from orchestrator.errors import NotFound, OrchestratorError
from orchestrator.ports import StageLog, StageLogs, Tail
from orchestrator.sdk.log_text import log_text

LOG_SUFFIX = ".log"
READER, READER_IMAGE, READER_USER_ID = "read-log", "busybox", 65532
"""A pod that prints a log from a claim, with the user of the jobs' pods."""
FOLLOW_POLL_SECONDS = 0.2
MAX_LINE_BYTES = 1 << 20
"""A longer line is cut into several."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLine:
    """One line of one attempt's log, without its line feed."""

    stage: StageKind
    attempt: int
    text: str

    def __str__(self) -> str:
        return self.text


class LogLines(Iterator[LogLine]):
    """Lines to iterate over, once; as text, those that are left, as people read them."""

    def __init__(self, lines: Iterator[LogLine]) -> None:
        self._lines = lines

    def __next__(self) -> LogLine:
        return next(self._lines)

    def __str__(self) -> str:
        return "\n".join(in_lines(log_text(line.text)) for line in self._lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogQuery:
    """Whose log is read."""

    namespace: str
    job: str
    stage: StageKind | None = None
    attempt: int | None = None

    def wants(self, log: StageLog) -> bool:
        """Whether the log is asked for."""
        return self.stage in (None, log.name.stage) and self.attempt in (None, log.name.attempt)


def read_lines(logs: StageLogs, query: LogQuery) -> Iterator[LogLine]:
    """All lines that are there now."""
    for line in follow_lines(logs, query, finished=lambda: True):
        if line is not None:
            yield line


def follow_lines(logs: StageLogs, query: LogQuery, finished: Callable[[], bool]) -> Iterator[LogLine | None]:
    """Lines as they are written, until the job is `finished` and all is read.

    None means that nothing is new: the caller pauses for FOLLOW_POLL_SECONDS, and may stop there.
    """
    tails: dict[StageLog, Tail] = {}
    while True:
        at_end = finished()  # asked before reading, so that the last lines are not missed
        found = [log for log in logs.attempts(query.namespace, query.job) if query.wants(log)]
        attempts = sorted(found, key=lambda log: log.name.attempt)
        for log in attempts:
            tail = tails.setdefault(log, logs.tail(log))
            for text in tail.new_lines(closed=at_end or log is not attempts[-1]):
                yield LogLine(stage=log.name.stage, attempt=log.name.attempt, text=text)
        if at_end:
            return
        yield None


def last_lines(lines: Iterator[LogLine | None], count: int | None) -> Iterator[LogLine | None]:
    """Of the lines up to the first pause no more than the last `count`, and all after it."""
    if count is not None:
        yield from deque(takewhile(lambda line: line is not None, lines), count)
    yield from lines


class LogFolder:
    """The embedded service's logs: `<folder>/<namespace>/<stage>.log`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def attempts(self, namespace: str, job: str) -> Sequence[StageLog]:
        """The job's logs that exist."""
        found = (
            StageLog.of(namespace, job, path.stem) for path in (self._folder / namespace).glob(f"{job}-*{LOG_SUFFIX}")
        )
        return [log for log in found if log is not None]

    def tail(self, log: StageLog) -> Tail:
        """One of them, from its beginning."""
        return FileTail(self._folder / log.namespace / f"{log.name}{LOG_SUFFIX}")


class FileTail:
    """A log file that may still grow, or go away."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset_bytes = 0

    def new_lines(self, closed: bool) -> Iterator[str]:
        """What was written since the last call."""
        try:
            stream = self._path.open("rb")
        except FileNotFoundError:
            return  # deleted after it was listed
        with stream:
            stream.seek(self._offset_bytes)
            while line := stream.readline(MAX_LINE_BYTES):
                if not line.endswith(b"\n") and len(line) < MAX_LINE_BYTES and not closed:
                    return
                self._offset_bytes += len(line)
                yield line.decode(errors="replace").rstrip("\r\n")


class KeptLogs:
    """Logs of a place that forgets them, and of the job's store for those that it has forgotten."""

    def __init__(self, place: StageLogs, job: QLoRAJob, query: LogQuery) -> None:
        self._place = place
        self._uri = job.status.store_uri
        self._stored = [] if self._uri is None else list(_ended(job, query))
        self._in_place = frozenset[StageLog]()

    def attempts(self, namespace: str, job: str) -> Sequence[StageLog]:
        """The job's logs that exist, or may exist in its store."""
        found = self._place.attempts(namespace, job)
        self._in_place = frozenset(found)
        return [*found, *(log for log in self._stored if log not in self._in_place)]

    def tail(self, log: StageLog) -> Tail:
        """One of them, from its beginning."""
        if log in self._in_place:
            return self._place.tail(log)
        folder_uri = f"{self._uri}/{log_folder(log.name.stage, log.name.attempt)}"
        return ClaimTail(folder_uri, log.namespace) if folder_uri.startswith("pvc://") else StoredTail(folder_uri)


def _ended(job: QLoRAJob, query: LogQuery) -> Iterator[StageLog]:
    """Attempts of the query that have ended: those of the status, and one that it does not name any more."""
    name, named = job.metadata.name, {attempt.number for attempt in job.status.attempts}
    found = [StageName(job=name, stage=a.stage, attempt=a.number) for a in job.status.attempts if not a.active]
    if query.attempt is not None and query.attempt not in named:
        found = [StageName(job=name, stage=stage, attempt=query.attempt) for stage in get_args(StageKind)]
    logs = (StageLog(namespace=job.metadata.namespace, name=each) for each in found)
    return (log for log in logs if query.wants(log))


class ClaimTail:
    """The log of an ended attempt on a claim, which pods alone can read: one line says so, and what prints it."""

    def __init__(self, folder_uri: str, namespace: str) -> None:
        self._uri = folder_uri
        self._namespace = namespace
        self._is_told = False

    def new_lines(self, closed: bool) -> Iterator[str]:  # noqa: ARG002 - it grows no more
        """The line, at the first call."""
        if not self._is_told:
            self._is_told = True
            yield (
                f"the log of this attempt is at {self._uri}, on a claim that only pods read; who may make one there "
                f"prints it with: {shlex.join(_reader(self._uri, self._namespace))}"
            )


def _reader(folder_uri: str, namespace: str) -> Sequence[str]:
    """The command that prints a log from a claim, by a pod within Pod Security `restricted`."""
    parts = urlsplit(folder_uri)
    names = " ".join(shlex.quote(f"{parts.path.strip('/')}/{name}") for name in (EARLIER_LOG_NAME, LOG_NAME))
    container: dict[str, object] = {
        "name": READER,
        "image": READER_IMAGE,
        "command": ["sh", "-c", f"cd /store && cat {names} 2>/dev/null"],
        "volumeMounts": [{"name": "store", "mountPath": "/store", "readOnly": True}],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    spec: dict[str, object] = {
        "containers": [container],
        "volumes": [{"name": "store", "persistentVolumeClaim": {"claimName": parts.netloc, "readOnly": True}}],
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": READER_USER_ID,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    overrides = json.dumps({"spec": spec}, separators=(",", ":"))
    run = ["run", READER, "--rm", "--stdin", "--quiet", "--restart=Never", f"--image={READER_IMAGE}"]
    return ["kubectl", f"--namespace={namespace}", *run, f"--overrides={overrides}"]


class StoredTail:
    """The log of an ended attempt in its job's store, which grows no more."""

    def __init__(self, folder_uri: str) -> None:
        self._uri = folder_uri
        self._is_read = False

    def new_lines(self, closed: bool) -> Iterator[str]:  # noqa: ARG002 - it is
        """All of it at the first call; where it cannot be read from here, one line that says so."""
        if self._is_read:
            return
        self._is_read = True
        for name in (EARLIER_LOG_NAME, LOG_NAME):
            try:
                content = stored_adapter.read_file(self._uri, name)
            except NotFound:  # it never wrote that much, or never began
                continue
            except OrchestratorError as error:
                yield f"the log of this attempt is at {self._uri} and cannot be read from here: {error}"
                return
            yield from content.decode(errors="replace").removesuffix("\n").split("\n")
