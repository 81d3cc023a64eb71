"""A real S3 server behind a line with faults: every job ends with the adapter of a job that met none, bit for bit.

An attempt that a fault ends says that it is transient, as a controller wants to hear it; the next goes on. Writes that
two may be at are conditional, and where the server cannot do that it is said, and done without.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from fault_link import Cut, Fault, Link, Request, Stale, fault_link, hurry, s3_error
from qlora_trainer import train
from qlora_trainer.outcome import FencedError, StageError, Transient
from qlora_trainer.storage.job_store import JobStore
from s3_server import ACCESS, BUCKET, REGION, SECRET, S3Server, s3_server
from test_job_store import make_folder, make_manifest, publish
from toy_job import digest_of_adapter, make_task

from orchestrator.api.formats import AttemptLog, CheckpointManifest, Fence, FileEntry
from orchestrator.api.reasons import Reason
from orchestrator.api.task import StageTask
from tests.cluster.resources import require

s3fs = pytest.importorskip("s3fs")
STEPS = 6
JOB = {"steps": STEPS, "eval_rows": 0, "checkpoint": {"every_steps": 2}}
MAX_ATTEMPTS = 30


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    require("versitygw")
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def link(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Link]:
    with fault_link("127.0.0.1", server.port) as link:
        settings = {
            "AWS_ENDPOINT_URL": link.url,
            "AWS_ACCESS_KEY_ID": ACCESS,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_MAX_ATTEMPTS": "1",  # the client's own tries, on top of which come ours
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        hurry(monkeypatch)
        monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
        s3fs.S3FileSystem.clear_instance_cache()
        yield link
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the adapter of a job that meets no fault."""
    store = tmp_path_factory.mktemp("undisturbed") / "job"
    train.run(make_task(store, **JOB))
    return digest_of_adapter(store)


def task_on(server: S3Server, name: str) -> StageTask:
    """The toy job with its store in the bucket, where its prepared data already lies."""
    return make_task(server.bucket / name, **JOB).model_copy(update={"store_uri": f"s3://{BUCKET}/{name}"})


def run_to_the_end(task: StageTask) -> int:
    """As a controller has it: an attempt that ends as transient is followed by the next; how many there were."""
    for attempt in range(1, MAX_ATTEMPTS):
        s3fs.S3FileSystem.clear_instance_cache()  # an attempt is a process of its own
        try:
            train.run(task.model_copy(update={"attempt": attempt}))
            return attempt
        except Transient:
            continue
    raise AssertionError(f"it did not end in {MAX_ATTEMPTS} attempts")


def at_each_checkpoint(faults: Sequence[tuple[Fault, int]]) -> Callable[[Request], Fault | None]:
    """So many requests meet the first fault once the first checkpoint is being written, and so on."""
    waiting = [(f"/checkpoints/step-{2 * number:08d}/", *fault) for number, fault in enumerate(faults, start=1)]
    on: list[Fault] = []

    def rule(request: Request) -> Fault | None:
        if waiting and not on and request.method == "PUT" and waiting[0][0] in request.path:
            _, fault, requests = waiting.pop(0)
            on.extend([fault] * requests)
        return on.pop() if on else None

    return rule


FAULTS: dict[str, list[tuple[Fault, int]]] = {
    "throttled, then with rotated credentials, then without rights": [
        (s3_error(503, "SlowDown"), 20),
        (s3_error(403, "InvalidAccessKeyId"), 9),
        (s3_error(403, "AccessDenied"), 3),
    ],
    "broken, then cut off in the middle of uploads": [(s3_error(500, "InternalError"), 12), (Cut.MIDWAY, 12)],
    "with expired credentials, then with lost answers": [(s3_error(400, "ExpiredToken"), 12), (Cut.AFTER, 12)],
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_store_that_is_disturbed_costs_attempts_and_no_bit(
    server: S3Server, link: Link, undisturbed: str, name: str
) -> None:
    link.rule = at_each_checkpoint(FAULTS[name])
    task = task_on(server, name.replace(" ", "-").replace(",", ""))
    assert run_to_the_end(task) > 2, "no attempt was ended by one of them"
    assert link.faults == sum(requests for _, requests in FAULTS[name])
    assert digest_of_adapter(server.bucket / task.store_uri.rpartition("/")[2]) == undisturbed


def test_lists_that_are_old_cost_steps_and_no_bit(server: S3Server, link: Link, undisturbed: str) -> None:
    """The lists that a store gives are those of before: checkpoints are missing, others are there no more."""
    task = task_on(server, "old-lists")

    def rule(request: Request) -> Fault | None:
        if request.method == "PUT" and "/checkpoints/step-00000006/" in request.path and not ended:
            ended.append(1)
            return s3_error(403, "InvalidAccessKeyId")
        return Stale.EARLIER if "list-type=2" in request.path else None

    ended: list[int] = []
    link.rule = rule
    assert run_to_the_end(task) > 1
    assert link.faults > 3
    assert digest_of_adapter(server.bucket / "old-lists") == undisturbed


def test_an_upload_in_parts_that_is_cut_in_the_middle_is_made_again(
    server: S3Server, link: Link, tmp_path: Path
) -> None:
    data = os.urandom(1 << 20) * 101  # from 100 MiB on the client uploads in parts
    parts: list[str] = []

    def rule(request: Request) -> Fault | None:
        if "partNumber=" not in request.path:
            return None
        parts.append(request.path)
        return Cut.MIDWAY if len(parts) == 2 else None

    link.rule = rule
    store = JobStore(f"s3://{BUCKET}/in-parts")
    store.publish_folder(make_folder(tmp_path / "large", weights=data), "checkpoints/step-00000001", make_manifest)
    assert link.faults == 1
    stored = server.bucket / "in-parts" / "checkpoints" / "step-00000001" / "weights"
    assert hashlib.sha256(stored.read_bytes()).digest() == hashlib.sha256(data).digest()


def test_a_denial_is_final_only_before_the_job_has_used_its_store(server: S3Server, link: Link) -> None:
    link.rule = lambda _request: s3_error(403, "AccessDenied")
    for is_new, reason in ((True, Reason.USER_ERROR), (False, Reason.CREDENTIALS_REFUSED)):
        with pytest.raises(StageError, match="AccessDenied, says the link; give the job a store and cred") as denied:
            JobStore(f"s3://{BUCKET}/denied", is_new=is_new).take_fence(1)
        assert denied.value.reason is reason


# --- two writers


def test_of_many_that_take_the_fence_at_once_the_latest_has_it(server: S3Server, link: Link) -> None:
    """Every write but the last would be lost without a condition: all of them read before any of them writes."""
    uri, attempts = f"s3://{BUCKET}/many", 6
    meeting = threading.Barrier(attempts)
    met = threading.local()
    refused: list[int] = []
    stores = [JobStore(uri) for _ in range(attempts)]
    for store in stores:
        wait_before_writing(store, meeting, met)

    def take(attempt: int) -> None:
        try:
            stores[attempt - 1].take_fence(attempt)
        except FencedError:
            refused.append(attempt)

    run_together(take, range(1, attempts + 1))
    kept = Fence.model_validate_json((server.bucket / "many" / "fence.json").read_bytes())
    assert kept.attempt == attempts
    assert attempts not in refused


def wait_before_writing(store: JobStore, meeting: threading.Barrier, met: threading.local) -> None:
    """Let the store's first read be everybody's first read."""
    read = store._backend.read

    def read_and_wait(name: str) -> bytes | None:
        data = read(name)
        if not getattr(met, "done", False):
            met.done = True
            meeting.wait(20)
        return data

    store._backend.read = read_and_wait


def run_together(call: Callable[[int], None], numbers: range) -> None:
    threads = [threading.Thread(target=call, args=(number,)) for number in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)


def test_what_attempts_say_of_themselves_is_lost_by_nobody(server: S3Server, link: Link) -> None:
    uri, attempts = f"s3://{BUCKET}/said", 4
    meeting, met = threading.Barrier(attempts), threading.local()
    first = JobStore(uri)
    first.take_fence(1)
    stores = [JobStore(uri) for _ in range(attempts)]
    for store in stores:
        store.check_fence = lambda _attempt: None  # as if it had been asked a moment ago
        wait_before_writing(store, meeting, met)

    run_together(lambda number: stores[number - 1].record_attempt(number, {"n": str(number)}), range(1, attempts + 1))
    kept = AttemptLog.model_validate_json((server.bucket / "said" / "attempts.json").read_bytes())
    assert set(kept.tags) == {str(number) for number in range(1, attempts + 1)}


def test_an_old_attempts_manifest_does_not_take_the_place_of_a_later_ones(
    server: S3Server, link: Link, tmp_path: Path
) -> None:
    """The later one publishes between the old one's look at the fence and its write."""
    uri, name = f"s3://{BUCKET}/manifests", "checkpoints/step-00000001"
    old, new = JobStore(uri), JobStore(uri)
    old.take_fence(1)

    def manifest_of_the_old(files: tuple[FileEntry, ...]) -> CheckpointManifest:
        old.check_fence(1)
        if not overtaken:
            overtaken.append(1)
            new.take_fence(2)
            publish(new, name, one=b"of the new one")
        return make_manifest(files)

    overtaken: list[int] = []
    with old.scratch_folder() as folder, pytest.raises(FencedError):
        old.publish_folder(make_folder(folder, one=b"of the old one"), name, manifest_of_the_old)
    manifest = new.read_manifest(name, CheckpointManifest)
    assert manifest is not None
    assert (new.fetch_folder(name, manifest.files, tmp_path) / "one").read_bytes() == b"of the new one"


def test_a_store_that_knows_no_conditions_is_told_of_and_written_to(
    server: S3Server, link: Link, caplog: pytest.LogCaptureFixture
) -> None:
    def rule(request: Request) -> Fault | None:
        return s3_error(501, "NotImplemented") if request.conditional else None

    link.rule = rule
    store = JobStore(f"s3://{BUCKET}/no-conditions")
    store.take_fence(1)
    store.take_fence(2)
    with pytest.raises(FencedError):
        store.check_fence(1)
    assert caplog.text.count("cannot write under a condition, so it is done without") == 1
    assert link.faults == 1
