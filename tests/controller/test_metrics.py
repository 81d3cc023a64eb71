"""What Prometheus is told, against what the store says happened."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.api.job import Attempt, CheckpointStatus, ObjectMeta, QLoRAJob, QLoRAJobStatus
from orchestrator.api.queue import MonthlyUsage, QLoRAQueue, QLoRAQueueStatus
from orchestrator.api.reasons import Reason
from orchestrator.controller.metrics import OTHER, QUEUES_LIMIT, Metrics
from orchestrator.core.snapshot import Policy, Snapshot
from orchestrator.errors import StoreUnavailable
from orchestrator.sizing.hardware import gpu_class
from tests.builders import make_queue, submitted_job
from tests.controller.test_loop import World

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)


def samples(metrics: Metrics, name: str) -> Mapping[tuple[str, ...], float]:
    """A metric's samples as a scraper reads them, by their labels' values in the order of the labels' names."""
    text = generate_latest(metrics.registry).decode()
    found = [s for family in text_string_to_metric_families(text) for s in family.samples if s.name == name]
    return {tuple(value for _, value in sorted(s.labels.items())): s.value for s in found}


def make_snapshot(*jobs: QLoRAJob, **changes: object) -> Snapshot:
    snapshot = Snapshot(
        now=NOW, jobs=jobs, gpu_classes=(gpu_class("24Gi", 4),), policy=Policy(store_uri="file:///store")
    )
    return replace(snapshot, **changes)


def take(metrics: Metrics, snapshot: Snapshot) -> None:
    metrics.round_begins()
    metrics.round_done(snapshot, (), decide_seconds=0.0, start=0.0)


def job_at(version: int, status: QLoRAJobStatus, queue: str = "default") -> QLoRAJob:
    job = submitted_job()
    metadata = job.metadata.model_copy(
        update={"uid": "u", "resource_version": str(version), "creation_timestamp": NOW - timedelta(hours=2)}
    )
    return job.model_copy(
        update={"metadata": metadata, "status": status, "spec": job.spec.model_copy(update={"queue": queue})}
    )


def attempt(stage: str, number: int, *, since: int, until: int | None = None, reason: Reason | None = None) -> Attempt:
    """Minutes before now."""
    return Attempt(
        stage=stage,
        number=number,
        gpu_class="24Gi" if stage == "train" else None,
        created_time=NOW - timedelta(minutes=since),
        start_time=NOW - timedelta(minutes=since),
        finish_time=None if until is None else NOW - timedelta(minutes=until),
        reason=reason,
    )


PREPARED = attempt("prepare", 1, since=90, until=80, reason=Reason.SUCCEEDED)
TRAINING = QLoRAJobStatus(
    attempts=(PREPARED, attempt("train", 2, since=60)),
    attempts_total=2,
    checkpoint=CheckpointStatus(step=5, uri="file:///c", time=NOW - timedelta(minutes=15)),
)
PREEMPTED = TRAINING.model_copy(
    update={"attempts": (PREPARED, attempt("train", 2, since=60, until=10, reason=Reason.PREEMPTED))}
)


def test_a_job_is_counted_as_its_status_tells_it(tmp_path: Path) -> None:
    world = World(tmp_path)
    metrics = world.controller.metrics
    world.controller.round()
    world.store.create_job(submitted_job())
    world.rounds(lambda: world.is_settled() and not world.runtime.stages)
    world.controller.round()
    status = world.job().status
    assert samples(metrics, "qlora_attempts_ended_total") == {
        ("Succeeded", attempt.stage): 1.0 for attempt in status.attempts
    }
    assert samples(metrics, "qlora_jobs_finished_total") == {("Succeeded",): 1.0}
    assert samples(metrics, "qlora_queue_wait_seconds_count") == {("24Gi", "default"): 1.0}
    used = samples(metrics, "qlora_gpu_used_seconds_total")[("24Gi", "default")]
    assert abs(used - status.gpu_seconds) < 1e-6
    assert samples(metrics, "qlora_gpu_lost_seconds_total") == {}
    assert samples(metrics, "qlora_jobs") == {("default", "Succeeded"): 1.0}
    rounds = metrics.latencies().rounds
    assert samples(metrics, "qlora_rounds_total") == {("done",): rounds}
    decided = samples(metrics, "qlora_decisions_total")
    ensured = [call for call in world.runtime.calls if call.startswith("ensure")]
    assert decided[("EnsureStage",)] >= len(ensured) == 3


def test_what_was_before_this_process_is_not_counted_again() -> None:
    metrics = Metrics()
    take(metrics, make_snapshot(job_at(1, PREEMPTED)))
    assert samples(metrics, "qlora_attempts_ended_total") == {}
    assert samples(metrics, "qlora_queue_wait_seconds_count") == {}


def test_a_preempted_attempt_loses_what_came_after_its_checkpoint() -> None:
    metrics = Metrics()
    take(metrics, make_snapshot(job_at(1, TRAINING)))
    take(metrics, make_snapshot(job_at(2, PREEMPTED)))
    take(metrics, make_snapshot(job_at(3, PREEMPTED)))
    assert samples(metrics, "qlora_gpu_used_seconds_total") == {("24Gi", "default"): 50 * 60.0}
    assert samples(metrics, "qlora_gpu_lost_seconds_total") == {("24Gi", "Preempted"): 5 * 60.0}
    assert samples(metrics, "qlora_attempts_ended_total") == {("Preempted", "train"): 1.0}


def test_a_wait_lasts_from_the_end_of_the_last_attempt_to_the_next() -> None:
    metrics = Metrics()
    take(metrics, make_snapshot(job_at(1, QLoRAJobStatus(attempts=(PREPARED,), attempts_total=1))))
    assert samples(metrics, "qlora_queue_oldest_wait_seconds") == {}, "it is not prepared yet"
    take(metrics, make_snapshot(job_at(2, TRAINING)))
    assert samples(metrics, "qlora_queue_wait_seconds_sum") == {("24Gi", "default"): 20 * 60.0}
    assert samples(metrics, "qlora_checkpoint_age_seconds") == {("default",): 15 * 60.0}
    assert samples(metrics, "qlora_gpus_in_use") == {("24Gi", "default"): 1.0}
    assert samples(metrics, "qlora_gpus") == {("24Gi",): 4.0}


def test_queues_that_nobody_described_share_one_label() -> None:
    metrics = Metrics()
    queues = tuple(QLoRAQueue(metadata=ObjectMeta(name=f"team-{number:03}")) for number in range(QUEUES_LIMIT + 50))
    jobs = tuple(job_at(number, TRAINING, queue=f"anything-{number}") for number in range(500))
    take(metrics, make_snapshot(*jobs, job_at(1, TRAINING, queue="team-007"), queues=queues, gpu_classes=()))
    assert samples(metrics, "qlora_gpus_in_use") == {(OTHER, OTHER): 500.0, (OTHER, "team-007"): 1.0}
    everyone = tuple(job_at(1, TRAINING, queue=queue.metadata.name) for queue in queues)
    take(metrics, make_snapshot(*everyone, queues=queues))
    assert len(samples(metrics, "qlora_jobs")) == QUEUES_LIMIT + 1


def test_a_change_is_behind_until_a_round_that_came_after_it_is_through() -> None:
    metrics = Metrics()
    take(metrics, make_snapshot())
    assert samples(metrics, "qlora_reconcile_lag_seconds_count") == {(): 0.0}
    metrics.changed()
    metrics.round_begins()  # fails
    metrics.round_begins()
    metrics.changed()  # while it works: for the next one
    metrics.round_done(make_snapshot(), (), decide_seconds=0.0, start=0.0)
    assert samples(metrics, "qlora_reconcile_lag_seconds_count") == {(): 1.0}
    take(metrics, make_snapshot())
    assert samples(metrics, "qlora_reconcile_lag_seconds_count") == {(): 2.0}


def test_rounds_that_fail_are_counted_as_such(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.runtime.error = lambda call: StoreUnavailable("away") if call == "observe" else None
    stop = threading.Event()
    thread = threading.Thread(target=lambda: world.controller.run(stop, lambda: None), daemon=True)
    thread.start()
    metrics = world.controller.metrics
    deadline = time.monotonic() + 20
    while samples(metrics, "qlora_rounds_total").get(("failed",), 0.0) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    stop.set()
    thread.join(10)
    assert samples(metrics, "qlora_rounds_total")[("failed",)] >= 2
    assert ("done",) not in samples(metrics, "qlora_rounds_total")


def test_the_program_reports_leadership_watches_and_requests() -> None:
    metrics = Metrics()
    metrics.leads(True)
    metrics.watch_restarted("pods", "gone")
    metrics.read_requests = lambda: {("GET", "pods"): 3}
    assert samples(metrics, "qlora_leader") == {(): 1.0}
    assert samples(metrics, "qlora_watch_restarts_total") == {("gone", "pods"): 1.0}
    assert samples(metrics, "qlora_api_requests_total") == {("pods", "GET"): 3.0}


def test_these_are_the_metrics_and_no_others() -> None:
    """Alerts, dashboards and other people's queries rest on these names."""
    metrics = Metrics()
    take(metrics, make_snapshot(job_at(1, TRAINING)))
    text = generate_latest(metrics.registry).decode()
    others = ("process_", "python_gc_")
    assert {f.name for f in text_string_to_metric_families(text) if not f.name.startswith(others)} == {
        "qlora_api_requests",
        "qlora_attempts_ended",
        "qlora_broken_gpus",
        "qlora_checkpoint_age_seconds",
        "qlora_decide_seconds",
        "qlora_decisions",
        "qlora_gpu_lost_seconds",
        "qlora_gpu_used_seconds",
        "qlora_gpus",
        "qlora_gpus_not_counted",
        "qlora_gpus_in_use",
        "qlora_jobs",
        "qlora_jobs_finished",
        "qlora_jobs_refused",
        "qlora_jobs_unreadable",
        "qlora_jobs_waiting",
        "qlora_last_round_timestamp_seconds",
        "qlora_leader",
        "qlora_month_dollars",
        "qlora_month_gpu_seconds",
        "qlora_outages",
        "qlora_queue_oldest_wait_seconds",
        "qlora_queue_wait_seconds",
        "qlora_reconcile_lag_seconds",
        "qlora_round_seconds",
        "qlora_rounds",
        "qlora_watch_restarts",
    }


def test_a_months_gpu_time_is_told_as_queues_statuses_have_it() -> None:
    had = [
        MonthlyUsage(month=month, user=user, gpu_class=gpu_class, gpu_seconds=seconds, dollars=seconds / 100)
        for month, user, gpu_class, seconds in (
            (f"{NOW:%Y-%m}", "team-a", "24Gi", 600.0),
            (f"{NOW:%Y-%m}", "team-a", "gone", 60.0),
            ("2001-01", "team-a", "24Gi", 5.0),
        )
    ]
    queue = make_queue("research").model_copy(update={"status": QLoRAQueueStatus(months=tuple(had))})
    metrics = Metrics()
    take(metrics, replace(make_snapshot(), queues=(queue,)))
    told = samples(metrics, "qlora_month_gpu_seconds")
    assert told == {("24Gi", "research", "team-a"): 600.0, (OTHER, "research", "team-a"): 60.0}
    assert samples(metrics, "qlora_month_dollars")["24Gi", "research", "team-a"] == 6.0
