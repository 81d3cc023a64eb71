"""What a running stage reports, folded into the status.

Reports are for people and may be lost; a new checkpoint is also for preemption, which counts lost GPU-seconds from it,
so it is written at once while figures wait their turn.
"""

from __future__ import annotations

from datetime import datetime

from orchestrator.api.job import CheckpointStatus
from orchestrator.api.reasons import ConditionType, Reason
from orchestrator.api.results import ProgressReport
from orchestrator.core.job.conditions import Finding
from orchestrator.core.job.status_draft import Draft


def fold_progress(draft: Draft, report: ProgressReport, interval_seconds: float) -> Draft:
    """The draft with what the report brings: a checkpoint at once, figures no more often than the interval."""
    attempt = draft.attempt
    if attempt is None or report.stage != attempt.stage:
        return draft
    if report.stage == "train" and report.checkpoint_step is not None and report.checkpoint_uri is not None:
        draft = record_checkpoint(draft, step=report.checkpoint_step, uri=report.checkpoint_uri, time=report.time)
    if not _is_due(draft.status.progress, report, interval_seconds):
        return draft
    return draft.amend(progress=_with_losses(report, draft.status.progress))


def record_checkpoint(draft: Draft, *, step: int, uri: str, time: datetime) -> Draft:
    """The draft with this as the last durable checkpoint; unchanged if it is known or older than the known one."""
    known = draft.status.checkpoint
    if known is not None and ((known.step, known.uri) == (step, uri) or time < known.time):
        return draft
    saved = Finding(
        kind=ConditionType.CHECKPOINTED,
        status="True",
        reason=Reason.CHECKPOINT_SAVED,
        message=f"step {step} at {uri}",
    )
    return draft.amend(saved, checkpoint=CheckpointStatus(step=step, uri=uri, time=time))


def _is_due(known: ProgressReport | None, report: ProgressReport, interval_seconds: float) -> bool:
    if known is None or known.stage != report.stage:
        return True
    return (report.time - known.time).total_seconds() >= interval_seconds


def _with_losses(report: ProgressReport, known: ProgressReport | None) -> ProgressReport:
    """A publish stage has no losses of its own; what training ended with stays in view."""
    if report.stage != "publish" or known is None:
        return report
    return report.model_copy(update={"loss": known.loss, "eval_loss": known.eval_loss})
