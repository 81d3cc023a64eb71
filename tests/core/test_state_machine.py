"""The state machine is data, and no status change gets around it."""

from __future__ import annotations

import re

import pytest

from orchestrator.api.job import QLoRAJobStatus
from orchestrator.api.reasons import ConditionType, Reason
from orchestrator.core.job.conditions import Finding
from orchestrator.core.job.state_machine import (
    TABLE,
    TERMINAL_STATES,
    IllegalTransitionError,
    JobEvent,
    JobState,
    mermaid,
    state_of,
)
from orchestrator.core.job.status_draft import Draft
from tests.builders import NOW, after, make_attempt, make_job, prepared_status, running_status

STATUSES = {
    "an empty status is New": (QLoRAJobStatus(), JobState.NEW),
    "an active prepare attempt is Preparing": (
        QLoRAJobStatus(attempts=(make_attempt("prepare", 1),)),
        JobState.PREPARING,
    ),
    "a prepare attempt that was asked to stop is still Preparing": (
        QLoRAJobStatus(attempts=(make_attempt("prepare", 1, stop_time=NOW),)),
        JobState.PREPARING,
    ),
    "prepared without an attempt is Queued": (prepared_status(), JobState.QUEUED),
    "a train attempt not seen running is Starting": (prepared_status(attempts=(make_attempt(),)), JobState.STARTING),
    "a train attempt seen running is Training": (running_status(), JobState.TRAINING),
    "a train attempt asked to stop is Stopping": (running_status(stop_reason=Reason.PREEMPTED), JobState.STOPPING),
    "an ended train attempt without an adapter is Queued": (
        prepared_status(attempts=(make_attempt(finish_time=NOW),)),
        JobState.QUEUED,
    ),
    "an adapter without an attempt is Trained": (prepared_status(adapter_uri="file:///a"), JobState.TRAINED),
    "an active publish attempt is Publishing": (
        prepared_status(adapter_uri="file:///a", attempts=(make_attempt("publish", 3),)),
        JobState.PUBLISHING,
    ),
}


@pytest.mark.parametrize(("status", "state"), STATUSES.values(), ids=STATUSES)
def test_a_state_is_derived_from_the_status(status: QLoRAJobStatus, state: JobState) -> None:
    assert state_of(status) is state


def test_nothing_comes_after_a_terminal_state() -> None:
    assert {state for state, row in TABLE.items() if not row} == TERMINAL_STATES


def test_every_state_has_a_row_and_can_be_reached_from_new() -> None:
    reached = {JobState.NEW}
    for _ in JobState:
        reached |= {target for state in reached for target in TABLE[state].values()}
    assert reached == set(JobState) == set(TABLE)


def test_the_diagram_has_an_arrow_for_each_transition_of_the_table_and_no_other() -> None:
    drawn = set(re.findall(r"^    (\w+) --> (\w+): (\w+)$", mermaid(), re.MULTILINE))
    assert drawn == {(s.value, t.value, e.value) for s, row in TABLE.items() for e, t in row.items()}


def test_an_event_that_the_table_lacks_raises_with_job_state_and_event() -> None:
    draft = Draft.open(make_job(), NOW)
    with pytest.raises(IllegalTransitionError, match="job default/job: Published is not allowed in state New"):
        draft.move(JobEvent.PUBLISHED)


def test_an_event_whose_change_leads_elsewhere_raises() -> None:
    draft = Draft.open(make_job(status=prepared_status()), NOW)
    with pytest.raises(IllegalTransitionError, match="Admitted is not allowed in state Queued: the change leads to"):
        draft.move(JobEvent.ADMITTED)


def test_a_change_of_state_without_an_event_raises() -> None:
    draft = Draft.open(make_job(status=prepared_status()), NOW)
    with pytest.raises(IllegalTransitionError, match="without an event is not allowed in state Queued: it leads to Tr"):
        draft.amend(adapter_uri="file:///a")


def test_a_draft_that_changes_nothing_writes_nothing() -> None:
    first = Draft.open(make_job(), NOW).close()
    assert first is not None
    assert Draft.open(make_job(status=first.status), after(60)).close() is None


def test_a_conditions_transition_time_moves_with_its_status_only() -> None:
    waiting = Finding(kind=ConditionType.ADMITTED, status="False", reason=Reason.WAITING_FOR_GPU, message="a")
    other = Finding(kind=ConditionType.ADMITTED, status="False", reason=Reason.WAITING_FOR_QUOTA, message="b")
    admitted = Finding(kind=ConditionType.ADMITTED, status="True", reason=Reason.ADMITTED, message="c")
    seen = []
    status = prepared_status()
    for seconds, finding in ((0, waiting), (10, other), (20, admitted)):
        draft = Draft.open(make_job(status=status), after(seconds)).amend(finding)
        status = draft.status
        condition = status.condition(ConditionType.ADMITTED)
        seen.append((condition.reason, condition.message, condition.last_transition_time))
    assert seen == [
        (Reason.WAITING_FOR_GPU, "a", NOW),
        (Reason.WAITING_FOR_QUOTA, "b", NOW),
        (Reason.ADMITTED, "c", after(20)),
    ]


def test_conditions_keep_the_order_of_their_types_and_fit_the_contract() -> None:
    draft = Draft.open(make_job(), NOW)
    for kind in (ConditionType.FINISHED, ConditionType.PREPARED, ConditionType.RUNNING):
        draft = draft.amend(Finding(kind=kind, status="False", reason=Reason.PREPARING, message="x" * 5000))
    assert [c.type for c in draft.status.conditions] == [
        ConditionType.PREPARED,
        ConditionType.RUNNING,
        ConditionType.FINISHED,
    ]
    assert QLoRAJobStatus.model_validate(draft.status.to_wire()) == draft.status
