"""What becomes of a job that nothing can be decided about: it fails by itself, and nobody else notices.

A job is made of what strangers send, so whatever is worked out for one job may meet a value that no rule foresaw.
Such an exception is that job's failure, in words, and a `ReportDefect` carries the traceback to the log. What concerns
the whole process, such as running out of memory, is no job's failure and passes through.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import replace

from orchestrator.api.job import QLoRAJob
from orchestrator.api.reasons import ConditionType, Reason
from orchestrator.api.words import on_one_line
from orchestrator.core.commands import Event
from orchestrator.core.job.attempts import request_stop
from orchestrator.core.job.conditions import Finding, clip, set_condition
from orchestrator.core.job.recovery import fail, give_up_attempt
from orchestrator.core.job.stage_commands import stage_of
from orchestrator.core.job.state_machine import TERMINAL_STATES, JobEvent, state_of
from orchestrator.core.job.status_draft import Draft
from orchestrator.core.snapshot import Snapshot, StagePhase

DEFECT_CHARACTERS = 300


def contained(draft: Draft, snapshot: Snapshot, step: Callable[[Draft], Draft]) -> Draft:
    """What a step makes of one job's draft; if it raises, the job fails instead."""
    try:
        return step(draft)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, it is this job's failure
        return failed_by_defect(draft.job, snapshot, error)


def failed_by_defect(job: QLoRAJob, snapshot: Snapshot, error: Exception) -> Draft:
    """The job's draft where an exception came of it: its stage is stopped, and then it fails."""
    draft = replace(Draft.open(job, snapshot.now), defect="".join(traceback.format_exception(error)))
    message = f"the controller cannot go on with this job: {_in_words(error)}"
    try:
        return abandon(draft, snapshot, message)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - a status of no state that the machine knows a way out of; nobody of ours wrote it
        return _broken_off(draft, snapshot, message)


def abandon(draft: Draft, snapshot: Snapshot, message: str) -> Draft:
    """The job ends here; a stage that is there is stopped first, whatever its end may be."""
    if draft.state in TERMINAL_STATES:
        return draft
    if draft.attempt is not None:
        fact = stage_of(draft.job, draft.attempt, snapshot)
        if fact is not None and fact.phase is not StagePhase.EXITED:
            return request_stop(draft, Reason.INTERNAL_ERROR, message)
        draft = give_up_attempt(draft, Reason.INTERNAL_ERROR, message)
    return fail(draft, Reason.INTERNAL_ERROR, message)


def _broken_off(draft: Draft, snapshot: Snapshot, message: str) -> Draft:
    """The same without the state machine, for a status that it does not know: what is there stops, then all ends."""
    message, attempts = clip(message), draft.status.attempts
    if (attempt := draft.attempt) is not None:
        fact = stage_of(draft.job, attempt, snapshot)
        if fact is not None and fact.phase is not StagePhase.EXITED:
            if attempt.stop_time is not None:
                return draft
            asked = draft.change_attempt(stop_time=draft.now, stop_reason=Reason.INTERNAL_ERROR)
            return _with_status(draft, attempts=asked)
        attempts = draft.change_attempt(finish_time=draft.now, reason=Reason.INTERNAL_ERROR, message=message)
    finding = Finding(kind=ConditionType.FINISHED, status="True", reason=Reason.INTERNAL_ERROR, message=message)
    conditions = set_condition(
        draft.status.conditions, finding, now=draft.now, generation=draft.job.metadata.generation
    )
    ended = _with_status(draft, attempts=attempts, conditions=conditions, finish_time=draft.now, retry_after=None)
    return ended.happen(JobEvent.FAILED).tell(Event(reason=Reason.INTERNAL_ERROR, message=message, warning=True))


def _with_status(draft: Draft, **changes: object) -> Draft:
    status = draft.status.model_copy(update=changes)
    return replace(draft, status=status, state=state_of(status), words_only=False)


def _in_words(error: Exception) -> str:
    """The kind of the exception, its first words, and where it was raised."""
    raised = traceback.extract_tb(error.__traceback__)
    where = f" (in {raised[-1].name}, line {raised[-1].lineno})" if raised else ""
    text = on_one_line(str(error))
    short = text if len(text) <= DEFECT_CHARACTERS else text[: DEFECT_CHARACTERS - 3] + "..."
    return f"{type(error).__name__}: {short}{where}"
