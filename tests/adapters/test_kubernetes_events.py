"""The recorder of events: what comes together is told together, and no faster than it may be. The API is on paper."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from orchestrator.adapters.kubernetes.api import Json
from orchestrator.adapters.kubernetes.events import Recorder
from orchestrator.api.job import QLoRAJob
from orchestrator.api.reasons import Reason
from orchestrator.core.commands import Event
from orchestrator.errors import StoreUnavailable
from tests.builders import submitted_job

ADMITTED = Event(reason=Reason.ADMITTED, message="on 24Gi")
TRAINING = Event(reason=Reason.TRAINING, message="train attempt 2")
FAILED = Event(reason=Reason.OUT_OF_MEMORY, message="out of memory", warning=True)


class PaperApi:
    """Keeps what is created, and when."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str, str, float]] = []
        """Job, reason, note and monotonic time of each event."""
        self.error: Exception | None = None

    def create(self, path: str, body: Json) -> Json:
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        self.told.append((body["regarding"]["name"], body["reason"], body["note"], time.monotonic()))
        return body


def job(name: str) -> QLoRAJob:
    return submitted_job(name, meta={"uid": f"uid-{name}"})


@contextmanager
def recorder(api: PaperApi, *, delay_seconds: float, jobs_per_second: float) -> Iterator[Recorder]:
    found = Recorder(api, "controller-0", delay_seconds=delay_seconds, jobs_per_second=jobs_per_second)
    found.start()
    try:
        yield found
    finally:
        found.close()


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def test_what_happens_to_a_job_within_the_delay_is_one_event_and_a_warning_stands_alone() -> None:
    api = PaperApi()
    with recorder(api, delay_seconds=0.2, jobs_per_second=100) as telling:
        for event in (ADMITTED, TRAINING, FAILED, ADMITTED):
            telling.record(job("medical"), event)
        assert api.told == []
        wait_for(lambda: len(api.told) == 3)
    assert [(reason, note) for _, reason, note, _ in api.told] == [
        ("Training", "on 24Gi\ntrain attempt 2"),
        ("OutOfMemory", "out of memory"),
        ("Admitted", "on 24Gi"),
    ]


def test_jobs_are_told_of_in_turn_and_no_faster_than_allowed() -> None:
    api = PaperApi()
    began = time.monotonic()
    with recorder(api, delay_seconds=0.0, jobs_per_second=20) as telling:
        for number in range(6):
            telling.record(job(f"job-{number}"), ADMITTED)
        telling.record(job("job-5"), TRAINING)
        wait_for(lambda: len(api.told) == 6)
    assert [name for name, *_ in api.told] == [f"job-{number}" for number in range(6)]
    assert api.told[-1][2] == "on 24Gi\ntrain attempt 2", "what came while the job waited its turn is told with it"
    assert api.told[-1][3] - began >= 6 / 20


def test_what_is_left_is_told_at_the_end() -> None:
    api = PaperApi()
    with recorder(api, delay_seconds=60.0, jobs_per_second=0.1) as telling:
        telling.record(job("one"), ADMITTED)
        telling.record(job("two"), ADMITTED)
    assert [name for name, *_ in api.told] == ["one", "two"]


def test_an_event_that_cannot_be_sent_is_lost_and_the_sender_goes_on() -> None:
    api = PaperApi()
    api.error = StoreUnavailable("away")
    with recorder(api, delay_seconds=0.0, jobs_per_second=100) as telling:
        telling.record(job("one"), ADMITTED)
        telling.record(job("two"), ADMITTED)
        wait_for(lambda: api.told)
    assert [name for name, *_ in api.told] == ["two"]
