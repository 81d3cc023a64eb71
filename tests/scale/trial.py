"""The trial: a thousand GPUs, thousands of jobs, and the controller as it is shipped.

`test_scale` asserts on what it returns, `benchmarks/scale` keeps it. In this order:

1. Latency: jobs are applied one by one to the idle cluster, each timed until its first pod is seen by another client.
2. The mass: all jobs are submitted to queues that are held, and prepared; as many again are suspended.
3. The wave: scheduler and nodes are stopped, the queues let go, and as many train pods as there are GPUs are created.
   Then the scheduler goes on, alone, and places those very pods. So both rates are had from the same work, each side
   with the machine to itself.
4. Everything runs to its end, urgent jobs that preempt others included, and the books are read.
"""

from __future__ import annotations

import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from orchestrator.adapters.kubernetes.api import Json, KubeApi, path_of
from orchestrator.adapters.kubernetes.objects import Parser, job_wire
from orchestrator.api.base import API_VERSION
from orchestrator.api.job import QLoRAJob, ResourcesSpec
from orchestrator.api.reasons import ConditionType, Reason
from tests.builders import ON_THE_HUB, submitted_job
from tests.cluster.control_plane import ControlPlane, control_plane
from tests.cluster.resources import furnish
from tests.scale.fleet import CLASSES, WRITERS, create_nodes, kwok_configuration, node_names
from tests.scale.observer import Observer, unfinished_pods
from tests.scale.paper_mlflow import read_runs
from tests.scale.program import ACCOUNT, Program, audit_arguments, audited_requests, controller, registry

COHORT_QUEUES, LONE_QUEUE = ("blue", "green", "red"), "tight"
QUEUES = (*COHORT_QUEUES, LONE_QUEUE)
LONE_SHARE = 25
"""One GPU in so many is the lone queue's, and so is one job in so many."""
BAD_EVERY, OUT_OF_MEMORY_EVERY = 50, 40
SUSPENDED_NAMESPACE = "team-b"
URGENT_PRIORITY = 1000
LATENCY_PAUSE_SECONDS = 0.2
LATENCY_SECONDS, PREPARE_SECONDS, WAVE_SECONDS, FINISH_SECONDS = 60.0, 400.0, 200.0, 1200.0
PAGE_JOBS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How much of everything."""

    nodes: int = 1000
    jobs: int = 5000
    suspended: int = 5000
    urgent: int = 20
    singles: int = 100
    """Jobs that are applied one by one, for their latency."""

    def scaled(self, fraction: float) -> Size:
        """The same in small."""
        return Size(**{name: max(4, int(number * fraction)) for name, number in asdict(self).items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of it: figures, and what the tests hold against the rules."""

    size: Size
    figures: Json
    jobs: list[QLoRAJob]
    """All of them, as the API server has them at the end."""
    runs: list[tuple[str, str]]
    """(job's uid, status) of every run in the registry."""
    observer: Observer
    unfinished_pods: list[str]


def run(folder: Path, size: Size, tell: Callable[[str], None] = print) -> Outcome:
    """The whole trial; `tell` hears how it goes."""
    classes = node_names(size.nodes)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kwok.yaml").write_text(kwok_configuration())
    arguments = {
        # Without a controller manager nobody takes the taint off new nodes, and nobody looks at their leases.
        "kube-apiserver": [*audit_arguments(folder), "--disable-admission-plugins=TaintNodesByCondition"],
        "kwok": ["--node-lease-duration-seconds=0"],
    }
    with control_plane(folder, "kwok", "kube-scheduler", accounts=[ACCOUNT], arguments=arguments) as plane:
        api = plane.api()
        furnish(api)
        create_nodes(api, classes)
        for name, spec in queue_specs(size.nodes, hold=False).items():
            api.create(path_of(API_VERSION, "qloraqueues"), _queue(name, spec))
        with (
            registry(folder) as port,
            controller(plane, port) as program,
            Observer(api, classes, gpu_bounds(size.nodes)) as observer,
        ):
            return Trial(plane=plane, api=api, program=program, observer=observer, size=size, tell=tell).run()


@dataclass(slots=True, kw_only=True)
class Trial:
    """One trial under way."""

    plane: ControlPlane
    api: KubeApi
    program: Program
    observer: Observer
    size: Size
    tell: Callable[[str], None]

    def run(self) -> Outcome:
        """All parts, one after another."""
        began = time.monotonic()
        figures: dict[str, object] = {"apply_to_pod": self._latency(), "decide_few_jobs": self._decisions({})}
        before, cpu_before = audited_requests(self.plane.folder), self.program.cpu_seconds()
        decided = self.program.samples()
        figures |= self._prepare()
        figures |= self._wave()
        figures |= self._finish()
        figures["requests"] = self._requests(before)
        figures["decide_many_jobs"] = self._decisions(decided)
        figures["controller_peak_mib"] = round(self.program.peak_mib(), 1)
        figures["controller_cpu_seconds_per_job"] = round((self.program.cpu_seconds() - cpu_before) / self._mass, 4)
        figures["seconds"] = round(time.monotonic() - began, 1)
        return Outcome(
            size=self.size,
            figures=figures,
            jobs=list(self._jobs()),
            runs=read_runs(self.program.registry_port),
            observer=self.observer,
            unfinished_pods=unfinished_pods(self.api),
        )

    @property
    def _mass(self) -> int:
        """Jobs that go all the way in parts 2 to 4."""
        return self.size.jobs + self.size.urgent

    # 1. latency

    def _latency(self) -> Json:
        """Milliseconds from the request that creates a job to the arrival of its first pod's event."""
        applied: dict[str, float] = {}
        for number in range(self.size.singles):
            name = f"ok-single-{number}"
            applied[name] = time.monotonic()
            self._submit(submitted_job(name, **ON_THE_HUB))
            time.sleep(LATENCY_PAUSE_SECONDS)
        self.observer.wait(
            lambda: applied.keys() <= self.observer.first_pods().keys(), LATENCY_SECONDS, "a pod for every single job"
        )
        first = self.observer.first_pods()
        found = [(first[name] - at) * 1000 for name, at in applied.items()]
        self._wait_for_ends("publish", self.size.singles, LATENCY_SECONDS)
        cuts = statistics.quantiles(found, n=100, method="inclusive")
        return self._told("apply to pod, ms", {"p50_ms": cuts[49], "p99_ms": cuts[98], "max_ms": max(found)})

    # 2. the mass

    def _prepare(self) -> Json:
        for name, spec in queue_specs(self.size.nodes, hold=True).items():
            self.api.patch(path_of(API_VERSION, "qloraqueues", name=name), {"spec": spec})
        began = time.monotonic()
        with ThreadPoolExecutor(WRITERS) as pool:
            list(pool.map(self._submit, (*suspended_jobs(self.size.suspended), *mass_jobs(self.size.jobs))))
        submitted = time.monotonic() - began
        self._wait_for_ends("prepare", self.size.singles + self.size.jobs, PREPARE_SECONDS)
        ready = self.size.singles + self.size.jobs
        self.observer.wait(lambda: len(read_runs(self.program.registry_port)) >= ready, PREPARE_SECONDS, "all runs")
        self._wait_until_quiet()
        prepared = time.monotonic() - began
        return self._told("jobs prepared", {"submit_seconds": submitted, "prepare_seconds": prepared})

    def _wait_until_quiet(self) -> None:
        """Wait until every job of the mass has a status that says that its queue is held."""
        deadline = time.monotonic() + PREPARE_SECONDS
        while sum(1 for job in self._jobs() if _is_held(job)) < self.size.jobs:
            assert time.monotonic() < deadline, "not all jobs came to wait for their queues"
            time.sleep(1.0)

    # 3. the wave

    def _wave(self) -> Json:
        gpus = min(self.size.nodes, self.size.jobs)
        before = len(self.observer.of("train"))
        self._signal(signal.SIGSTOP, "kube-scheduler", "kwok")
        self.program.process.send_signal(signal.SIGSTOP)  # or the queue that opens first would borrow all of the others
        for name, spec in queue_specs(self.size.nodes, hold=False).items():
            self.api.patch(path_of(API_VERSION, "qloraqueues", name=name), {"spec": spec})
        began = time.monotonic()
        self.program.process.send_signal(signal.SIGCONT)
        self.observer.wait(
            lambda: len(self.observer.of("train")) - before >= gpus, WAVE_SECONDS, f"{gpus} train pods at once"
        )
        wave = self.observer.of("train")[before:]
        ours = max(pod.created_at for pod in wave) - began
        self._signal(signal.SIGCONT, "kube-scheduler")
        continued = time.monotonic()
        # The controller may have decided when it had heard of one queue only, which then borrowed: such pods are gone
        # again before any node takes them, and others come in their place.
        self.observer.wait(lambda: all(pod.bound_at or pod.ended_at for pod in wave), WAVE_SECONDS, "the wave placed")
        placed = [pod.bound_at for pod in wave if pod.bound_at]
        theirs = max(placed) - continued
        self._signal(signal.SIGCONT, "kwok")
        rates = {
            "gpus": gpus,
            "admitted_per_second": len(wave) / ours,
            "scheduler_placed_per_second": len(placed) / theirs,
        }
        return {"wave": self._told("the wave", rates)}

    # 4. the end

    def _finish(self) -> Json:
        began, bound = time.monotonic(), self._bound()
        for number in range(self.size.urgent):
            kind = submitted_job(f"ok-urgent-{number}", queue=LONE_QUEUE, priority=URGENT_PRIORITY, **ON_THE_HUB)
            self._submit(kind)
        succeed = self.size.singles + self._mass - sum(1 for job in mass_jobs(self.size.jobs) if kind_of(job) == "bad")
        self._wait_for_ends("publish", succeed, FINISH_SECONDS)
        deadline = time.monotonic() + FINISH_SECONDS
        while not all(_is_over(job) for job in self._jobs() if not job.spec.suspend):
            assert time.monotonic() < deadline, "not all jobs came to their end"
            time.sleep(1.0)
        seconds = time.monotonic() - began
        rates = {"finish_seconds": seconds, "placed_per_second": (self._bound() - bound) / seconds}
        return {"under_load": self._told("under load", {**rates, "peak_gpus": self.observer.peak})}

    def _bound(self) -> int:
        return sum(1 for stage in ("prepare", "train", "publish") for pod in self.observer.of(stage) if pod.bound_at)

    # pieces

    def _submit(self, job: QLoRAJob) -> None:
        self.api.create(path_of(API_VERSION, "qlorajobs", job.metadata.namespace), job_wire(job))

    def _jobs(self) -> Iterator[QLoRAJob]:
        """All jobs as the API server has them, page by page."""
        parser, query = Parser(), dict[str, str | int](limit=PAGE_JOBS)
        while True:
            page = self.api.get(path_of(API_VERSION, "qlorajobs"), **query)
            yield from map(parser.job, page["items"])
            if not (token := page["metadata"].get("continue")):
                return
            query["continue"] = token

    def _wait_for_ends(self, stage: str, count: int, timeout_seconds: float) -> None:
        self.observer.wait(
            lambda: sum(1 for pod in self.observer.of(stage) if pod.ended_at) >= count,
            timeout_seconds,
            f"{count} {stage} pods ended",
        )

    def _signal(self, number: signal.Signals, *programs: str) -> None:
        for program in programs:
            self.plane.processes[program].send_signal(number)

    def _requests(self, before: Counter[tuple[str, str]]) -> Json:
        """Requests of the controller's account for each job of the mass, by the API server's own count.

        Suspended jobs have a namespace of their own, and what is asked about them is told apart.
        """
        spent = audited_requests(self.plane.folder) - before
        suspended = sum(count for (namespace, _), count in spent.items() if namespace == SUSPENDED_NAMESPACE)
        by_kind: Counter[str] = Counter()
        for (namespace, what), count in spent.items():
            if namespace != SUSPENDED_NAMESPACE:
                by_kind[what] += count
        return self._told(
            "requests a job",
            {
                "per_job": by_kind.total() / self._mass,
                "per_suspended_job": suspended / self.size.suspended,
                "by_kind": {what: round(count / self._mass, 3) for what, count in by_kind.most_common()},
            },
        )

    def _decisions(self, before: Mapping[str, float]) -> Json:
        """Milliseconds of a decision about everything."""
        now = self.program.samples()
        gone = {name: value - before.get(name, 0.0) for name, value in now.items() if "qlora_decide_seconds" in name}
        rounds = gone["qlora_decide_seconds_count"]
        mean = gone["qlora_decide_seconds_sum"] / max(rounds, 1) * 1000
        buckets = sorted((float(name.split("le=")[1]), count) for name, count in gone.items() if "le=" in name)
        p99 = next(bound for bound, count in buckets if count >= 0.99 * rounds) * 1000
        return self._told("decisions", {"rounds": int(rounds), "mean_ms": mean, "p99_at_most_ms": p99})

    def _told(self, what: str, figures: Json) -> Json:
        rounded = {name: round(value, 2) if isinstance(value, float) else value for name, value in figures.items()}
        self.tell(f"{what}: {rounded}")
        return rounded


# --- jobs and queues ------------------------------------------------------------------------------------------------


def mass_jobs(count: int) -> Iterator[QLoRAJob]:
    """Jobs of all classes, queues and fates."""
    for number in range(count):
        fate = "bad" if number % BAD_EVERY == 1 else "oom" if number % OUT_OF_MEMORY_EVERY == 2 else "ok"
        # The class must not hang together with the fate or the queue, or some of them would never meet.
        gpu_class = CLASSES[number // LONE_SHARE % len(CLASSES)]
        queue = LONE_QUEUE if number % LONE_SHARE == 0 else COHORT_QUEUES[number % len(COHORT_QUEUES)]
        yield submitted_job(
            f"{fate}-{number}", queue=queue, resources=ResourcesSpec(gpu_classes=(gpu_class,)), **ON_THE_HUB
        )


def suspended_jobs(count: int) -> Iterator[QLoRAJob]:
    """Jobs that are only there."""
    return (
        submitted_job(f"ok-suspended-{number}", namespace=SUSPENDED_NAMESPACE, suspend=True, **ON_THE_HUB)
        for number in range(count)
    )


def kind_of(job: QLoRAJob) -> str:
    """`ok`, `bad` or `oom`: how its stages end."""
    return job.metadata.name.partition("-")[0]


def queue_specs(nodes: int, *, hold: bool) -> dict[str, Json]:
    """A cohort of three, which owns most GPUs of each class, and a queue of its own with the rest."""
    specs: dict[str, Json] = {}
    for queue in QUEUES:
        quotas = [_quota(queue, gpu_class, nodes) for gpu_class in CLASSES]
        specs[queue] = {"quotas": quotas, "hold": hold, **({} if queue == LONE_QUEUE else {"cohort": "colors"})}
    return specs


def gpu_bounds(nodes: int) -> dict[tuple[str, str], int]:
    """The most GPUs that a queue may hold, by queue and class."""
    bounds: dict[tuple[str, str], int] = {}
    for queue in QUEUES:
        for gpu_class in CLASSES:
            quota = _quota(queue, gpu_class, nodes)
            bounds[queue, gpu_class] = quota["nominal"] + (0 if queue == LONE_QUEUE else quota["borrowingLimit"])
    return bounds


def _quota(queue: str, gpu_class: str, nodes: int) -> Json:
    capacity = sum(1 for found in node_names(nodes).values() if found == gpu_class)
    lone = max(1, capacity // LONE_SHARE)
    if queue == LONE_QUEUE:
        return {"gpuClass": gpu_class, "nominal": lone}
    share, rest = divmod(capacity - lone, len(COHORT_QUEUES))
    own = share + (rest if queue == COHORT_QUEUES[0] else 0)
    return {"gpuClass": gpu_class, "nominal": own, "borrowingLimit": own // 4}


def _queue(name: str, spec: Json) -> Json:
    return {"apiVersion": API_VERSION, "kind": "QLoRAQueue", "metadata": {"name": name}, "spec": spec}


def _is_held(job: QLoRAJob) -> bool:
    admitted = job.status.condition(ConditionType.ADMITTED)
    return admitted is not None and admitted.reason is Reason.QUEUE_HELD


def _is_over(job: QLoRAJob) -> bool:
    """Whether it has finished and nothing is held for it."""
    return (
        job.status.finish_time is not None
        and job.status.mlflow.run_status in ("FINISHED", "FAILED")
        and not job.metadata.finalizers
    )
