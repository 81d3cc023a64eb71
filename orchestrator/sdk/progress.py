"""A job's way as lines of text: one for every change of state, every tenth of the steps, and whatever it waits for."""

from __future__ import annotations

from orchestrator.api.job import QLoRAJob
from orchestrator.api.words import in_lines
from orchestrator.core.job.state_machine import TERMINAL_STATES, JobState, state_of
from orchestrator.sdk.words import duration, figure, state_word

PLAIN_STEPS_SHARE = 0.1
"""Share of the steps after which another line is said."""
PLAIN_DETAIL = "training"
"""What the train stage reports while nothing but training goes on; figures say it better."""


class News:
    """Knows what was said of a job, and so what there is to say."""

    def __init__(self) -> None:
        self._said: tuple[str, int, str] | None = None

    def line(self, job: QLoRAJob) -> str | None:
        """The job's state as a line, if it is news."""
        news = (state_word(job), _tenth(job), note(job) if state_of(job.status) is not JobState.TRAINING else "")
        if news == self._said:
            return None
        self._said = news
        return plain_line(job)

    def tell(self, job: QLoRAJob) -> None:
        """Print that line."""
        if (line := self.line(job)) is not None:
            print(in_lines(line), flush=True)  # noqa: T201  what was asked for


def plain_line(job: QLoRAJob) -> str:
    """The job's state as one line of text."""
    progress = job.status.progress
    far = f"{progress.step}/{progress.steps}" if _is_training(job) and progress is not None and progress.steps else ""
    parts = [f"{job.metadata.name}: {state_word(job)}", far, *figures(job)]
    line = "  ".join(filter(None, parts))
    return line if far or state_of(job.status) in TERMINAL_STATES or not note(job) else f"{line}  ({note(job)})"


def figures(job: QLoRAJob) -> list[str]:
    """The latest figures of a running stage."""
    progress = job.status.progress
    if progress is None or job.status.active_attempt is None or progress.stage != job.status.active_attempt.stage:
        return []
    named = (
        ("loss", figure(progress.loss) if progress.loss is not None else ""),
        ("eval loss", figure(progress.eval_loss) if progress.eval_loss is not None else ""),
        ("", f"{progress.tokens_per_second:.0f} tokens/s" if progress.tokens_per_second is not None else ""),
        ("ETA", duration(progress.eta_seconds) if progress.eta_seconds is not None else ""),
    )
    return [f"{name} {value}".strip() for name, value in named if value]


def note(job: QLoRAJob) -> str:
    """What figures do not say: what is being done, or what the job waits for."""
    progress, attempt = job.status.progress, job.status.active_attempt
    if attempt is not None and attempt.stop_time is None:
        detail = progress.detail if progress is not None and progress.stage == attempt.stage else ""
        return "" if detail == PLAIN_DETAIL else detail
    return job.status.summary


def _is_training(job: QLoRAJob) -> bool:
    return state_of(job.status) in (JobState.TRAINING, JobState.STOPPING)


def _tenth(job: QLoRAJob) -> int:
    progress = job.status.progress
    if not _is_training(job) or progress is None or not progress.steps:
        return 0
    return int(progress.step / progress.steps / PLAIN_STEPS_SHARE)
