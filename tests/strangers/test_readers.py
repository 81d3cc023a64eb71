"""Whoever reads what strangers wrote answers with a value or in words: no traceback, no InternalError, no hang.

Termination messages, progress, objects that do not parse, pods, nodes, files of stores and of stages, configs and
safetensors headers: each from a seed, `QLORA_FUZZ` of each.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
from pydantic import ValidationError

from orchestrator.adapters.job_store import model_config, stored_adapter
from orchestrator.adapters.kubernetes import pod_facts
from orchestrator.adapters.kubernetes.api import KubeApi
from orchestrator.adapters.kubernetes.nodes import gpus_held, read_node
from orchestrator.adapters.kubernetes.objects import Parser
from orchestrator.adapters.kubernetes.pod_facts import RuntimeBounds, Surroundings, read_pod, stage_fact
from orchestrator.adapters.kubernetes.pod_manifest import (
    ATTEMPT_LABEL,
    JOB_LABEL,
    JOB_UID_LABEL,
    STAGE_LABEL,
    TRAINER,
)
from orchestrator.adapters.kubernetes.pod_policy import PodPolicy
from orchestrator.adapters.kubernetes.watch import Changes, Feed
from orchestrator.adapters.local.shim import EXIT_NAME, PROCESS_NAME, STOP_NAME, TERMINATION_NAME
from orchestrator.adapters.local.stages import PROGRESS_NAME, STAGE_NAME, Stage
from orchestrator.adapters.ray_fabric.wire import Answer, Word
from orchestrator.api.formats import AttemptLog, CheckpointManifest, Fence, JournalRecord, PreparedManifest
from orchestrator.api.job import ModelSource, QLoRAJob
from orchestrator.api.protocol import from_trainer
from orchestrator.api.results import ProgressReport, StageResult
from orchestrator.api.task import StageTask
from orchestrator.core.job.unreadable import read_leniently
from orchestrator.errors import OrchestratorError
from tests.builders import NOW, make_job, make_task, submitted_job
from tests.strangers.generate import instance
from tests.strangers.harm import harmful
from tests.strangers.test_decide import a_status
from tests.strangers.test_fuzz import CHARACTERS, ROUNDS, SEED, any_value, mutated

Json = dict[str, Any]
DEEP = "[" * 200_000
HUGE = "9" * 5000
TOKENS = [
    "null",
    "NaN",
    "-Infinity",
    "1e400",
    HUGE,
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    '"',
    "\\ud800",
    "\\u202e",
    "true",
    "-1",
    "0.5",
]


def any_text(dice: random.Random, wire: object) -> bytes:
    """A JSON text of the value, as it is, changed, or of no shape at all."""
    match dice.randrange(8):
        case 0:
            return dice.choice([b"", b"\xff\xfe", DEEP.encode(), HUGE.encode(), b"null", b"\x00", b'"x"', b"[]", b"{}"])
        case 1:
            return json.dumps(any_value(dice)).encode()
        case 2 | 3 if isinstance(wire, dict):
            return json.dumps(mutated(dice, cast(Json, wire))).encode()
        case 4:
            return json.dumps(wire).encode()
        case _:
            text = json.dumps(wire)
            for _ in range(dice.randrange(1, 4)):
                at = dice.randrange(len(text) + 1)
                text = text[:at] + dice.choice([*TOKENS, *CHARACTERS]) + text[at + dice.randrange(3) :]
            return text.encode(errors="surrogatepass")


WIRES: Mapping[str, Callable[[bytes], object]] = {
    "termination message": lambda data: pod_facts._result(data.decode(errors="replace")),  # pyright: ignore[reportPrivateUsage]
    "message of a trainer": from_trainer.validate_json,
    "word of the fabric": Word.model_validate_json,
    "answer of an agent": Answer.model_validate_json,
}


@pytest.mark.parametrize("name", WIRES)
def test_messages_are_read_or_refused(name: str) -> None:
    dice, seen = random.Random(SEED), Counter[str]()
    for _ in range(ROUNDS * 3):
        report = instance(dice, ProgressReport)
        wires = {
            "termination message": lambda: instance(dice, StageResult),
            "message of a trainer": lambda report=report: {"type": "progress", "report": report},
            "word of the fabric": lambda: instance(dice, Word),
            "answer of an agent": lambda: instance(dice, Answer),
        }
        try:
            found = WIRES[name](any_text(dice, wires[name]()))
        except ValidationError:
            found = None
        seen["refused" if found is None else "read"] += 1
    assert min(seen["read"], seen["refused"]) > ROUNDS / 10


def test_what_cannot_be_read_of_a_job_counts_as_not_told() -> None:
    dice, parser, seen = random.Random(SEED), Parser(), Counter[str]()
    for number in range(ROUNDS):
        job = submitted_job(f"job-{number}").model_dump(mode="json", by_alias=True, exclude_none=True)
        job["status"] = json.loads(a_status(dice).model_dump_json(by_alias=True, exclude_none=True))
        odd = job if dice.random() < 0.5 else mutated(dice, job) if dice.random() < 0.8 else without(dice, job)
        odd["metadata"] = {**job["metadata"], "uid": "u", "resourceVersion": "1", **_odd_metadata(dice)}
        read_leniently(odd, namespace="team-a", name="odd")
        read_leniently(any_value(dice), namespace="team-a", name="odd")
        seen[type(parser.job_or_unreadable(odd)).__name__] += 1
    assert min(seen.values()) > ROUNDS / 10


FIELDS_READ = (
    *(("metadata", name) for name in ("uid", "annotations", "deletionTimestamp", "finalizers")),
    *(("spec", name) for name in ("queue", "suspend", "activeDeadlineSeconds")),
    *(("status", name) for name in ("attempts", "activeSeconds")),
    *(("attempt", name) for name in ("stage", "number", "gpuClass", "finishTime")),
)
VALUES: tuple[Any, ...] = (None, True, 0, 1.5, 10**40, "", "train", [], ["train"], [[]], {}, {"a": []})


@pytest.mark.parametrize(("part", "field"), FIELDS_READ)
def test_each_field_that_is_read_of_it_may_be_of_any_type(part: str, field: str) -> None:
    for value in VALUES:
        attempt = {"stage": "train", "number": 1, "gpuClass": "24Gi"} | ({field: value} if part == "attempt" else {})
        odd: Json = {"metadata": {"uid": "u"}, "spec": {}, "status": {"attempts": [attempt]}}
        if part != "attempt":
            odd[part] |= {field: value}
        found = read_leniently(odd, namespace="team-a", name="odd")
        assert isinstance(found.uid, str)
        assert isinstance(found.queue, str)
        assert found.gpu_class is None or isinstance(found.gpu_class, str)
        assert found.stage in ("", "odd-train-1", "odd-train-0")
        hash(found)  # what it is kept by


def without(dice: random.Random, job: Json) -> Json:
    return {**job, dice.choice(["spec", "status"]): any_value(dice)}


def _odd_metadata(dice: random.Random) -> Json:
    return {
        "labels": dice.choice([None, {}, {f"l{n}": "x" for n in range(100)}]),
        "annotations": dice.choice([None, {"qlora.dev/cancel": "true"}, {"qlora.dev/x": "\u202e" * 100_000}]),
        "finalizers": dice.choice([None, [], ["foreign.example/held"] * 3]),
        "creationTimestamp": dice.choice([None, "2026-01-01T00:00:00Z", "0000-12-31T00:00:00Z"]),
    }


POD: Json = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {
        "name": "job-train-1",
        "namespace": "team-a",
        "uid": "pod-uid",
        "resourceVersion": "7",
        "creationTimestamp": "2026-01-01T11:00:00Z",
        "labels": {JOB_LABEL: "job", JOB_UID_LABEL: "uid", ATTEMPT_LABEL: "1", STAGE_LABEL: "train"},
    },
    "spec": {
        "nodeName": "gpu-1",
        "containers": [{"name": TRAINER, "resources": {"limits": {"memory": "1Gi", "nvidia.com/gpu": "1"}}}],
        "initContainers": [{"name": "agent", "resources": {"limits": {"nvidia.com/gpu": "1k"}}}],
    },
    "status": {
        "phase": "Running",
        "conditions": [
            {"type": "PodScheduled", "status": "True", "lastTransitionTime": "2026-01-01T11:00:01Z"},
            {"type": "DisruptionTarget", "status": "False", "reason": "x", "message": "y"},
        ],
        "initContainerStatuses": [{"name": "agent", "state": {"waiting": {"reason": "CrashLoopBackOff"}}}],
        "containerStatuses": [
            {
                "name": TRAINER,
                "state": {
                    "terminated": {
                        "exitCode": 0,
                        "startedAt": "2026-01-01T11:00:02Z",
                        "finishedAt": "0000-01-01T00:00:00Z",
                        "reason": "Completed",
                        "message": "{}",
                    }
                },
            }
        ],
    },
}
NODE: Json = {
    "metadata": {"name": "gpu-1", "resourceVersion": "7", "labels": {"nvidia.com/gpu.memory": "24564"}},
    "spec": {"taints": [{"key": "nvidia.com/gpu", "effect": "NoSchedule"}]},
    "status": {"allocatable": {"nvidia.com/gpu": "2"}, "conditions": [{"type": "Ready", "status": "True"}]},
}


POLICY = PodPolicy(trainer_image="i", tracking_uri="t")


class OnePage:
    """An API server that has these objects."""

    def __init__(self, items: list[Json]) -> None:
        self.items = items

    def get(self, _path: str, **_query: object) -> Json:
        return {"metadata": {"resourceVersion": "9"}, "items": self.items}


def test_pods_and_nodes_of_any_kind_leave_the_others_in_view() -> None:
    dice = random.Random(SEED)
    whole = {**POD, "metadata": {**POD["metadata"], "name": "whole"}}
    whole["status"] = {"phase": "Running", "containerStatuses": []}
    readers: list[tuple[Json, Callable[[Json], object]]] = [
        (POD, lambda item: read_pod(item, POLICY)),
        (POD, lambda item: gpus_held(item, POLICY)),
        (NODE, lambda item: read_node(item, POLICY)),
    ]
    for base, read in readers:
        items = [mutated(dice, base) for _ in range(ROUNDS)]
        for number, item in enumerate(items):
            item["metadata"] = {**base["metadata"], "name": f"odd-{number}"}
            if base is POD and dice.random() < 0.5:
                item["metadata"]["labels"] = {**POD["metadata"]["labels"], ATTEMPT_LABEL: dice.choice(["0", "9" * 63])}
        healthy = whole if base is POD else base
        feed = Feed(cast(KubeApi, OnePage([*items, healthy])), "/api/v1/x", read, Changes(), "", lambda _: None)
        feed.refresh()
        key = f"{healthy['metadata'].get('namespace', '')}/{healthy['metadata']['name']}"
        assert feed.find(key) == read(healthy)
        for _, found in feed.values():
            if isinstance(found, pod_facts.StagePod):
                stage_fact(found, Surroundings(), None, RuntimeBounds(), NOW)


def test_a_message_longer_than_a_kubelet_keeps_is_nobodys() -> None:
    state = {"terminated": {"exitCode": 0, "message": '{"failure": null}' + " " * 5000}}
    found = read_pod({**POD, "status": {"containerStatuses": [{"name": TRAINER, "state": state}]}}, POLICY)
    assert found.end is not None
    assert found.end.text == ""


def test_a_stages_folder_tells_what_it_can(tmp_path: Path) -> None:
    dice = random.Random(SEED)
    names = [STAGE_NAME, PROGRESS_NAME, TERMINATION_NAME, EXIT_NAME, PROCESS_NAME, STOP_NAME]
    record = {"task": make_task(make_job(), store=tmp_path).to_wire(), "gpu_class": "24Gi"}
    process = {"pid": 1, "start_ticks": 1, "boot_id": "x"}
    whole: dict[str, object] = {
        STAGE_NAME: record,
        EXIT_NAME: {"exit_code": 0, "disrupted": False, "finish_time": "2026-01-01T00:00:00Z"},
        PROCESS_NAME: {"shim": process, "trainer": None, "start_time": "2026-01-01T00:00:00Z"},
        STOP_NAME: {"time_seconds": 1.0, "grace_seconds": 1, "reason": "Cancelled"},
    }
    for number in range(ROUNDS // 2):
        folder = tmp_path / "stages" / "team-a" / f"job-train-{number}"
        folder.mkdir(parents=True)
        for name in names:
            wire = whole.get(name) or instance(dice, StageResult if name == TERMINATION_NAME else ProgressReport)
            if dice.random() < 0.7 or name == STAGE_NAME:
                data = json.dumps(wire).encode() if name == STAGE_NAME else any_text(dice, wire)
                (folder / name).write_bytes(data)
        fact = Stage(folder=folder).fact()
        assert fact is not None


CONFIG: Json = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 256,
    "num_experts": 1,
    "tie_word_embeddings": True,
    "text_config": None,
    "quantization_config": None,
}


def test_a_config_gives_a_shape_or_words(tmp_path: Path) -> None:
    dice, seen = random.Random(SEED), Counter[str]()
    for _ in range(ROUNDS):
        (tmp_path / "config.json").write_bytes(any_text(dice, CONFIG))
        try:
            facts = model_config.read_facts(ModelSource(source=f"file://{tmp_path}"))
            assert harmful(facts.model_dump_json()) == []
            seen["read"] += 1
        except OrchestratorError:
            seen["refused"] += 1
    assert min(seen["read"], seen["refused"]) > ROUNDS / 20


def an_adapter_folder(dice: random.Random, folder: Path) -> None:
    """Files that a manifest vouches for, or nearly."""
    folder.mkdir(exist_ok=True)
    journal = b"\n".join(any_text(dice, instance(dice, JournalRecord)) for _ in range(dice.randrange(3)))
    files = {"adapter_model.safetensors": b"x", "adapter_config.json": b"{}", "journal.jsonl": journal}
    entries = [
        {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
    ]
    manifest = {**instance(dice, CheckpointManifest), "complete": True}
    manifest["files"] = dice.sample(entries, dice.randrange(4))
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "manifest.json").write_bytes(any_text(dice, manifest))


def test_a_stored_adapter_is_read_or_refused(tmp_path: Path) -> None:
    dice, seen = random.Random(SEED), Counter[str]()
    for number in range(ROUNDS // 2):
        folder = tmp_path / "adapter"
        an_adapter_folder(dice, folder)
        readers: list[Callable[[], object]] = [
            lambda uri=f"file://{folder}": stored_adapter.read_manifest(uri),
            lambda uri=f"file://{folder}": stored_adapter.read_journal(uri),
            lambda uri=f"file://{folder}", n=number: stored_adapter.download(uri, tmp_path / f"into-{n}", None),
        ]
        for read in readers:
            try:
                read()
                seen["read"] += 1
            except OrchestratorError:
                seen["refused"] += 1
    assert min(seen.values()) > ROUNDS / 20


@pytest.mark.parametrize(
    "kind",
    [AttemptLog, CheckpointManifest, Fence, JournalRecord, PreparedManifest, StageTask, QLoRAJob],
    ids=lambda kind: kind.__name__,
)
def test_files_of_the_contract_are_read_or_refused(kind: Any) -> None:
    dice, seen = random.Random(SEED), Counter[str]()
    for _ in range(ROUNDS):
        try:
            kind.model_validate_json(any_text(dice, instance(dice, kind)))
            seen["read"] += 1
        except ValidationError:
            seen["refused"] += 1
    assert seen["refused"] > ROUNDS / 10
