"""Stages as pods: `ports.StageRuntime` on an API server.

`pod_manifest` says what a pod looks like, `pod_facts` what one says about its stage. Rules:

- A name is an attempt: creating a pod that exists is done. A pod is only touched if it has the uid that was looked at.
- No finalizers. The end of a pod is kept in memory from the moment it is seen until `delete`, so that one that is
  taken away at once does not take its last words along. A pod that vanished without an end is absent, and the core
  resumes its job.
- To stop is to ask the trainer through its agent and, where that is not acknowledged at once, to delete the pod, whose
  grace starts with SIGTERM. A pod is never removed while its trainer may run: one that cannot end, because its node
  does not answer, is only forced out when the node is gone or an operator has declared it out of service.
- Whatever the views of pods and jobs say, a young pod that no attempt seems to explain is held against the job on the
  server first: the two are watched apart, and a leader that has just taken over may see a pod before its attempt. No
  view is older than STALE_SECONDS, so older pods need no such care.
- `delete` forgets. The pods stay, with their logs, until their job goes or newer ones crowd them out.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import get_args

from orchestrator.adapters.kubernetes.api import Forbidden, Json, KubeApi, path_of
from orchestrator.adapters.kubernetes.nodes import NODES, Node, count_gpus, gpus_of_others, parse_gpu_classes, read_node
from orchestrator.adapters.kubernetes.objects import Parser
from orchestrator.adapters.kubernetes.pod_facts import RuntimeBounds, StagePod, given_up, read_pod, stage_fact
from orchestrator.adapters.kubernetes.pod_manifest import MANAGED_BY_LABEL, MANAGER, claim_template, pod
from orchestrator.adapters.kubernetes.pod_policy import PodPolicy
from orchestrator.adapters.kubernetes.store import JOBS
from orchestrator.adapters.kubernetes.watch import EVERYWHERE, STALE_SECONDS, Cache, Changes
from orchestrator.api.base import API_VERSION
from orchestrator.api.reasons import Reason
from orchestrator.api.results import Failure, ProgressReport, StageResult
from orchestrator.api.stage_name import StageKind, StageName
from orchestrator.api.task import StageTask
from orchestrator.core.job.conditions import clip
from orchestrator.core.snapshot import StageFact, StagePhase
from orchestrator.errors import AlreadyExists, Conflict, InvalidObject, NotFound, TransientError
from orchestrator.ports import AgentChannel
from orchestrator.sizing.hardware import GpuClass

log = logging.getLogger(__name__)

PODS = "pods"
CLAIM_TEMPLATES_VERSION, CLAIM_TEMPLATES = "resource.k8s.io/v1", "resourceclaimtemplates"
YOUNG_SECONDS = 2 * STALE_SECONDS
"""How long after its creation a pod may be unknown to the view of jobs."""
NEW_NODE_SECONDS = 60.0
"""How long after a pod was put on a node the view of nodes may lack it."""
LAST_GRACE_SECONDS = 1
"""For a trainer that was told to stop and has not ended by its deadline."""
ENDS_LIMIT = 10_000
"""Ends that are kept in memory; a replica that stands by forgets none of them by itself."""
QUOTA_EXCEEDED = "exceeded quota"
STAGES: tuple[StageKind, ...] = get_args(StageKind)

__all__ = ["KubernetesPods", "RuntimeBounds"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request to stop that went to a trainer's agent."""

    at_seconds: float
    """Monotonic."""
    grace_seconds: int


class KubernetesPods:
    """The stages of all namespaces, or of some."""

    def __init__(
        self,
        api: KubeApi,
        changes: Changes,
        policy: PodPolicy,
        bounds: RuntimeBounds,
        channel: AgentChannel | None = None,
        *,
        namespaces: Sequence[str] = EVERYWHERE,
    ) -> None:
        """Raises InvalidObject for bounds that name a GPU class that does not exist."""
        self.channel = channel
        """A word with the trainers; may come later, or never."""
        self._api = api
        self._policy = policy
        self._bounds = bounds
        self._reachable = parse_gpu_classes(bounds.gpu_classes)
        self._parser = Parser()
        self._nodes: Cache[Node] = Cache(api, "v1", NODES, partial(read_node, policy=policy), changes)
        self._pods: Cache[StagePod] = Cache(
            api,
            "v1",
            PODS,
            self._read,
            changes,
            namespaces=namespaces,
            selector=f"{MANAGED_BY_LABEL}={MANAGER}",
            on_deleted=self._last_seen,
        )
        # Changes of its own: what other people's pods do wakes nobody, and is looked at in the next round.
        self._others: Cache[tuple[str, int]] = Cache(
            api,
            "v1",
            PODS,
            partial(gpus_of_others, policy=policy),
            Changes(changes.relist_seconds),
            namespaces=namespaces,
            selector=f"{MANAGED_BY_LABEL}!={MANAGER}",
        )
        self._told_not_whole: frozenset[str] = frozenset()
        self._lock = threading.Lock()  # never held while a cache is asked
        self._ends: dict[str, StagePod] = {}
        self._forgotten: set[str] = set()
        self._refused: dict[str, StageFact] = {}
        self._asked: dict[str, Asked] = {}

    def start(self) -> None:
        """Complete views from here on, which watches keep up to date."""
        self._nodes.start()
        self._pods.start()
        self._others.start()

    def refresh(self) -> None:
        """See everything that anybody wrote before this call."""
        self._nodes.refresh()
        self._pods.refresh()

    def close(self) -> None:
        """Watch no more; the pods go on."""
        self._others.close()
        self._pods.close()
        self._nodes.close()

    # what there is

    def observe(self) -> Mapping[str, StageFact]:
        """What is known of every stage, by `namespace/name`."""
        pods, nodes, now = self._pods.values(), self._nodes.values(), datetime.now(UTC)
        progress: Mapping[str, ProgressReport] = {} if self.channel is None else self.channel.progress()
        facts = {
            key: stage_fact(found, _leaving(found, nodes, now), progress.get(key), self._bounds, now)
            for key, found in self._known(pods).items()
        }
        return {**self._refused, **facts}

    def _known(self, pods: Mapping[str, StagePod]) -> Mapping[str, StagePod]:
        """The pods that are there, and those that ended and are not; without those that were forgotten."""
        uids = {found.uid for found in pods.values()}
        with self._lock:
            self._forgotten &= uids
            self._asked = {uid: asked for uid, asked in self._asked.items() if uid in uids}
            shown = {key: found for key, found in pods.items() if found.uid not in self._forgotten}
            return {**{key: ended for key, ended in self._ends.items() if key not in pods}, **shown}

    def _read(self, item: Json) -> StagePod | None:
        """A pod for the view, whose end is kept beyond it."""
        found = read_pod(item)
        if found is not None and found.end is not None:
            with self._lock:
                if found.uid not in self._forgotten:
                    self._ends[found.key] = found
                while len(self._ends) > ENDS_LIMIT:
                    self._ends.pop(next(iter(self._ends)))
        return found

    def _last_seen(self, item: Json) -> None:
        self._read(item)

    def gpu_classes(self) -> Sequence[GpuClass]:
        """What the nodes have, and what an autoscaler can add."""
        held = Counter(found.node for found in self._pods.values().values() if found.on_gpu and found.end is None)
        others: Counter[str] = Counter()
        for node, count in self._others.values().values():
            others[node] += count
        nodes = self._nodes.values().values()
        self._tell_not_whole(nodes)
        return count_gpus(nodes, held, self._reachable, others)

    def uncounted_gpus(self) -> Mapping[str, int]:
        """GPUs that no job gets because they are parts of cards, by the reason in words."""
        counts: Counter[str] = Counter()
        for node in self._nodes.values().values():
            if node.not_whole:
                counts[node.not_whole] += node.gpus
        return counts

    def _tell_not_whole(self, nodes: Iterable[Node]) -> None:
        """Say once of each node why its GPUs do not count."""
        found = {node.name: node.not_whole for node in nodes if node.not_whole}
        for name in sorted(found.keys() - self._told_not_whole):
            log.warning("the GPUs of node %s do not count: %s", name, found[name])
        self._told_not_whole = frozenset(found)

    # start

    def ensure(self, task: StageTask, gpu_class: str | None) -> None:
        """Create the attempt's pod. What the server refuses for good becomes a fact: the stage could not start."""
        name = task.stage_name
        try:
            if gpu_class is not None and self._policy.gpu_mode == "dra":
                self._ensure_claim_template(task.namespace, gpu_class)
            created = self._api.create(path_of("v1", PODS, task.namespace), pod(task, gpu_class, self._policy))
        except AlreadyExists:
            created = self._existing(task, name)
        except (Forbidden, InvalidObject) as error:
            self._refuse(task, name, str(error))
            return
        self._pods.put(created, self._read(created))

    def _ensure_claim_template(self, namespace: str, gpu_class: str) -> None:
        try:
            self._api.create(
                path_of(CLAIM_TEMPLATES_VERSION, CLAIM_TEMPLATES, namespace), claim_template(namespace, gpu_class)
            )
        except AlreadyExists:
            return

    def _existing(self, task: StageTask, name: str) -> Json:
        """The pod of this name, if it is the one that is wanted; raises TransientError while another is in the way."""
        key = f"{task.namespace}/{name}"
        try:
            found = self._api.get(path_of("v1", PODS, task.namespace, name))
        except NotFound as error:
            self._pods.drop(key)
            raise TransientError(f"pod {key} has just gone; it is created anew") from error
        known = read_pod(found)
        if known is None or known.job_uid != task.uid:
            raise TransientError(f"pod {key} is not this job's, but perhaps an earlier one's; it is waited for")
        if known.deletion_time is not None and known.end is None:
            raise TransientError(f"pod {key} is being deleted; it is created anew once it is gone")
        return found

    def _refuse(self, task: StageTask, name: str, message: str) -> None:
        reason = Reason.QUOTA_EXCEEDED if QUOTA_EXCEEDED in message else Reason.ADMISSION_REFUSED
        failure = Failure(reason=reason, message=clip(f"the API server refused the pod: {message}"))
        fact = StageFact(
            namespace=task.namespace,
            name=name,
            uid=task.uid,
            phase=StagePhase.EXITED,
            result=StageResult(failure=failure),
            disruption=reason,
        )
        self._refused[fact.key] = fact

    # stop

    def stop(self, namespace: str, name: str, grace_seconds: int, reason: Reason) -> None:
        """Ask for a checkpoint and an end, through the agent or by a signal. Called again until the stage has ended."""
        found = self._pods.find(f"{namespace}/{name}")
        if found is None or found.end is not None:
            return
        if reason is Reason.FENCED:
            self._require_unwanted(found)
        if found.deletion_time is not None:
            self._force_out_if_stranded(found, found.deletion_time)
            return
        left_seconds = self._ask(found, grace_seconds)
        if left_seconds is not None:
            self._delete(found, left_seconds)

    def _ask(self, found: StagePod, grace_seconds: int) -> int | None:
        """Pass the request on by the agent; the grace that is left for a signal, or None while none is needed."""
        if self.channel is None or not found.has_agent or found.start_time is None:
            return grace_seconds
        now = time.monotonic()
        with self._lock:
            asked = self._asked.setdefault(found.uid, Asked(at_seconds=now, grace_seconds=grace_seconds))
        told = self.channel.preempt(found.key, asked.grace_seconds)
        waited_seconds = now - asked.at_seconds
        if waited_seconds < (asked.grace_seconds if told else self._bounds.acknowledge_seconds):
            return None
        return max(LAST_GRACE_SECONDS, int(asked.grace_seconds - waited_seconds))

    def _force_out_if_stranded(self, found: StagePod, deletion_time: datetime) -> None:
        """Delete for good a pod whose kubelet will never say that it ended, if nothing of it can be running."""
        overdue_seconds = (datetime.now(UTC) - deletion_time).total_seconds()
        node = self._nodes.find(f"/{found.node}")
        if overdue_seconds <= self._bounds.stranded_seconds or (node is not None and not node.out_of_service):
            return
        why = "is out of service" if node is not None else "is gone"
        log.warning("pod %s is forced out: its node %s %s", found.key, found.node, why)
        self._delete(found, 0)

    def _delete(self, found: StagePod, grace_seconds: int) -> None:
        """Delete this very pod; raises Conflict where there is another of its name."""
        options: Json = {"gracePeriodSeconds": grace_seconds, "preconditions": {"uid": found.uid}}
        try:
            answer = self._api.delete(path_of("v1", PODS, found.namespace, found.name), options)
        except NotFound:
            self._pods.drop(found.key)
            return
        if answer.get("kind") == "Pod":
            self._pods.put(answer, self._read(answer))

    def _require_unwanted(self, found: StagePod) -> None:
        """Raises Conflict where the job on the server wants the stage that the view of jobs did not explain."""
        if (datetime.now(UTC) - found.created_time).total_seconds() > YOUNG_SECONDS:
            return
        try:
            job = self._parser.job(self._api.get(path_of(API_VERSION, JOBS, found.namespace, found.job)))
        except NotFound:
            return
        attempt = job.status.active_attempt
        if job.metadata.uid == found.job_uid and attempt is not None and job.stage_name(attempt) == found.name:
            raise Conflict(f"pod {found.key} is of the job's active attempt; the view of jobs is behind")

    # forget

    def delete(self, namespace: str, name: str, *, recorded: bool = False) -> None:
        """Forget an ended stage. Older ones of the job are deleted if too many stay, and what never started at once."""
        key = f"{namespace}/{name}"
        self._refused.pop(key, None)
        found = self._pods.find(key)
        with self._lock:
            ended = self._ends.get(key) if found is None else found
        if ended is None:
            return
        if not recorded:
            self._require_unwanted(ended)
        if ended.end is not None:
            self._forget(ended)
            self._delete_older(ended)
        elif given_up(ended, self._bounds, datetime.now(UTC)) is not None:
            self._delete_unstarted(ended)
        else:
            log.warning("pod %s has not ended and is not forgotten", key)

    def _forget(self, ended: StagePod) -> None:
        with self._lock:
            self._forgotten.add(ended.uid)
            self._ends.pop(ended.key, None)

    def _delete_older(self, ended: StagePod) -> None:
        """Deletes the attempt that has become too old, one with every attempt that ends."""
        number = ended.attempt - self._bounds.ended_pods_limit
        for stage in STAGES:
            older = self._pods.find(f"{ended.namespace}/{StageName(job=ended.job, stage=stage, attempt=number)}")
            if older is not None and older.end is not None and older.job_uid == ended.job_uid:
                self._forget(older)
                self._delete(older, 0)

    def _delete_unstarted(self, found: StagePod) -> None:
        if found.deletion_time is None:
            self._delete(found, LAST_GRACE_SECONDS)
        else:
            self._force_out_if_stranded(found, found.deletion_time)


def _leaving(found: StagePod, nodes: Mapping[str, Node], now: datetime) -> str:
    """Why a pod's node is about to go, or went; empty where nothing is known."""
    if not found.node:
        return ""
    if (node := nodes.get(f"/{found.node}")) is not None:
        return node.leaving
    age_seconds = (now - (found.scheduled_time or found.created_time)).total_seconds()
    return f"node {found.node} is gone" if age_seconds > NEW_NODE_SECONDS else ""
