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
from orchestrator.api.reasons import Reason
from orchestrator.api.words import on_one_line
from orchestrator.core.job.attempts import request_stop
from orchestrator.core.job.recovery import fail, give_up_attempt
from orchestrator.core.job.stage_commands import stage_of
from orchestrator.core.job.state_machine import TERMINAL_STATES
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
    return abandon(draft, snapshot, f"the controller cannot go on with this job: {_in_words(error)}")


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


def _in_words(error: Exception) -> str:
    """The kind of the exception, its first words, and where it was raised."""
    raised = traceback.extract_tb(error.__traceback__)
    where = f" (in {raised[-1].name}, line {raised[-1].lineno})" if raised else ""
    text = on_one_line(str(error))
    short = text if len(text) <= DEFECT_CHARACTERS else text[: DEFECT_CHARACTERS - 3] + "..."
    return f"{type(error).__name__}: {short}{where}"
