"""The messages between a trainer and its agent: one JSON object a line over a unix socket.

The trainer connects, reports, and obeys; it never waits for the agent. Losing the socket loses nothing: SIGTERM
does the same work as `preempt`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from orchestrator.api.base import Amount, Count, Model
from orchestrator.api.results import ProgressReport, Uri

MAX_MESSAGE_BYTES = 65536


class Progress(Model):
    """Trainer to agent: the latest figures."""

    type: Literal["progress"] = "progress"
    report: ProgressReport


class Checkpointed(Model):
    """Trainer to agent: a checkpoint is durable. Answers `checkpoint` and `preempt`."""

    type: Literal["checkpointed"] = "checkpointed"
    step: Count
    uri: Uri


class Checkpoint(Model):
    """Agent to trainer: make a checkpoint at the next step boundary and go on."""

    type: Literal["checkpoint"] = "checkpoint"


class Preempt(Model):
    """Agent to trainer: make a checkpoint and exit with `ExitCode.PREEMPTED` within the deadline."""

    type: Literal["preempt"] = "preempt"
    deadline_seconds: Amount


FromTrainer = Annotated[Progress | Checkpointed, Field(discriminator="type")]
ToTrainer = Annotated[Checkpoint | Preempt, Field(discriminator="type")]
from_trainer: TypeAdapter[FromTrainer] = TypeAdapter(FromTrainer)
to_trainer: TypeAdapter[ToTrainer] = TypeAdapter(ToTrainer)
