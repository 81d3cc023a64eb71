"""A job's status on its way from what is stored to what will be written.

A draft changes only through `move` (an event of the state machine) and `amend` (everything that is not a change of
state); both check the derived state, so a transition that `core/job/state_machine` does not list cannot reach a
`WriteStatus`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from orchestrator.api.job import Attempt, QLoRAJob, QLoRAJobStatus
from orchestrator.api.reasons import ConditionType, Reason
from orchestrator.core.commands import Event, WriteStatus
from orchestrator.core.job.conditions import Finding, clip, set_condition, summarize
from orchestrator.core.job.state_machine import (
    LAST_RUN_STATUS,
    IllegalTransitionError,
    JobEvent,
    JobState,
    next_state,
    state_of,
)

_SAID_OF: Mapping[JobEvent, ConditionType] = {
    JobEvent.PREPARED: ConditionType.PREPARED,
    JobEvent.ADMITTED: ConditionType.ADMITTED,
    JobEvent.TRAIN_STARTED: ConditionType.RUNNING,
    JobEvent.TRAINED: ConditionType.RUNNING,
    JobEvent.PUBLISHED: ConditionType.FINISHED,
    JobEvent.FAILED: ConditionType.FINISHED,
    JobEvent.CANCELLED: ConditionType.FINISHED,
}
"""The condition that says why; of other events the latest attempt does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Happening:
    """An event of the state machine, and what was said of it."""

    event: JobEvent
    reason: Reason
    message: str

    @classmethod
    def of(cls, event: JobEvent, status: QLoRAJobStatus) -> Happening | None:
        """As the status says after the event; None where it says nothing."""
        kind = _SAID_OF.get(event)
        if kind is not None:
            said = status.condition(kind)
            return None if said is None else cls(event=event, reason=said.reason, message=said.message)
        last = status.attempts[-1] if status.attempts else None
        if last is None or last.reason is None:
            return None
        return cls(event=event, reason=last.reason, message=last.message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """The stored job, its status as it shall be, and what to tell the user about the difference."""

    job: QLoRAJob
    status: QLoRAJobStatus
    state: JobState
    """Where the job is now: derived from the status, once for each of them."""
    now: datetime
    events: tuple[Event, ...] = ()
    happened: tuple[Happening, ...] = ()
    """What of the state machine, in order."""
    word: Finding | None = None
    """Why the job waits. It gets into the status when the draft is closed: of thousands who wait few are told so."""
    words_only: bool = True
    """Whether nothing has changed but what is said about the job, which costs nobody anything to hear late."""
    defect: str = ""
    """The traceback of what was raised instead of a decision about the job, if so."""

    @classmethod
    def open(cls, job: QLoRAJob, now: datetime) -> Draft:
        """A draft that changes nothing yet."""
        return cls(job=job, status=job.status, state=state_of(job.status), now=now)

    @classmethod
    def untried(cls, job: QLoRAJob, now: datetime) -> Draft:
        """The same of a job that is known to be prepared, and never had a GPU."""
        return cls(job=job, status=job.status, state=JobState.QUEUED, now=now)

    @property
    def attempt(self) -> Attempt | None:
        """The active attempt."""
        return self.status.active_attempt

    def move(self, event: JobEvent, *findings: Finding, **changes: object) -> Draft:
        """The draft after an event of the state machine, with the status changes that make it so.

        A job's end is also its run's, if it has one.
        """
        expected = next_state(self.job.key, self.state, event)
        after = self._with(findings, changes)
        if after.state is not expected:
            raise IllegalTransitionError(self.job.key, self.state, event, f"the change leads to {after.state.value}")
        after = after.happen(event)
        return after._end_run() if after.state in LAST_RUN_STATUS else after

    def happen(self, event: JobEvent) -> Draft:
        """The draft with the event on its list, of which its status tells already."""
        found = Happening.of(event, self.status)
        return self if found is None else replace(self, happened=(*self.happened, found))

    def amend(self, *findings: Finding, **changes: object) -> Draft:
        """The draft with changes that leave the job in its state."""
        after = self._with(findings, changes)
        if after.state is not self.state:
            raise IllegalTransitionError(self.job.key, self.state, None, f"it leads to {after.state.value}")
        return after

    def tell(self, event: Event) -> Draft:
        """The draft with one more thing to tell the user."""
        return replace(self, events=(*self.events, replace(event, message=clip(event.message))))

    def change_attempt(self, **changes: object) -> tuple[Attempt, ...]:
        """The attempts with the last one changed, to be handed to `move` or `amend`."""
        *earlier, last = self.status.attempts
        return (*earlier, last.model_copy(update=changes))

    def say(self, word: Finding) -> Draft:
        """The draft with why the job waits; told as an event when the reason is a new one."""
        return replace(self, word=word)

    @property
    def says_something_new(self) -> bool:
        """Whether there may be something to write; most jobs have nothing, most of the time."""
        seen = self.status.observed_generation == self.job.metadata.generation
        return self.word is not None or self.status is not self.job.status or not seen

    def check(self) -> None:
        """See whether the status could be stored, where all its parts are new and were checked when they were made.

        Raises ValueError as `close` does, at a tenth of the time.
        """
        stored = vars(self.job.status)
        QLoRAJobStatus.model_validate({k: v for k, v in vars(self.status).items() if v is not stored[k]})

    def close(self) -> WriteStatus | None:
        """The write that stores the draft; None where it says what is stored already.

        Raises ValueError for a status that a reader, or the API server, would refuse.
        """
        if not self.says_something_new:
            return None
        said = self if self.word is None else self._with_word(self.word)
        status = said.status.model_copy(
            update={"observed_generation": self.job.metadata.generation, "summary": summarize(said.status)},
        )
        stored = vars(self.job.status)
        changed = {name for name, value in vars(status).items() if value is not stored[name] and value != stored[name]}
        if not changed:
            return None
        text = status.model_dump_json(include=changed, by_alias=True, warnings=False)
        QLoRAJobStatus.model_validate_json(text)  # what is stored was read, and no field depends on another
        return WriteStatus(job=self.job, status=status, events=said.events, words_only=self.words_only)

    def _with_word(self, word: Finding) -> Draft:
        before = self.status.condition(word.kind)
        said = self.amend(word)
        is_known = before is not None and before.reason is word.reason
        if is_known or word.reason is Reason.OUTAGE:  # an outage is told once, not once by each job
            return said
        return said.tell(Event(reason=word.reason, message=word.message))

    def _end_run(self) -> Draft:
        mlflow = self.status.mlflow
        if mlflow.run_id is None:
            return self
        ended = mlflow.model_copy(update={"run_status": LAST_RUN_STATUS[self.state]})
        return replace(self, status=self.status.model_copy(update={"mlflow": ended}))

    def _with(self, findings: tuple[Finding, ...], changes: dict[str, object]) -> Draft:
        conditions = self.status.conditions
        for finding in findings:
            conditions = set_condition(conditions, finding, now=self.now, generation=self.job.metadata.generation)
        status = self.status.model_copy(update={"conditions": conditions, **changes})
        return Draft(
            job=self.job,
            status=status,
            state=state_of(status),
            now=self.now,
            events=self.events,
            happened=self.happened,
            word=self.word,
            words_only=self.words_only and not changes,
            defect=self.defect,
        )
