"""QLoRAQueue: how much of the GPUs a team may use, and whom its jobs may move.

A queue that no object describes has no quota: the `default` queue works without any set-up. Queues are
cluster-wide names; a job names one in spec.queue. Which namespaces may do so is a list and no selector of labels: to
read those takes a right on all namespaces, and who may label a namespace would decide whose GPUs it gets.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from orchestrator.api.base import API_VERSION, Amount, Count, DnsLabel, Model, Time
from orchestrator.api.job import MAX_PRIORITY, MIN_PRIORITY, GpuClassName, ObjectMeta
from orchestrator.api.notification import WEBHOOKS_HAVE_NAMES, Webhooks, names_are_unique

MAX_USERS = 256
"""Of whom a queue's status tells."""
MAX_MONTHLY = 1024
MONTH_PATTERN = r"^[0-9]{4}-(0[1-9]|1[0-2])$"
Month = Annotated[str, StringConstraints(pattern=MONTH_PATTERN, max_length=7)]
"""Such as `2026-11`."""

MAX_BUDGET = 1_000_000_000
StopPolicy = Literal["None", "Hold", "HoldAndDrain"]


class Quota(Model):
    """GPUs of one class that the queue may hold."""

    gpu_class: GpuClassName
    nominal: int = Field(ge=0, le=1_000_000)
    borrowing_limit: int | None = Field(default=None, ge=0, le=1_000_000)
    """GPUs beyond nominal that may be borrowed from the cohort while nobody else there needs them; absent: no bound."""


class UserLimits(Model):
    """How many of a queue's jobs are one user's. A user is a namespace."""

    running: int | None = Field(default=None, ge=1, le=1_000_000)
    """Jobs of one user that hold a GPU at one time; absent: no bound."""
    waiting: int | None = Field(default=None, ge=1, le=1_000_000)
    """Jobs of one user that are prepared and wait for a GPU; nothing is done for more. Absent: no bound."""


class Budget(Model):
    """What a queue's jobs may have in a month (UTC)."""

    gpu_hours: int | None = Field(default=None, ge=0, le=MAX_BUDGET)
    dollars: int | None = Field(default=None, ge=0, le=MAX_BUDGET)
    """By `QLORA_GPU_PRICES`."""
    when_spent: Literal["Warn", "Hold"] = "Hold"
    """Warn: the status says so. Hold: nothing is admitted, too, until the next month; what runs goes on."""

    @model_validator(mode="after")
    def _says_how_much(self) -> Budget:
        if self.gpu_hours is None and self.dollars is None:
            raise ValueError("budget must name gpuHours or dollars")
        return self


class QLoRAQueueSpec(Model):
    """The queue's share and manners."""

    cohort: DnsLabel | None = None
    """Queues of one cohort lend each other unused quota."""
    weight: int = Field(default=1, ge=1, le=1_000_000)
    """Fair share relative to the other queues: GPU time, weighted by VRAM, is divided by it."""
    quotas: Annotated[tuple[Quota, ...], Field(max_length=64)] = ()
    """Empty means no limit; otherwise classes that are not listed may not be used."""
    preemption: Literal["LowerPriority", "Never"] = "LowerPriority"
    """Whether this queue's jobs may evict others of lower priority."""
    queueing_strategy: Literal["StrictFIFO", "BestEffortFIFO"] = "BestEffortFIFO"
    """StrictFIFO: nobody of the queue goes before the one who is next and finds no GPU. BestEffortFIFO: whoever finds
    one goes."""
    fair_sharing: Literal["None", "PerUser"] = "None"
    """Whose jobs of one priority go first. PerUser: those of the users who have had least of the queue's GPU time, the
    past counting for less and less. None: the oldest, whoever's they are. A user is a namespace."""
    turn_seconds: int | None = Field(default=None, ge=300, le=31_536_000)
    """After so long a running job saves a checkpoint and yields to a job of the queue that waits, of no lower priority,
    and waits behind those who do. Absent: it runs until it is done, or has to make way for another reason."""
    stop_policy: StopPolicy = "None"
    """Hold: admit nothing; running jobs go on. HoldAndDrain: they save a checkpoint and wait, too."""
    hold: bool = False
    """The same as stopPolicy Hold, as 0.1.0 has it."""
    per_user: UserLimits = UserLimits()
    budget: Budget | None = None
    namespaces: Annotated[tuple[DnsLabel, ...], Field(max_length=256)] = ()
    """Whose jobs may use the queue; empty means any namespace's. Jobs of others wait, whatever their priority."""
    max_priority: int | None = Field(default=None, ge=MIN_PRIORITY, le=MAX_PRIORITY)
    """Jobs of a higher priority wait until theirs is lowered; absent: no bound."""
    notifications: Webhooks = ()
    """Who is told what becomes of the queue's jobs, besides those whom a job names. Their secrets are the service's."""

    @property
    def stops(self) -> StopPolicy:
        """What of the queue is stopped, however that is said."""
        return "Hold" if self.hold and self.stop_policy == "None" else self.stop_policy

    @model_validator(mode="after")
    def _webhooks_have_names(self) -> QLoRAQueueSpec:
        if not names_are_unique(self.notifications):
            raise ValueError(WEBHOOKS_HAVE_NAMES)
        return self

    @model_validator(mode="after")
    def _turns_are_everybodys(self) -> QLoRAQueueSpec:
        if self.turn_seconds is not None and self.fair_sharing == "PerUser":
            raise ValueError("turnSeconds gives every job its turn, so fairSharing must be None beside it")
        return self

    @model_validator(mode="after")
    def _one_quota_a_class(self) -> QLoRAQueueSpec:
        classes = [quota.gpu_class for quota in self.quotas]
        if len(classes) != len(set(classes)):
            raise ValueError("quotas must name each gpuClass once")
        return self


class UserUsage(Model):
    """GPU time that one user has had of a queue's, decayed until the status's `countedUntil`."""

    user: DnsLabel
    """The namespace of the jobs: the one thing about whose they are that no job can choose."""
    gpu_seconds: Amount
    gib_seconds: Amount
    """The same weighted by the cards' VRAM."""


class MonthlyUsage(Model):
    """GPU time that one user has had of a queue's in one month (UTC), on cards of one class. It does not decay."""

    month: Month
    user: DnsLabel
    gpu_class: GpuClassName
    gpu_seconds: Amount
    dollars: Amount = 0
    """By the prices (`QLORA_GPU_PRICES`) of the time."""


class ClassUse(Model):
    """GPUs of one class, as of now."""

    gpu_class: GpuClassName
    nominal: Count = 0
    """What is the queue's own."""
    used: Count = 0
    """What its jobs hold."""
    borrowed: Count = 0
    """What of that is beyond nominal."""
    lent: Count = 0
    """What of nominal other queues of its cohort hold."""


class BudgetUse(Model):
    """What is spent of a budget."""

    month: Month
    gpu_hours: Amount = 0
    dollars: Amount = 0
    spent: bool = False
    """Whether that is all of it."""


class QLoRAQueueStatus(Model):
    """What becomes of the queue. Written by the controller alone, every now and then while something changes.

    All of it is as of one moment, which is written with it: what came before is counted, what comes after is not.
    """

    counted_until: Time | None = None
    """By the controller's clock. Absent: nothing is counted yet."""
    usage: Annotated[tuple[UserUsage, ...], Field(max_length=MAX_USERS)] = ()
    """By user, those with the most VRAM time if there are more."""
    months: Annotated[tuple[MonthlyUsage, ...], Field(max_length=MAX_MONTHLY)] = ()
    """By month, user and class, the latest months if there are more."""
    classes: Annotated[tuple[ClassUse, ...], Field(max_length=64)] = ()
    """Of each class that has a quota or is held."""
    running: Count = 0
    """Jobs that hold a GPU."""
    pending: Count = 0
    """Jobs that are ready to train and hold none."""
    pending_since: Time | None = None
    """Since when the one of them waits that has waited for longest."""
    budget: BudgetUse | None = None
    """Of this month."""


class QLoRAQueue(Model):
    """A share of the cluster's GPUs."""

    api_version: Literal["qlora.dev/v1alpha1"] = API_VERSION
    kind: Literal["QLoRAQueue"] = "QLoRAQueue"
    metadata: ObjectMeta
    spec: QLoRAQueueSpec = QLoRAQueueSpec()
    status: QLoRAQueueStatus = QLoRAQueueStatus()
