"""Logs of stages, from their pods: `ports.StageLogs` on a cluster.

The kubelet keeps them for as long as the pod exists. A log is read piece by piece, by the times that the kubelet puts
before each line, at most once in POLL_SECONDS.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

from orchestrator.adapters.kubernetes.api import Json, KubeApi, path_of
from orchestrator.adapters.kubernetes.pod_manifest import JOB_LABEL, TRAINER
from orchestrator.api.base import API_VERSION
from orchestrator.errors import InvalidObject, NotFound
from orchestrator.ports import StageLog

POLL_SECONDS = 1.0
FIRST_TIME = ""


class PodLogs:
    """The logs of a cluster's stages."""

    def __init__(self, api: KubeApi) -> None:
        self._api = api

    def attempts(self, namespace: str, job: str) -> Sequence[StageLog]:
        """The job's pods that exist and have started; none that the job's status says is another's."""
        items: list[Json] = self._api.get(path_of("v1", "pods", namespace), labelSelector=f"{JOB_LABEL}={job}")["items"]
        started = {item["metadata"]["name"]: item["metadata"]["uid"] for item in items if _has_started(item)}
        uids: Mapping[str, str] = self._uids(namespace, job) if started else {}
        found = (StageLog.of(namespace, job, name) for name, uid in started.items() if uids.get(name, uid) == uid)
        return [log for log in found if log is not None]

    def _uids(self, namespace: str, job: str) -> Mapping[str, str]:
        """The uids of the job's pods by their names, as far as its status names them."""
        try:
            found = self._api.get(path_of(API_VERSION, "qlorajobs", namespace, job))
        except NotFound:
            return {}
        attempts: list[Json] = found.get("status", {}).get("attempts") or []
        named = (attempt for attempt in attempts if attempt.get("stageUid"))
        return {f"{job}-{each['stage']}-{each['number']}": each["stageUid"] for each in named}

    def tail(self, log: StageLog) -> PodTail:
        """One of them, from its beginning."""
        return PodTail(self._api, f"{path_of('v1', 'pods', log.namespace, str(log.name))}/log")


class PodTail:
    """One pod's log, which may still grow."""

    def __init__(self, api: KubeApi, path: str) -> None:
        self._api = api
        self._path = path
        self._last_time = FIRST_TIME
        self._told_at_last = 0
        """Lines of that very time that were handed out; the kubelet starts again with whole seconds."""
        self._polled_at = float("-inf")

    def new_lines(self, closed: bool) -> Iterator[str]:
        """Whole lines only: the kubelet writes no others."""
        if not closed and time.monotonic() - self._polled_at < POLL_SECONDS:
            return
        self._polled_at = time.monotonic()
        query = {"sinceTime": self._last_time} if self._last_time else {}
        try:
            text = self._api.text(self._path, container=TRAINER, timestamps="true", **query)
        except (NotFound, InvalidObject):  # gone, or its container is not there yet
            return
        skip = self._told_at_last
        for line in text.splitlines():
            when, _, words = line.partition(" ")
            if when < self._last_time:
                continue
            if when == self._last_time:
                if skip:
                    skip -= 1
                    continue
                self._told_at_last += 1
            else:
                self._last_time, self._told_at_last, skip = when, 1, 0
            yield words


def _has_started(pod: Json) -> bool:
    statuses: list[Json] = pod.get("status", {}).get("containerStatuses") or []
    return any("running" in status.get("state", {}) or "terminated" in status.get("state", {}) for status in statuses)
