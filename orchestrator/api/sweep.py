"""QLoRASweep: one job tried with several values of its hyperparameters, the best of which is named.

A trial is an ordinary QLoRAJob, named `<sweep>-<index>`, that the sweep owns. What its hyperparameters are follows from
the sweep's spec and the index alone. Only what leaves the metric comparable can be searched: neither the data nor the
objective.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field, StringConstraints, field_validator, model_validator

from orchestrator.api.base import (
    API_VERSION,
    DECIMAL_PATTERN,
    DNS_LABEL_PATTERN,
    Count,
    DecimalString,
    JobName,
    Measured,
    Model,
    PositiveCount,
    Sentence,
    ShortText,
    Time,
    written,
)
from orchestrator.api.job import (
    CANCEL_ANNOTATION,
    Alias,
    Condition,
    MlflowStatus,
    ObjectMeta,
    QLoRAJobSpec,
    is_reserved,
)
from orchestrator.api.reasons import ConditionType

SWEEP_LABEL, TRIAL_LABEL = "qlora.dev/sweep", "qlora.dev/trial"
"""Of a trial: the name of its sweep, and its index."""
MAX_TRIALS, MAX_PARALLEL, MAX_DIMENSIONS, MAX_CHOICES, MAX_RUNGS = 256, 64, 8, 32, 16
MAX_SEED = 2**31 - 1
DecimalField = Literal[
    "training.epochs",
    "training.learningRate",
    "training.warmupRatio",
    "training.weightDecay",
    "training.maxGradNorm",
    "training.adamBeta1",
    "training.adamBeta2",
    "training.loraPlusRatio",
    "training.neftuneAlpha",
    "adapter.dropout",
]
IntegerField = Literal["training.globalBatchSize", "training.seed", "adapter.rank", "adapter.alpha"]
WordField = Literal["training.scheduler", "training.optimizer"]
SearchedField = Literal[DecimalField, IntegerField, WordField]
DECIMAL_FIELDS: tuple[str, ...] = get_args(DecimalField)
INTEGER_FIELDS: tuple[str, ...] = get_args(IntegerField)
INTEGER_PATTERN = "^(0|[1-9][0-9]{0,9})$"
# A sweep's name is the stem of its trials': `<sweep>-255` must stay the name of a job.
SweepName = Annotated[str, StringConstraints(pattern=DNS_LABEL_PATTERN, min_length=1, max_length=44)]
Value = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9_.+-]+$", min_length=1, max_length=24, strict=True),
    BeforeValidator(written),
]
"""Of a field, as text: numbers, too, since a schema of Kubernetes has no unions."""
ONE_WAY_RULE = "a field of the space takes one of choice, uniform, logUniform and integer"
DECIMAL_RULE = "uniform and logUniform are for decimal fields: take integer or choice"
INTEGER_RULE = "integer is for fields that are whole numbers: take uniform, logUniform or choice"
CHOICE_RULE = "choice must hold numbers where the field is one, and whole ones where it is a whole number"
CHOICES_DIFFER_RULE = "choice must name each value once"
ORDER_RULE = "max must be above min"
LOG_RULE = "min must be above 0, since a logarithm has none of 0"
FIELDS_DIFFER_RULE = "space must name each field once"
METRIC_RULE = (
    "metric eval/loss is logged only where something is held out: set job.dataset.evalSource or "
    "job.dataset.evalFraction, or take train/loss"
)
GATE_RULE = "job.tracking.promote judges one job: use the sweep's own promote, and leave it out of job"
RUNGS_RULE = (
    "earlyStop.firstStep must be a multiple of job.evaluation.everySteps, so that a rung has a figure of its own"
)


class SweepMeta(ObjectMeta):
    """The metadata of a sweep, whose name leaves room for its trials'."""

    name: SweepName


class DecimalRange(Model):
    """Every decimal from min to max is as likely."""

    min: DecimalString
    max: DecimalString

    @model_validator(mode="after")
    def _in_order(self) -> DecimalRange:
        if float(self.min) >= float(self.max):
            raise ValueError(ORDER_RULE)
        return self


class LogRange(Model):
    """Every order of magnitude from min to max is as likely."""

    min: DecimalString
    max: DecimalString

    @model_validator(mode="after")
    def _in_order(self) -> LogRange:
        if float(self.min) <= 0:
            raise ValueError(LOG_RULE)
        if float(self.min) >= float(self.max):
            raise ValueError(ORDER_RULE)
        return self


class IntegerRange(Model):
    """Every whole number from min to max, both included, is as likely."""

    min: int = Field(ge=0, le=MAX_SEED)
    max: int = Field(ge=0, le=MAX_SEED)

    @model_validator(mode="after")
    def _in_order(self) -> IntegerRange:
        if self.min >= self.max:
            raise ValueError(ORDER_RULE)
        return self


class SweepDimension(Model):
    """A field of the job, and what it may be: exactly one of the four."""

    field: SearchedField
    choice: Annotated[tuple[Value, ...], Field(min_length=1, max_length=MAX_CHOICES)] | None = None
    uniform: DecimalRange | None = None
    log_uniform: LogRange | None = None
    integer: IntegerRange | None = None

    @property
    def is_decimal(self) -> bool:
        """Whether the field is a decimal number."""
        return self.field in DECIMAL_FIELDS

    @property
    def is_integer(self) -> bool:
        """Whether the field is a whole number."""
        return self.field in INTEGER_FIELDS

    @model_validator(mode="after")
    def _one_way_that_fits(self) -> SweepDimension:
        ways = (self.choice, self.uniform, self.log_uniform, self.integer)
        if sum(way is not None for way in ways) != 1:
            raise ValueError(ONE_WAY_RULE)
        if not self.is_decimal and (self.uniform is not None or self.log_uniform is not None):
            raise ValueError(DECIMAL_RULE)
        if not self.is_integer and self.integer is not None:
            raise ValueError(INTEGER_RULE)
        pattern = DECIMAL_PATTERN if self.is_decimal else INTEGER_PATTERN if self.is_integer else ""
        if not all(re.match(pattern, value) for value in self.choice or ()):
            raise ValueError(CHOICE_RULE)
        if len(set(self.choice or ())) != len(self.choice or ()):
            raise ValueError(CHOICES_DIFFER_RULE)
        return self


class SweepMetric(Model):
    """What makes one trial better than another."""

    name: Literal["eval/loss", "train/loss"] = "eval/loss"
    """As the trainer logs it. Both are in a job's status, so that a sweep goes on while MLflow is away."""
    mode: Literal["min", "max"] = "min"
    """Whether a lower or a higher one is better."""


class EarlyStop(Model):
    """Asynchronous successive halving (ASHA, Li et al., 2020): trials that are not among the best end early.

    A rung is a number of steps: firstStep, and eta times as many again and again. A trial that has passed one goes on
    if its metric is in the best 1/eta of those that have come so far; otherwise it is cancelled, and its checkpoint
    stays.
    """

    first_step: int = Field(ge=1, le=1_000_000)
    eta: int = Field(default=3, ge=2, le=16)


class QLoRASweepSpec(Model):
    """What is tried, and how often."""

    job: QLoRAJobSpec
    """The spec of every trial but for the fields of the space. Trials get no alias, share one registered model
    (default: `<namespace>-<sweep>`), and stay as long as the sweep does."""
    space: Annotated[tuple[SweepDimension, ...], Field(min_length=1, max_length=MAX_DIMENSIONS)]
    metric: SweepMetric = SweepMetric()
    algorithm: Literal["random"] = "random"
    """How a trial's values are drawn: each by itself, from the seed and the trial's index."""
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    trials: int = Field(ge=1, le=MAX_TRIALS)
    parallel: int = Field(default=1, ge=1, le=MAX_PARALLEL)
    """Trials that are there at one time; those wait in their queue like any job."""
    max_failures: int = Field(default=3, ge=0, le=MAX_TRIALS)
    """The sweep ends once more trials than that have failed."""
    early_stop: EarlyStop | None = None
    """Absent: every trial trains to its end."""
    promote: Alias | None = None
    """An alias that the best trial's version gets at the end; MLflow reserves `latest` and `v<number>`."""

    @field_validator("promote")
    @classmethod
    def _alias_is_free(cls, value: str | None) -> str | None:
        if value is not None and is_reserved(value):
            raise ValueError("promote must not be `latest` or `v<number>`, which MLflow reserves")
        return value

    @model_validator(mode="after")
    def _fields_differ(self) -> QLoRASweepSpec:
        fields = [dimension.field for dimension in self.space]
        if len(set(fields)) != len(fields):
            raise ValueError(FIELDS_DIFFER_RULE)
        return self

    @model_validator(mode="after")
    def _metric_is_logged(self) -> QLoRASweepSpec:
        if self.metric.name == "eval/loss" and not self.job.dataset.holds_out:
            raise ValueError(METRIC_RULE)
        return self

    @model_validator(mode="after")
    def _gate_is_the_sweeps(self) -> QLoRASweepSpec:
        if self.job.tracking.promote is not None:
            raise ValueError(GATE_RULE)
        return self

    @model_validator(mode="after")
    def _rungs_have_figures(self) -> QLoRASweepSpec:
        if self.early_stop is not None and self.early_stop.first_step % self.job.evaluation.every_steps != 0:
            raise ValueError(RUNGS_RULE)
        return self


SWEEP_IMMUTABLE_FIELDS = ("space", "metric", "algorithm", "seed", "earlyStop", "promote")


class RungResult(Model):
    """The metric of a trial when it had passed a rung."""

    step: PositiveCount
    value: float


TrialState = Literal["Running", "Succeeded", "Failed", "Stopped", "Cancelled"]
ENDS: frozenset[TrialState] = frozenset({"Succeeded", "Failed", "Stopped", "Cancelled"})


class TrialStatus(Model):
    """What has come of one trial. Recorded before its job is made."""

    index: Count
    job: JobName
    """The name of its job."""
    uid: ShortText = ""
    """Of its job, once that was seen: from then on a job that is missing was deleted."""
    parameters: Annotated[dict[ShortText, ShortText], Field(max_length=MAX_DIMENSIONS)]
    """Its values, by field."""
    state: TrialState = "Running"
    """Running from the time it is recorded; what it waits for, its job says. Stopped: by earlyStop."""
    value: Measured = None
    """Its metric: the latest, and in the end the last."""
    rungs: Annotated[tuple[RungResult, ...], Field(max_length=MAX_RUNGS)] = ()
    """Those it has passed."""
    stopped_at: PositiveCount | None = None
    """The rung after which it was to stop."""
    model_version: ShortText | None = None
    """Of the registered model, once it is published."""
    message: ShortText = ""
    """Why it did not succeed."""


class BestTrial(Model):
    """The best of the trials that have succeeded."""

    index: Count
    job: JobName
    value: float


class QLoRASweepStatus(Model):
    """What came of the sweep. Written by the controller alone."""

    observed_generation: Count = 0
    summary: Sentence = ""
    """One line for people."""
    conditions: Annotated[tuple[Condition, ...], Field(max_length=16)] = ()
    """`Finished`, and `Promoted` where the spec asks for that."""
    trials: Annotated[tuple[TrialStatus, ...], Field(max_length=MAX_TRIALS)] = ()
    running: Count = 0
    succeeded: Count = 0
    failed: Count = 0
    stopped: Count = 0
    """Trials that earlyStop ended."""
    best: BestTrial | None = None
    mlflow: MlflowStatus = MlflowStatus()
    """The run whose children the runs of the trials are, once it has got its last status."""
    finish_time: Time | None = None

    def condition(self, kind: ConditionType) -> Condition | None:
        """The condition of this type, if it has been set."""
        return next((known for known in self.conditions if known.type is kind), None)


class QLoRASweep(Model):
    """One job tried with several values of its hyperparameters."""

    api_version: Literal["qlora.dev/v1alpha1"] = API_VERSION
    kind: Literal["QLoRASweep"] = "QLoRASweep"
    metadata: SweepMeta
    spec: QLoRASweepSpec
    status: QLoRASweepStatus = QLoRASweepStatus()

    @property
    def key(self) -> str:
        """`namespace/name`."""
        return f"{self.metadata.namespace}/{self.metadata.name}"

    @property
    def cancelled(self) -> bool:
        """Whether the user has asked to cancel: by annotation, or by deleting the object."""
        asked = self.metadata.annotations.get(CANCEL_ANNOTATION) == "true"
        return asked or self.metadata.deletion_timestamp is not None
