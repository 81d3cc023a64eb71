"""The Store contract on a real API server, and what only watches and subresources can get wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import pytest

from orchestrator.adapters.kubernetes.api import MERGE_PATCH, KubeApi, path_of
from orchestrator.adapters.kubernetes.store import KubernetesStore
from orchestrator.adapters.kubernetes.watch import Changes
from orchestrator.api.base import API_VERSION
from orchestrator.api.job import CANCEL_ANNOTATION, RELEASE_FINALIZER, Attempt, MlflowStatus, QLoRAJobStatus
from orchestrator.api.reasons import Reason
from orchestrator.core.commands import Event
from orchestrator.errors import Conflict, OrchestratorError
from tests.adapters.store_contract import StoreContract, with_attempt
from tests.builders import submitted_job
from tests.cluster.control_plane import ControlPlane
from tests.cluster.resources import clear

WAIT_SECONDS = 10.0


@pytest.fixture
def api(cluster: ControlPlane) -> Iterator[KubeApi]:
    """A connection to a cluster without jobs and queues."""
    api = cluster.api()
    clear(api)
    yield api
    api.close()


@pytest.fixture
def stores(cluster: ControlPlane) -> Iterator[Callable[..., KubernetesStore]]:
    """Opens clients that are closed after the test."""
    opened: list[tuple[KubernetesStore, KubeApi]] = []

    def open_store(*, started: bool = False, changes: Changes | None = None) -> KubernetesStore:
        api = cluster.api()
        store = KubernetesStore(api, changes=changes)
        opened.append((store, api))
        if started:
            store.start()
        return store

    yield open_store
    for store, api in opened:
        store.close()
        api.close()


class TestKubernetesStore(StoreContract):
    """Every read asks the server."""

    started = False

    @pytest.fixture(autouse=True)
    def _cluster(self, api: KubeApi, stores: Callable[..., KubernetesStore]) -> None:
        self.stores = stores

    def open(self) -> KubernetesStore:
        return self.stores(started=self.started)


class TestWatchingKubernetesStore(TestKubernetesStore):
    """Reads come from caches: the controller's way."""

    started = True

    def test_events_are_kept_in_order(self) -> None:
        store = self.open()
        job = store.create_job(submitted_job())
        told = [Event(reason=Reason.TRAINING, message=f"step {n}", warning=n == 1) for n in range(3)]
        for event in told:
            store.record_event(job, event)
        store.close()
        assert [event for _, event in store.list_events("team-a", "medical")] == told


def until(done: Callable[[], bool]) -> None:
    """Wait for something that a watch brings."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not done():
        assert time.monotonic() < deadline, "it did not come in time"
        time.sleep(0.02)


def train_attempt() -> QLoRAJobStatus:
    attempt = Attempt(stage="train", number=2, created_time=now())
    return QLoRAJobStatus(attempts=(attempt,), attempts_total=2)


def now() -> datetime:
    return datetime.now(UTC)


def test_what_was_written_is_read_at_once(api: KubeApi, stores: Callable[..., KubernetesStore]) -> None:
    store = stores(started=True)
    for number in range(20):
        job = store.create_job(submitted_job(f"job-{number}"))
        written = store.update_status(job, QLoRAJobStatus(summary=f"summary {number}"))
        assert store.get_job("team-a", f"job-{number}") == written
        assert written in store.list_jobs("team-a")


def test_the_finalizer_is_there_while_a_gpu_is_held_and_gone_with_the_end(
    api: KubeApi, stores: Callable[..., KubernetesStore]
) -> None:
    store = stores(started=True)
    job = store.create_job(submitted_job())
    preparing = store.update_status(job, with_attempt())
    assert RELEASE_FINALIZER not in preparing.metadata.finalizers
    training = store.update_status(preparing, train_attempt())
    assert RELEASE_FINALIZER in training.metadata.finalizers
    path = path_of(API_VERSION, "qlorajobs", "team-a", "medical")
    assert api.get(path)["metadata"]["finalizers"] == [RELEASE_FINALIZER]
    over = train_attempt().model_copy(
        update={
            "attempts": tuple(a.model_copy(update={"finish_time": now()}) for a in train_attempt().attempts),
            "finish_time": now(),
            "mlflow": MlflowStatus(run_id="r", run_status="FINISHED"),
        }
    )
    done = store.update_status(training, over)
    assert RELEASE_FINALIZER in done.metadata.finalizers, "nobody has told MLflow yet"
    store.release(done)
    assert RELEASE_FINALIZER not in store.get_job("team-a", "medical").metadata.finalizers
    assert "finalizers" not in api.get(path)["metadata"]
    api.delete(path)
    until(lambda: store.list_jobs() == [])


def test_another_clients_job_is_seen_without_asking(api: KubeApi, stores: Callable[..., KubernetesStore]) -> None:
    watcher, writer = stores(started=True), stores()
    job = writer.create_job(submitted_job())
    until(lambda: [seen.key for seen in watcher.list_jobs()] == ["team-a/medical"])
    writer.update_status(job, QLoRAJobStatus(summary="elsewhere"))
    until(lambda: watcher.list_jobs()[0].status.summary == "elsewhere")
    writer.delete_job("team-a", "medical")
    until(lambda: watcher.list_jobs() == [])


def test_a_write_on_an_old_view_is_refused_and_puts_the_view_right(
    api: KubeApi, stores: Callable[..., KubernetesStore]
) -> None:
    store, other = stores(started=True), stores()
    old = store.create_job(submitted_job())
    fresh = other.update_status(old, QLoRAJobStatus(summary="other"))
    with pytest.raises(Conflict):
        store.update_status(old, QLoRAJobStatus(summary="mine"))
    assert store.get_job("team-a", "medical") == fresh


def test_whatever_metadata_the_server_takes_can_be_read(api: KubeApi, stores: Callable[..., KubernetesStore]) -> None:
    """What is kept of it is cut, and a write of ours leaves on the server what was cut here."""
    store = stores(started=True)
    store.create_job(submitted_job("loaded"))
    path = path_of(API_VERSION, "qlorajobs", "team-a", "loaded")
    labels = {f"example.org/label-{number}": "x" * 63 for number in range(200)}
    annotations = {"qlora.dev/note": "x" * 5000, "example.org/note": "y" * 200_000}
    api.patch(path, {"metadata": {"annotations": annotations, "labels": labels}}, MERGE_PATCH)
    until(lambda: len(store.get_job("team-a", "loaded").metadata.labels) == 64)
    assert store.list_unreadable() == []
    [job] = store.list_jobs()
    cancelled = {**job.metadata.annotations, CANCEL_ANNOTATION: "true"}
    meta = job.metadata.model_copy(update={"annotations": cancelled})
    assert store.update_job(job.model_copy(update={"metadata": meta})).cancelled
    kept = api.get(path)["metadata"]
    assert kept["annotations"] == {**annotations, CANCEL_ANNOTATION: "true"}
    assert kept["labels"] == labels


def test_a_view_that_nobody_feeds_is_not_decided_on(api: KubeApi, stores: Callable[..., KubernetesStore]) -> None:
    store = stores(started=True, changes=Changes(stale_seconds=-1.0))
    with pytest.raises(OrchestratorError, match="nothing is decided"):
        store.list_jobs()


def test_watchers_keep_up_with_many_writers(api: KubeApi, stores: Callable[..., KubernetesStore]) -> None:
    """Ten threads write five hundred versions; at the end every view has the server's."""
    watcher = stores(started=True)
    writers = [stores() for _ in range(10)]

    def write(number: int) -> None:
        job = writers[number].create_job(submitted_job(f"job-{number}"))
        for version in range(50):
            job = writers[number].update_status(job, QLoRAJobStatus(attempts_total=version))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: [job.status.attempts_total for job in watcher.list_jobs()] == [49] * 10)
    assert watcher.list_jobs() == writers[0].list_jobs()


def test_a_finalizer_that_a_killed_controller_left_is_taken_off_by_the_next(
    api: KubeApi, stores: Callable[..., KubernetesStore]
) -> None:
    store = stores()
    job = store.create_job(submitted_job(meta={"finalizers": (RELEASE_FINALIZER,)}))
    over = QLoRAJobStatus(finish_time=now())
    path = path_of(API_VERSION, "qlorajobs", "team-a", "medical")
    api.patch(f"{path}/status", {"status": over.to_wire()}, MERGE_PATCH)
    assert api.get(path)["metadata"]["finalizers"] == [RELEASE_FINALIZER]
    following = stores(started=True)
    following.refresh()
    assert "finalizers" not in api.get(path)["metadata"]
    assert following.get_job("team-a", "medical").metadata.uid == job.metadata.uid
