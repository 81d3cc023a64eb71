"""What the controller tells Prometheus, and how long its rounds take.

Rules:

- Names begin with `qlora_` and end with their unit; what only grows ends with `_total`.
- Labels are bounded: enums, the cards that exist, at most BROKEN_NODES_LIMIT nodes, and at most QUEUES_LIMIT queues
  that an object describes.
- Counters are differences between what two rounds found stored, so what came before this process is not counted
  again, and a decision whose write failed is not counted at all.
- Gauges are worked out when they are asked for, from the last round's snapshot.
- A registry of its own: nothing of another library gets in, and tests may have as many as they like.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter as Tally
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import quantiles

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from orchestrator.api.job import Attempt, QLoRAJob, QLoRAJobStatus
from orchestrator.api.reasons import ConditionType, Reason
from orchestrator.core.commands import Command
from orchestrator.core.job.outages import current_outages
from orchestrator.core.job.state_machine import GPU_STATES, JobState, state_of
from orchestrator.core.scheduling.ordering import DEFAULT_QUEUE
from orchestrator.core.snapshot import Snapshot

log = logging.getLogger(__name__)

ROUNDS_KEPT = 1024
LOGGED_EVERY_SECONDS = 60.0
QUEUES_LIMIT = 100
BROKEN_NODES_LIMIT = 1000
OTHER = "other"
"""Stands for queues beyond the limit or that no object describes, and for classes whose cards are gone."""
FAST_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
WAIT_BUCKETS = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0, 4 * 3600.0, 12 * 3600.0, 24 * 3600.0, 72 * 3600.0)

ReadUncounted = Callable[[], Mapping[str, int]]
ReadRequests = Callable[[], Mapping[tuple[str, str], int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Latencies:
    """How long the last rounds took, in seconds."""

    rounds: int
    decide_median_seconds: float
    decide_p99_seconds: float
    round_median_seconds: float
    round_p99_seconds: float


class Metrics:
    """All figures of one controller. Safe to scrape from another thread."""

    def __init__(self) -> None:
        disable_created_metrics()  # twice the series, for a time that nobody asks about
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self.registry.register(_Jobs(self))
        self.registry.register(_ApiRequests(self))
        self.registry.register(_UncountedGpus(self))
        self.snapshot: Snapshot | None = None
        """The last round's; gauges are worked out from it."""
        self.read_requests: ReadRequests = dict
        """Requests to the API server so far, by verb and resource; the program on Kubernetes sets it."""
        self.read_uncounted_gpus: ReadUncounted = dict
        """GPUs that are there and that no job gets, by why not; the program on Kubernetes sets it."""
        self._history = _History(self.registry)
        self._rounds = Counter("qlora_rounds", "Rounds of the control loop", ["outcome"], registry=self.registry)
        self._decisions = Counter("qlora_decisions", "Commands decided", ["command"], registry=self.registry)
        self._decide = self._seconds("qlora_decide_seconds", "Time to decide about everything")
        self._round = self._seconds("qlora_round_seconds", "Time to observe, decide and act")
        self._lag = self._seconds(
            "qlora_reconcile_lag_seconds",
            "From the first change that no round has looked at to the end of the round that does",
        )
        self._last_round = Gauge(
            "qlora_last_round_timestamp_seconds", "When the last round came through", registry=self.registry
        )
        self._leader = Gauge("qlora_leader", "1 where this replica leads", registry=self.registry)
        self._restarts = Counter(
            "qlora_watch_restarts", "Watches begun anew", ["resource", "reason"], registry=self.registry
        )
        self._recent: deque[tuple[float, float]] = deque(maxlen=ROUNDS_KEPT)
        self._rounds_total = 0
        self._logged = time.monotonic()
        self._lock = threading.Lock()
        self._changed_at: float | None = None
        self._looked_at: float | None = None

    def changed(self) -> None:
        """Something outside changed; called by whoever notices it first, from any thread."""
        with self._lock:
            self._changed_at = self._changed_at or time.monotonic()

    def round_begins(self) -> None:
        """Begins a round, which looks at everything that has changed until now."""
        with self._lock:
            self._looked_at = self._looked_at or self._changed_at
            self._changed_at = None

    def round_done(self, snapshot: Snapshot, commands: Sequence[Command], decide_seconds: float, start: float) -> None:
        """One more round that began at `start` (monotonic)."""
        round_seconds = time.monotonic() - start
        self.snapshot = snapshot
        self._history.take(snapshot)
        self._rounds.labels("done").inc()
        self._decide.observe(decide_seconds)
        self._round.observe(round_seconds)
        self._last_round.set_to_current_time()
        for kind, count in Tally(type(command).__name__ for command in commands).items():
            self._decisions.labels(kind).inc(count)
        with self._lock:
            looked_at, self._looked_at = self._looked_at, None
        if looked_at is not None:
            self._lag.observe(time.monotonic() - looked_at)
        self._remember(decide_seconds, round_seconds)

    def round_failed(self) -> None:
        """One more round that did not come through."""
        self._rounds.labels("failed").inc()

    def leads(self, leading: bool) -> None:
        """Whether this replica leads."""
        self._leader.set(leading)

    def watch_restarted(self, resource: str, reason: str) -> None:
        """A watch was begun anew. `reason` is one of a few words, never an error's text."""
        self._restarts.labels(resource, reason).inc()

    def latencies(self) -> Latencies:
        """Percentiles over the rounds that are kept; zeros before the first."""
        decide = _percentiles([decide_seconds for decide_seconds, _ in self._recent])
        whole = _percentiles([round_seconds for _, round_seconds in self._recent])
        return Latencies(
            rounds=self._rounds_total,
            decide_median_seconds=decide[49],
            decide_p99_seconds=decide[98],
            round_median_seconds=whole[49],
            round_p99_seconds=whole[98],
        )

    def _remember(self, decide_seconds: float, round_seconds: float) -> None:
        self._rounds_total += 1
        self._recent.append((decide_seconds, round_seconds))
        if time.monotonic() - self._logged >= LOGGED_EVERY_SECONDS:
            self._logged = time.monotonic()
            log.info("%s", self.latencies())

    def _seconds(self, name: str, meaning: str) -> Histogram:
        return Histogram(name, meaning, buckets=FAST_BUCKETS, registry=self.registry)


class _History:
    """Counters of what happened to jobs, from the difference between two rounds."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._known: dict[str, QLoRAJob] | None = None
        self._wait = Histogram(
            "qlora_queue_wait_seconds",
            "From being ready to train to getting a GPU",
            ["queue", "gpu_class"],
            buckets=WAIT_BUCKETS,
            registry=registry,
        )
        self._ended = Counter("qlora_attempts_ended", "Attempts at stages", ["stage", "reason"], registry=registry)
        self._broken = Counter("qlora_broken_gpus", "Attempts that a broken card ended", ["node"], registry=registry)
        self._nodes: set[str] = set()
        self._finished = Counter("qlora_jobs_finished", "Jobs that came to an end", ["state"], registry=registry)
        self._used = Counter(
            "qlora_gpu_used_seconds",
            "GPU time of ended train attempts",
            ["queue", "gpu_class"],
            registry=registry,
        )
        self._lost = Counter(
            "qlora_gpu_lost_seconds",
            "GPU time after the last checkpoint of train attempts that ended early",
            ["reason", "gpu_class"],
            registry=registry,
        )

    def take(self, snapshot: Snapshot) -> None:
        """Count what is new since the last call; the first call only notes what is there."""
        jobs = {job.metadata.uid: job for job in snapshot.jobs}
        if self._known is not None:
            labels = _Labels(snapshot)
            for uid, job in jobs.items():
                known = self._known.get(uid)
                if known is None or known.metadata.resource_version != job.metadata.resource_version:
                    self._count(job, known.status if known else QLoRAJobStatus(), labels)
        self._known = jobs

    def _count(self, job: QLoRAJob, before: QLoRAJobStatus, labels: _Labels) -> None:
        after = job.status
        open_before = {attempt.number for attempt in before.attempts if attempt.active}
        for previous, attempt in zip((None, *after.attempts), after.attempts, strict=False):
            is_new = attempt.number > before.attempts_total
            if is_new and attempt.stage == "train":
                self._count_wait(job, previous, attempt, labels)
            if not attempt.active and (is_new or attempt.number in open_before):
                self._count_end(job, attempt, labels)
        if after.finish_time is not None and before.finish_time is None:
            self._finished.labels(state_of(after)).inc()

    def _node(self, attempt: Attempt) -> str:
        """Nodes come and go, and a status may name any: the first ones have a series each, the others one together."""
        if attempt.node is None or (attempt.node not in self._nodes and len(self._nodes) >= BROKEN_NODES_LIMIT):
            return OTHER
        self._nodes.add(attempt.node)
        return attempt.node

    def _count_wait(self, job: QLoRAJob, previous: Attempt | None, attempt: Attempt, labels: _Labels) -> None:
        ready = (previous and previous.finish_time) or job.metadata.creation_timestamp or attempt.created_time
        waited_seconds = max(0.0, (attempt.created_time - ready).total_seconds())
        self._wait.labels(labels.queue(job), labels.gpu_class(attempt)).observe(waited_seconds)

    def _count_end(self, job: QLoRAJob, attempt: Attempt, labels: _Labels) -> None:
        reason = attempt.reason or Reason.LOST
        self._ended.labels(attempt.stage, reason).inc()
        if reason is Reason.BROKEN_GPU:
            self._broken.labels(self._node(attempt)).inc()
        if attempt.stage != "train" or attempt.start_time is None or attempt.finish_time is None:
            return
        used_seconds = (attempt.finish_time - attempt.start_time).total_seconds()
        self._used.labels(labels.queue(job), labels.gpu_class(attempt)).inc(max(0.0, used_seconds))
        if job.status.adapter_uri is None:
            durable = _durable(job.status, attempt.start_time)
            lost_seconds = (attempt.finish_time - durable).total_seconds()
            self._lost.labels(reason, labels.gpu_class(attempt)).inc(max(0.0, lost_seconds))


class _Labels:
    """Bounded label values for one snapshot."""

    def __init__(self, snapshot: Snapshot) -> None:
        described = sorted(queue.metadata.name for queue in snapshot.queues)
        self._queues = {DEFAULT_QUEUE, *described[:QUEUES_LIMIT]}
        self._classes = {gpu_class.name for gpu_class in snapshot.gpu_classes}

    def queue(self, job: QLoRAJob) -> str:
        return self.queue_name(job.spec.queue)

    def queue_name(self, name: str) -> str:
        return name if name in self._queues else OTHER

    def gpu_class(self, attempt: Attempt) -> str:
        return self.class_name(attempt.gpu_class)

    def class_name(self, name: str | None) -> str:
        return name if name is not None and name in self._classes else OTHER


class _Jobs(Collector):
    """Gauges over the last snapshot."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def describe(self) -> Iterable[Metric]:
        """Nothing: names are known once there is a snapshot."""
        return ()

    def collect(self) -> Iterator[Metric]:
        snapshot = self._metrics.snapshot
        if snapshot is None:
            return
        labels = _Labels(snapshot)
        states = [(job, state_of(job.status)) for job in snapshot.jobs]
        yield _gauge("qlora_jobs", "Jobs", ("queue", "state"), _by_state(states, labels))
        yield _gauge("qlora_jobs_waiting", "Jobs without a GPU", ("queue", "reason"), _by_reason(states, labels))
        yield _gauge(
            "qlora_queue_oldest_wait_seconds",
            "Longest wait of a queued job",
            ("queue",),
            _oldest(states, labels, snapshot.now),
        )
        yield _gauge(
            "qlora_checkpoint_age_seconds",
            "Oldest last checkpoint among running jobs; what an unannounced loss would cost",
            ("queue",),
            _checkpoint_ages(states, labels, snapshot.now),
        )
        unreadable = {(): float(len(snapshot.unreadable))}
        yield _gauge("qlora_jobs_unreadable", "Jobs whose object does not parse", (), unreadable)
        refused = {(): float(len(snapshot.refused))}
        yield _gauge(
            "qlora_jobs_refused", "Jobs that nothing can come of: no status, or no stage, is taken", (), refused
        )
        told = ((job, job.status) for job in snapshot.jobs)
        outages = Tally((cause.reason.value, cause.stage) for cause in current_outages(told, snapshot))
        yield _gauge("qlora_outages", "Causes that many jobs fail for together", ("reason", "stage"), outages)
        capacity = {(c.name,): float(c.capacity) for c in snapshot.gpu_classes}
        yield _gauge("qlora_gpus", "GPUs that exist", ("gpu_class",), capacity)
        seconds, dollars = _this_month(snapshot, labels)
        of = ("queue", "user", "gpu_class")
        yield _gauge("qlora_month_gpu_seconds", "GPU time of this month (UTC) that is counted", of, seconds)
        yield _gauge("qlora_month_dollars", "What that cost", of, dollars)
        yield _gauge("qlora_gpus_in_use", "GPUs held by jobs", ("queue", "gpu_class"), _in_use(states, labels))


class _ApiRequests(Collector):
    """Requests as the transport counts them."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def describe(self) -> Iterable[Metric]:
        """Nothing: known once there were requests."""
        return ()

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily("qlora_api_requests", "Requests to the API server", labels=["verb", "resource"])
        for (verb, resource), count in sorted(self._metrics.read_requests().items()):
            family.add_metric([verb, resource], count)
        yield family


class _UncountedGpus(Collector):
    """GPUs that do not count, as the runtime tells of them."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def describe(self) -> Iterable[Metric]:
        """Nothing: known once there are some."""
        return ()

    def collect(self) -> Iterator[Metric]:
        samples = {(why,): float(count) for why, count in self._metrics.read_uncounted_gpus().items()}
        yield _gauge("qlora_gpus_not_counted", "GPUs that no job gets, by why not", ("reason",), samples)


States = Sequence[tuple[QLoRAJob, JobState]]
Samples = Mapping[tuple[str, ...], float]


def _gauge(name: str, meaning: str, labels: tuple[str, ...], samples: Samples) -> Metric:
    family = GaugeMetricFamily(name, meaning, labels=labels)
    for values, value in sorted(samples.items()):
        family.add_metric(values, value)
    return family


def _by_state(states: States, labels: _Labels) -> Samples:
    return Tally((labels.queue(job), state.value) for job, state in states)


def _by_reason(states: States, labels: _Labels) -> Samples:
    waiting = Tally[tuple[str, ...]]()
    for job, state in states:
        admitted = job.status.condition(ConditionType.ADMITTED)
        if state is JobState.QUEUED and admitted is not None:
            waiting[labels.queue(job), admitted.reason.value] += 1
    return waiting


def _this_month(snapshot: Snapshot, labels: _Labels) -> tuple[Samples, Samples]:
    """GPU-seconds and dollars, as queues' statuses have them."""
    month = f"{snapshot.now.astimezone(UTC):%Y-%m}"
    seconds: dict[tuple[str, ...], float] = {}
    dollars: dict[tuple[str, ...], float] = {}
    for queue in snapshot.queues:
        for each in queue.status.months:
            if each.month == month:
                of = labels.queue_name(queue.metadata.name), each.user, labels.class_name(each.gpu_class)
                seconds[of] = seconds.get(of, 0.0) + each.gpu_seconds
                dollars[of] = dollars.get(of, 0.0) + each.dollars
    return seconds, dollars


def _oldest(states: States, labels: _Labels, now: datetime) -> Samples:
    oldest: dict[tuple[str, ...], float] = {}
    for job, state in states:
        if state is JobState.QUEUED and (since := _ready_since(job)) is not None:
            waited = max(0.0, (now - since).total_seconds())
            oldest[(labels.queue(job),)] = max(waited, oldest.get((labels.queue(job),), 0.0))
    return oldest


def _ready_since(job: QLoRAJob) -> datetime | None:
    """When a queued job came to its line: at the end of its last attempt."""
    attempts = job.status.attempts
    return attempts[-1].finish_time if attempts else job.metadata.creation_timestamp


def _checkpoint_ages(states: States, labels: _Labels, now: datetime) -> Samples:
    ages: dict[tuple[str, ...], float] = {}
    for job, state in states:
        attempt = job.status.active_attempt
        if state is JobState.TRAINING and attempt is not None and attempt.start_time is not None:
            age = (now - _durable(job.status, attempt.start_time)).total_seconds()
            ages[(labels.queue(job),)] = max(age, ages.get((labels.queue(job),), 0.0))
    return ages


def _in_use(states: States, labels: _Labels) -> Samples:
    in_use = Tally[tuple[str, ...]]()
    for job, state in states:
        attempt = job.status.active_attempt
        if state in GPU_STATES and attempt is not None:
            in_use[labels.queue(job), labels.gpu_class(attempt)] += 1
    return in_use


def _durable(status: QLoRAJobStatus, start: datetime) -> datetime:
    """Up to when an attempt's work is safe: its last checkpoint, or its start where it has none yet."""
    return max(start, status.checkpoint.time) if status.checkpoint is not None else start


def _percentiles(values: Sequence[float]) -> list[float]:
    """The 1st to 99th percentile."""
    if not values:
        return [0.0] * 99
    return quantiles(values, n=100, method="inclusive") if len(values) > 1 else [values[0]] * 99
