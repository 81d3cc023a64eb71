"""What every Store must do, whatever it stands on. Each backend's test module inherits it and says how to open one."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from datetime import UTC, datetime

import pytest

from orchestrator.api.base import utc
from orchestrator.api.job import (
    CANCEL_ANNOTATION,
    NOTIFY_FINALIZER,
    RELEASE_FINALIZER,
    Attempt,
    MlflowStatus,
    ObjectMeta,
    OwnerReference,
    QLoRAJobStatus,
    TrackingSpec,
    TrainingSpec,
)
from orchestrator.api.notification import Notification, NotificationsStatus
from orchestrator.api.queue import MonthlyUsage, QLoRAQueue, QLoRAQueueSpec, QLoRAQueueStatus, Quota, UserUsage
from orchestrator.api.reasons import Reason
from orchestrator.api.sweep import QLoRASweepStatus, TrialStatus
from orchestrator.core.commands import Event
from orchestrator.core.sweep.search import trial_job
from orchestrator.errors import AlreadyExists, Conflict, InvalidObject, NotFound
from orchestrator.ports import Store
from tests.builders import submitted_job, submitted_sweep


def with_attempt() -> QLoRAJobStatus:
    attempt = Attempt(stage="prepare", number=1, created_time=datetime.now(UTC))
    return QLoRAJobStatus(attempts=(attempt,), attempts_total=1)


class StoreContract(ABC):
    """Inherit, and return an empty store."""

    @abstractmethod
    def open(self) -> Store:
        """A client of the store under test; every call within a test opens the same store."""

    def test_a_new_job_gets_uid_version_time_and_an_empty_status(self) -> None:
        store = self.open()
        job = submitted_job()
        forged = job.model_copy(update={"status": QLoRAJobStatus(summary="done, honest")})
        created = store.create_job(forged)
        meta = created.metadata
        assert len(meta.uid) == 36
        assert meta.resource_version
        assert meta.generation == 1
        assert meta.creation_timestamp is not None
        assert abs((datetime.now(UTC) - meta.creation_timestamp).total_seconds()) < 60
        assert created.status == QLoRAJobStatus()
        assert created.spec == job.spec
        assert self.open().get_job("team-a", "medical") == created

    def test_a_duplicate_name_is_refused_and_the_first_job_stays(self) -> None:
        store = self.open()
        first = store.create_job(submitted_job(priority=1))
        with pytest.raises(AlreadyExists, match="team-a/medical"):
            store.create_job(submitted_job(priority=2))
        assert store.get_job("team-a", "medical") == first

    def test_one_name_in_two_namespaces_is_two_jobs(self) -> None:
        store = self.open()
        store.create_job(submitted_job(namespace="team-b"))
        store.create_job(submitted_job(namespace="team-a"))
        assert [job.key for job in store.list_jobs()] == ["team-a/medical", "team-b/medical"]
        assert [job.key for job in store.list_jobs("team-b")] == ["team-b/medical"]

    def test_jobs_are_listed_by_namespace_and_name(self) -> None:
        store = self.open()
        for name in ("c", "a", "b"):
            store.create_job(submitted_job(name))
        assert [job.metadata.name for job in store.list_jobs()] == ["a", "b", "c"]

    def test_a_job_that_does_not_exist_is_not_found(self) -> None:
        store = self.open()
        ghost = submitted_job(meta={"resource_version": "1"})
        for call in (
            lambda: store.get_job("team-a", "medical"),
            lambda: store.update_job(ghost),
            lambda: store.update_status(ghost, QLoRAJobStatus()),
            lambda: store.delete_job("team-a", "medical"),
        ):
            with pytest.raises(NotFound, match="team-a/medical"):
                call()

    def test_a_status_write_changes_the_status_alone(self) -> None:
        store = self.open()
        created = store.create_job(submitted_job(priority=3))
        forged = created.model_copy(update={"spec": submitted_job(priority=9).spec})
        written = store.update_status(forged, QLoRAJobStatus(summary="waiting"))
        assert written.status.summary == "waiting"
        assert written.spec.priority == 3
        assert written.metadata.generation == 1
        assert int(written.metadata.resource_version) > int(created.metadata.resource_version)

    def test_a_spec_write_changes_the_spec_and_generation_but_never_the_status(self) -> None:
        store = self.open()
        created = store.create_job(submitted_job())
        running = store.update_status(created, QLoRAJobStatus(summary="running"))
        wanted = running.model_copy(
            update={"spec": running.spec.model_copy(update={"suspend": True}), "status": QLoRAJobStatus()}
        )
        updated = store.update_job(wanted)
        assert updated.spec.suspend
        assert updated.metadata.generation == 2
        assert updated.status.summary == "running"

    def test_an_annotation_does_not_bump_the_generation(self) -> None:
        store = self.open()
        created = store.create_job(submitted_job())
        meta = created.metadata.model_copy(update={"annotations": {"qlora.dev/cancel": "true"}})
        updated = store.update_job(created.model_copy(update={"metadata": meta}))
        assert updated.cancelled
        assert updated.metadata.generation == 1

    def test_identity_cannot_be_rewritten(self) -> None:
        store = self.open()
        created = store.create_job(submitted_job())
        meta = created.metadata.model_copy(update={"uid": "forged", "creation_timestamp": None, "generation": 7})
        updated = store.update_job(created.model_copy(update={"metadata": meta}))
        assert updated.metadata.uid == created.metadata.uid
        assert updated.metadata.creation_timestamp == created.metadata.creation_timestamp
        assert updated.metadata.generation == 1

    def test_a_stale_write_is_refused_and_changes_nothing(self) -> None:
        store = self.open()
        stale = store.create_job(submitted_job())
        fresh = store.update_status(stale, QLoRAJobStatus(summary="first"))
        with pytest.raises(Conflict, match="team-a/medical"):
            store.update_status(stale, QLoRAJobStatus(summary="second"))
        with pytest.raises(Conflict, match="team-a/medical"):
            store.update_job(stale)
        assert store.get_job("team-a", "medical") == fresh

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("model", submitted_job().spec.model.model_copy(update={"revision": "other"})),
            ("dataset", submitted_job().spec.dataset.model_copy(update={"too_long": "drop"})),
            ("adapter", submitted_job().spec.adapter.model_copy(update={"rank": 8})),
            ("training", TrainingSpec(seed=1)),
            ("tracking", TrackingSpec(alias=None)),
        ],
    )
    def test_what_the_results_depend_on_is_immutable(self, field: str, value: object) -> None:
        store = self.open()
        created = store.create_job(submitted_job())
        changed = created.model_copy(update={"spec": created.spec.model_copy(update={field: value})})
        with pytest.raises(InvalidObject, match=rf"spec\.{field}\b"):
            store.update_job(changed)
        assert store.get_job("team-a", "medical") == created

    def test_a_null_that_overrides_a_default_survives(self) -> None:
        store = self.open()
        store.create_job(submitted_job(tracking=TrackingSpec(alias=None)))
        assert self.open().get_job("team-a", "medical").spec.tracking.alias is None

    def test_an_object_that_breaks_a_rule_is_not_stored(self) -> None:
        store = self.open()
        bad = submitted_job()
        bad = bad.model_copy(update={"spec": bad.spec.model_copy(update={"backoff_limit": -1})})
        with pytest.raises(InvalidObject, match="backoffLimit"):
            store.create_job(bad)
        assert store.list_jobs() == []

    def test_deleting_a_job_at_rest_removes_it(self) -> None:
        store = self.open()
        created = store.create_job(submitted_job())
        store.record_event(created, Event(reason=Reason.PREPARING, message="old"))
        store.delete_job("team-a", "medical")
        assert store.list_jobs() == []
        again = store.create_job(submitted_job())
        assert again.metadata.uid != created.metadata.uid
        assert store.list_events("team-a", "medical") == []

    @pytest.mark.parametrize(
        "busy", [with_attempt(), QLoRAJobStatus(mlflow=MlflowStatus(run_id="r", run_status="RUNNING"))]
    )
    def test_deleting_a_busy_job_marks_it_until_it_is_at_rest(self, busy: QLoRAJobStatus) -> None:
        store = self.open()
        running = store.update_status(store.create_job(submitted_job()), busy)
        store.delete_job("team-a", "medical")
        marked = store.get_job("team-a", "medical")
        assert marked.cancelled
        assert marked.metadata.deletion_timestamp is not None
        assert marked.metadata.resource_version != running.metadata.resource_version
        store.delete_job("team-a", "medical")
        assert store.get_job("team-a", "medical") == marked
        store.update_status(marked, QLoRAJobStatus())
        store.delete_job("team-a", "medical")
        assert store.list_jobs() == []

    def test_a_job_is_held_from_its_run_on_record_until_it_is_released(self) -> None:
        store = self.open()
        open_run = MlflowStatus(run_id="r", run_status="RUNNING")
        job = store.update_status(store.create_job(submitted_job()), QLoRAJobStatus(mlflow=open_run))
        ended = open_run.model_copy(update={"run_status": "FINISHED"})
        job = store.update_status(job, QLoRAJobStatus(mlflow=ended, finish_time=utc(0)))
        assert job.metadata.finalizers == (RELEASE_FINALIZER,)
        store.delete_job("team-a", "medical")
        assert store.get_job("team-a", "medical").metadata.deletion_timestamp is not None
        store.release(store.get_job("team-a", "medical"))
        assert store.list_jobs() == []

    def test_to_release_a_job_twice_changes_nothing(self) -> None:
        store = self.open()
        ended = MlflowStatus(run_id="r", run_status="FAILED")
        job = store.update_status(store.create_job(submitted_job()), QLoRAJobStatus(mlflow=ended, finish_time=utc(0)))
        assert job.metadata.finalizers == (RELEASE_FINALIZER,), "a run that is new on record may still be open"
        store.release(job)
        released = store.get_job("team-a", "medical")
        store.release(job)
        store.release(released)
        assert store.get_job("team-a", "medical") == released
        assert released.metadata.finalizers == ()

    def test_a_job_that_finishes_without_a_run_owes_nothing(self) -> None:
        store = self.open()
        created = store.create_job(submitted_job(meta={"finalizers": (RELEASE_FINALIZER,)}))
        job = store.update_status(created, QLoRAJobStatus(finish_time=utc(0)))
        assert job.metadata.finalizers == ()
        store.delete_job("team-a", "medical")
        assert store.list_jobs() == []

    def test_a_job_whose_webhooks_are_to_be_told_stays_until_its_end_is_told(self) -> None:
        """Through what a run and a notification owe at one time, each taken off by itself."""
        store = self.open()
        told = NotificationsStatus(total=1)
        job = store.update_status(store.create_job(submitted_job()), QLoRAJobStatus(notifications=told))
        assert job.metadata.finalizers == (NOTIFY_FINALIZER,)
        running = MlflowStatus(run_id="r", run_status="RUNNING")
        job = store.update_status(job, QLoRAJobStatus(notifications=told, mlflow=running))
        assert set(job.metadata.finalizers) == {NOTIFY_FINALIZER, RELEASE_FINALIZER}
        store.delete_job("team-a", "medical")
        end = Notification(
            number=1,
            event="job.cancelled",
            time=datetime(2026, 11, 30, 12, tzinfo=UTC),
            reason=Reason.CANCELLED,
            recipients=("job/ci",),
        )
        ended = QLoRAJobStatus(
            notifications=NotificationsStatus(total=1, outstanding=(end,)),
            mlflow=running.model_copy(update={"run_status": "KILLED"}),
            finish_time=datetime(2026, 11, 30, 12, tzinfo=UTC),
        )
        job = store.update_status(store.get_job("team-a", "medical"), ended)
        store.release(job)
        store.delete_job("team-a", "medical")
        job = store.get_job("team-a", "medical")
        assert job.metadata.finalizers == (NOTIFY_FINALIZER,)
        store.update_status(job, ended.model_copy(update={"notifications": told}))
        if store.list_jobs():  # an API server removes it with its last finalizer
            store.delete_job("team-a", "medical")
        assert store.list_jobs() == []

    def test_a_finalizer_keeps_a_deleted_job_until_it_is_taken_off(self) -> None:
        store = self.open()
        store.create_job(submitted_job(meta={"finalizers": ("example.com/backup",)}))
        store.delete_job("team-a", "medical")
        marked = store.get_job("team-a", "medical")
        store.update_job(marked.model_copy(update={"metadata": marked.metadata.model_copy(update={"finalizers": ()})}))
        assert store.list_jobs() == []

    def test_queues_are_created_replaced_and_listed_by_name(self) -> None:
        store = self.open()
        for name in ("research", "default"):
            store.apply_queue(QLoRAQueue(metadata=submitted_job(name).metadata))
        quota = QLoRAQueueSpec(quotas=(Quota(gpu_class="24Gi", nominal=2),))
        before = store.list_queues()
        applied = store.apply_queue(QLoRAQueue(metadata=submitted_job("default").metadata, spec=quota))
        after = store.list_queues()
        assert [queue.metadata.name for queue in after] == ["default", "research"]
        assert after[0] == applied
        assert after[0].spec == quota
        assert after[0].metadata.uid == before[0].metadata.uid
        assert after[0].metadata.generation == 2

    def test_a_queue_is_deleted_and_may_come_again(self) -> None:
        store = self.open()
        store.create_job(submitted_job())
        queue = QLoRAQueue(metadata=submitted_job().metadata)  # of the job's own name
        first = store.apply_queue(queue)
        store.delete_queue(queue.metadata.name)
        assert store.list_queues() == []
        assert len(store.list_jobs()) == 1
        with pytest.raises(NotFound, match=f"there is no queue {queue.metadata.name}"):
            store.delete_queue(queue.metadata.name)
        assert store.apply_queue(queue).metadata.uid != first.metadata.uid

    def test_sweeps_come_back_as_they_were_written_and_their_status_by_who_has_read_this_version(self) -> None:
        store = self.open()
        created = store.create_sweep(submitted_sweep())
        assert created.metadata.uid
        assert created.spec == submitted_sweep().spec
        with pytest.raises(AlreadyExists, match="qlora sweeps delete search"):
            store.create_sweep(submitted_sweep())
        trial = TrialStatus(index=0, job="search-0", parameters={"adapter.rank": "8"}, value=0.5)
        status = QLoRASweepStatus(observed_generation=1, trials=(trial,), running=1, summary="Running")
        written = store.update_sweep_status(created, status)
        assert written.status == status
        with pytest.raises(Conflict):
            store.update_sweep_status(created, QLoRASweepStatus())
        store.cancel_sweep("team-a", "search")
        [found] = store.list_sweeps("team-a")
        assert (found.cancelled, found.status, found.spec) == (True, status, created.spec)
        assert store.list_sweeps("team-b") == []
        store.update_sweep_status(found, QLoRASweepStatus())
        store.delete_sweep("team-a", "search")
        assert store.list_sweeps() == []
        for gone in (store.cancel_sweep, store.delete_sweep):
            with pytest.raises(NotFound, match="qlora sweeps"):
                gone("team-a", "search")

    def test_a_sweep_is_held_from_its_first_trial_on_record_until_its_run_has_its_end(self) -> None:
        store = self.open()
        created = store.create_sweep(submitted_sweep())
        assert created.metadata.finalizers == ()
        trial = TrialStatus(index=0, job="search-0", uid="u", parameters={"adapter.rank": "8"})
        running = QLoRASweepStatus(trials=(trial,), running=1)
        written = store.update_sweep_status(created, running)
        assert (written.metadata.finalizers, written.status) == ((RELEASE_FINALIZER,), running)
        store.delete_sweep("team-a", "search")
        store.delete_sweep("team-a", "search")
        [found] = store.list_sweeps()
        assert (found.cancelled, found.metadata.deletion_timestamp is None) == (True, False)
        ended = running.model_copy(update={"finish_time": utc(0)})
        marked = store.update_sweep_status(found, ended)
        assert store.list_sweeps() == [marked], "its run may be open"
        told = ended.model_copy(update={"mlflow": MlflowStatus(run_status="KILLED")})
        store.update_sweep_status(marked, told)
        assert store.list_sweeps() == []
        again = store.create_sweep(submitted_sweep())
        done = store.update_sweep_status(store.update_sweep_status(again, running), told)
        assert done.metadata.finalizers == (), "what is over can be deleted with no controller around"
        store.delete_sweep("team-a", "search")
        assert store.list_sweeps() == []

    def test_a_sweep_that_waited_too_long_is_released_and_only_this_very_one(self) -> None:
        store = self.open()
        trial = TrialStatus(index=0, job="search-0", parameters={"adapter.rank": "8"})
        written = store.update_sweep_status(store.create_sweep(submitted_sweep()), QLoRASweepStatus(trials=(trial,)))
        store.delete_sweep("team-a", "search")
        [marked] = store.list_sweeps()
        other = written.metadata.model_copy(update={"uid": "another"})
        with pytest.raises((NotFound, Conflict)):
            store.release_sweep(written.model_copy(update={"metadata": other}))
        assert store.list_sweeps() == [marked]
        store.release_sweep(marked)
        assert store.list_sweeps() == []
        with pytest.raises(NotFound):
            store.release_sweep(marked)

    def test_a_trial_knows_its_sweep_wherever_it_is_read(self) -> None:
        store = self.open()
        sweep = store.create_sweep(submitted_sweep())
        created = store.create_job(trial_job(sweep, 0))
        assert created.sweep == OwnerReference(name="search", uid=sweep.metadata.uid)
        assert self.open().get_job("team-a", "search-0").sweep == created.sweep
        asked = created.metadata.model_copy(update={"annotations": {CANCEL_ANNOTATION: "true"}})
        assert store.update_job(created.model_copy(update={"metadata": asked})).sweep == created.sweep
        store.delete_job("team-a", "search-0")

    def test_a_queues_status_is_written_apart_from_its_spec_and_only_by_who_has_read_this_version(self) -> None:
        store = self.open()
        queue = store.apply_queue(QLoRAQueue(metadata=ObjectMeta(name="research")))
        had = UserUsage(user="team-a", gpu_seconds=12.5, gib_seconds=300.0)
        month = MonthlyUsage(month="2026-11", user="team-a", gpu_class="24Gi", gpu_seconds=12.5, dollars=0.25)
        status = QLoRAQueueStatus(counted_until=datetime(2026, 11, 30, 12, tzinfo=UTC), usage=(had,), months=(month,))
        written = store.update_queue_status(queue, status)
        assert (written.spec, written.status) == (queue.spec, status)
        assert written.metadata.generation == queue.metadata.generation
        with pytest.raises(Conflict):
            store.update_queue_status(queue, QLoRAQueueStatus())
        heavy = store.apply_queue(queue.model_copy(update={"spec": QLoRAQueueSpec(weight=3)}))
        assert (heavy.spec.weight, heavy.status) == (3, status)
        assert self.open().list_queues() == [heavy]
        with pytest.raises(NotFound):
            store.update_queue_status(QLoRAQueue(metadata=ObjectMeta(name="gone", resource_version="1")), status)

    def test_events_are_kept_in_order(self) -> None:
        store = self.open()
        job = store.create_job(submitted_job())
        told = [Event(reason=Reason.TRAINING, message=f"step {n}", warning=n == 1) for n in range(3)]
        for event in told:
            store.record_event(job, event)
        listed = self.open().list_events("team-a", "medical")
        assert [event for _, event in listed] == told
        times = [datetime.fromisoformat(time) for time, _ in listed]
        assert times == sorted(times)

    def test_waiting_returns_at_once_when_something_changed_before(self) -> None:
        store = self.open()
        cursor = store.wait_for_change("", 0)
        store.create_job(submitted_job())
        start = time.monotonic()
        assert store.wait_for_change(cursor, 30) != cursor
        assert time.monotonic() - start < 10

    def test_waiting_is_ended_by_another_clients_write(self) -> None:
        store = self.open()
        cursor = store.wait_for_change("", 0)
        writer = threading.Timer(0.2, lambda: self.open().create_job(submitted_job()))
        writer.start()
        start = time.monotonic()
        changed = store.wait_for_change(cursor, 30)
        waited = time.monotonic() - start
        writer.join()
        assert changed != cursor
        assert 0.1 < waited < 10

    def test_waiting_ends_with_the_timeout_when_nothing_changes(self) -> None:
        store = self.open()
        cursor = store.wait_for_change("", 0)
        start = time.monotonic()
        assert store.wait_for_change(cursor, 0.3) == cursor
        assert 0.25 < time.monotonic() - start < 10

    def test_of_many_writers_of_one_version_one_wins(self) -> None:
        created = self.open().create_job(submitted_job())
        outcomes: list[str] = []

        def write(number: int) -> None:
            try:
                self.open().update_status(created, QLoRAJobStatus(summary=f"writer {number}"))
                outcomes.append(f"writer {number}")
            except Conflict:
                outcomes.append("conflict")

        writers = [threading.Thread(target=write, args=(number,)) for number in range(8)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        winners = [outcome for outcome in outcomes if outcome != "conflict"]
        assert len(outcomes) == 8
        assert len(winners) == 1
        assert self.open().get_job("team-a", "medical").status.summary == winners[0]
