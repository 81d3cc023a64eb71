"""A thousand nodes on paper: four GPU classes, one GPU each, and what KWOK plays on them.

The stages that KWOK is told stand for kubelet and trainer: a bound pod runs after a moment and ends after its time,
with the exit code and the termination message that the trainer would write. Which end it is hangs on the job's name:
`ok-...` come through, `bad-...` have data that no trainer can use, `oom-...` run out of memory in their first attempt
at training.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count

from orchestrator.adapters.kubernetes.api import Json, KubeApi, path_of
from orchestrator.adapters.kubernetes.pod_manifest import ATTEMPT_LABEL, JOB_LABEL, STAGE_LABEL, TRAINER
from orchestrator.api.reasons import ExitCode, Reason
from orchestrator.api.results import PublishResult, StageResult
from tests.builders import failure, prepare_result, train_result
from tests.cluster.control_plane import KWOK_LABEL

CARDS_MIB = {"24Gi": 23_034, "48Gi": 46_068, "80Gi": 81_559, "141Gi": 143_771}
"""Total memory of an L4, an L40S, an H100 and an H200."""
CLASSES = tuple(CARDS_MIB)
WRITERS = 8
FIRST_TRAIN_ATTEMPT = "2"
"""Attempts are numbered over all stages, and the first one prepares."""
PREPARE_MILLISECONDS, TRAIN_MILLISECONDS, PUBLISH_MILLISECONDS = 300, 4000, 300
START_MILLISECONDS, STOP_MILLISECONDS = 200, 200

NOT_RUNNING = ("Pending", "Succeeded", "Failed")
DELETED = {"key": ".metadata.deletionTimestamp", "operator": "Exists"}
NOT_DELETED = {"key": ".metadata.deletionTimestamp", "operator": "DoesNotExist"}
JOB_KIND = f'.metadata.labels["{JOB_LABEL}"] | split("-") | .[0]'


def node_names(count: int) -> dict[str, str]:
    """GPU class by node name, in turns."""
    return {f"gpu-{number:04}": CLASSES[number % len(CLASSES)] for number in range(count)}


def create_nodes(api: KubeApi, classes: dict[str, str]) -> None:
    """Register them, ready, as kubelets do."""

    def register(name: str) -> None:
        api.create(path_of("v1", "nodes"), _node(name, classes[name]))

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(register, classes))


def _node(name: str, gpu_class: str) -> Json:
    key, _, value = KWOK_LABEL.partition("=")
    have = {"nvidia.com/gpu": "1", "cpu": "64", "memory": "512Gi", "ephemeral-storage": "4Ti", "pods": "110"}
    return {
        "metadata": {"name": name, "labels": {key: value, "nvidia.com/gpu.memory": str(CARDS_MIB[gpu_class])}},
        "status": {
            "allocatable": have,
            "capacity": have,
            "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady"}],
        },
    }


def kwok_configuration() -> str:
    """All stages, as YAML documents. The one for nodes matches none and only keeps KWOK from playing heartbeats."""
    stages = [
        _stage("node-rests", "Node", [{"key": ".metadata.name", "operator": "DoesNotExist"}], {}, 0),
        _stage(
            "pod-runs",
            "Pod",
            [NOT_DELETED, _is(".status.phase", "Pending")],
            _status(_RUNNING, "Running"),
            START_MILLISECONDS,
        ),
        *_ends(),
        _stopped(),
        _stage(
            "pod-goes", "Pod", [DELETED, _is(".status.phase", "Succeeded", "Failed", "Pending")], {"delete": True}, 0
        ),
    ]
    return "\n---\n".join(json.dumps(stage) for stage in stages)


def _ends() -> Iterator[Json]:
    """How stages of undisturbed pods end."""
    first = {"key": f'.metadata.labels["{ATTEMPT_LABEL}"]', "operator": "In", "values": [FIRST_TRAIN_ATTEMPT]}
    later = {**first, "operator": "NotIn"}
    published = PublishResult(registered_model="m", model_version="1", model_uri="models:/m/1")
    bad = failure(Reason.USER_ERROR, "line 7 of the dataset has no field `messages`")
    full = failure(Reason.OUT_OF_MEMORY, "CUDA out of memory")
    good = train_result()
    yield _end("prepare", (), ExitCode.OK, StageResult(prepare=prepare_result()), PREPARE_MILLISECONDS)
    yield _end("train", (_is(JOB_KIND, "ok"),), ExitCode.OK, good, TRAIN_MILLISECONDS)
    yield _end("train", (_is(JOB_KIND, "bad"),), ExitCode.USER_ERROR, bad, TRAIN_MILLISECONDS)
    yield _end("train", (_is(JOB_KIND, "oom"), first), ExitCode.OUT_OF_MEMORY, full, TRAIN_MILLISECONDS)
    yield _end("train", (_is(JOB_KIND, "oom"), later), ExitCode.OK, good, TRAIN_MILLISECONDS)
    yield _end("publish", (), ExitCode.OK, StageResult(publish=published), PUBLISH_MILLISECONDS)


_numbers = count()


def _end(stage: str, more: Sequence[Json], code: ExitCode, result: StageResult, milliseconds: int) -> Json:
    key = f'.metadata.labels["{STAGE_LABEL}"]'
    found = [NOT_DELETED, _is(".status.phase", "Running"), _is(key, stage), *more]
    phase = "Failed" if code else "Succeeded"
    return _stage(
        f"{stage}-ends-{next(_numbers)}", "Pod", found, _status(_terminated(code, result), phase), milliseconds
    )


def _stopped() -> Json:
    """A deleted pod that runs gets SIGTERM: its trainer checkpoints and exits with the code of the preempted."""
    result = train_result(step=10, complete=False)
    state = _terminated(ExitCode.PREEMPTED, result)
    return _stage(
        "pod-stops", "Pod", [DELETED, _is(".status.phase", "Running")], _status(state, "Failed"), STOP_MILLISECONDS
    )


def _stage(name: str, kind: str, found: Sequence[Json], next_: Json, milliseconds: int) -> Json:
    delay = {"durationMilliseconds": milliseconds, "jitterDurationMilliseconds": milliseconds * 3 // 2}
    return {
        "apiVersion": "kwok.x-k8s.io/v1alpha1",
        "kind": "Stage",
        "metadata": {"name": name},
        "spec": {
            "resourceRef": {"apiGroup": "v1", "kind": kind},
            "selector": {"matchExpressions": list(found)},
            **({"delay": delay} if milliseconds else {}),
            "next": next_,
        },
    }


def _is(key: str, *values: str) -> Json:
    return {"key": key, "operator": "In", "values": list(values)}


_RUNNING = "running: {startedAt: {{ Now | Quote }}}"


def _terminated(code: ExitCode, result: StageResult) -> str:
    message = result.model_dump_json(by_alias=True, exclude_none=True)
    assert "'" not in message
    assert "{{" not in message
    began = "(index .status.containerStatuses 0).state.running.startedAt"
    return (
        f"terminated: {{exitCode: {int(code)}, startedAt: {{{{ {began} | Quote }}}}, "
        f"finishedAt: {{{{ Now | Quote }}}}, message: '{message}'}}"
    )


def _status(state: str, phase: str) -> Json:
    template = (
        f"phase: {phase}\ncontainerStatuses:\n- name: {TRAINER}\n  image: trainer\n  imageID: ''\n"
        f"  ready: {str(phase == 'Running').lower()}\n  restartCount: 0\n  state:\n    {state}\n"
    )
    return {"statusTemplate": template}
