"""What webhooks are told of a job: which events, for how long it is tried, and what waits for it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.api.job import NOTIFY_FINALIZER, QLoRAJob
from orchestrator.api.notification import EVENT_MEANINGS, MAX_OUTSTANDING, Notification, NotificationsStatus, Webhook
from orchestrator.api.reasons import Reason
from orchestrator.core.commands import DeleteJob, SendNotification, WriteStatus
from orchestrator.core.decide import decide
from orchestrator.core.job.finalizer import finalizers_with, is_at_rest
from orchestrator.core.snapshot import DeliveryFact, Policy, Snapshot
from tests.builders import NOW, POLICY, after, gpus, make_job, make_queue, prepared_status
from tests.core.world import World

EVERYTHING = Webhook(name="ci", url="https://ci.example.com/hook", events=tuple(EVENT_MEANINGS))
ENDS = Webhook(name="ops", url="https://ops.example.com/hook")


def make_world(**queue: object) -> World:
    return World(policy=POLICY, gpu_classes=list(gpus(_24Gi=1)), queues=(make_queue("default", **queue),))


def run(world: World, passes: int = 40) -> None:
    for _ in range(passes):
        world.pass_once()
        for key in world.live_stages():
            world.run_stage(key)
        world.pass_time(20)


def told(world: World, key: str = "default/job") -> list[str]:
    return [event for of, _, event in world.told if of == key]


def outstanding_job(*notifications: Notification, finished: bool = True, **fields: object) -> QLoRAJob:
    status = prepared_status(run_id=None).model_copy(
        update={
            "notifications": NotificationsStatus(total=len(notifications), outstanding=notifications),
            "finish_time": NOW if finished else None,
            "observed_generation": 1,
        }
    )
    return make_job(notifications=(ENDS,), status=status, finalizers=(NOTIFY_FINALIZER,), **fields)


def note(number: int = 1, age_seconds: float = 0, recipient: str = "job/ops", failure: str = "") -> Notification:
    return Notification(
        number=number,
        event="job.failed",
        time=after(-age_seconds),
        reason=Reason.USER_ERROR,
        recipients=(recipient,),
        failure=failure,
    )


def decided(job: QLoRAJob, *facts: DeliveryFact, policy: Policy = POLICY) -> tuple[WriteStatus | None, list[str]]:
    """What is written of the job, and to whom what is sent."""
    snapshot = Snapshot(now=NOW, jobs=(job,), deliveries={job.metadata.uid: facts}, policy=policy)
    commands = decide(snapshot)
    write = next((c for c in commands if isinstance(c, WriteStatus)), None)
    return write, [c.recipient for c in commands if isinstance(c, SendNotification)]


def fact(outcome: str, message: str = "", number: int = 1) -> DeliveryFact:
    return DeliveryFact(number=number, recipient="job/ops", outcome=outcome, message=message)  # pyright: ignore


def test_a_job_that_goes_well_is_told_step_by_step_in_order() -> None:
    world = make_world()
    world.submit(make_job(notifications=(EVERYTHING,)))
    run(world)
    assert told(world) == ["job.queued", "job.admitted", "job.running", "job.trained", "job.succeeded"]
    job = world.jobs["default/job"]
    assert job.metadata.finalizers == ()
    assert job.status.notifications == NotificationsStatus(total=5)


def test_a_webhook_hears_by_default_how_jobs_end() -> None:
    world = make_world(notifications=(ENDS,))
    world.submit(make_job())
    run(world)
    assert told(world) == ["job.succeeded"]


def test_a_job_of_which_nobody_is_told_costs_nothing() -> None:
    world = make_world()
    world.submit(make_job())
    run(world)
    assert world.jobs["default/job"].status.notifications is None
    assert "notifications" not in world.jobs["default/job"].status.to_wire()


def test_a_queue_that_is_not_for_the_job_is_told_nothing_of_it() -> None:
    world = make_world(notifications=(EVERYTHING,), namespaces=("team-b",))
    world.submit(make_job())
    run(world, 5)
    world.cancel("default/job")
    run(world, 5)
    assert world.jobs["default/job"].status.finish_time is not None
    assert world.told == []


def test_a_job_that_is_moved_is_told_so() -> None:
    world = make_world()
    world.policy = replace(POLICY, minimum_run_seconds=0, preemption_cooldown_seconds=0)
    world.submit(make_job(notifications=(EVERYTHING,)))
    while "job.running" not in told(world):
        run(world, 1)
    world.submit(make_job("urgent", priority=5))
    while not world.stopping:
        world.pass_once()
        for key in world.live_stages():
            if "urgent" in key:
                world.run_stage(key)
        world.pass_time(20)
    run(world, 80)
    events = told(world)
    assert "job.preempted" in events, events
    assert events[-1] == "job.succeeded"


def test_what_is_sent_stays_on_record_until_it_is_confirmed() -> None:
    job = outstanding_job(note())
    assert decided(job) == (None, ["job/ops"])
    write, sent = decided(job, fact("delivered"))
    assert sent == ["job/ops"], "the workers know that it has been told"
    assert write is not None
    assert write.status.notifications == NotificationsStatus(total=1)


def test_a_failure_is_on_record_and_nothing_changes_while_it_stays_the_same() -> None:
    write, _ = decided(outstanding_job(note()), fact("failed", "answered 503"))
    assert write is not None
    assert write.status.notifications is not None
    assert [n.failure for n in write.status.notifications.outstanding] == ["answered 503"]
    write, sent = decided(outstanding_job(note(failure="answered 503")), fact("failed", "answered 503"))
    assert (write, sent) == (None, ["job/ops"])


@pytest.mark.parametrize(
    ("job", "facts"),
    [
        (outstanding_job(note(age_seconds=POLICY.webhook_limit_seconds, failure="answered 503")), ()),
        (outstanding_job(note()), (fact("refused", "answered 410, Gone: it wants no more"),)),
    ],
)
def test_what_is_given_up_is_said_and_fails_nobody(job: QLoRAJob, facts: tuple[DeliveryFact, ...]) -> None:
    write, _ = decided(job, *facts)
    assert write is not None
    assert write.status.notifications == NotificationsStatus(total=1, undelivered=1)
    assert write.status.conditions == job.status.conditions
    (event,) = [e for e in write.events if e.reason is Reason.NOTIFICATION_UNDELIVERED]
    assert event.warning
    assert event.message.startswith("job.failed is given up for job/ops: answered ")


def test_more_than_a_status_keeps_is_given_up_oldest_first() -> None:
    many = tuple(note(number) for number in range(1, MAX_OUTSTANDING + 1))
    job = outstanding_job(*many, finished=False, cancelled=True)
    write, _ = decided(job)
    assert write is not None
    kept = write.status.notifications
    assert kept is not None
    assert [n.number for n in kept.outstanding] == list(range(2, MAX_OUTSTANDING + 2))
    assert (kept.outstanding[-1].event, kept.undelivered) == ("job.cancelled", 1)
    assert any("job.failed is given up for job/ops" in e.message for e in write.events)


def test_a_job_is_not_removed_before_its_end_is_told_nor_kept_for_ever() -> None:
    job = outstanding_job(note(), deleted=True, ttl_seconds_after_finished=0)
    assert not is_at_rest(job)
    write, sent = decided(job)
    assert sent == ["job/ops"]
    assert write is not None
    assert write.status.release_since == NOW
    waiting = job.model_copy(
        update={"status": write.status.model_copy(update={"release_since": after(-POLICY.release_limit_seconds)})}
    )
    write, _ = decided(waiting)
    assert write is not None
    assert write.status.notifications == NotificationsStatus(total=1, undelivered=1)
    assert finalizers_with(waiting, write.status) == ()


def test_a_job_that_waits_and_is_deleted_is_told_as_cancelled() -> None:
    world = make_world()
    world.gpu_classes = []
    world.submit(make_job(notifications=(EVERYTHING,)))
    run(world, 4)
    job = world.jobs["default/job"]
    assert job.metadata.finalizers == (NOTIFY_FINALIZER,)
    assert not is_at_rest(job)
    deleted = job.metadata.model_copy(update={"deletion_timestamp": world.now})
    world.jobs["default/job"] = job.model_copy(update={"metadata": deleted})
    world.webhooks_away = True
    run(world, 4)
    assert "default/job" in world.jobs
    world.webhooks_away = False
    run(world, 4)
    assert told(world)[-1] == "job.cancelled"
    assert "default/job" not in world.jobs


def test_a_webhook_that_nobody_names_any_more_is_settled_by_the_workers() -> None:
    job = outstanding_job(note(recipient="queue/gone"))
    snapshot = Snapshot(now=NOW, jobs=(job,), policy=POLICY)
    (command,) = [c for c in decide(snapshot) if isinstance(c, SendNotification)]
    assert command.webhook is None


def test_a_webhook_that_is_refused_fails_the_job_before_anything_of_it_is_read() -> None:
    poisoned = Webhook(name="ci", url="https://169.254.169.254/latest/meta-data")
    write, sent = decided(make_job(notifications=(poisoned,)))
    assert write is not None
    assert write.status.summary.startswith("UserError: spec.notifications[0].url: https://169.254.169.254/")
    assert sent == []
    allowed = replace(POLICY, webhook_allowed_hosts="169.254.169.254")
    write, _ = decided(make_job(notifications=(poisoned,)), policy=allowed)
    assert write is None or write.status.finish_time is None


def test_nothing_is_deleted_while_something_is_outstanding() -> None:
    job = outstanding_job(note(), ttl_seconds_after_finished=0)
    assert not [c for c in decide(Snapshot(now=NOW, jobs=(job,), policy=POLICY)) if isinstance(c, DeleteJob)]
