"""Jobs as they are kept in memory: as they were told, and with what is equal shared."""

from __future__ import annotations

from orchestrator.adapters.kubernetes.api import Json
from orchestrator.adapters.kubernetes.objects import Parser, job_wire
from orchestrator.api.job import QLoRAJob
from tests.builders import submitted_job

CONDITION = {"type": "Prepared", "status": "True", "reason": "Prepared", "lastTransitionTime": "2026-01-02T03:04:05Z"}


def told(name: str) -> Json:
    wire = job_wire(submitted_job(name, meta={"uid": f"uid-{name}"}))
    return {**wire, "status": {"observedGeneration": 1, "conditions": [{**CONDITION, "message": f"of {name}"}]}}


def test_equal_parts_and_names_of_fields_are_kept_once() -> None:
    parser = Parser()
    first, second = parser.job(told("first")), parser.job(told("second"))
    assert first.spec is second.spec
    for one, other in (
        (first, second),
        (first.metadata, second.metadata),
        (first.status, second.status),
        (first.status.conditions[0], second.status.conditions[0]),
    ):
        assert one.model_fields_set is other.model_fields_set


def test_a_job_is_what_was_told_and_a_changed_copy_changes_no_other() -> None:
    parser = Parser()
    first, second = parser.job(told("first")), parser.job(told("second"))
    before = second.model_dump_json(exclude_unset=True)
    changed = first.model_copy(update={"status": first.status.model_copy(update={"summary": "changed"})})
    assert "summary" in changed.status.model_fields_set
    assert "summary" not in first.status.model_fields_set
    assert second.model_dump_json(exclude_unset=True) == before
    assert parser.job(told("first")) == QLoRAJob.model_validate(told("first")) == first
