"""A person's request for the alias of spec.tracking.promote: what it says, and whether it is to be carried out.

The request is an annotation, so whoever may update a job may promote it. It is answered by the condition Promoted: one
that is True has been carried out, and one that became False for another reason than `AwaitingApproval` is refused,
unless it is forced. So no request is carried out twice, and none has to be taken back.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.api.job import FORCED, PROMOTE_ANNOTATION, Condition, QLoRAJob, QLoRAJobStatus
from orchestrator.api.ownership import registered_model_name
from orchestrator.api.reasons import ConditionType, Reason, Refusal
from orchestrator.api.results import Promotion
from orchestrator.core.commands import Event
from orchestrator.core.job.conditions import Finding
from orchestrator.core.job.finalizer import owes_run_its_end
from orchestrator.core.job.state_machine import JobState, state_of

MAX_REASON_CHARACTERS = 500
FORCEABLE = frozenset(
    {Reason.AWAITING_APPROVAL, Reason.GATE_NOT_PASSED, Reason.HOLDER_NOT_COMPARED, Reason.HOLDER_CHANGED}
)
"""Why an alias is left alone that a person may force to move."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromotionRequest:
    """What a person asks for."""

    forced: str = ""
    """Why the alias is to move whatever the gate said; empty where it is only approved."""

    @property
    def annotation(self) -> str:
        """The value of PROMOTE_ANNOTATION."""
        return f"{FORCED}{self.forced}" if self.forced else "true"


def request_of(job: QLoRAJob) -> PromotionRequest | None:
    """What a person asks for; None where nobody does, or in words that mean nothing here."""
    value = job.metadata.annotations.get(PROMOTE_ANNOTATION, "")
    if value == "true":
        return PromotionRequest()
    forced = value.removeprefix(FORCED).strip() if value.startswith(FORCED) else ""
    return PromotionRequest(forced=forced[:MAX_REASON_CHARACTERS]) if forced else None


def owed_promotion(job: QLoRAJob) -> PromotionRequest | None:
    """The request that is still to be carried out."""
    request = request_of(job)
    if request is None or job.metadata.deletion_timestamp is not None or _refusal(job, request) is not None:
        return None
    return None if job.status.is_true(ConditionType.PROMOTED) else request


def awaits_mlflow(job: QLoRAJob) -> bool:
    """Whether MLflow is still to be told, or asked, something about a finished job."""
    return owes_run_its_end(job) or owed_promotion(job) is not None


def answer_to(job: QLoRAJob, request: PromotionRequest) -> str | Refusal:
    """What would come of a request: a sentence, or why it is refused."""
    refusal = _refusal(job, request)
    if refusal is not None:
        return refusal
    found, promote = _condition(job.status), job.spec.tracking.promote
    assert found is not None, "a job without it is refused"
    assert promote is not None, "so is one that asks for none"
    if found.status == "True":
        return f"promoted already: {found.message}"
    model = registered_model_name(job.spec.tracking, job.metadata.namespace, job.metadata.name)
    unchanged = promote.depends_on_holder and not request.forced
    only = " if it is still where it was when the adapter was compared with its holder" if unchanged else ""
    version = job.status.mlflow.model_version
    return f"the alias {promote.alias} would move to version {version} of {model}{only}; now {found.message}"


def finding_of(promotion: Promotion) -> Finding:
    """The condition that says what came of the alias."""
    return Finding(
        kind=ConditionType.PROMOTED,
        status="True" if promotion.promoted else "False",
        reason=promotion.reason,
        message=promotion.message,
    )


def event_of(promotion: Promotion) -> Event:
    """The same as an event; that somebody is to approve is no fault."""
    warning = not promotion.promoted and promotion.reason is not Reason.AWAITING_APPROVAL
    return Event(reason=promotion.reason, message=promotion.message, warning=warning)


def _refusal(job: QLoRAJob, request: PromotionRequest) -> Refusal | None:
    if job.spec.tracking.promote is None:
        message = "spec.tracking.promote is absent, so there is no alias to move; submit the job with one"
        return Refusal(reason=Reason.PROMOTION_REFUSED, message=message)
    if state_of(job.status) is not JobState.SUCCEEDED or job.status.mlflow.model_version is None:
        message = f"it is not published, so it has no version that could get the alias: {job.status.summary}"
        return Refusal(reason=Reason.PROMOTION_REFUSED, message=message)
    found = _condition(job.status)
    if found is None:
        message = "no gate has judged it: its version was published without held-out answers; submit the job again"
        return Refusal(reason=Reason.PROMOTION_REFUSED, message=message)
    if found.status == "True" or found.reason is Reason.AWAITING_APPROVAL:
        return None
    if found.reason not in FORCEABLE:
        return Refusal(reason=found.reason, message=found.message)
    if request.forced:
        return None
    message = f"{found.reason.value}: {found.message}; to move the alias all the same: --force --reason TEXT"
    return Refusal(reason=found.reason, message=message)


def _condition(status: QLoRAJobStatus) -> Condition | None:
    return status.condition(ConditionType.PROMOTED)
