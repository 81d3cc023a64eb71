"""Stages as pods: `ports.StageRuntime` on an API server.

`pod_manifest` says what a pod looks like, `pod_facts` what one says about its stage. Rules:

- A name is an attempt. A pod is only touched if it has the uid that was looked at.
- Whoever may create pods may give one any name, label and owner, so none of these is believed. A pod is vouched for if
  this process created it, or found it just as it would have created it; of the others, one counts whose uid a job's
  status names. Where anything else has the name of an attempt, the attempt ends as NAME_TAKEN, in words.
- What says that it is ours (label, owner and name agree) and that no status explains is ended. Pods that only have such
  a name are left alone; their names are passed over, and their GPUs are taken.
- No finalizers. The end of a pod is kept in memory from the moment it is seen until `delete`, so that one that is
  taken away at once does not take its last words along. A pod that vanished without an end is absent, and the core
  resumes its job.
- To stop is to ask the trainer through its agent and, where that is not acknowledged at once, to delete the pod, whose
  grace starts with SIGTERM. A pod is not removed while its trainer may run: one that cannot end, because its node does
  not answer, is only forced out when the node is gone, an operator has declared it out of service, or settings allow.
- The attempt of such a pod is given up all the same (`pod_facts.unending`): the job goes on elsewhere, the GPU is
  nobody's until the pod is gone, and a trainer that comes back finds that a later attempt has its job's store.
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
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import get_args

from orchestrator.adapters.kubernetes.api import Forbidden, Json, KubeApi, path_of
from orchestrator.adapters.kubernetes.comparison import difference
from orchestrator.adapters.kubernetes.nodes import NODES, Node, count_gpus, gpus_held, parse_gpu_classes, read_node
from orchestrator.adapters.kubernetes.objects import Parser
from orchestrator.adapters.kubernetes.pod_facts import (
    RuntimeBounds,
    StagePod,
    Surroundings,
    given_up,
    read_pod,
    stage_fact,
    unending,
)
from orchestrator.adapters.kubernetes.pod_manifest import (
    MANAGED_BY_LABEL,
    MANAGER,
    claim_template,
    claim_template_name,
    pod,
)
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
from orchestrator.errors import AlreadyExists, Conflict, InvalidObject, NotFound, PermanentError, TransientError
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
VOUCHED_LIMIT = 16_384
"""Uids that are kept in memory: far more than pods are created before their jobs' statuses name them."""
QUOTA_EXCEEDED = "exceeded quota"
STAGES: tuple[StageKind, ...] = get_args(StageKind)

__all__ = ["KubernetesPods", "RuntimeBounds"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request to stop that went to a trainer's agent."""

    at_seconds: float
    """Monotonic."""
    grace_seconds: int


class NameTaken(PermanentError):
    """Under a name that is needed stands what would not have been created there."""


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
        self._reachable = parse_gpu_classes(bounds.gpu_classes, policy.gpu_table)
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
            self._read_other,
            Changes(changes.relist_seconds),
            namespaces=namespaces,
            selector=f"{MANAGED_BY_LABEL}!={MANAGER}",
        )
        self._told_unfit: frozenset[str] = frozenset()
        self._lock = threading.Lock()  # never held while a cache is asked
        self._ends: dict[str, StagePod] = {}
        self._forgotten: set[str] = set()
        self._vouched: dict[str, None] = {}
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
        with self._lock:
            vouched = frozenset(self._vouched)
        coming = self._coming(nodes.values())
        facts: dict[str, StageFact] = {}
        for key, found in self._known(pods, vouched).items():
            where = _surroundings(found, nodes, coming, now)
            fact = stage_fact(found, where, progress.get(key), self._bounds, now)
            node = nodes.get(f"/{found.node}")
            facts[key] = replace(fact, vouched=found.uid in vouched, gpu_class=node.gpu_class if node else None)
        refused = {key: fact for key, fact in self._refused.items() if key not in facts or not facts[key].vouched}
        return {**facts, **refused}

    def taken_names(self) -> frozenset[str]:
        """Names that pods have, whoever made them: those that are forgotten are still there."""
        return frozenset({*self._pods.values(), *(key for key in self._others.values() if _is_stages(key))})

    def _known(self, pods: Mapping[str, StagePod], vouched: frozenset[str]) -> Mapping[str, StagePod]:
        """The pods that are there, and those that ended and are not; without those that were forgotten.

        The end of a pod of ours stays known whatever takes its place.
        """
        uids = {found.uid for found in pods.values()}
        with self._lock:
            self._forgotten &= uids
            self._asked = {uid: asked for uid, asked in self._asked.items() if uid in uids}
            shown = {key: found for key, found in pods.items() if found.claimed and found.uid not in self._forgotten}
            ends = {key: ended for key, ended in self._ends.items() if key not in pods or ended.uid in vouched}
            return {**shown, **ends}

    def _read(self, item: Json) -> StagePod:
        """A pod for the view, whose end is kept beyond it."""
        found = read_pod(item, self._policy)
        if found.claimed and found.end is not None:
            with self._lock:
                if found.uid not in self._forgotten:
                    self._ends[found.key] = found
                while len(self._ends) > ENDS_LIMIT:
                    self._ends.pop(next(iter(self._ends)))
        return found

    def _read_other(self, item: Json) -> tuple[str, int] | None:
        """Where a pod of somebody else's is, and the GPUs that it keeps; None for one that is in nobody's way."""
        gpus = gpus_held(item, self._policy)
        if not gpus and not _is_stages(item["metadata"]["name"]):
            return None
        return item["spec"].get("nodeName") or "", gpus

    def _last_seen(self, item: Json) -> None:
        self._read(item)

    def gpu_classes(self) -> Sequence[GpuClass]:
        """What the nodes have, and what an autoscaler can add."""
        held: Counter[str] = Counter()
        others: Counter[str] = Counter()
        nodes, now = self._nodes.values(), datetime.now(UTC)
        with self._lock:
            forgotten = frozenset(self._forgotten)
        for found in self._pods.values().values():
            if found.end is not None and found.claimed:
                continue
            where = _surroundings(found, nodes, frozenset(), now)
            is_lost = found.uid in forgotten or unending(found, where, self._bounds, now)
            books = others if is_lost or not found.claimed else held
            books[found.node] += found.gpus
        for node, count in self._others.values().values():
            others[node] += count
        self._tell_unfit(nodes.values())
        return count_gpus(nodes.values(), held, self._reachable, others, table=self._policy.gpu_table)

    def _coming(self, nodes: Iterable[Node]) -> frozenset[str]:
        """Classes of which an autoscaler can bring up more than there is."""
        here: Counter[str] = Counter()
        for node in nodes:
            if node.gpu_class is not None:
                here[node.gpu_class] += node.gpus
        return frozenset(name for name, count in self._reachable.items() if here[name] < count)

    def uncounted_gpus(self) -> Mapping[str, int]:
        """GPUs that no job gets because they are parts of cards or have no bfloat16, by the reason in words."""
        counts: Counter[str] = Counter()
        for node in self._nodes.values().values():
            if node.unfit:
                counts[node.unfit] += node.gpus
        return counts

    def _tell_unfit(self, nodes: Iterable[Node]) -> None:
        """Say once of each node why its GPUs do not count."""
        found = {node.name: node.unfit for node in nodes if node.unfit}
        for name in sorted(found.keys() - self._told_unfit):
            log.warning("the GPUs of node %s do not count: %s", name, found[name])
        self._told_unfit = frozenset(found)

    # start

    def ensure(self, task: StageTask, gpu_class: str | None) -> None:
        """Create the attempt's pod. What the server refuses for good becomes a fact: the stage could not start."""
        try:
            if gpu_class is not None and self._policy.gpu_mode == "dra":
                self._ensure_claim_template(task.namespace, gpu_class)
            is_there = self._pods.find(f"{task.namespace}/{task.stage_name}") is not None
            make = self._found if is_there else self._created_or_found
            made = make(path_of("v1", PODS, task.namespace), pod(task, gpu_class, self._policy))
        except NameTaken as error:
            self._refuse(task, Reason.NAME_TAKEN, str(error))
            return
        except (Forbidden, InvalidObject) as error:
            reason = Reason.QUOTA_EXCEEDED if QUOTA_EXCEEDED in str(error) else Reason.ADMISSION_REFUSED
            self._refuse(task, reason, f"the API server refused the pod: {error}")
            return
        self._refused.pop(f"{task.namespace}/{task.stage_name}", None)
        self._pods.put(made, self._read(made))

    def _ensure_claim_template(self, namespace: str, gpu_class: str) -> None:
        """Its spec cannot be changed, so one that was looked at once is known by its uid."""
        template = claim_template(namespace, gpu_class, self._policy.gpu_table)
        collection = path_of(CLAIM_TEMPLATES_VERSION, CLAIM_TEMPLATES, namespace)
        try:
            found = self._api.get(f"{collection}/{claim_template_name(gpu_class, self._policy.gpu_table)}")
        except NotFound:
            self._created_or_found(collection, template)
        else:
            self._require_equal(collection, template, found)

    def _created_or_found(self, collection: str, wanted: Json) -> Json:
        """The object as it is on the server, vouched for.

        Raises NameTaken where another has its name, TransientError while that is about to go.
        """
        try:
            made = self._api.create(collection, wanted)
        except AlreadyExists:
            return self._found(collection, wanted)
        self._vouch(made["metadata"]["uid"])
        return made

    def _found(self, collection: str, wanted: Json) -> Json:
        key = f"{wanted['metadata']['namespace']}/{wanted['metadata']['name']}"
        try:
            found = self._api.get(f"{collection}/{wanted['metadata']['name']}")
        except NotFound as error:
            self._pods.drop(key)
            raise TransientError(f"{wanted['kind']} {key} has just gone; it is created anew") from error
        self._require_equal(collection, wanted, found)
        if found["metadata"].get("deletionTimestamp") and read_pod(found, self._policy).end is None:
            raise TransientError(f"{wanted['kind']} {key} is being deleted; it is created anew once it is gone")
        return found

    def _require_equal(self, collection: str, wanted: Json, found: Json) -> None:
        """Raises NameTaken for what is not just as it would be created now."""
        uid: str = found["metadata"]["uid"]
        with self._lock:
            if uid in self._vouched:
                return
        kind, meta = wanted["kind"], wanted["metadata"]
        try:
            differs = difference(self._api.rehearse(collection, wanted), found)
        except (Forbidden, InvalidObject) as error:
            differs = f"it cannot be told, because the server refuses to rehearse the creation: {error}"
        if differs:
            raise NameTaken(
                f"the {kind} {meta['namespace']}/{meta['name']} is there already and is not what the controller "
                f"creates: {differs}. Nothing of it is believed; delete it if nobody needs it, and see who may create "
                "such objects in this namespace"
            )
        self._vouch(uid)

    def _vouch(self, uid: str) -> None:
        with self._lock:
            self._vouched[uid] = None
            while len(self._vouched) > VOUCHED_LIMIT:
                self._vouched.pop(next(iter(self._vouched)))

    def _refuse(self, task: StageTask, reason: Reason, message: str) -> None:
        log.warning("%s/%s: %s", task.namespace, task.stage_name, message)
        failure = Failure(reason=reason, message=clip(message))
        fact = StageFact(
            namespace=task.namespace,
            name=task.stage_name,
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
        if found is None or not found.claimed or found.end is not None:
            return
        if found.deletion_time is not None:
            self._force_out_if_stranded(found, found.deletion_time)
            return
        if reason is Reason.FENCED:
            self._require_unwanted(found)
        left_seconds = self._ask(found, grace_seconds, reason)
        if left_seconds is not None:
            self._delete(found, left_seconds)

    def _ask(self, found: StagePod, grace_seconds: int, reason: Reason) -> int | None:
        """Pass the request on by the agent; the grace that is left for a signal, or None while none is needed.

        Where the machine is taken away the trainer is to hurry, and has its time all the same if the machine stays.
        """
        if self.channel is None or not found.has_agent or found.start_time is None:
            return grace_seconds
        now = time.monotonic()
        with self._lock:
            asked = self._asked.setdefault(found.uid, Asked(at_seconds=now, grace_seconds=grace_seconds))
        short_grace_seconds = self._bounds.short_grace_seconds if reason is Reason.DISRUPTED else asked.grace_seconds
        told = self.channel.preempt(found.key, min(asked.grace_seconds, short_grace_seconds))
        waited_seconds = now - asked.at_seconds
        if waited_seconds < (asked.grace_seconds if told else self._bounds.acknowledge_seconds):
            return None
        return max(LAST_GRACE_SECONDS, int(asked.grace_seconds - waited_seconds))

    def _force_out_if_stranded(self, found: StagePod, deletion_time: datetime) -> None:
        """Delete for good a pod whose kubelet will not say that it ended, if nothing of it runs or settings allow."""
        overdue_seconds = (datetime.now(UTC) - deletion_time).total_seconds()
        if found.finalizing:
            return
        node = self._nodes.find(f"/{found.node}")
        if overdue_seconds <= self._bounds.stranded_seconds:
            return
        if node is None:
            why = "is gone"
        elif node.out_of_service:
            why = "is out of service"
        elif self._bounds.force_delete_unreachable and not node.ready:
            why = "does not answer, and QLORA_FORCE_DELETE_UNREACHABLE is set"
        else:
            return
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
        if self._refused.pop(key, None) is not None:
            return
        found = self._pods.find(key)
        with self._lock:
            ended = self._ends.get(key) if found is None else found
        if ended is None or not ended.claimed:
            return
        if not recorded:
            self._require_unwanted(ended)
        nodes, now = self._nodes.values(), datetime.now(UTC)
        where = _surroundings(ended, nodes, self._coming(nodes.values()), now)
        if ended.end is not None:
            self._forget(ended)
            self._delete_older(ended)
        elif ended.deletion_time is not None and unending(ended, where, self._bounds, now) is not None:
            self._forget(ended)
            self._force_out_if_stranded(ended, ended.deletion_time)
        elif given_up(ended, where, self._bounds, now) is not None:
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


def _is_stages(key: str) -> bool:
    return StageName.parse(key.rpartition("/")[2]) is not None


def _surroundings(found: StagePod, nodes: Mapping[str, Node], coming: frozenset[str], now: datetime) -> Surroundings:
    """What is known of a pod's node; `coming` are the classes of nodes that an autoscaler may bring up."""
    if not found.node:
        return Surroundings(may_come=found.gpu_class in coming)
    if (node := nodes.get(f"/{found.node}")) is not None:
        return Surroundings(leaving=node.leaving, answers=node.ready)
    age_seconds = (now - (found.scheduled_time or found.created_time)).total_seconds()
    if age_seconds <= NEW_NODE_SECONDS:
        return Surroundings()
    return Surroundings(leaving=f"node {found.node} is gone", answers=False)
