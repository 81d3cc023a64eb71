"""Our side of `benchmarks.kueue`: the controller's own program on the same shape of queues and jobs.

What Kueue's runner does to workloads, `Player` does to pods, with one write each: it ends a train pod after its job's
time. Nobody binds pods or says that they run, since nobody does so there.

The data of all jobs are prepared before the clock starts, and the jobs are suspended, with a status as prepare leaves
it; a job is created, as far as the figures go, when it is let go, with one write as well. All that follows is done and
counted: the status and the finalizer, the train pod, the publish pod, the end of the MLflow run.
"""

from __future__ import annotations

import heapq
import json
import os
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.kueue_peer import MORE_INFLIGHT, Limit
from benchmarks.kueue_shape import Life, Shape, WorkloadClass, figures
from orchestrator.adapters.kubernetes.api import STRATEGIC_PATCH, Json, KubeApi, path_of
from orchestrator.adapters.kubernetes.objects import Parser, job_wire
from orchestrator.adapters.kubernetes.pod_manifest import JOB_LABEL, STAGE_LABEL, TRAINER
from orchestrator.adapters.mlflow.tracking import UID_TAG
from orchestrator.api.base import API_VERSION
from orchestrator.api.job import RELEASE_FINALIZER, MlflowStatus, QLoRAJob, QLoRAJobStatus, ResourcesSpec
from orchestrator.api.reasons import Reason
from orchestrator.api.results import PublishResult, StageResult
from orchestrator.errors import NotFound, OrchestratorError
from tests.builders import ON_THE_HUB, prepare_result, submitted_job, train_result
from tests.cluster.control_plane import control_plane
from tests.cluster.resources import furnish
from tests.scale.paper_mlflow import API as REGISTRY_API
from tests.scale.pod_watch import PodWatch
from tests.scale.program import ACCOUNT, audit_arguments, audited_requests, controller, cpu_seconds, registry

GPU_CLASS, GPU_MIB, GPUS_OF_A_NODE = "24Gi", 23_034, 8
WRITERS = 8
PAGE_JOBS = 500
POLL_SECONDS = 1.0
LIMIT_SECONDS = 7200.0
"""The runner of the other side gives up after as long."""


def run_ours(folder: Path, shape: Shape, limit: Limit) -> dict[str, object]:
    """One run with an API server of its own."""
    settings = {
        "QLORA_KUBE_REQUESTS_PER_SECOND": str(limit.per_second),
        "QLORA_KUBE_REQUESTS_BURST": str(limit.burst or 1),
    }
    arguments = {"kube-apiserver": [*audit_arguments(folder), *MORE_INFLIGHT]}
    with control_plane(folder, accounts=[ACCOUNT], arguments=arguments) as plane, registry(folder) as port:
        api = plane.api()
        furnish(api)
        _create_cluster(api, shape)
        arrivals = list(arrivals_of(shape))
        _deposit(api, port, arrivals)
        with controller(plane, port, settings) as program, Player(api, shape) as player:
            requests_before, cpu_before = audited_requests(folder), program.cpu_seconds()
            server_before = cpu_seconds(plane.processes["kube-apiserver"].pid)
            load_before, began = os.getloadavg(), time.monotonic()
            created = _let_go(api, arrivals)
            player.wait_for_ends("train", len(arrivals))
            trained_seconds = time.monotonic() - began
            jobs = _when_finished(api, player, len(arrivals))
            wall_seconds = time.monotonic() - began
            requests = audited_requests(folder) - requests_before
            cpu, peak_mib = program.cpu_seconds() - cpu_before, program.peak_mib()
            server_cpu = cpu_seconds(plane.processes["kube-apiserver"].pid) - server_before
    by_kind: Counter[str] = Counter()
    for (_, what), count in requests.items():
        by_kind[what] += count
    return {
        **figures(shape, [_life(job, created[job.key]) for job in jobs]),
        "cpu_seconds": round(cpu, 1),
        "api_server_cpu_seconds": round(server_cpu, 1),
        "peak_mib": round(peak_mib, 1),
        "requests_per_workload": round(requests.total() / len(jobs), 2),
        "requests": dict(by_kind.most_common()),
        "evictions": sum(sum(job.status.evictions.values()) for job in jobs),
        "trained_wall_seconds": round(trained_seconds, 1),
        "wall_seconds": round(wall_seconds, 1),
        "load_average_before": round(load_before[0], 2),
        "load_average_after": round(os.getloadavg()[0], 2),
    }


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Arrival:
    """When a job comes, in seconds after the start, and which."""

    seconds: float
    namespace: str
    """And queue."""
    name: str
    kind: str
    priority: int

    @property
    def key(self) -> str:
        """As jobs are named."""
        return f"{self.namespace}/{self.name}"


def arrivals_of(shape: Shape) -> Iterator[Arrival]:
    """All jobs in the order of their coming: each queue gets those of each class at their interval."""
    queues = [name for name, _ in shape.queue_names()]
    yield from heapq.merge(*(_of_class(each, queue) for each in shape.classes for queue in queues))


def _of_class(each: WorkloadClass, queue: str) -> Iterator[Arrival]:
    for number in range(each.count):
        yield Arrival(
            seconds=(number + 1) * each.interval_seconds,
            namespace=queue,
            name=f"{each.name}-{number}",
            kind=each.name,
            priority=each.priority,
        )


def _create_cluster(api: KubeApi, shape: Shape) -> None:
    """Namespaces, queues, and nodes for all of the quota."""
    for name, cohort in shape.queue_names():
        api.create("/api/v1/namespaces", {"metadata": {"name": name}})
        quota = {"gpuClass": GPU_CLASS, "nominal": shape.nominal, "borrowingLimit": shape.borrowing_limit}
        queue = {"apiVersion": API_VERSION, "kind": "QLoRAQueue", "metadata": {"name": name}}
        api.create(path_of(API_VERSION, "qloraqueues"), {**queue, "spec": {"cohort": cohort, "quotas": [quota]}})
    left = shape.quota
    while left > 0:
        have = {"nvidia.com/gpu": str(min(left, GPUS_OF_A_NODE)), "cpu": "512", "memory": "4Ti", "pods": "1000"}
        name = f"gpu-{left:04}"
        api.create(
            path_of("v1", "nodes"),
            {"metadata": {"name": name, "labels": {"nvidia.com/gpu.memory": str(GPU_MIB)}}},
        )
        status = {"allocatable": have, "capacity": have, "conditions": [{"type": "Ready", "status": "True"}]}
        api.patch(f"{path_of('v1', 'nodes', name=name)}/status", {"status": status}, STRATEGIC_PATCH)
        left -= GPUS_OF_A_NODE


def _deposit(api: KubeApi, registry_port: int, arrivals: list[Arrival]) -> None:
    """Every job suspended, with its data prepared and a run in the registry."""
    experiment = _ask_registry(registry_port, "experiments/create", {"name": "benchmark"})["experiment_id"]

    def deposit(arrival: Arrival) -> None:
        job = submitted_job(
            arrival.name,
            arrival.namespace,
            meta={"finalizers": (RELEASE_FINALIZER,)},
            queue=arrival.namespace,
            priority=arrival.priority,
            resources=ResourcesSpec(gpu_classes=(GPU_CLASS,)),
            suspend=True,
            **ON_THE_HUB,
        )
        made = api.create(path_of(API_VERSION, "qlorajobs", arrival.namespace), job_wire(job))
        tags = [{"key": UID_TAG, "value": made["metadata"]["uid"]}]
        asked = {"experiment_id": experiment, "run_name": arrival.name, "tags": tags}
        run = _ask_registry(registry_port, "runs/create", asked)["run"]["info"]["run_id"]
        mlflow = MlflowStatus(run_id=run, experiment_id=experiment, run_status="RUNNING")
        status = QLoRAJobStatus(prepared=prepare_result(), attempts_total=1, mlflow=mlflow)
        api.patch(f"{_path(arrival)}/status", {"status": status.to_wire()})

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(deposit, arrivals))


def _ask_registry(port: int, call: str, body: Json) -> Json:
    url = f"http://127.0.0.1:{port}{REGISTRY_API}{call}"
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def _path(arrival: Arrival) -> str:
    return path_of(API_VERSION, "qlorajobs", arrival.namespace, arrival.name)


def _let_go(api: KubeApi, arrivals: list[Arrival]) -> Mapping[str, datetime]:
    """Let every job go at its time, or as soon after it as the API server keeps up; when each was, by key."""
    created: dict[str, datetime] = {}

    def let_go(arrival: Arrival) -> None:
        created[arrival.key] = datetime.now(UTC)
        api.patch(_path(arrival), {"spec": {"suspend": False}})

    began = time.monotonic()
    with ThreadPoolExecutor(WRITERS) as pool:
        begun: list[Future[None]] = []
        for arrival in arrivals:
            time.sleep(max(0.0, began + arrival.seconds - time.monotonic()))
            begun.append(pool.submit(let_go, arrival))
        for each in begun:
            each.result()
    return created


class Player:
    """Ends the pods of stages after their time, as a kubelet would tell it. A context manager."""

    def __init__(self, api: KubeApi, shape: Shape) -> None:
        self._api = api
        self._run_seconds = {each.name: each.run_seconds for each in shape.classes}
        self._ended: Counter[str] = Counter()
        self._seen: set[str] = set()
        self._due: list[tuple[float, str, str]] = []
        self._changed = threading.Condition()
        self._over = False
        self._watch = PodWatch(api, self._hear)
        self._clock = threading.Thread(target=self._end_in_time, daemon=True)
        self._pool = ThreadPoolExecutor(WRITERS)
        self._messages = {
            "train": _wire(train_result()),
            "publish": _wire(
                StageResult(publish=PublishResult(registered_model="m", model_version="1", model_uri="models:/m/1"))
            ),
        }

    def __enter__(self) -> Player:
        self._watch.__enter__()
        self._clock.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._over = True
            self._changed.notify_all()
        self._watch.__exit__()
        self._clock.join()
        self._pool.shutdown()

    def wait_for_ends(self, stage: str, count: int) -> None:
        """Wait until so many stages of a kind have come to their end."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while self._ended[stage] < count:
            time.sleep(POLL_SECONDS)
            assert self._watch.is_alive(), "the watch of the pods has ended"
            assert self._clock.is_alive(), "nobody ends the pods any more"
            assert time.monotonic() < deadline, f"{self._ended[stage]} of {count} {stage} stages ended"

    def _hear(self, event: str, item: Json) -> None:
        meta: Json = item["metadata"]
        if event == "DELETED" or meta["uid"] in self._seen:
            return
        self._seen.add(meta["uid"])
        stage: str = meta["labels"][STAGE_LABEL]
        kind = meta["labels"][JOB_LABEL].partition("-")[0]
        seconds = self._run_seconds[kind] if stage == "train" else 0.0
        with self._changed:
            heapq.heappush(
                self._due, (time.monotonic() + seconds, path_of("v1", "pods", meta["namespace"], meta["name"]), stage)
            )
            self._changed.notify_all()

    def _end_in_time(self) -> None:
        with self._changed:
            while not self._over:
                wait_seconds = self._due[0][0] - time.monotonic() if self._due else None
                if wait_seconds is None or wait_seconds > 0:
                    self._changed.wait(wait_seconds)
                else:
                    _, path, stage = heapq.heappop(self._due)
                    self._pool.submit(self._end, path, stage)

    def _end(self, path: str, stage: str) -> None:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        state = {"terminated": {"exitCode": 0, "startedAt": now, "finishedAt": now, "message": self._messages[stage]}}
        container = {"name": TRAINER, "image": "i", "imageID": "", "ready": False, "restartCount": 0, "state": state}
        try:
            body = {"status": {"phase": "Succeeded", "containerStatuses": [container]}}
            self._api.patch(f"{path}/status", body, STRATEGIC_PATCH)
        except NotFound:
            return  # it was evicted
        except OrchestratorError:
            self._pool.submit(self._end, path, stage)
            return
        with self._changed:
            self._ended[stage] += 1


def _wire(result: StageResult) -> str:
    return result.model_dump_json(by_alias=True, exclude_none=True)


def _when_finished(api: KubeApi, player: Player, count: int) -> list[QLoRAJob]:
    """All jobs, once every one has finished and its run has its end."""
    player.wait_for_ends("publish", count)
    deadline = time.monotonic() + LIMIT_SECONDS
    while True:
        jobs = list(_jobs(api))
        if all(job.status.finish_time is not None and not job.metadata.finalizers for job in jobs):
            assert len(jobs) == count
            return jobs
        assert time.monotonic() < deadline, "not all jobs came to their end"
        time.sleep(POLL_SECONDS)


def _jobs(api: KubeApi) -> Iterator[QLoRAJob]:
    parser, query = Parser(), dict[str, str | int](limit=PAGE_JOBS)
    while True:
        page = api.get(path_of(API_VERSION, "qlorajobs"), **query)
        yield from map(parser.job, page["items"])
        if not (token := page["metadata"].get("continue")):
            return
        query["continue"] = token


def _life(job: QLoRAJob, created: datetime) -> Life:
    """Its last attempt at training is the one that came through."""
    last = [attempt for attempt in job.status.attempts if attempt.stage == "train"][-1]
    assert last.reason is None or last.reason is Reason.SUCCEEDED, job.status.summary
    assert last.finish_time is not None
    return Life(
        kind=job.metadata.name.partition("-")[0],
        created=created,
        admitted=last.created_time,
        finished=last.finish_time,
    )
