"""The fabric's messages, one JSON object a line.

Controller to head: `Order`. Head to controller: `Word`. Relay to agent: `Look`, `Checkpoint` or `Preempt`, each
answered by an `Answer`. The last two requests are those of the trainer's own protocol, passed on as they are.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from orchestrator.api.base import Model, ShortText
from orchestrator.api.protocol import Checkpoint, Checkpointed, Preempt, ToTrainer
from orchestrator.api.results import ProgressReport


class Look(Model):
    """Relay to agent: what is the latest?"""

    type: Literal["look"] = "look"


ToAgent = Annotated[Look | Checkpoint | Preempt, Field(discriminator="type")]
to_agent: TypeAdapter[ToAgent] = TypeAdapter(ToAgent)


class Answer(Model):
    """Agent to relay: the trainer's last words."""

    heard: bool = False
    """Whether a trainer was there to take the request."""
    progress: ProgressReport | None = None
    checkpointed: Checkpointed | None = None


class Order(Model):
    """Controller to head: pass a request on to a stage's trainer."""

    key: ShortText
    request: ToTrainer


class Word(Model):
    """Head to controller: what a stage's agent said, and to which order, if it was one."""

    key: ShortText
    request: ToTrainer | None = None
    answer: Answer
