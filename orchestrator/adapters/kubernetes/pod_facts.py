"""What a pod says about its stage. Pure: JSON in, a `StagePod` out; that and the present in, a `StageFact` out.

Rules:

- The end is the trainer's: its container terminated, with an exit code and a termination message. Whatever else is
  still running in the pod does not matter.
- A pod that has come to nothing counts as ended, without an exit code: it failed before its trainer started, could
  not be put anywhere, or could not start, for longer than the bounds allow. It is deleted when the core forgets it.
- So has one that was deleted and whose end nobody tells of: its node does not answer, or cannot end it. Something of it
  may still run; its trainer finds the job's store fenced, and its GPU is nobody's until the pod is gone.
- What the platform does is told as soon as it is known, while the stage still runs: a node that is being taken away,
  an eviction, somebody who deletes the pod. At the end it explains only an end that the stage did not choose.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from types import MappingProxyType

from orchestrator.adapters.kubernetes.api import Json
from orchestrator.adapters.kubernetes.nodes import gpus_held
from orchestrator.adapters.kubernetes.pod_manifest import (
    AGENT,
    ATTEMPT_LABEL,
    GPU_CLASS_LABEL,
    JOB_LABEL,
    JOB_UID_LABEL,
    STAGE_LABEL,
    TRAINER,
)
from orchestrator.adapters.kubernetes.pod_policy import PodPolicy
from orchestrator.api.reasons import Reason, exit_reason
from orchestrator.api.results import MAX_TERMINATION_MESSAGE_BYTES, Failure, ProgressReport, StageResult
from orchestrator.api.stage_name import StageName
from orchestrator.core.job.conditions import clip
from orchestrator.core.job.verdict import STOPPED
from orchestrator.core.snapshot import StageFact, StagePhase

log = logging.getLogger(__name__)

IMAGE_PROBLEMS = (
    "ErrImagePull",
    "ImagePullBackOff",
    "ErrImageNeverPull",
    "InvalidImageName",
    "ImageInspectError",
    "RegistryUnavailable",
    "SignatureValidationFailed",
)
CANNOT_START: Mapping[str, Reason] = MappingProxyType(
    {
        **dict.fromkeys(IMAGE_PROBLEMS, Reason.IMAGE_UNAVAILABLE),
        "CreateContainerConfigError": Reason.CONFIG_MISSING,
        "CreateContainerError": Reason.START_FAILED,
        "RunContainerError": Reason.START_FAILED,
    }
)
"""Why the kubelet says that a container waits, where waiting alone does not help, and what that is."""
INIT_LOOP = "CrashLoopBackOff"
"""How it says that what has to run before the trainer ends again and again."""
CLAIM_PROBLEM = "persistentvolumeclaim"
"""In the scheduler's words about a pod whose claim is missing or not bound."""
NEVER_RAN = frozenset({"StartError", "ContainerCannotRun"})
"""Why it says that a container ended which the container runtime could not start."""
RESULTS_KEPT = 1024
"""Termination messages that were read and are not read again, of at most 4 KiB each."""
UNKNOWN_END = "ContainerStatusUnknown"
"""The kubelet found no trace of a container: its exit code is made up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeBounds:
    """How long pods may take, and how many are kept."""

    gpu_classes: str = ""
    """GPUs that an autoscaler can bring up, such as `24Gi=4,48Gi=2`."""
    unschedulable_seconds: float = 900.0
    """A pod that no node has taken for so long goes back to the queue."""
    scale_up_seconds: float = 1800.0
    """The same while an autoscaler can bring up a node of its class."""
    short_grace_seconds: float = 15.0
    """What a trainer is told that it has when its machine is taken away."""
    start_failure_seconds: float = 300.0
    """An image or secret may be missing, or what runs before the trainer fail, for so long on a node."""
    volume_seconds: float = 300.0
    """A volume claim may be missing or unbound for so long."""
    start_seconds: float = 3600.0
    """So long after a node took the pod the trainer runs, whatever the image weighs."""
    acknowledge_seconds: float = 5.0
    """How long the agent may take to pass on a request to stop, before a signal does."""
    stranded_seconds: float = 60.0
    """So long after its grace the end of a pod is not waited for on a node that does not answer."""
    unending_seconds: float = 900.0
    """The same on a node that does: its kubelet tries on."""
    force_delete_unreachable: bool = False
    """Whether pods are deleted for good whose node is there and does not answer; something of them may still run."""
    ended_pods_limit: int = 3
    """Ended pods of a job that stay, with their logs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What is known of the node that a pod is on."""

    leaving: str = ""
    """Why it is about to go, or went; empty where nothing is known."""
    answers: bool = True
    """Whether its kubelet is heard of."""
    may_come: bool = False
    """Whether there is none yet, and one that fits may come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """What the platform did, or is about to do."""

    reason: Reason
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """The end of a trainer."""

    exit_code: int | None
    """None: it did not run, or nobody knows."""
    finish_time: datetime | None
    text: str = ""
    """The termination message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePod:
    """What matters of a pod."""

    namespace: str
    name: str
    uid: str
    job: str
    job_uid: str
    attempt: int
    claimed: bool
    """Whether labels and name say that it is the attempt's. Anybody can write that: it proves nothing."""
    gpu_class: str | None
    """What it asks for, by its label."""
    gpus: int
    """GPUs that it keeps from others now."""
    has_agent: bool
    created_time: datetime
    scheduled_time: datetime | None
    deletion_time: datetime | None
    """When its grace is over, once it has been deleted."""
    finalizing: bool
    """Whether it has been deleted for good, and only waits for somebody's finalizer."""
    node: str
    """Empty until a node takes it."""
    start_time: datetime | None
    end: End | None
    trouble: Trouble | None
    waiting: str
    """Why it does not run, in the platform's words."""
    problem: Reason | None
    """What keeps it from starting, where waiting alone does not help."""

    @property
    def key(self) -> str:
        """`namespace/name`."""
        return f"{self.namespace}/{self.name}"


def read_pod(item: Json, policy: PodPolicy) -> StagePod:
    """A pod of the API."""
    meta: Json = item["metadata"]
    spec: Json = item.get("spec", {})
    status: Json = item.get("status", {})
    labels: dict[str, str] = meta.get("labels") or {}
    told = [labels.get(label, "") for label in (JOB_LABEL, STAGE_LABEL, ATTEMPT_LABEL)]
    name = StageName.parse(meta["name"])
    state = _state(status, "containerStatuses", TRAINER)
    terminated: Json | None = state.get("terminated")
    listed: list[Json] = status.get("conditions") or []
    conditions: dict[str, Json] = {condition["type"]: condition for condition in listed}
    scheduled: Json = conditions.get("PodScheduled", {})
    waiting = _waiting(status, state)
    why = str(waiting.get("reason", ""))
    return StagePod(
        namespace=meta["namespace"],
        name=meta["name"],
        uid=meta["uid"],
        job=name.job if name is not None else "",
        job_uid=labels.get(JOB_UID_LABEL, ""),
        attempt=name.attempt if name is not None else 0,
        claimed=name is not None and "-".join(told) == meta["name"] and bool(labels.get(JOB_UID_LABEL)),
        gpu_class=labels.get(GPU_CLASS_LABEL),
        gpus=gpus_held(item, policy),
        has_agent=AGENT in _names(spec.get("initContainers")),
        created_time=datetime.fromisoformat(meta["creationTimestamp"]),
        scheduled_time=_time(scheduled.get("lastTransitionTime")) if scheduled.get("status") == "True" else None,
        deletion_time=_time(meta.get("deletionTimestamp")),
        finalizing=bool(meta.get("deletionTimestamp")) and meta.get("deletionGracePeriodSeconds") == 0,
        node=spec.get("nodeName") or "",
        start_time=_start_time(state),
        end=_end(status, terminated),
        trouble=_trouble(status, conditions, terminated, _memory_limit(spec)),
        waiting=_said(waiting) or _said(scheduled),
        problem=Reason.INIT_FAILED if why == INIT_LOOP else CANNOT_START.get(why),
    )


def _names(containers: list[Json] | None) -> list[str]:
    return [container["name"] for container in containers or []]


def _state(status: Json, kind: str, name: str) -> Json:
    found: list[Json] = status.get(kind) or []
    state: Json | None = next((container.get("state") for container in found if container["name"] == name), None)
    return state or {}


def _start_time(state: Json) -> datetime | None:
    """When the trainer started, if it did."""
    ended: Json = state.get("terminated") or {}
    running: Json = state.get("running") or ({} if ended.get("reason") in NEVER_RAN | {UNKNOWN_END} else ended)
    return _time(running.get("startedAt"))


def _waiting(status: Json, trainer: Json) -> Json:
    """What the trainer waits for: its agent's image may be what is missing, or the agent what does not stay up."""
    listed: list[Json] = status.get("initContainerStatuses") or []
    states: list[Json] = [container.get("state") or {} for container in listed]
    waiting: Json | None = trainer.get("waiting")
    if waiting is None:  # it runs, or has ended
        return {}
    first = next((state["waiting"] for state in states if _is_stuck(state.get("waiting"))), None)
    return first or waiting


def _is_stuck(waiting: Json | None) -> bool:
    return waiting is not None and waiting.get("reason") in {*CANNOT_START, INIT_LOOP}


def _end(status: Json, terminated: Json | None) -> End | None:
    if terminated is not None:
        known = terminated.get("reason") not in NEVER_RAN | {UNKNOWN_END}
        return End(
            exit_code=terminated["exitCode"] if known else None,
            finish_time=_time(terminated.get("finishedAt")),
            text=_kubelets(terminated.get("message") or ""),
        )
    return End(exit_code=None, finish_time=None) if status.get("phase") in ("Failed", "Succeeded") else None


def _kubelets(message: str) -> str:
    """A termination message as a kubelet can have kept it: a longer one is somebody else's, and thousands are kept."""
    return message if len(message.encode(errors="replace")) <= MAX_TERMINATION_MESSAGE_BYTES else ""


def _memory_limit(spec: Json) -> str:
    """The trainer's limit of host memory, as its pod has it."""
    containers: list[Json] = spec.get("containers") or []
    resources: Json | None = containers[0].get("resources") if containers else None
    limits: Json | None = resources.get("limits") if resources else None
    return str(limits.get("memory", "unknown")) if limits else "unknown"


def _trouble(
    status: Json, conditions: Mapping[str, Json], terminated: Json | None, memory_limit: str
) -> Trouble | None:
    """What the pod's own status says of the platform's doing."""
    why = terminated.get("reason") if terminated is not None else None
    if why == "OOMKilled":
        message = f"the trainer took more host memory than its limit, {memory_limit}"
        return Trouble(reason=Reason.HOST_OUT_OF_MEMORY, message=message)
    if why in NEVER_RAN:
        return Trouble(reason=Reason.START_FAILED, message=f"the trainer could not be started: {_said(terminated)}")
    target: Json = conditions.get("DisruptionTarget", {})
    if target.get("status") == "True":
        return Trouble(reason=Reason.DISRUPTED, message=f"the pod is taken away: {_said(target)}")
    if status.get("reason") == "Evicted":  # without that condition it is the pod's own fault: it overran a limit
        return Trouble(reason=Reason.KILLED, message=clip(f"the pod overran a limit: {status.get('message', '')}"))
    if why == UNKNOWN_END or (terminated is None and status.get("phase") in ("Failed", "Succeeded")):
        return Trouble(reason=Reason.DISRUPTED, message=f"the node gave the pod up: {_said(terminated or status)}")
    return None


def _said(part: Json | None) -> str:
    """Reason and message of a part of a status, as far as there are any."""
    return clip(": ".join(str(part[name]) for name in ("reason", "message") if part.get(name))) if part else ""


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


# --- the fact -----------------------------------------------------------------------------------------------------


def stage_fact(
    pod: StagePod, node: Surroundings, progress: ProgressReport | None, bounds: RuntimeBounds, now: datetime
) -> StageFact:
    """What is known of a stage."""
    abandoned = unending(pod, node, bounds, now)
    nothing = abandoned or given_up(pod, node, bounds, now)
    end = pod.end or (End(exit_code=None, finish_time=None) if nothing else None)
    trouble = abandoned or _present_trouble(pod, node, bounds, now)
    if end is not None and trouble is not None and trouble.reason is Reason.DISRUPTED and _chosen(end):
        trouble = None
    phase = StagePhase.PENDING if pod.start_time is None else StagePhase.RUNNING
    return StageFact(
        namespace=pod.namespace,
        name=pod.name,
        uid=pod.job_uid,
        node=pod.node,
        phase=StagePhase.EXITED if end is not None else phase,
        start_time=pod.start_time,
        finish_time=end.finish_time if end else None,
        exit_code=end.exit_code if end else None,
        result=_with_trouble(_result(end.text) if end and end.exit_code is not None else None, trouble),
        disruption=trouble.reason if trouble else None,
        progress=progress if pod.start_time is not None else None,
        stage_uid=pod.uid,
        gpus=0 if abandoned else pod.gpus,  # which is on nobody's books
    )


def unending(pod: StagePod, node: Surroundings, bounds: RuntimeBounds, now: datetime) -> Trouble | None:
    """Why the end of a pod that was deleted is not waited for any longer, though its trainer may still run."""
    if pod.end is not None or pod.deletion_time is None:
        return None
    overdue_seconds = (now - pod.deletion_time).total_seconds()
    if overdue_seconds <= (bounds.unending_seconds if node.answers else bounds.stranded_seconds):
        return None
    what = "has not ended it" if node.answers else "does not answer"
    message = f"the pod should have ended {overdue_seconds:.0f} s ago, and its node {pod.node or '(none)'} {what}"
    return Trouble(reason=Reason.LOST, message=message)


def given_up(pod: StagePod, node: Surroundings, bounds: RuntimeBounds, now: datetime) -> Trouble | None:
    """Why a pod whose trainer has not started is not waited for any longer."""
    if pod.start_time is not None or pod.end is not None:
        return None
    if not pod.node:
        waited_seconds = (now - pod.created_time).total_seconds()
        no_volume = CLAIM_PROBLEM in pod.waiting
        placed_seconds = bounds.scale_up_seconds if node.may_come else bounds.unschedulable_seconds
        if waited_seconds <= (bounds.volume_seconds if no_volume else placed_seconds):
            return None
        message = f"no node took the pod in {waited_seconds:.0f} s: {pod.waiting or 'no scheduler looked at it'}"
        reason = Reason.VOLUME_UNAVAILABLE if no_volume else Reason.UNSCHEDULABLE
        return Trouble(reason=reason, message=message)
    waited_seconds = (now - (pod.scheduled_time or pod.created_time)).total_seconds()
    if waited_seconds <= (bounds.start_seconds if pod.problem is None else bounds.start_failure_seconds):
        return None
    message = f"the pod did not start in {waited_seconds:.0f} s on node {pod.node}: {pod.waiting or 'no reason given'}"
    return Trouble(reason=pod.problem or Reason.START_FAILED, message=message)


def _present_trouble(pod: StagePod, node: Surroundings, bounds: RuntimeBounds, now: datetime) -> Trouble | None:
    if (known := pod.trouble or given_up(pod, node, bounds, now)) is not None:
        return known
    if pod.deletion_time is not None:  # by us or by somebody: whom we delete has been asked to stop before
        return Trouble(reason=Reason.DISRUPTED, message=f"pod {pod.key} is being deleted")
    return Trouble(reason=Reason.DISRUPTED, message=node.leaving) if node.leaving else None


def _chosen(end: End) -> bool:
    """Whether the stage ended by its own verdict, not because it was stopped."""
    return end.exit_code is not None and exit_reason(end.exit_code) not in STOPPED


def _with_trouble(result: StageResult | None, trouble: Trouble | None) -> StageResult | None:
    """The stage's own words come first."""
    if trouble is None or (result is not None and result.failure is not None):
        return result
    failure = Failure(reason=trouble.reason, message=clip(trouble.message))
    return (result or StageResult()).model_copy(update={"failure": failure})


@lru_cache(maxsize=RESULTS_KEPT)
def _result(text: str) -> StageResult | None:
    if not text:
        return None
    try:
        return StageResult.from_termination_message(text)
    except ValueError as error:
        log.warning("a termination message does not parse and is not used: %s", error)
        return None
