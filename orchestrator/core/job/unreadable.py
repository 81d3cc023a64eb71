"""What can be told of a job whose object does not parse: enough to book its GPU, and to stop what runs for it.

Another version wrote such an object, or the API server accepted what this version cannot read. Nothing is decided
about it but its end: no stage is started, no result taken. It is read field by field, and whatever is not as it should
be counts as not told.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from orchestrator.api.base import MAX_COUNT
from orchestrator.api.job import CANCEL_ANNOTATION
from orchestrator.api.stage_name import STAGES_ON_GPU, StageName
from orchestrator.core.job.finalizer import FINALIZERS
from orchestrator.core.snapshot import UnreadableJob

_STAGES = ("prepare", "train", "publish")


def read_leniently(item: object, *, namespace: str, name: str) -> UnreadableJob:
    """The job in an object of JSON types, whatever it looks like."""
    meta, spec, status = _mapping(item, "metadata"), _mapping(item, "spec"), _mapping(item, "status")
    deleted = meta.get("deletionTimestamp") is not None
    cancelled = _mapping(meta, "annotations").get(CANCEL_ANNOTATION) == "true"
    attempt = _active_attempt(status)
    stage, number, gpu_class = _text(attempt, "stage"), attempt.get("number"), _text(attempt, "gpuClass")
    known = stage in _STAGES and _is_count(number)
    finalizers = meta.get("finalizers")
    return UnreadableJob(
        namespace=namespace,
        name=name,
        uid=_text(meta, "uid"),
        queue=_text(spec, "queue"),
        stage=f"{name}-{stage}-{number}" if known else "",
        gpu_class=(gpu_class or None) if stage in STAGES_ON_GPU else None,
        stop=deleted or cancelled or spec.get("suspend") is True,
        deleted=deleted,
        held=isinstance(finalizers, list | tuple) and any(ours in finalizers for ours in FINALIZERS),
        seconds_left=_seconds_left(spec, status),
    )


def job_key_of(namespace: str, stage: str) -> str:
    """`namespace/name` of the job that a stage's name is of."""
    parsed = StageName.parse(stage)
    return f"{namespace}/{parsed.job if parsed is not None else stage}"


def _active_attempt(status: Mapping[str, object]) -> Mapping[str, object]:
    attempts = status.get("attempts")
    last = cast(list[object], attempts)[-1] if isinstance(attempts, list) and attempts else None
    if not isinstance(last, Mapping):
        return {}
    found = cast(Mapping[str, object], last)
    return {} if found.get("finishTime") is not None else found


def _seconds_left(spec: Mapping[str, object], status: Mapping[str, object]) -> float | None:
    deadline, spent = spec.get("activeDeadlineSeconds"), status.get("activeSeconds", 0)
    if _is_count(deadline) and (_is_count(spent) or isinstance(spent, float)):
        return cast(int, deadline) - cast(float, spent)
    return None


def _is_count(value: object) -> bool:
    """Whether it is a number as the contract has them: any other is taken for no number, whatever its digits."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MAX_COUNT


def _mapping(item: object, name: str) -> Mapping[str, object]:
    found = cast(Mapping[str, object], item).get(name) if isinstance(item, Mapping) else None
    return cast(Mapping[str, object], found) if isinstance(found, Mapping) else {}


def _text(item: Mapping[str, object], name: str) -> str:
    found = item.get(name)
    return found if isinstance(found, str) else ""
