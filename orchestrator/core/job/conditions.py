"""Conditions and the one-line summary: how a status says what is going on.

Kubernetes' rules hold: one condition a type, lastTransitionTime moves only when the status value does, and
observedGeneration names the spec that was looked at.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Literal

from orchestrator.api.job import Attempt, Condition, QLoRAJobStatus
from orchestrator.api.plan import MemoryPlan
from orchestrator.api.reasons import ConditionType, Reason
from orchestrator.api.words import on_one_line
from orchestrator.core.job.state_machine import JobState, state_of

ConditionStatus = Literal["True", "False", "Unknown"]
WORDS_KEPT, WORDS_KEPT_CHARACTERS = 4096, 512
MAX_SENTENCE_CHARACTERS = 2048  # the contract's bound on `Sentence`
_FIGURES = re.compile(r"\b\d+\b")
_ORDER = {kind: index for index, kind in enumerate(ConditionType)}


def clip(text: str) -> str:
    """A text that fits the contract's bound on sentences, and that can be shown."""
    text = on_one_line(text)
    return text if len(text) <= MAX_SENTENCE_CHARACTERS else text[: MAX_SENTENCE_CHARACTERS - 3] + "..."


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What is to be said about one condition type."""

    kind: ConditionType
    status: ConditionStatus
    reason: Reason
    message: str = ""


def says_the_same(condition: Condition, reason: Reason, message: str, generation: int) -> bool:
    """Whether it is false for this reason already: to say so would change figures at most, as of GPUs in use.

    Those change all the time for everybody who waits; whoever wants them asks for an explanation.
    """
    return (
        condition.reason is reason
        and condition.status == "False"
        and condition.observed_generation == generation
        and (condition.message == message or words(condition.message) == words(clip(message)))
    )


def is_said(status: QLoRAJobStatus, kind: ConditionType, reason: Reason, message: str, generation: int) -> bool:
    """The same of the condition of this type, if there is one."""
    before = status.condition(kind)
    return before is not None and says_the_same(before, reason, message, generation)


def words(message: str) -> str:
    """A sentence without its figures."""
    return _known_words(message) if len(message) <= WORDS_KEPT_CHARACTERS else _FIGURES.sub("#", message)


@lru_cache(maxsize=WORDS_KEPT)  # everybody who waits is asked about in every pass, and most wait for the same
def _known_words(message: str) -> str:
    return _FIGURES.sub("#", message)


def set_condition(
    conditions: tuple[Condition, ...], finding: Finding, *, now: datetime, generation: int
) -> tuple[Condition, ...]:
    """The conditions with this one set, in the order of `ConditionType`."""
    before = next((c for c in conditions if c.type is finding.kind), None)
    since = before.last_transition_time if before is not None and before.status == finding.status else now
    after = Condition(
        type=finding.kind,
        status=finding.status,
        reason=finding.reason,
        message=clip(finding.message),
        last_transition_time=since,
        observed_generation=generation,
    )
    others = tuple(c for c in conditions if c.type is not finding.kind)
    return tuple(sorted((*others, after), key=lambda c: _ORDER[c.type]))


def summarize(status: QLoRAJobStatus) -> str:
    """One line for people: what is going on and what it waits for."""
    state = state_of(status)
    if state in _WAITS_FOR:
        return clip(_waiting(state, status))
    attempt = status.active_attempt
    if attempt is None:
        return clip(_finished(state, status))
    if attempt.stop_time is not None and attempt.stop_reason is not None:
        return clip(f"Stopping {attempt.stage}: {attempt.stop_reason.value}")
    return clip(_running(attempt, status))


_WAITS_FOR = {
    JobState.NEW: ConditionType.PREPARED,
    JobState.QUEUED: ConditionType.ADMITTED,
    JobState.TRAINED: ConditionType.PUBLISHED,
}


def _waiting(state: JobState, status: QLoRAJobStatus) -> str:
    condition = status.condition(_WAITS_FOR[state])
    return f"{condition.reason.value}: {condition.message}" if condition else state.value


def _finished(state: JobState, status: QLoRAJobStatus) -> str:
    condition = status.condition(ConditionType.FINISHED)
    if condition is None or not condition.message:
        return state.value
    return f"{condition.reason.value}: {condition.message}"


def _running(attempt: Attempt, status: QLoRAJobStatus) -> str:
    where = f" on {attempt.gpu_class}" if attempt.gpu_class else ""
    if attempt.start_time is None:
        return f"Starting {attempt.stage}{where}"
    verb = {"prepare": "Preparing", "train": "Training", "publish": "Publishing"}[attempt.stage]
    progress = status.progress
    if progress is None or progress.stage != attempt.stage:
        return f"{verb}{where}"
    step = f", step {progress.step} of {progress.steps}" if progress.steps else ""
    loss = f", loss {progress.loss:.4f}" if progress.loss is not None else ""
    return f"{verb}{where}{step}{loss}"


def plan_words(plan: MemoryPlan) -> str:
    """A memory plan in a sentence."""
    offloaded = f", {' and '.join(plan.offload)} in host memory" if plan.offload else ""
    kept_there = f", what {plan.offloaded_layers} others keep in host memory" if plan.offloaded_layers else ""
    streamed = f", {plan.streamed_layers} layers streamed from host memory" if plan.streamed_layers else ""
    split = f"micro-batch {plan.micro_batch_size} x {plan.accumulation_steps}"
    return f"{split}, {plan.recompute_layers} layers recomputed{offloaded}{kept_there}{streamed}"
