"""What a running stage reports, folded into the status.

Reports are for people and may be lost; a new checkpoint is also for preemption, which counts lost GPU-seconds from it,
so it is written at once while figures wait their turn. Reports are stamped by the clock of the machine that sends them,
so what is compared with the present is when the controller saw them: of two checkpoints the later attempt's counts, and
of one attempt's the later step's, whatever their stamps. Where a checkpoint lies follows from the job and the step: who
can report in a stage's name cannot have the status point elsewhere.
"""

from __future__ import annotations

from datetime import datetime

from orchestrator.api.job import CheckpointStatus
from orchestrator.api.reasons import ConditionType, Reason
from orchestrator.api.results import ProgressReport
from orchestrator.core.commands import Event
from orchestrator.core.job.conditions import Finding
from orchestrator.core.job.stage_commands import checkpoint_uri
from orchestrator.core.job.status_draft import Draft
from orchestrator.core.snapshot import Policy

KEPT_FIGURES = ("loss", "eval_loss", "skipped_steps", "rollbacks")
"""Of training, which stay in view when it is over."""


def fold_progress(draft: Draft, report: ProgressReport, policy: Policy) -> Draft:
    """The draft with what the report brings: a checkpoint at once, figures no more often than the policy's interval."""
    attempt, known = draft.attempt, draft.status.progress
    if attempt is None or report.stage != attempt.stage:
        return draft
    if report.stage == "train" and report.checkpoint_step is not None and report.checkpoint_uri is not None:
        draft = record_checkpoint(draft, step=report.checkpoint_step, time=report.time, policy=policy)
    is_news = report.warning is not None and (known is None or known.warning is None)
    if not is_news and not _is_due(known, report, policy.progress_interval_seconds):
        return draft
    changes: dict[str, object] = {"progress": _with_losses(report, known)}
    if attempt.progress_time is None or known is None or (known.step, known.detail) != (report.step, report.detail):
        changes["attempts"] = draft.change_attempt(progress_time=draft.now)
    draft = draft.amend(**changes)
    if not is_news:
        return draft
    return draft.tell(Event(reason=Reason.CHECKPOINT_LATE, message=str(report.warning), warning=True))


def record_checkpoint(draft: Draft, *, step: int, time: datetime, policy: Policy) -> Draft:
    """The draft with this as the last durable checkpoint of the active attempt; unchanged if it is known or older.

    A later step than any before is durable progress: what went wrong until now is forgotten.
    """
    known, attempt = draft.status.checkpoint, draft.attempt
    assert attempt is not None, "only an active attempt reports a checkpoint"
    uri = checkpoint_uri(draft.job, step, policy)
    if known is not None:
        is_older = known.attempt == attempt.number and step <= known.step
        if (known.step, known.uri) == (step, uri) or is_older:
            return draft
    is_progress = known is None or step > known.step
    saved = Finding(
        kind=ConditionType.CHECKPOINTED,
        status="True",
        reason=Reason.CHECKPOINT_SAVED,
        message=f"step {step} at {uri}",
    )
    stamp = between(attempt.start_time or attempt.created_time, time, draft.now)
    checkpoint = CheckpointStatus(step=step, uri=uri, time=stamp, attempt=attempt.number)
    return draft.amend(saved, checkpoint=checkpoint, **({"setbacks": ()} if is_progress else {}))


def between(earliest: datetime, time: datetime, now: datetime) -> datetime:
    """A time that another machine's clock tells, as far as it can be: from `earliest` on, and not after the present."""
    return max(earliest, min(time, now))


def stalled(draft: Draft, report: ProgressReport, policy: Policy) -> str:
    """Why a stage that trains and reports this is taken for stuck, in a sentence; empty while it is not.

    The bound is its own: a number of its steps, an evaluation twice, and `stall_seconds` for a checkpoint on its way.
    """
    attempt, known = draft.attempt, draft.status.progress
    if attempt is None or attempt.start_time is None or attempt.stage != "train" or attempt.stop_time is not None:
        return ""
    if known is None or (known.step, known.detail) != (report.step, report.detail):
        return ""
    since = attempt.progress_time or between(attempt.start_time, report.time, draft.now)
    silent_seconds = (draft.now - since).total_seconds()
    bound_seconds = patience_seconds(draft, report, policy)
    if silent_seconds <= bound_seconds:
        return ""
    return (
        f"no progress: step {report.step} was its last {silent_seconds:.0f} s ago, and by its own step times "
        f"{bound_seconds:.0f} s are long; it is stopped and resumed"
    )


def never_heard(draft: Draft, policy: Policy) -> str:
    """Why a stage that trains and has never reported is taken for stuck; empty while it is not.

    One whose reports are lost on their way saves a checkpoint when it is stopped, so it loses no more than a start.
    """
    attempt = draft.attempt
    if attempt is None or attempt.start_time is None or attempt.stage != "train" or not policy.has_agents:
        return ""
    silent_seconds = (draft.now - attempt.start_time).total_seconds()
    if (
        attempt.progress_time is not None
        or attempt.stop_time is not None
        or silent_seconds <= policy.stall_start_seconds
    ):
        return ""
    return f"no progress: nothing was heard of it in {silent_seconds:.0f} s; it is stopped and resumed"


def patience_seconds(draft: Draft, report: ProgressReport, policy: Policy) -> float:
    """How long the stage may take for its next step."""
    left = report.steps - report.step
    if report.tokens_per_second is None or report.eta_seconds is None or left <= 0:
        return policy.stall_start_seconds
    step_seconds = report.eta_seconds / left
    prepared, batch = draft.status.prepared, draft.job.spec.training.global_batch_size
    evaluation_seconds = step_seconds * prepared.eval_sequences / batch if prepared is not None else 0.0
    return policy.stall_seconds + policy.stall_steps * step_seconds + 2 * evaluation_seconds


def _is_due(known: ProgressReport | None, report: ProgressReport, interval_seconds: float) -> bool:
    if known is None or known.stage != report.stage:
        return True
    return abs((report.time - known.time).total_seconds()) >= interval_seconds  # another machine's clock may be behind


def _with_losses(report: ProgressReport, known: ProgressReport | None) -> ProgressReport:
    """A publish stage has no losses of its own; what training ended with stays in view."""
    if report.stage != "publish" or known is None:
        return report
    return report.model_copy(update={name: getattr(known, name) for name in KEPT_FIGURES})
