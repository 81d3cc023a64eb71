"""QLoRAQueue: how much of the GPUs a team may use, and whom its jobs may move.

A queue that no object describes has no quota: the `default` queue works without any set-up. Queues are
cluster-wide names; a job names one in spec.queue. Which namespaces may do so is a list and no selector of labels: to
read those takes a right on all namespaces, and who may label a namespace would decide whose GPUs it gets.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from orchestrator.api.base import API_VERSION, Amount, DnsLabel, Model, Time
from orchestrator.api.job import MAX_PRIORITY, MIN_PRIORITY, GpuClassName, ObjectMeta

MAX_USERS = 256
"""Of whom a queue's status tells."""
MAX_MONTHLY = 1024
MONTH_PATTERN = r"^[0-9]{4}-(0[1-9]|1[0-2])$"


class Quota(Model):
    """GPUs of one class that the queue may hold."""

    gpu_class: GpuClassName
    nominal: int = Field(ge=0, le=1_000_000)
    borrowing_limit: int | None = Field(default=None, ge=0, le=1_000_000)
    """GPUs beyond nominal that may be borrowed from the cohort while nobody else there needs them; absent: no bound."""


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
    hold: bool = False
    """Admit nothing; running jobs go on."""
    namespaces: Annotated[tuple[DnsLabel, ...], Field(max_length=256)] = ()
    """Whose jobs may use the queue; empty means any namespace's. Jobs of others wait, whatever their priority."""
    max_priority: int | None = Field(default=None, ge=MIN_PRIORITY, le=MAX_PRIORITY)
    """Jobs of a higher priority wait until theirs is lowered; absent: no bound."""

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

    month: Annotated[str, StringConstraints(pattern=MONTH_PATTERN, max_length=7)]
    """Such as `2026-11`."""
    user: DnsLabel
    gpu_class: GpuClassName
    gpu_seconds: Amount
    dollars: Amount = 0
    """By the prices (`QLORA_GPU_PRICES`) of the time."""


class QLoRAQueueStatus(Model):
    """What the queue's jobs have had. Written by the controller alone, every now and then while they hold GPUs.

    All of it is as of one moment, which is written with it: what came before is counted, what comes after is not.
    """

    counted_until: Time | None = None
    """By the controller's clock. Absent: nothing is counted yet."""
    usage: Annotated[tuple[UserUsage, ...], Field(max_length=MAX_USERS)] = ()
    """By user, those with the most VRAM time if there are more."""
    months: Annotated[tuple[MonthlyUsage, ...], Field(max_length=MAX_MONTHLY)] = ()
    """By month, user and class, the latest months if there are more."""


class QLoRAQueue(Model):
    """A share of the cluster's GPUs."""

    api_version: Literal["qlora.dev/v1alpha1"] = API_VERSION
    kind: Literal["QLoRAQueue"] = "QLoRAQueue"
    metadata: ObjectMeta
    spec: QLoRAQueueSpec = QLoRAQueueSpec()
    status: QLoRAQueueStatus = QLoRAQueueStatus()
