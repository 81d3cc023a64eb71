"""What commands print on terminals of 80 and 120 columns and into a pipe, to the letter.

The texts are in `tests/cli/screens`, for people to read.

QLORA_WRITE_SCREENS=1 python -m pytest tests/cli/test_screens.py      writes them anew
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from orchestrator.api.job import CheckpointStatus, Condition, EvictionBudgetStatus, QLoRAJob, QLoRAJobStatus
from orchestrator.api.notification import Notification, NotificationsStatus, Webhook
from orchestrator.api.queue import QLoRAQueue
from orchestrator.api.reasons import ConditionType, Reason
from orchestrator.api.results import ProgressReport
from orchestrator.cli.console import THEME
from orchestrator.cli.describe import show_explanation, show_job, show_queue, show_simulation
from orchestrator.cli.follow import live_view
from orchestrator.cli.output import print_columns
from orchestrator.cli.plan_view import show_plan
from orchestrator.cli.tables import job_table, queue_table, simulation_table
from orchestrator.core.commands import Event
from orchestrator.core.explain import explain
from orchestrator.core.forecast import Expectation
from orchestrator.core.job.conditions import summarize
from orchestrator.core.job.state_machine import state_of
from orchestrator.core.simulate import simulate
from orchestrator.core.snapshot import Snapshot
from orchestrator.sdk import Client
from orchestrator.sdk.explanation import Explanation
from orchestrator.sdk.simulation import what_if
from orchestrator.sizing.hardware import GpuClass, cpu_class, gpu_class
from tests.builders import (
    LLAMA_3_8B,
    NOW,
    after,
    make_attempt,
    make_job,
    make_queue,
    prepared_status,
    running_status,
    snapshot,
    stage,
)
from tests.sdk.paper_service import PaperService, job_document, service_that_is_up

SCREENS = Path(__file__).with_name("screens")
WRITE = "QLORA_WRITE_SCREENS" in os.environ
GPUS = (gpu_class("24Gi", capacity=2), gpu_class("48Gi", capacity=1))
CPU = (cpu_class(64 << 30, capacity=1),)


LINE_7 = "line 7 of train.jsonl is not JSON: Expecting ',' delimiter, column 40; mend it, or leave the line out"
Draw = Callable[[PaperService, Console], None]


def condition(kind: ConditionType, status: Any, reason: Reason, seconds: float, message: str) -> Condition:
    return Condition(type=kind, status=status, reason=reason, message=message, last_transition_time=after(seconds))


def progress_report(**fields: Any) -> ProgressReport:
    figures = {"loss": 2.5, "eval_loss": 2.25, "tokens_per_second": 812.0, "eta_seconds": 1400.0}
    if fields["step"] == 0:
        figures = {}
    return ProgressReport.model_validate({"stage": "train", "time": NOW, "detail": "training", **figures, **fields})


def told(job: QLoRAJob) -> QLoRAJob:
    """The job with the summary that a controller writes into its status."""
    return job.model_copy(update={"status": job.status.model_copy(update={"summary": summarize(job.status)})})


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PaperService:
    """A service that counts as up."""
    return service_that_is_up(tmp_path, monkeypatch)


def plan_on(classes: tuple[GpuClass, ...], *, records: int = 0, **spec: object) -> Draw:
    """`qlora plan` of a job of so many records where these classes are."""
    said = [{"role": role, "content": "What lowers a fever? " * 40} for role in ("user", "assistant")]

    def draw(service: PaperService, console: Console) -> None:
        service.classes = classes
        (service.folder / "train.jsonl").write_text(f"{json.dumps({'messages': said})}\n" * records)
        settings = service.settings.model_copy(update={"gpu_prices": "24Gi=0.5,48Gi=0.8"})
        show_plan(console, Client(settings, connection=service.connection).plan(job_document(**spec)))

    return draw


SUCCEEDED = make_job(
    "medical-es",
    age_seconds=4000,
    status=prepared_status(
        LLAMA_3_8B,
        run_id="0a1b2c3d4e5f60718293a4b5c6d7e8f9",
        attempts=(
            make_attempt("prepare", 1, start_time=after(-3990), finish_time=after(-3960), exit_code=0),
            make_attempt(
                "train",
                2,
                start_time=after(-3900),
                finish_time=after(-2000),
                exit_code=85,
                reason=Reason.PREEMPTED,
                message="preempted for team-a/urgent at step 120 of 400; its checkpoint is durable",
            ),
            make_attempt("train", 3, start_time=after(-1900), finish_time=after(-120), exit_code=0),
            make_attempt("publish", 4, start_time=after(-100), finish_time=after(-60), exit_code=0),
        ),
        conditions=(
            condition(ConditionType.PREPARED, "True", Reason.PREPARED, -3960, "600 records in 64 sequences"),
            condition(
                ConditionType.FINISHED, "True", Reason.SUCCEEDED, -60, "published as models:/default-medical-es/3"
            ),
        ),
        checkpoint=CheckpointStatus(step=400, uri="file:///store/default/medical-es/uid/checkpoints/400", time=NOW),
        evictions={"Preempted": 1},
        eviction_budget=EvictionBudgetStatus(times=(after(-2050),), left=1, renew_time=after(86_400 - 2050)),
        gpu_seconds=3680.0,
        adapter_uri="file:///home/ada/.local/share/qlora-orchestrator/store/default/medical-es/adapter",
        adapter_digest="sha256:" + "1f2e3d4c" * 8,
        finish_time=after(-60),
    ),
)
AWAITING = SUCCEEDED.model_copy(
    update={
        "status": SUCCEEDED.status.model_copy(
            update={
                "conditions": (
                    *SUCCEEDED.status.conditions,
                    condition(
                        ConditionType.PROMOTED,
                        "False",
                        Reason.AWAITING_APPROVAL,
                        -60,
                        "the alias champion stays with version 2: it waits for approval (qlora promote medical-es): "
                        "f1 over the holder is +0.034 and at least +0.0052, with 95% confidence, which reaches 0",
                    ),
                )
            }
        )
    }
)
TRAINING = make_job(
    "notes",
    age_seconds=900,
    priority=9,
    status=running_status(ran_seconds=600, progress=progress_report(step=120, steps=400)),
)
LOADING = make_job(
    "notes",
    age_seconds=90,
    status=running_status(
        ran_seconds=30, progress=progress_report(step=0, steps=400, loss=None, detail="loading weights: 40 %")
    ),
)
WAITING = make_job(
    "sentences-of-a-long-name",
    age_seconds=3000,
    priority=5,
    queue="research",
    status=prepared_status(
        conditions=(
            condition(
                ConditionType.ADMITTED,
                "False",
                Reason.WAITING_FOR_GPU,
                -100,
                "1 of 1 24Gi GPUs are in use; waits for one to come free, or add one; first in line",
            ),
        )
    ),
)
HELD = make_job(
    "held",
    age_seconds=50,
    queue="research",
    status=prepared_status(
        conditions=(
            condition(
                ConditionType.ADMITTED,
                "False",
                Reason.QUEUE_HELD,
                -40,
                "queue research is held, until: qlora queue release research",
            ),
        )
    ),
)
FAILED = make_job(
    "broken",
    age_seconds=70,
    status=QLoRAJobStatus(
        attempts=(
            make_attempt(
                "prepare",
                1,
                start_time=after(-60),
                finish_time=after(-50),
                exit_code=80,
                reason=Reason.USER_ERROR,
                message=LINE_7,
            ),
        ),
        attempts_total=1,
        conditions=(condition(ConditionType.FINISHED, "True", Reason.USER_ERROR, -50, LINE_7),),
        finish_time=after(-50),
    ),
)
RESEARCH = make_queue("research", {"24Gi": (2, 1), "48Gi": 1}, cohort="lab", weight=3, namespaces=("team-a", "default"))
EVENTS = (
    ("2026-01-01T11:59:05Z", Event(reason=Reason.PREPARING, message="attempt 1 is started")),
    ("2026-01-01T11:59:10Z", Event(reason=Reason.USER_ERROR, message=LINE_7, warning=True)),
)
JOBS = [FAILED, HELD, told(SUCCEEDED), TRAINING, WAITING]


TOLD = FAILED.model_copy(
    update={
        "spec": FAILED.spec.model_copy(
            update={"notifications": (Webhook(name="ci", url="https://ci.example.com/hooks/qlora"),)}
        ),
        "status": FAILED.status.model_copy(
            update={
                "notifications": NotificationsStatus(
                    total=2,
                    outstanding=(
                        Notification(
                            number=2,
                            event="job.failed",
                            time=after(-50),
                            reason=Reason.USER_ERROR,
                            message=LINE_7,
                            recipients=("job/ci", "queue/operators"),
                            failure="answered 503",
                        ),
                    ),
                    undelivered=1,
                )
            }
        ),
    }
)


def described(job: QLoRAJob, *events: tuple[str, Event]) -> Draw:
    """`qlora describe` of a job."""
    return lambda _, console: show_job(console, told(job), events, NOW)


def listed(**options: bool) -> Draw:
    """`qlora get`."""
    return lambda _, console: print_columns(console, job_table(map(told, JOBS), NOW, **options))


def explained(job: QLoRAJob, *others: QLoRAJob, queues: tuple[QLoRAQueue, ...] = ()) -> Draw:
    """`qlora explain` of a job beside others."""
    classes = (gpu_class("24Gi", 1),)
    seen = snapshot(job, *others, queues=queues, stages=tuple(map(stage, others)), gpu_classes=classes)

    def draw(_: PaperService, console: Console) -> None:
        sentences = explain(seen, job.key)
        show_explanation(console, Explanation(job=job.key, state=state_of(job.status), sentences=sentences))

    return draw


def simulated(*changes: str) -> Draw:
    """`qlora simulate` of two that train, two that wait and one that is not prepared."""
    left = (progress_report(step=120, steps=400), progress_report(step=300, steps=400, eta_seconds=300.0))
    heard = make_attempt(number=2, start_time=after(-600), created_time=after(-600), progress_time=NOW)
    training = [
        make_job(f"notes-{n}", status=prepared_status(attempts=(heard,), attempts_total=2, progress=report))
        for n, report in enumerate(left)
    ]
    waits = [
        make_job(name, age_seconds=age, status=prepared_status(LLAMA_3_8B), gpu_classes=("24Gi",))
        for name, age in (("medical-es-of-a-long-name", 60), ("letters", 30))
    ]
    held = make_job("held", age_seconds=20, queue="research", status=prepared_status())
    seen = snapshot(
        *training,
        *waits,
        held,
        make_job("fresh"),
        queues=(make_queue("research", hold=True),),
        stages=tuple(map(stage, training)),
        gpu_classes=(gpu_class("24Gi", 2),),
    )
    return lambda _, console: show_simulation(console, what_if(seen, changes, (), ()))


DRAWN: dict[str, Draw] = {
    "plan": plan_on(GPUS, records=200),
    "plan-few": plan_on(GPUS, records=60, dataset={"source": "file://./train.jsonl", "evalFraction": "0.1"}),
    "plan-long": plan_on(GPUS, records=20_000, training={"sequenceLength": 32768}),
    "plan-cpu": plan_on(CPU),
    "get": listed(),
    "get-wide": listed(wide=True, namespaces=True),
    "get-queues": lambda _, console: print_columns(console, queue_table([RESEARCH, make_queue("default")], JOBS, NOW)),
    "describe": described(SUCCEEDED),
    "describe-awaiting": described(AWAITING),
    "describe-failed": described(FAILED, *EVENTS),
    "describe-told": described(TOLD),
    "describe-waiting": described(WAITING),
    "describe-queue": lambda _, console: show_queue(console, RESEARCH, [told(HELD), told(WAITING)], NOW),
    "explain": explained(WAITING, TRAINING, queues=(make_queue("research"),)),
    "explain-held": explained(HELD, queues=(make_queue("research", hold=True),)),
    "simulate": simulated("24Gi=+1"),
    "simulate-fewer": simulated("24Gi=-1"),
    "live-loading": lambda _, console: console.print(live_view(LOADING, NOW)),
    "live-training": lambda _, console: console.print(live_view(TRAINING, NOW)),
}


@pytest.mark.parametrize("columns", [80, 120, None], ids=["80", "120", "pipe"])
@pytest.mark.parametrize("name", list(DRAWN))
def test_a_screen_is_as_it_was_read(service: PaperService, name: str, columns: int | None) -> None:
    console = Console(
        theme=THEME,
        file=io.StringIO(),
        width=columns or 80,
        force_terminal=columns is not None,
        color_system=None,
        highlight=False,
        soft_wrap=columns is None,
    )
    DRAWN[name](service, console)
    assert isinstance(console.file, io.StringIO)
    drawn = re.sub("[⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏]", "⠋", console.file.getvalue())  # where a spinner stands is the clock's
    text = "\n".join(line.rstrip() for line in drawn.splitlines()) + "\n"
    path = SCREENS / f"{name}-{columns or 'pipe'}.txt"
    if WRITE:
        path.write_text(text)
    if columns is not None:
        assert max(map(cell_len, text.splitlines())) <= columns, "a terminal would wrap it"
    assert text == path.read_text()


def test_no_screen_is_kept_that_nothing_draws() -> None:
    drawn = {f"{name}-{columns}.txt" for name in DRAWN for columns in ("80", "120", "pipe")}
    assert {path.name for path in SCREENS.iterdir()} == drawn


def test_what_was_not_looked_at_is_no_change() -> None:
    ready = prepared_status(LLAMA_3_8B)
    jobs = [make_job(f"job-{n}", status=ready, gpu_classes=("24Gi",)) for n in range(4)]
    limited = snapshot(*jobs, queues=(make_queue("default", {"24Gi": 0}),), gpu_classes=(gpu_class("24Gi", 1),))
    free = replace(limited, queues=())

    def changes(present: Snapshot, changed: Snapshot, most_events: int) -> list[str]:
        table = simulation_table(simulate(present, changed, most_events=most_events), 100)
        return [row[-1].text for row in table.rows]

    assert changes(limited, free, 100) == ["starts"] * 4
    assert changes(free, limited, 100) == ["not expected"] * 4
    assert changes(free, limited, 1) == ["not expected"] * 2 + [""] * 2, "the last two start later than was looked"
    cut = simulate(free, free, most_events=2)
    shorter = replace(cut, jobs=[replace(each, before=Expectation()) for each in cut.jobs])
    longer = replace(cut, jobs=[replace(each, after=Expectation()) for each in cut.jobs])
    for found in (shorter, longer):
        assert {row[-1].text for row in simulation_table(found, 100).rows} == {""}
