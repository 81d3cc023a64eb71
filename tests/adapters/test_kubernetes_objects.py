"""Jobs as they are kept in memory: as they were told, and with what is equal shared."""

from __future__ import annotations

import gc
import tracemalloc

import pytest

from orchestrator.adapters.kubernetes.api import Json
from orchestrator.adapters.kubernetes.objects import Parser, job_wire
from orchestrator.api.job import CANCEL_ANNOTATION, RELEASE_FINALIZER, QLoRAJob
from orchestrator.core.snapshot import UnreadableJob
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


def test_a_job_that_is_gone_leaves_nothing_behind() -> None:
    """Whatever it held: a tenant may submit and delete as many as there is time for."""
    parser = Parser()
    tracemalloc.start()
    try:
        sizes = [_held_after_jobs(parser, first) for first in (0, 100, 200, 300)]
    finally:
        tracemalloc.stop()
    template_bytes = 100 * 40_000
    assert sizes[-1] - sizes[0] < template_bytes / 10


def _held_after_jobs(parser: Parser, first: int) -> int:
    for number in range(first, first + 100):
        item = told(f"job-{number}")
        item["spec"]["model"]["chatTemplate"] = "{{ x }}" + f"{number:06}" * 6000
        parser.job(item)
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


LONG = "x" * 5000
METADATA: dict[str, Json] = {
    "an annotation of ours that is long": {"annotations": {"qlora.dev/note": LONG}},
    "annotations of others": {"annotations": {"example.org/note": "y" * 200_000, "Example.ORG/Note": ""}},
    "hundreds of labels": {"labels": {f"example.org/a-{number}": "x" * 63 for number in range(300)}},
    "hundreds of annotations of ours": {"annotations": {f"qlora.dev/a-{number}": "x" for number in range(300)}},
    "many finalizers": {"finalizers": [f"example.org/{number}-{'x' * 63}" for number in range(100)]},
    "nothing where there may be something": {"annotations": None, "labels": None},
    "what a later server adds": {"selfLink": "/x", "managedFields": [{}], "somethingNew": {"a": [1]}},
}


@pytest.mark.parametrize("meta", METADATA.values(), ids=METADATA)
def test_whatever_metadata_the_server_takes_can_be_read(meta: Json) -> None:
    item = told("loaded")
    item["metadata"] |= {"uid": "uid-loaded", **meta}
    job = Parser().job(item)
    assert job.metadata.uid == "uid-loaded"
    assert len(job.metadata.labels) <= 64
    assert sum(map(len, job.metadata.annotations.values())) <= 64 * 2048
    assert list(job.metadata.finalizers) == meta.get("finalizers", [])


def test_that_a_job_is_cancelled_is_read_among_however_many_annotations() -> None:
    item = told("loaded")
    item["metadata"]["annotations"] = {f"qlora.dev/a-{n}": "x" for n in range(300)} | {CANCEL_ANNOTATION: "true"}
    assert Parser().job(item).cancelled


SHAPES: list[object] = [None, 3, "x", [], [[]], {"a": {"b": {}}}, {"attempts": 3}, {"conditions": [None]}, True, 1e308]


@pytest.mark.parametrize("shape", SHAPES, ids=repr)
@pytest.mark.parametrize("part", ["spec", "status"])
def test_an_object_of_any_shape_is_read_or_told_of(part: str, shape: object) -> None:
    item = told("odd")
    item["metadata"] |= {"uid": "uid-odd", "finalizers": [RELEASE_FINALIZER]}
    item[part] = shape
    found = Parser().job_or_unreadable(item)
    assert isinstance(found, UnreadableJob)
    assert (found.key, found.uid, found.held, found.stop) == ("team-a/odd", "uid-odd", True, False)


def test_what_a_job_holds_that_cannot_be_read_is_told() -> None:
    item = told("odd")
    item["metadata"] |= {"deletionTimestamp": "2026-01-02T03:04:05Z"}
    item["spec"] = {"somethingNew": 1, "queue": "team", "suspend": True, "activeDeadlineSeconds": 100}
    item["status"] = {"activeSeconds": 30.5, "attempts": [{"stage": "train", "number": 7, "gpuClass": "48Gi"}]}
    found = Parser().job_or_unreadable(item)
    assert isinstance(found, UnreadableJob)
    assert (found.queue, found.stage, found.gpu_class) == ("team", "odd-train-7", "48Gi")
    assert (found.stop, found.deleted, found.seconds_left) == (True, True, 69.5)
