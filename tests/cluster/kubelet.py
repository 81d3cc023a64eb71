"""A kubelet on paper: plays the pods of stages through the real API server, as fast as it hears of them.

Tests that are about the controller and not about containers use it. It binds a pod to a node if no scheduler has, and
takes it through running to its end with the termination message that the trainer would write. Its nodes may be out of
reach for a while. What trainers do is remembered outside the pods, as a job's store would: a train stage that is
stopped leaves its step, and the next one goes on from there. Every stage that ran is counted, so that a test can ask
whether two ran at one time.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime

from orchestrator.adapters.kubernetes.api import STRATEGIC_PATCH, Json, KubeApi, path_of
from orchestrator.adapters.kubernetes.pod_manifest import JOB_UID_LABEL, MANAGED_BY_LABEL, MANAGER, STAGE_LABEL
from orchestrator.adapters.kubernetes.watch import Cache, Changes
from orchestrator.api.reasons import ExitCode
from orchestrator.api.results import PublishResult, StageResult
from orchestrator.errors import OrchestratorError
from tests.builders import prepare_result, train_result

STEPS = 120
POLL_SECONDS = 0.02
HEARTBEAT_SECONDS = 0.5


@dataclass(slots=True)
class Seen:
    """What one pod has been through."""

    uid: str
    started_at: float | None = None
    ended: bool = False


@dataclass(slots=True)
class Books:
    """What happened, by the kubelet's own count."""

    steps: Counter[str] = field(default_factory=Counter[str])
    """Durable steps, by the job's uid."""
    started: Counter[str] = field(default_factory=Counter[str])
    """Train stages that began, by the job's uid."""
    running: dict[str, set[str]] = field(default_factory=dict[str, set[str]])
    """Uids of the train pods that run now, by the job's uid."""
    overlaps: list[str] = field(default_factory=list[str])
    """Jobs of which two train stages ran at one time."""


class PaperKubelet:
    """Plays all pods of the service. A context manager."""

    def __init__(self, api: KubeApi, *nodes: str, train_seconds: float = 0.3, heartbeats: bool = False) -> None:
        """Pods come to the first of the nodes that can be reached."""
        self._api = api
        self._nodes = nodes or ("paper",)
        self.unreachable: frozenset[str] = frozenset()
        """Nodes whose pods nobody plays, and of which nobody hears."""
        self._heartbeats = heartbeats
        self._beat_at = 0.0
        self.train_seconds = train_seconds
        self._changes = Changes()
        self._pods: Cache[Json] = Cache(
            api, "v1", "pods", lambda item: item, self._changes, selector=f"{MANAGED_BY_LABEL}={MANAGER}"
        )
        self._seen: dict[str, Seen] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.books = Books()

    def __enter__(self) -> PaperKubelet:
        self._pods.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._pods.close()

    def _run(self) -> None:
        while not self._over.wait(POLL_SECONDS):
            if self._heartbeats and time.monotonic() - self._beat_at > HEARTBEAT_SECONDS:
                self._beat_at = time.monotonic()
                self._beat()
            for item in list(self._pods.values().values()):
                try:
                    self._play(item)
                except OrchestratorError:
                    continue  # the pod has changed or gone; the next look says how

    def _beat(self) -> None:
        for node in sorted(set(self._nodes) - self.unreachable):
            ready = {"type": "Ready", "status": "True", "reason": "KubeletReady", "lastHeartbeatTime": _now()}
            path = f"{path_of('v1', 'nodes', name=node)}/status"
            self._api.patch(path, {"status": {"conditions": [ready]}}, STRATEGIC_PATCH)

    def _play(self, item: Json) -> None:
        meta: Json = item["metadata"]
        seen = self._seen.setdefault(meta["uid"], Seen(uid=meta["uid"]))
        path = path_of("v1", "pods", meta["namespace"], meta["name"])
        labels: dict[str, str] = meta["labels"]
        job, is_train = labels[JOB_UID_LABEL], labels[STAGE_LABEL] == "train"
        node = item["spec"].get("nodeName")
        if not node:
            self._bind(path, meta["name"])
        elif node in self.unreachable:
            return
        elif seen.ended:
            if "deletionTimestamp" in meta:
                self._api.delete(path, {"gracePeriodSeconds": 0})
        elif seen.started_at is None and "deletionTimestamp" not in meta:
            self._begin(path, seen, job, is_train)
        elif "deletionTimestamp" in meta:
            self._end(path, seen, job, ExitCode.PREEMPTED if is_train else 143, self._stopped(job) if is_train else "")
        elif time.monotonic() - (seen.started_at or 0.0) > (self.train_seconds if is_train else 0.0):
            self._end(path, seen, job, ExitCode.OK, self._result(labels[STAGE_LABEL], job))

    def _bind(self, path: str, name: str) -> None:
        target = {"kind": "Node", "name": next(node for node in self._nodes if node not in self.unreachable)}
        self._api.create(
            f"{path}/binding", {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name}, "target": target}
        )

    def _begin(self, path: str, seen: Seen, job: str, is_train: bool) -> None:
        self._write(path, "Running", {"running": {"startedAt": _now()}})
        seen.started_at = time.monotonic()
        if is_train:
            running = self.books.running.setdefault(job, set())
            if running:
                self.books.overlaps.append(job)
            running.add(seen.uid)
            self.books.started[job] += 1

    def _end(self, path: str, seen: Seen, job: str, code: int, message: str) -> None:
        terminated = {"exitCode": int(code), "startedAt": _now(), "finishedAt": _now(), "message": message}
        self._write(path, "Failed" if code else "Succeeded", {"terminated": terminated})
        seen.ended = True
        self.books.running.get(job, set()).discard(seen.uid)

    def _stopped(self, job: str) -> str:
        self.books.steps[job] = min(STEPS - 1, self.books.steps[job] + 10)
        return _wire(train_result(self.books.steps[job], complete=False))

    def _result(self, stage: str, job: str) -> str:
        if stage == "prepare":
            return _wire(StageResult(prepare=prepare_result()))
        if stage == "train":
            self.books.steps[job] = STEPS
            return _wire(train_result(STEPS))
        return _wire(
            StageResult(publish=PublishResult(registered_model=job, model_version="1", model_uri="models:/m/1"))
        )

    def _write(self, path: str, phase: str, state: Json) -> None:
        container = {"name": "trainer", "image": "i", "imageID": "", "ready": False, "restartCount": 0, "state": state}
        body = {"status": {"phase": phase, "containerStatuses": [container]}}
        self._api.patch(f"{path}/status", json.loads(json.dumps(body)), STRATEGIC_PATCH)


def _wire(result: StageResult) -> str:
    return result.model_dump_json(by_alias=True, exclude_none=True)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
