"""QLoRAQueue: how much of the GPUs a team may use, and whom its jobs may move.

A queue that no object describes has no quota: the `default` queue works without any set-up. Queues are
cluster-wide names; a job names one in spec.queue. Which namespaces may do so is a list and no selector of labels: to
read those takes a right on all namespaces, and who may label a namespace would decide whose GPUs it gets.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from orchestrator.api.base import API_VERSION, DnsLabel, Model
from orchestrator.api.job import MAX_PRIORITY, MIN_PRIORITY, GpuClassName, ObjectMeta


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


class QLoRAQueue(Model):
    """A share of the cluster's GPUs."""

    api_version: Literal["qlora.dev/v1alpha1"] = API_VERSION
    kind: Literal["QLoRAQueue"] = "QLoRAQueue"
    metadata: ObjectMeta
    spec: QLoRAQueueSpec = QLoRAQueueSpec()
