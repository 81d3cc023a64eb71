"""Numbers and times as people read them. All functions are pure."""

from __future__ import annotations

import re
from datetime import datetime

from orchestrator.api.job import QLoRAJob
from orchestrator.api.plan import Estimate, MemoryPlan
from orchestrator.core.job.state_machine import TERMINAL_STATES, JobState, state_of

NOTHING = "-"
SHORT_HEX = 12
_HEX = re.compile(r"\b(?:[0-9a-f]{64}|[0-9a-f]{40})\b")


def duration(seconds: float | None) -> str:
    """`48s`, `3m20s`, `2h05m`, `4d3h`: two units at most."""
    if seconds is None:
        return NOTHING
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86_400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86_400}d{whole % 86_400 // 3600}h"


def step_time(seconds: float) -> str:
    """What one step takes: `0.012s`, `0.73s`, `12.3s`, and from a minute on as a duration."""
    if seconds >= 59.95:
        return duration(seconds)
    digits = 1 if seconds >= 10 else 2 if seconds >= 0.1 else 3
    return f"{seconds:.{digits}f}s"


def since(moment: datetime | None, now: datetime) -> str:
    """How long ago something was."""
    return duration((now - moment).total_seconds()) if moment is not None else NOTHING


def gib(count_bytes: int) -> str:
    """Bytes in GiB; below 0.1 GiB in MiB, so that small items do not all read 0.00."""
    if count_bytes < (1 << 30) // 10:
        return f"{count_bytes / (1 << 20):.1f} MiB"
    return f"{count_bytes / (1 << 30):.2f} GiB"


def dollars(value: float | None) -> str:
    """A price, to the cent."""
    return f"${value:,.2f}" if value is not None else NOTHING


def figure(value: float | None) -> str:
    """A loss."""
    return f"{value:.4f}" if value is not None else NOTHING


def short(text: str) -> str:
    """A text in which digests and commits are as long as people compare them: `sha256:1f2e3d4c5b6a…`."""
    return _HEX.sub(lambda found: f"{found[0][:SHORT_HEX]}…", text)


def state_word(job: QLoRAJob) -> str:
    """The job's state in one word; a held job says so."""
    state = state_of(job.status)
    idle = job.status.active_attempt is None and state not in TERMINAL_STATES
    if idle and job.metadata.deletion_timestamp is not None:
        return "Deleting"
    return "Suspended" if idle and job.spec.suspend else state.value


def state_style(job: QLoRAJob) -> str:
    """The theme's style for the state."""
    match state_of(job.status):
        case JobState.SUCCEEDED:
            return "good"
        case JobState.FAILED | JobState.CANCELLED:
            return "bad"
        case JobState.NEW | JobState.QUEUED | JobState.TRAINED:
            return "waiting"
        case _:
            return "busy"


def progress_word(job: QLoRAJob) -> str:
    """`120/1000` while and after training."""
    progress = job.status.progress
    if progress is not None and progress.stage == "train" and progress.steps:
        return f"{progress.step}/{progress.steps}"
    prepared = job.status.prepared
    if prepared is None:
        return NOTHING
    if job.status.adapter_uri is not None:
        return f"{prepared.steps}/{prepared.steps}"
    return f"{job.status.checkpoint.step if job.status.checkpoint else 0}/{prepared.steps}"


def plan_words(plan: MemoryPlan) -> str:
    """A memory plan as one line."""
    offload = f", {' and '.join(plan.offload)} in host memory" if plan.offload else ""
    kept_there = f", what {plan.offloaded_layers} others keep in host memory" if plan.offloaded_layers else ""
    streamed = f", {plan.streamed_layers} layers streamed from host memory" if plan.streamed_layers else ""
    recompute = f"{plan.recompute_layers} layers recomputed" if plan.recompute_layers else "nothing recomputed"
    kept = " but for attention" if plan.keep_attention else ""
    by = f", attention by {plan.attention}" if plan.attention != "own" else ""
    micro = f"micro-batch {plan.micro_batch_size} x {plan.accumulation_steps} accumulated"
    return f"{micro}, {recompute}{kept}{by}{offload}{kept_there}{streamed}"


def length_words(estimate: Estimate, *, about: bool = False) -> str:
    """How long the steps take, on which card, and what they cost."""
    steps = f"{'about ' if about else ''}{estimate.steps} steps"
    words = [steps if estimate.steps else "steps are counted by prepare"]
    if estimate.step_seconds is not None:
        words.append(f"{step_time(estimate.step_seconds)} each on {estimate.card}")
    if estimate.seconds is not None:
        words.append(f"about {duration(estimate.seconds)} in all")
    if estimate.answering_seconds is not None:
        words.append(f"then answers for up to {duration(estimate.answering_seconds)}")
    if estimate.dollars is not None:
        words.append(f"about {dollars(estimate.dollars)}")
    return ", ".join(words)
