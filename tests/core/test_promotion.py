"""A person's request for the alias of spec.tracking.promote: when it is carried out, and when it is refused."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from orchestrator.api.job import (
    PROMOTE_ANNOTATION,
    RELEASE_FINALIZER,
    Condition,
    MlflowStatus,
    PromoteSpec,
    QLoRAJob,
    QLoRAJobStatus,
    TrackingSpec,
)
from orchestrator.api.promotion import moved, stays
from orchestrator.api.reasons import ConditionType, Reason, Refusal
from orchestrator.core.commands import DeleteJob, Event, FinishRun, PromoteVersion, WriteStatus
from orchestrator.core.decide import Decider, decide
from orchestrator.core.job.promotion import FORCEABLE, PromotionRequest, answer_to, owed_promotion, request_of
from orchestrator.core.snapshot import RunFact
from tests.builders import NOW, make_job, snapshot

OVER_HOLDER = {"metric": "f1", "over": "holder", "atLeast": "0"}
APPROVE, FORCE = PromotionRequest(), PromotionRequest(forced="the holder speaks Latin")
FIGURES = "f1 over the holder is +0.1, which reaches 0"


def published(reason: Reason | None, request: str | None = None, **changes: Any) -> QLoRAJob:
    """A job that has succeeded, with what its condition Promoted says, if anything, and what is asked of it."""
    status = "True" if reason is Reason.PROMOTED else "False"
    found = {ConditionType.FINISHED: ("True", Reason.SUCCEEDED, "published as models:/job/7")}
    if reason is not None:
        found[ConditionType.PROMOTED] = (status, reason, FIGURES)
    conditions = tuple(
        Condition.model_validate(
            {"type": kind, "status": state, "reason": why, "message": words, "lastTransitionTime": NOW}
        )
        for kind, (state, why, words) in found.items()
    )
    job = make_job(
        status=QLoRAJobStatus(
            observed_generation=1,
            conditions=conditions,
            mlflow=MlflowStatus(run_id="r", registered_model="job", model_version="7", run_status="FINISHED"),
            finish_time=NOW,
            summary="Succeeded: published as models:/job/7",
        ),
        **changes,
    )
    promote = PromoteSpec.model_validate({"alias": "champion", "approval": "manual", "when": [OVER_HOLDER]})
    spec = job.spec.model_copy(update={"tracking": TrackingSpec(promote=promote)})
    annotations = {} if request is None else {PROMOTE_ANNOTATION: request}
    metadata = job.metadata.model_copy(update={"annotations": annotations})
    return job.model_copy(update={"metadata": metadata, "spec": spec})


def commands(job: QLoRAJob, fact: RunFact | None = None) -> tuple[object, ...]:
    return decide(snapshot(job, runs=() if fact is None else (fact,)))


@pytest.mark.parametrize(
    ("value", "request_"),
    [
        ("true", APPROVE),
        (FORCE.annotation, FORCE),
        ("forced:", None),
        ("forced:   ", None),
        ("yes", None),
        ("", None),
        ("forced: " + "x" * 2000, PromotionRequest(forced="x" * 500)),
    ],
)
def test_an_annotation_approves_or_forces_or_says_nothing(value: str, request_: PromotionRequest | None) -> None:
    assert request_of(published(Reason.AWAITING_APPROVAL, value)) == request_


def test_a_request_is_carried_out_once_and_told_with_the_figures() -> None:
    asked = published(Reason.AWAITING_APPROVAL, "true")
    assert commands(published(Reason.AWAITING_APPROVAL)) == ()
    promote = PromoteVersion(job=asked, forced="")
    assert commands(asked) == (promote,)
    assert commands(asked) == (promote,), "whoever takes over asks again"

    done = moved("champion", "7", f"approved; {FIGURES}")
    (write,) = commands(asked, RunFact(job=asked, mlflow=asked.status.mlflow, promotion=done))
    assert isinstance(write, WriteStatus)
    found = write.status.condition(ConditionType.PROMOTED)
    assert found is not None
    assert (found.status, found.reason, found.message) == ("True", Reason.PROMOTED, done.message)
    assert write.events == (Event(reason=Reason.PROMOTED, message=done.message),)
    assert commands(asked.model_copy(update={"status": write.status})) == ()


def test_what_mlflow_refuses_is_not_asked_again_until_it_is_forced() -> None:
    asked = published(Reason.AWAITING_APPROVAL, "true")
    changed = stays("champion", "9", Reason.HOLDER_CHANGED, "the adapter was compared with version 3")
    (write,) = commands(asked, RunFact(job=asked, mlflow=asked.status.mlflow, promotion=changed))
    assert isinstance(write, WriteStatus)
    assert write.events == (Event(reason=Reason.HOLDER_CHANGED, message=changed.message, warning=True),)
    refused = asked.model_copy(update={"status": write.status})
    assert commands(refused) == ()
    forced = published(Reason.HOLDER_CHANGED, FORCE.annotation)
    assert commands(forced) == (PromoteVersion(job=forced, forced=FORCE.forced),)
    assert commands(published(Reason.PROMOTION_REFUSED, FORCE.annotation)) == ()


@pytest.mark.parametrize("reason", sorted(FORCEABLE - {Reason.AWAITING_APPROVAL}))
def test_what_the_gate_left_alone_moves_by_force_alone(reason: Reason) -> None:
    assert commands(published(reason, "true")) == ()
    answer = answer_to(published(reason), APPROVE)
    assert isinstance(answer, Refusal)
    assert answer.reason is reason
    assert FIGURES in answer.message
    assert "--force --reason TEXT" in answer.message
    forced = published(reason, FORCE.annotation)
    assert commands(forced) == (PromoteVersion(job=forced, forced=FORCE.forced),)
    assert "the alias champion would move to version 7" in str(answer_to(published(reason), FORCE))


def test_what_would_be_done_is_told_with_the_figures_and_under_which_condition() -> None:
    answer = answer_to(published(Reason.AWAITING_APPROVAL), APPROVE)
    assert answer == (
        "the alias champion would move to version 7 of default-job if it is still where it was when the adapter was "
        f"compared with its holder; now {FIGURES}"
    )
    assert str(answer_to(published(Reason.PROMOTED), APPROVE)) == f"promoted already: {FIGURES}"


def test_a_job_without_a_version_or_an_alias_is_refused_in_words() -> None:
    running = published(Reason.AWAITING_APPROVAL, "true")
    running = running.model_copy(update={"status": QLoRAJobStatus(summary="Training, step 3 of 9")})
    plain = published(None, "true")
    plain = plain.model_copy(update={"spec": plain.spec.model_copy(update={"tracking": make_job().spec.tracking})})
    unjudged = published(None, "true")
    for job, words in (
        (running, "it is not published"),
        (plain, "spec.tracking.promote is absent"),
        (unjudged, "no gate"),
    ):
        for request in (APPROVE, FORCE):
            answer = answer_to(job, request)
            assert isinstance(answer, Refusal)
            assert words in answer.message
        assert owed_promotion(job) is None


def test_a_run_gets_its_end_first_and_a_job_is_not_removed_before_it_is_promoted() -> None:
    asked = published(Reason.AWAITING_APPROVAL, "true", finalizers=(RELEASE_FINALIZER,))
    assert commands(asked) == (FinishRun(job=asked, run_status="FINISHED"),)
    asked = published(Reason.AWAITING_APPROVAL, "true", ttl_seconds_after_finished=60)
    decider, later = Decider(), snapshot(asked, now=NOW + timedelta(hours=1))
    assert decider.decide(later) == (PromoteVersion(job=asked, forced=""),)
    done = published(Reason.PROMOTED, "true", ttl_seconds_after_finished=60)
    assert decider.decide(snapshot(done, now=NOW + timedelta(hours=2))) == (DeleteJob(job=done),)


def test_the_answer_for_a_job_that_is_gone_leaves_its_run_as_it_ended() -> None:
    asked = published(Reason.AWAITING_APPROVAL, "true")
    fact = RunFact(job=asked, mlflow=asked.status.mlflow, promotion=moved("champion", "7", "approved"))
    assert decide(snapshot(runs=(fact,))) == (FinishRun(job=asked, run_status="FINISHED"),)
