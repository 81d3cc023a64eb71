"""The job of `make demo` beside a real S3 server and a real MLflow server that fail: its adapter stays the same.

`QLORA_DEMO_FAULTS=all` lives through all eight faults; one of them, drawn by `QLORA_DEMO_FAULTS_SEED`, otherwise. Each
begins when the job is at the point in question, an upload of a checkpoint or of the adapter, or publish, and most last
until an attempt of the job has ended for them. Spec, data and model are the demo's, whole; what differs from it:

- checkpoints come after every six steps: the demo's job is over before its first;
- pauses between attempts are of 1 to 10 s, not of 10 s to 10 minutes;
- the clients of S3 and MLflow try once by themselves, on top of which come the trainer's tries, and MLflow may take 5 s
  to answer, not 30;
- uploads are in parts from 10 MiB on, as a checkpoint's largest file has, not from 100 (`uploads_in_parts`);
- credentials are refused for ten minutes where all eight faults are lived through, and for one otherwise.
"""

from __future__ import annotations

import os
import random
import shlex
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient, artifacts, set_tracking_uri

from examples import demo
from orchestrator.api.reasons import ConditionType, Reason
from orchestrator.api.stage_name import StageKind
from orchestrator.controller import supervisor
from orchestrator.sdk import Client, JobHandle
from orchestrator.settings import Settings
from tests.cluster.resources import require
from tests.trainer.fault_link import Cut, Fault, Link, Refusal, Request, Stale, fault_link, s3_error
from tests.trainer.mlflow_server import free_port, mlflow_server
from tests.trainer.s3_server import ACCESS, BUCKET, REGION, SECRET, s3_server

pytestmark = pytest.mark.timeout(3600)  # real training, also on a machine that is busy with other things

EVERY = os.environ.get("QLORA_DEMO_FAULTS") == "all"
SEED = int(os.environ.get("QLORA_DEMO_FAULTS_SEED", "1"))
REFUSED_SECONDS = 600.0 if EVERY else 60.0
STEPS = 24
CHECKPOINT_STEPS = 6
POLL_SECONDS = 0.1
LIMIT_SECONDS = 1800.0
"""No single wait is longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """The embedded service, with the servers that it depends on and the lines to them."""

    client: Client
    model: Path
    s3: Link
    bucket: Path
    mlflow: Link
    mlflow_uri: str
    """Straight to the server."""
    database: Path
    """The MLflow server's."""

    def submit(self, **spec: object) -> JobHandle:
        """The job of `make demo`, with further fields of its spec."""
        path = demo.manifest(self.client, demo.free_name(self.client, "notes-es"), self.model)
        document = yaml.safe_load(path.read_text())
        return self.client.submit({**document, "spec": {**document["spec"], **spec}})

    def adapter(self, handle: JobHandle) -> bytes:
        """The finished job's adapter, as it lies in the bucket."""
        folder = handle.result().adapter_uri.removeprefix(f"s3://{BUCKET}/")
        return (self.bucket / folder / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, pretrained: Path) -> Iterator[World]:
    require("versitygw")
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    with (
        pytest.MonkeyPatch.context() as patch,
        s3_server(tmp_path_factory.mktemp("s3")) as s3,
        fault_link("127.0.0.1", s3.port) as s3_link,
        mlflow_server(folder, port),
        fault_link("127.0.0.1", port) as mlflow_link,
    ):
        surroundings = {
            "AWS_ENDPOINT_URL": s3_link.url,
            "AWS_ACCESS_KEY_ID": ACCESS,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_MAX_ATTEMPTS": "1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
        }
        for name, value in surroundings.items():
            patch.setenv(name, value)
        settings = Settings(
            home=tmp_path_factory.mktemp("home"),
            store_uri=f"s3://{BUCKET}/jobs",
            tracking_uri=mlflow_link.url,
            gpu_classes="cpu=1",
            trainer_command=shlex.join([sys.executable, str(Path(__file__).with_name("uploads_in_parts.py"))]),
            backoff_base_seconds=1.0,
            backoff_max_seconds=10.0,
        )
        supervisor.start(settings)
        try:
            yield World(
                client=Client(settings),
                model=pretrained,
                s3=s3_link,
                bucket=s3.bucket,
                mlflow=mlflow_link,
                mlflow_uri=f"http://127.0.0.1:{port}",
                database=folder / "server.db",
            )
        finally:
            supervisor.stop(settings)


@pytest.fixture(scope="module")
def undisturbed(world: World) -> bytes:
    """The adapter of the demo's job to the letter, which meets no fault."""
    handle = world.submit()
    handle.wait(timeout_seconds=LIMIT_SECONDS)
    return world.adapter(handle)


# --- the store


def throttled(world: World) -> JobHandle:
    """Everything is answered with 503 SlowDown from the second checkpoint's upload on, and again from the adapter's."""
    handle = submit(world)
    for point in ("/checkpoints/step-00000012/", "/adapter/"):
        begun = begin_at(world.s3, uploading(handle, point), s3_error(503, "SlowDown"))
        wait_for_an_attempt_that_ends(handle, begun, Reason.TRANSIENT_ERROR)
        world.s3.rule = healthy
    return handle


def cut_off(world: World) -> JobHandle:
    """Parts of the second checkpoint are cut off midway until an attempt has ended, then the adapter's files once."""
    handle = submit(world)
    begun = begin_at(world.s3, uploading(handle, "/checkpoints/step-00000012/"), Cut.MIDWAY, touched=is_part)
    wait_for_an_attempt_that_ends(handle, begun, Reason.TRANSIENT_ERROR)
    cut: set[str] = set()

    def once(request: Request) -> Fault | None:
        if not uploading(handle, "/adapter/")(request) or request.path in cut:
            return None
        cut.add(request.path)
        return Cut.MIDWAY

    world.s3.rule = once
    handle.wait(timeout_seconds=LIMIT_SECONDS)
    assert len(cut) > 5, cut
    return handle


def stale(world: World) -> JobHandle:
    """Every list is the one of before; the job is moved from its place, and finds none of its checkpoints."""
    world.s3.rule = lambda request: Stale.EARLIER if "list-type=2" in request.path else None
    handle = submit(world)
    asked = uploading(handle, "/checkpoints/step-00000012/manifest.json")
    wait_until(handle, lambda: any(asked(request) for request in list(world.s3.seen)))
    handle.suspend()
    wait_until(handle, lambda: handle.status().attempts[-1].finish_time is not None)
    handle.resume()
    handle.wait(timeout_seconds=LIMIT_SECONDS)
    starts = [request for request in world.s3.seen if uploading(handle, "step-00000006/manifest.json")(request)]
    assert len(starts) > 1, "the second attempt knew a checkpoint"
    return handle


def refused(world: World) -> JobHandle:
    """Credentials are refused from the second checkpoint's upload on, for minutes."""
    handle = submit(world)
    refusal = s3_error(403, "InvalidAccessKeyId")
    begun = begin_at(world.s3, uploading(handle, "/checkpoints/step-00000012/"), refusal)
    wait_for_an_attempt_that_ends(handle, begun, Reason.CREDENTIALS_REFUSED)
    until = time.monotonic() + REFUSED_SECONDS
    wait_until(handle, lambda: time.monotonic() > until)
    wait_for_an_attempt_that_ends(handle, begun, Reason.CREDENTIALS_REFUSED)
    return handle


# --- MLflow


def busy(world: World) -> JobHandle:
    """503 from the first metrics on, until publish has given up once."""
    handle = submit(world)
    refusal = Refusal(status=503, body=b"upstream connect error", kind="text/plain")
    begun = begin_at(world.mlflow, lambda request: request.path.endswith("runs/log-batch"), refusal)
    wait_for_an_attempt_that_ends(handle, begun, Reason.TRANSIENT_ERROR, stage="publish")
    return handle


def late(world: World) -> JobHandle:
    """Whatever writes is carried out, and its answer comes too late, once for each thing that is asked."""
    written = world.mlflow.lose_the_answer_to_each_write_once(Cut.LATE)
    handle = submit(world)
    handle.wait(timeout_seconds=LIMIT_SECONDS)
    assert len(written) > 8, written
    assert any(what.endswith("runs/create") for what in written)
    return handle


def locked(world: World) -> JobHandle:
    """Somebody holds the server's database from publish's first write on, until publish has given up once."""
    handle = submit(world)
    begun: list[Request] = []

    def rule(request: Request) -> Fault | None:
        if not begun and request.method == "POST" and request.path.endswith("/logged-models"):
            other.execute("BEGIN EXCLUSIVE")
            begun.append(request)
        return None

    with sqlite3.connect(world.database, isolation_level=None, check_same_thread=False, timeout=60) as other:
        world.mlflow.rule = rule
        wait_for_an_attempt_that_ends(handle, begun, Reason.TRANSIENT_ERROR, stage="publish")
        other.execute("ROLLBACK")
    return handle


def gone(world: World) -> JobHandle:
    """It is gone before the job comes, until its adapter waits for nothing else."""
    world.mlflow.rule = lambda _request: Cut.BEFORE
    handle = submit(world)
    wait_until(handle, lambda: handle.status().adapter_digest is not None and "MLflow" in handle.status().summary)
    assert handle.status().mlflow.run_id is None
    return handle


STORE_FAULTS = {
    "a store that throttles": throttled,
    "uploads cut off in the middle of their parts": cut_off,
    "lists that are old": stale,
    "credentials that are refused": refused,
}
MLFLOW_FAULTS = {
    "an MLflow that answers 503": busy,
    "an MLflow that answers too late, after the commit": late,
    "a database that is locked": locked,
    "an MLflow that is gone for the whole job": gone,
}
FAULTS = {**STORE_FAULTS, **MLFLOW_FAULTS}


@pytest.mark.parametrize("name", FAULTS if EVERY else [random.Random(SEED).choice(sorted(FAULTS))])
def test_the_demos_adapter_is_the_same_beside(world: World, undisturbed: bytes, name: str) -> None:
    try:
        handle = FAULTS[name](world)
    finally:
        world.s3.rule = world.mlflow.rule = healthy
    job = handle.wait(timeout_seconds=LIMIT_SECONDS)
    assert job.status.condition(ConditionType.FINISHED).reason is Reason.SUCCEEDED, job.status.summary
    assert world.adapter(handle) == undisturbed
    assert_mlflow_has_everything_once(world, handle, undisturbed)


def healthy(_request: Request) -> Fault | None:
    return None


def submit(world: World) -> JobHandle:
    return world.submit(checkpoint={"everySteps": CHECKPOINT_STEPS})


def uploading(handle: JobHandle, name: str) -> Callable[[Request], bool]:
    """Whether a request puts something of this name into the job's store."""
    folder = f"/{handle.namespace}/{handle.name}-{handle.uid}/"
    return lambda request: request.method in ("PUT", "POST") and folder in request.path and name in request.path


def is_part(request: Request) -> bool:
    """Whether a request uploads a part of a file."""
    return "partNumber=" in request.path


def begin_at(
    link: Link, begins: Callable[[Request], bool], fault: Fault, *, touched: Callable[[Request], bool] | None = None
) -> list[Request]:
    """Let the line fail from the first such request on; the list of what met the fault, which is to grow."""
    met: list[Request] = []

    def rule(request: Request) -> Fault | None:
        if (not met and not begins(request)) or (touched is not None and not touched(request)):
            return None
        met.append(request)
        return fault

    link.rule = rule
    return met


def wait_for_an_attempt_that_ends(
    handle: JobHandle, met: list[Request], reason: Reason, stage: StageKind = "train"
) -> None:
    """Return once one more attempt of this stage has ended for this reason, after a request that met the fault."""

    def ended() -> set[int]:
        attempts = handle.status().attempts
        return {attempt.number for attempt in attempts if attempt.stage == stage and attempt.reason is reason}

    before = ended()
    wait_until(handle, lambda: bool(ended() - before))
    assert met, "it ended for another fault"


def wait_until(handle: JobHandle, holds: Callable[[], bool]) -> None:
    """Return once it holds, while the job goes on."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while not holds():
        assert handle.status().finish_time is None, handle.status().summary
        assert time.monotonic() < deadline, handle.status().summary
        time.sleep(POLL_SECONDS)


def assert_mlflow_has_everything_once(world: World, handle: JobHandle, adapter: bytes) -> None:
    """One finished run of the job with each step once, one logged model, and one version, which is the adapter."""
    mlflow = MlflowClient(world.mlflow_uri)
    experiment = mlflow.get_experiment_by_name("notes-es")
    assert experiment is not None
    mine = f"tags.`qlora.dev/job-uid` = '{handle.uid}'"
    deadline = time.monotonic() + 120
    while [run.info.status for run in mlflow.search_runs([experiment.experiment_id], mine)] == ["RUNNING"]:
        assert time.monotonic() < deadline, "the run was not ended"
        time.sleep(POLL_SECONDS)
    runs = mlflow.search_runs([experiment.experiment_id], mine)
    assert [run.info.status for run in runs] == ["FINISHED"]
    history = mlflow.get_metric_history(runs[0].info.run_id, "train/loss")
    assert [metric.step for metric in history] == list(range(1, STEPS + 1))
    assert len(mlflow.search_logged_models([experiment.experiment_id], mine)) == 1
    versions = mlflow.search_model_versions(f"run_id = '{runs[0].info.run_id}'")
    result = handle.result()
    assert [(v.name, str(v.version)) for v in versions] == [(result.registered_model, result.model_version)]
    set_tracking_uri(world.mlflow_uri)
    loaded = Path(artifacts.download_artifacts(str(result.model_uri)))
    assert (loaded / "artifacts" / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
