"""What stages answer: progress while they run, a result in the termination message when they end.

The termination message is JSON of at most 4 KiB, which a pod's status keeps; the controller needs no other
channel to be right. What prepare found and is longer than that is deflated. Progress is for people and may be lost.
"""

from __future__ import annotations

import re
import zlib
from base64 import b85decode, b85encode
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, StringConstraints

from orchestrator.api.adapter import TargetModules
from orchestrator.api.base import Count, Digest, Measured, Model, PositiveCount, Sentence, ShortText, Time
from orchestrator.api.model_facts import ModelFacts
from orchestrator.api.reasons import Reason
from orchestrator.api.words import on_one_line

MAX_TERMINATION_MESSAGE_BYTES = 4096  # Kubernetes' bound on a container's termination message
MAX_RESULT_BYTES = 64 << 10
"""Of a result's JSON, so that nobody's message inflates without bound."""
DEFLATED = re.compile(r'\{"deflated":"([^"\\]*)"\}')
"""A message that is too long as it is: the JSON, deflated (RFC 1950), in base 85 (RFC 1924)."""
MAX_WARNINGS = 5
MAX_WARNING_CHARACTERS = 280
MAX_URI_CHARACTERS = 2048
MAX_PROMOTION_CHARACTERS = 1000


def _warning(text: str) -> str:
    return on_one_line(text)[:MAX_WARNING_CHARACTERS]


def _promotion(text: str) -> str:
    return on_one_line(text)[:MAX_PROMOTION_CHARACTERS]


def _uri(text: str) -> str:
    return on_one_line(text)[:MAX_URI_CHARACTERS]


PrepareWarning = Annotated[str, StringConstraints(max_length=MAX_WARNING_CHARACTERS), AfterValidator(_warning)]
Uri = Annotated[str, StringConstraints(max_length=MAX_URI_CHARACTERS), AfterValidator(_uri)]


class StartingAdapter(Model):
    """The adapter that `adapter.from` names, as prepare has found and stored it."""

    source: Uri
    """Where exactly: with the commit of a hub's repository."""
    digest: Digest
    """SHA-256 of its adapter_model.safetensors."""
    rank: PositiveCount
    alpha: PositiveCount
    target_modules: TargetModules
    use_rslora: bool
    use_dora: bool
    experts: bool


class PrepareResult(Model):
    """What prepare found out and stored."""

    digest: Digest
    """Identifies the prepared data: same inputs, same digest, and the stage is skipped."""
    uri: Uri
    """The folder with the prepared data and its manifest."""
    model: ModelFacts
    train_records: PositiveCount
    train_sequences: PositiveCount
    train_tokens: PositiveCount
    supervised_tokens: PositiveCount
    """Training tokens that carry loss."""
    eval_records: Count
    eval_sequences: Count
    steps: PositiveCount
    """Optimizer steps of the whole job."""
    truncated_records: Count = 0
    dropped_records: Count = 0
    chats: bool = False
    """Of preferences: whether the answers are messages of a chat, as opposed to texts."""
    start: StartingAdapter | None = None
    """The adapter that training begins with, where that is not a new one."""
    warnings: Annotated[tuple[PrepareWarning, ...], Field(max_length=MAX_WARNINGS)] = ()
    """What is likely to be wrong with the data or the step count, each with what to change."""

    def shortened(self) -> PrepareResult:
        """Without what can be missed the most: a trace's walk, then the last warning. Raises ResultTooLong."""
        trace = self.model.trace
        if trace is not None and trace.walk:
            model = self.model.model_copy(update={"trace": trace.model_copy(update={"walk": ""})})
            return self.model_copy(update={"model": model})
        if not self.warnings:
            raise ResultTooLong
        return self.model_copy(update={"warnings": self.warnings[:-1]})


class TrainResult(Model):
    """How far training came."""

    step: Count
    """The last step that is durable."""
    checkpoint_uri: Uri | None = None
    complete: bool
    """Whether training is done, as opposed to stopped on request."""
    adapter_uri: Uri | None = None
    adapter_digest: Digest | None = None
    """SHA-256 of adapter_model.safetensors."""
    train_loss: Measured = None
    eval_loss: Measured = None
    eval_loss_before: Measured = None
    """Held-out loss before the first step: of the base, or of the adapter that training goes on from."""
    peak_allocated_bytes: Count | None = None
    peak_reserved_bytes: Count | None = None
    versions: ShortText | None = None
    """The libraries that these peaks depend on."""


class Promotion(Model):
    """Whether spec.tracking.promote moved its alias, and why."""

    promoted: bool
    reason: Reason
    message: Annotated[str, StringConstraints(max_length=MAX_PROMOTION_CHARACTERS), AfterValidator(_promotion)]
    """With the figures."""


class PublishResult(Model):
    """Where the adapter is in the registry."""

    registered_model: ShortText
    model_version: ShortText
    model_uri: Uri
    run_id: ShortText | None = None
    """The job's MLflow run; another one than the task names where that one was gone for good and made anew."""
    promotion: Promotion | None = None
    """Where the job asks for one."""


class Failure(Model):
    """Why a stage gave up, in words that name what to change."""

    reason: Reason
    message: Sentence


class StageResult(Model):
    """The termination message: a result, a failure, or (train, when preempted) both result and reason."""

    prepare: PrepareResult | None = None
    train: TrainResult | None = None
    publish: PublishResult | None = None
    failure: Failure | None = None

    def to_termination_message(self) -> str:
        """The JSON that goes into the termination log; a long failure message is cut to fit.

        What prepare found is deflated if it is too long, then `PrepareResult.shortened`. Raises ResultTooLong if that
        is not enough.
        """
        text = self.model_dump_json(by_alias=True, exclude_none=True)
        excess = len(text.encode()) - MAX_TERMINATION_MESSAGE_BYTES
        if excess <= 0:
            return text
        if self.failure is not None:
            # An escaped character is at most six bytes long in JSON, so cutting `excess` characters is enough.
            shorter = self.failure.message[: max(0, len(self.failure.message) - excess - 3)] + "..."
            failure = Failure(reason=self.failure.reason, message=shorter)
            return self.model_copy(update={"failure": failure}).to_termination_message()
        assert self.prepare is not None, "any other stage's result must fit the termination message"
        deflated = f'{{"deflated":"{b85encode(zlib.compress(text.encode(), 9)).decode()}"}}'
        if len(text.encode()) <= MAX_RESULT_BYTES and len(deflated.encode()) <= MAX_TERMINATION_MESSAGE_BYTES:
            return deflated
        return self.model_copy(update={"prepare": self.prepare.shortened()}).to_termination_message()

    @classmethod
    def from_termination_message(cls, text: str) -> StageResult:
        """What `to_termination_message` made a text of; ValueError for any other."""
        return cls.model_validate_json(_inflated(text))


class ResultTooLong(Exception):
    """What prepare found is more than a pod's status holds."""


def _inflated(text: str) -> str:
    """A message's JSON; ValueError where it was deflated and cannot be inflated."""
    packed = DEFLATED.fullmatch(text)
    if packed is None:
        return text
    inflating = zlib.decompressobj()
    try:
        found = inflating.decompress(b85decode(packed[1]), MAX_RESULT_BYTES)
    except zlib.error as error:
        raise ValueError(f"what is deflated cannot be inflated: {error}") from error
    if not inflating.eof:
        raise ValueError(f"what is deflated ends early, or has more than {MAX_RESULT_BYTES} bytes")
    return found.decode()


class ProgressReport(Model):
    """A running stage's latest figures."""

    stage: Literal["prepare", "train", "publish"]
    step: Count = 0
    steps: Count = 0
    """How many steps there are; 0 when unknown."""
    detail: Sentence = ""
    """What is being done, in words."""
    loss: Measured = None
    eval_loss: Measured = None
    tokens_per_second: Measured = None
    eta_seconds: Measured = None
    skipped_steps: PositiveCount | None = None
    """Updates left out by training.onNonFinite or onSpike; absent where there are none."""
    rollbacks: PositiveCount | None = None
    """How often they took training back to a checkpoint; absent where they did not."""
    checkpoint_step: Count | None = None
    checkpoint_uri: Uri | None = None
    warning: Sentence | None = None
    """What is wrong with the way of checkpoints to the store, in words."""
    time: Time
