"""What happens to the pods, seen from outside: one watch, in the order in which the API server tells.

It trusts nothing that the controller says: who holds a GPU is worked out from the pods' own bindings and ends, and the
clock is this process's, at the arrival of each event.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from orchestrator.adapters.kubernetes.api import Json, KubeApi, path_of
from orchestrator.adapters.kubernetes.pod_manifest import JOB_LABEL, QUEUE_LABEL, STAGE_LABEL
from tests.cluster.resources import NAMESPACES
from tests.scale.pod_watch import PodWatch

POLL_SECONDS = 0.1
"""Seconds between two looks of whoever waits: a look at every event would take more of the machine than what is
measured."""


@dataclass(slots=True, kw_only=True)
class Pod:
    """One pod's life."""

    job: str
    stage: str
    queue: str
    created_at: float
    node: str = ""
    bound_at: float | None = None
    ended_at: float | None = None


@dataclass(slots=True)
class Broken:
    """Rules that were seen broken; each entry says by whom."""

    jobs_with_two_trainers: list[str] = field(default_factory=list[str])
    nodes_with_two_trainers: list[str] = field(default_factory=list[str])
    quotas: list[str] = field(default_factory=list[str])


class Observer:
    """Watches all pods of stages. A context manager."""

    def __init__(self, api: KubeApi, classes: Mapping[str, str], bounds: Mapping[tuple[str, str], int]) -> None:
        """`classes`: GPU class by node. `bounds`: the most GPUs by queue and class; a queue without is not bounded."""
        self.pods: dict[str, Pod] = {}
        self.broken = Broken()
        self.peak = 0
        """Most GPUs held at one time."""
        self._classes = classes
        self._bounds = bounds
        self._on_job: Counter[str] = Counter()
        self._on_node: Counter[str] = Counter()
        self._on_quota: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()
        self._watch = PodWatch(api, self._hear)

    def __enter__(self) -> Observer:
        self._watch.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._watch.__exit__()

    def wait(self, seen: Callable[[], bool], timeout_seconds: float, what: str) -> None:
        """Wait until something is so. Fails the test after the time, or where the watch has ended."""
        deadline = time.monotonic() + timeout_seconds
        while not seen():
            time.sleep(POLL_SECONDS)
            assert self._watch.is_alive(), "the watch of the pods has ended"
            assert time.monotonic() < deadline, f"not in {timeout_seconds:.0f} s: {what}"

    def of(self, stage: str) -> list[Pod]:
        """Pods of a stage so far."""
        with self._lock:
            return [pod for pod in self.pods.values() if pod.stage == stage]

    def first_pods(self) -> dict[str, float]:
        """When each job's first pod was seen, by the job's name."""
        first: dict[str, float] = {}
        with self._lock:
            for pod in self.pods.values():
                first.setdefault(pod.job, pod.created_at)
        return first

    def holders(self) -> list[str]:
        """Nodes with a GPU that is still held."""
        return sorted(node for node, count in self._on_node.items() if count)

    def _hear(self, kind: str, item: Json) -> None:
        now = time.monotonic()
        with self._lock:
            self._note(kind, item, now)

    def _note(self, kind: str, item: Json, now: float) -> None:
        meta: Json = item["metadata"]
        labels: dict[str, str] = meta["labels"]
        pod = self.pods.get(meta["uid"])
        if pod is None:
            pod = Pod(job=labels[JOB_LABEL], stage=labels[STAGE_LABEL], queue=labels[QUEUE_LABEL], created_at=now)
            self.pods[meta["uid"]] = pod
            if pod.stage == "train":
                self._count(self._on_job, pod.job, 1, self.broken.jobs_with_two_trainers)
        if pod.bound_at is None and (node := item["spec"].get("nodeName")):
            pod.bound_at, pod.node = now, node
            if pod.stage == "train":
                self._take(pod)
        if pod.ended_at is None and (kind == "DELETED" or item["status"].get("phase") in ("Succeeded", "Failed")):
            pod.ended_at = now
            if pod.stage == "train":
                self._release(pod)

    def _take(self, pod: Pod) -> None:
        self._count(self._on_node, pod.node, 1, self.broken.nodes_with_two_trainers)
        quota = (pod.queue, self._classes[pod.node])
        self._on_quota[quota] += 1
        if self._on_quota[quota] > self._bounds.get(quota, len(self._classes)):
            self.broken.quotas.append(f"{quota}: {self._on_quota[quota]}")
        self.peak = max(self.peak, self._on_node.total())

    def _release(self, pod: Pod) -> None:
        self._on_job[pod.job] -= 1
        if pod.bound_at is not None:
            self._on_node[pod.node] -= 1
            self._on_quota[pod.queue, self._classes[pod.node]] -= 1

    @staticmethod
    def _count(counter: Counter[str], key: str, limit: int, broken: list[str]) -> None:
        counter[key] += 1
        if counter[key] > limit:
            broken.append(key)


def unfinished_pods(api: KubeApi) -> list[str]:
    """Pods that have not ended."""
    phases = {
        item["metadata"]["name"]: item["status"].get("phase")
        for namespace in NAMESPACES
        for item in api.get(path_of("v1", "pods", namespace))["items"]
    }
    return sorted(name for name, phase in phases.items() if phase not in ("Succeeded", "Failed"))
