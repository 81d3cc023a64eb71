"""Webhooks of jobs from outside: the real decision, the real store and real requests; stages are fakes."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from orchestrator.adapters.sqlite.store import SqliteStore
from orchestrator.adapters.webhooks.http import HttpNotifier
from orchestrator.adapters.webhooks.secrets import EnvironmentSecrets
from orchestrator.api.job import NOTIFY_FINALIZER, ObjectMeta, QLoRAJob
from orchestrator.api.notification import EVENT_MEANINGS, Webhook
from orchestrator.api.queue import QLoRAQueue, QLoRAQueueSpec
from orchestrator.api.reasons import Reason
from orchestrator.controller.loop import Controller, Ports
from orchestrator.core.commands import Command
from orchestrator.core.decide import Decider
from orchestrator.core.job.finalizer import outstanding
from orchestrator.core.snapshot import Snapshot
from orchestrator.settings import Settings
from tests.builders import submitted_job
from tests.controller.fakes import FakeRuntime, FakeTracking
from tests.webhook_receiver import SECRET, Receiver, receiving

GOES_WELL = ["job.queued", "job.admitted", "job.running", "job.trained", "job.succeeded"]
SECRETS = EnvironmentSecrets(
    {f"QLORA_WEBHOOK_{name}_SECRET": SECRET for name in ("CI", "OPS", *(f"DEAD_{n}" for n in range(8)))}
)


def webhook(receiver: Receiver, name: str = "ci") -> Webhook:
    return Webhook(name=name, url=receiver.url, events=tuple(EVENT_MEANINGS))


class World:
    def __init__(self, home: Path, **settings: object) -> None:
        fast = {
            "command_backoff_base_seconds": 0.01,
            "tick_seconds": 0.1,
            "tick_minimum_seconds": 0.0,
            "webhook_allowed_hosts": "127.0.0.1",
            "webhook_backoff_base_seconds": 0.05,
            "webhook_backoff_max_seconds": 0.2,
            "webhook_timeout_seconds": 5.0,
            "cpu_stages_limit": 64,
            **settings,
        }
        self.settings = Settings.model_validate({"home": home, **fast})
        self.store = SqliteStore(self.settings)
        self.runtime = FakeRuntime()
        self.start()

    def start(self) -> None:
        """A controller that remembers nothing of those before."""
        notifier = HttpNotifier(self.settings, SECRETS)
        ports = Ports(store=self.store, runtime=self.runtime, tracking=FakeTracking(), notifier=notifier)
        self.controller = Controller(self.settings, ports, Decider().decide)

    def submit(self, name: str = "medical", webhooks: Sequence[Webhook] = (), namespace: str = "team-a") -> None:
        job = submitted_job(name)
        spec = job.spec.model_copy(update={"notifications": tuple(webhooks)})
        meta = job.metadata.model_copy(update={"namespace": namespace})
        self.store.create_job(job.model_copy(update={"spec": spec, "metadata": meta}))

    def job(self, name: str = "medical", namespace: str = "team-a") -> QLoRAJob:
        return self.store.get_job(namespace, name)

    def is_finished(self, name: str = "medical", namespace: str = "team-a") -> bool:
        return self.job(name, namespace).status.finish_time is not None

    def is_settled(self, name: str = "medical") -> bool:
        job = self.job(name)
        return self.is_finished(name) and not job.metadata.finalizers

    def rounds(self, until: Callable[[], object], seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < deadline, [job.status.summary for job in self.store.list_jobs()]
            self.controller.round()
            self.runtime.finish()
            time.sleep(0.002)


def test_a_receiver_that_was_down_for_a_while_gets_every_event_afterwards(tmp_path: Path) -> None:
    world = World(tmp_path)
    with receiving() as gone:
        port = int(gone.url.split(":")[2].split("/")[0])
    world.submit(webhooks=[webhook(gone)])
    world.rounds(world.is_finished)
    world.rounds(lambda: any("cannot be reached" in each.failure for each in outstanding(world.job().status)))
    assert [each.event for each in outstanding(world.job().status)] == GOES_WELL
    world.rounds(lambda: world.job().metadata.finalizers == (NOTIFY_FINALIZER,))
    world.start()
    with receiving(address=("127.0.0.1", port)) as receiver:
        world.rounds(world.is_settled)
        assert sorted(receiver.events()) == sorted(GOES_WELL)
        uid = world.job().metadata.uid
        assert {identity for identity, _ in receiver.told} == {f"{uid}_{number}" for number in range(1, 6)}
    assert outstanding(world.job().status) == ()


def test_killed_between_the_delivery_and_its_record_it_tells_the_same_again(tmp_path: Path) -> None:
    """The controller never records a delivery before it is replaced, as if it were killed right after each."""
    world = World(tmp_path)
    with receiving() as receiver:
        world.submit(webhooks=[webhook(receiver)])
        world.rounds(lambda: outstanding(world.job().status))
        world.rounds(lambda: receiver.told)
        for _ in range(3):
            before = len(receiver.told)
            world.start()
            assert outstanding(world.job().status), "it is not on record that it has been told"
            world.controller.round()
            deadline = time.monotonic() + 10
            while len(receiver.told) == before:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        world.rounds(world.is_settled)
        by_id = {identity: body["type"] for identity, body in receiver.told}
        assert sorted(by_id.values()) == sorted(GOES_WELL)
        counts = Counter(identity for identity, _ in receiver.told)
        assert max(counts.values()) >= 3
        assert all(body["type"] == by_id[identity] for identity, body in receiver.told)


class KilledError(BaseException):
    """The controller is killed."""


def test_killed_after_any_command_it_misses_nothing(tmp_path: Path) -> None:
    """A new controller for each round, which carries out one command more than the last one did, and then none."""
    world = World(tmp_path)
    with receiving() as receiver:
        world.submit(webhooks=[webhook(receiver)])
        deadline = time.monotonic() + 30
        turn = 0
        while not world.is_settled():
            assert time.monotonic() < deadline, world.job().status.summary
            turn += 1
            decider, kept = Decider(), turn % 4

            def some(snapshot: Snapshot, decider: Decider = decider, kept: int = kept) -> tuple[Command, ...]:
                return decider.decide(snapshot)[: kept or None]

            ports = Ports(
                store=world.store,
                runtime=world.runtime,
                tracking=FakeTracking(),
                notifier=HttpNotifier(world.settings, SECRETS),
            )
            controller = Controller(world.settings, ports, some)
            controller.round()
            time.sleep(0.02)
            controller.round()
            world.runtime.finish()
        assert {body["type"] for _, body in receiver.told} == set(GOES_WELL)


def test_a_receiver_that_hangs_delays_nobody_else(tmp_path: Path) -> None:
    """One tenant's webhooks hang, on many addresses; another tenant's job and what is told of it do not notice."""
    world = World(tmp_path, webhook_workers=2)
    with receiving() as hanging, receiving() as receiver:
        hanging.hangs.set()
        dead = [Webhook(name=f"dead-{n}", url=f"{hanging.url}&n={n}", events=tuple(EVENT_MEANINGS)) for n in range(8)]
        for number in range(5):
            world.submit(f"other-{number}", dead, namespace="team-b")
        world.rounds(lambda: hanging.requests)
        world.submit(webhooks=[webhook(receiver)])
        longest = 0.0
        deadline = time.monotonic() + 20
        while not world.is_settled():
            assert time.monotonic() < deadline
            begun = time.monotonic()
            world.controller.round()
            longest = max(longest, time.monotonic() - begun)
            world.runtime.finish()
        assert receiver.events() == GOES_WELL
        assert longest < 2.0, "the loop waits for no webhook"
        assert hanging.told == []


def test_what_a_receiver_never_takes_holds_up_nothing_else(tmp_path: Path) -> None:
    """It answers 500 to the first thing that it is told, for ever; all others arrive."""
    world = World(tmp_path)
    with receiving() as receiver:
        receiver.refuses = "job.queued"
        world.submit(webhooks=[webhook(receiver)])
        world.rounds(lambda: "job.succeeded" in receiver.events())
        assert receiver.events() == GOES_WELL[1:]
        world.rounds(lambda: len(outstanding(world.job().status)) == 1)
        (left,) = outstanding(world.job().status)
        assert (left.event, left.failure) == ("job.queued", "answered 500")


def test_what_is_given_up_is_an_event_and_fails_no_job(tmp_path: Path) -> None:
    world = World(tmp_path, webhook_limit_seconds=1)
    with receiving() as receiver:
        receiver.status = 503
        world.submit(webhooks=[webhook(receiver)])
        world.rounds(world.is_settled)
    status = world.job().status
    assert status.summary.startswith("Succeeded")
    assert status.notifications is not None
    assert (status.notifications.outstanding, status.notifications.undelivered) == ((), 5)
    said = [
        e.message
        for _, e in world.store.list_events("team-a", "medical")
        if e.reason is Reason.NOTIFICATION_UNDELIVERED
    ]
    assert len(said) == 5
    assert all("answered 503" in message for message in said)


def test_a_queue_tells_of_all_its_jobs_with_the_services_secret(tmp_path: Path) -> None:
    world = World(tmp_path)
    with receiving() as receiver:
        spec = QLoRAQueueSpec(notifications=(Webhook(name="ops", url=receiver.url),))
        world.store.apply_queue(QLoRAQueue(metadata=ObjectMeta(name="default"), spec=spec))
        for name in ("first", "second"):
            world.submit(name)
        world.rounds(lambda: world.is_settled("first") and world.is_settled("second"))
        assert sorted(body["data"]["name"] for _, body in receiver.told) == ["first", "second"]
        assert {body["type"] for _, body in receiver.told} == {"job.succeeded"}


def test_a_job_that_is_deleted_is_told_as_cancelled_and_then_goes(tmp_path: Path) -> None:
    world = World(tmp_path)
    with receiving() as receiver:
        world.submit(webhooks=[webhook(receiver)])
        deadline = time.monotonic() + 20
        while "job.running" not in receiver.events():
            assert time.monotonic() < deadline
            world.controller.round()
            if not any("train" in key for key in world.runtime.stages):
                world.runtime.finish()
        world.store.delete_job("team-a", "medical")
        while world.store.list_jobs():
            assert time.monotonic() < deadline
            world.controller.round()
            world.runtime.finish(exit_code=85)
        assert "job.cancelled" in receiver.events()


def test_no_secret_is_anywhere_but_in_the_environment(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    world = World(tmp_path)
    with receiving() as receiver:
        receiver.status = 503
        world.submit(webhooks=[webhook(receiver)])
        world.rounds(lambda: any(each.failure for each in outstanding(world.job().status)))
        receiver.status = 204
        world.rounds(world.is_settled)
    needle = SECRET.removeprefix("whsec_")
    assert needle not in caplog.text
    with sqlite3.connect(world.settings.database) as database:
        rows = (
            database.execute("SELECT body FROM objects").fetchall()
            + database.execute("SELECT message FROM events").fetchall()
        )
    database.close()
    assert rows
    assert not any(needle in row[0] for row in rows)


def test_workers_are_a_bounded_number_of_threads(tmp_path: Path) -> None:
    before = threading.active_count()
    World(tmp_path, webhook_workers=3)
    workers = [thread for thread in threading.enumerate() if thread.name.startswith("webhook worker")]
    assert threading.active_count() - before >= 3
    assert all(thread.daemon for thread in workers)
