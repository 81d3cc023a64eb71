"""Why a pod does not start, as it is told to the core: each cause by its own name, after its own time."""

from __future__ import annotations

from datetime import timedelta

import pytest

from orchestrator.adapters.kubernetes.api import Json
from orchestrator.adapters.kubernetes.pod_facts import RuntimeBounds, Surroundings, read_pod, stage_fact
from orchestrator.adapters.kubernetes.pod_policy import PodPolicy
from orchestrator.api.reasons import Reason
from orchestrator.core.snapshot import StageFact, StagePhase
from tests.builders import NOW, after

POLICY = PodPolicy(trainer_image="t", tracking_uri="http://m")
BOUNDS = RuntimeBounds(unschedulable_seconds=900, start_failure_seconds=300, volume_seconds=200, start_seconds=3600)
LABELS = {"qlora.dev/job": "medical", "qlora.dev/job-uid": "1", "qlora.dev/attempt": "2", "qlora.dev/stage": "train"}
ON_A_NODE = {"type": "PodScheduled", "status": "True", "lastTransitionTime": after(0).isoformat()}


def waits(reason: str, message: str = "so it says") -> Json:
    return {"waiting": {"reason": reason, "message": message}}


def pending(*, trainer: Json | None = None, agent: Json | None = None, unscheduled: str = "") -> Json:
    placed = ON_A_NODE if not unscheduled else {"type": "PodScheduled", "status": "False", "message": unscheduled}
    status: Json = {"phase": "Pending", "conditions": [placed]}
    if trainer:
        status["containerStatuses"] = [{"name": "trainer", "state": trainer}]
    if agent:
        status["initContainerStatuses"] = [{"name": "ray-agent", "state": agent}]
    meta = {"name": "medical-train-2", "namespace": "team-a", "uid": "u", "labels": LABELS}
    spec: Json = {} if unscheduled else {"nodeName": "gpu-7"}
    return {"metadata": {**meta, "creationTimestamp": NOW.isoformat()}, "spec": spec, "status": status}


def told(item: Json, seconds: float, node: Surroundings | None = None) -> StageFact:
    found = read_pod(item, POLICY)
    return stage_fact(found, node or Surroundings(), None, BOUNDS, NOW + timedelta(seconds=seconds))


INITIALIZING = waits("PodInitializing")
STUCK = {
    "an image that cannot be pulled": (pending(trainer=waits("ImagePullBackOff")), Reason.IMAGE_UNAVAILABLE, 300),
    "a registry that is away": (pending(trainer=waits("RegistryUnavailable")), Reason.IMAGE_UNAVAILABLE, 300),
    "a secret that is missing": (pending(trainer=waits("CreateContainerConfigError")), Reason.CONFIG_MISSING, 300),
    "a container that cannot be made": (pending(trainer=waits("CreateContainerError")), Reason.START_FAILED, 300),
    "the agent's image": (pending(trainer=INITIALIZING, agent=waits("ErrImagePull")), Reason.IMAGE_UNAVAILABLE, 300),
    "an agent that fails": (pending(trainer=INITIALIZING, agent=waits("CrashLoopBackOff")), Reason.INIT_FAILED, 300),
    "a volume that never comes": (pending(trainer=waits("ContainerCreating")), Reason.START_FAILED, 3600),
    "no room": (pending(unscheduled="0/3 nodes are available: 3 Insufficient cpu"), Reason.UNSCHEDULABLE, 900),
    "a claim that is missing": (
        pending(unscheduled='persistentvolumeclaim "data" not found'),
        Reason.VOLUME_UNAVAILABLE,
        200,
    ),
}


@pytest.mark.parametrize(("item", "reason", "seconds"), STUCK.values(), ids=STUCK)
def test_a_pod_that_does_not_start_is_given_up_for_its_own_reason_after_its_own_time(
    item: Json, reason: Reason, seconds: float
) -> None:
    patient = told(item, seconds)
    assert (patient.phase, patient.disruption) == (StagePhase.PENDING, None)
    given_up = told(item, seconds + 1)
    assert (given_up.phase, given_up.exit_code, given_up.disruption) == (StagePhase.EXITED, None, reason)
    assert given_up.result is not None
    assert given_up.result.failure is not None
    assert given_up.result.failure.message


def test_a_pod_that_may_make_a_node_come_is_given_the_time_of_that() -> None:
    item, coming = (
        pending(unscheduled="0/3 nodes are available: 3 Insufficient nvidia.com/gpu"),
        Surroundings(may_come=True),
    )
    assert told(item, BOUNDS.scale_up_seconds, coming).phase is StagePhase.PENDING
    assert told(item, BOUNDS.scale_up_seconds + 1, coming).disruption is Reason.UNSCHEDULABLE


def test_where_it_was_put_is_part_of_the_fact() -> None:
    assert told(pending(), 0).node == "gpu-7"


def test_running_out_of_host_memory_names_the_limit() -> None:
    item = pending(trainer={"terminated": {"reason": "OOMKilled", "exitCode": 137}})
    item["spec"]["containers"] = [{"name": "trainer", "resources": {"limits": {"memory": "8427Mi"}}}]
    fact = told(item, 10)
    assert fact.disruption is Reason.HOST_OUT_OF_MEMORY
    assert fact.result is not None
    assert fact.result.failure is not None
    assert fact.result.failure.message == "the trainer took more host memory than its limit, 8427Mi"


@pytest.mark.parametrize(("answers", "seconds"), [(False, 60), (True, 900)])
def test_a_deleted_pod_whose_end_nobody_tells_of_is_given_up_and_holds_no_gpu_of_ours(
    answers: bool, seconds: float
) -> None:
    item = pending(trainer={"running": {"startedAt": NOW.isoformat()}})
    item["metadata"]["deletionTimestamp"] = NOW.isoformat()
    item["spec"]["containers"] = [{"name": "trainer", "resources": {"limits": {"nvidia.com/gpu": "1"}}}]
    found = read_pod(item, POLICY)

    def after_seconds(late: float) -> StageFact:
        node = Surroundings(answers=answers)
        return stage_fact(found, node, None, BOUNDS, NOW + timedelta(seconds=late))

    waited_for = after_seconds(seconds)
    assert (waited_for.phase, waited_for.disruption, waited_for.gpus) == (StagePhase.RUNNING, Reason.DISRUPTED, 1)
    given_up = after_seconds(seconds + 1)
    assert (given_up.phase, given_up.exit_code, given_up.disruption) == (StagePhase.EXITED, None, Reason.LOST)
    assert given_up.gpus == 0
    assert given_up.result is not None
    assert given_up.result.failure is not None
    assert "gpu-7" in given_up.result.failure.message
