"""Every bound and every rule of the resource definitions, tried on a real API server and on the models.

`test_crds` says what is valid, case by case. Here the cases are found by walking the models' schemas, so that a new
field is tried from the day it exists. The models judge as strict readers of JSON: a lax one, as for manifests, also
takes "64" for 64, which the API server refuses.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from orchestrator.adapters.kubernetes.api import KubeApi, path_of
from orchestrator.api.base import API_VERSION, Model
from orchestrator.api.crd import IMMUTABLE, RULES
from orchestrator.api.job import (
    TRAINING_FIELDS_ABOVE_ZERO,
    TRAINING_FIELDS_BELOW_ONE,
    QLoRAJob,
    QLoRAJobSpec,
    QLoRAJobStatus,
)
from orchestrator.api.layer_trace import KIND_LETTERS, ModelTrace
from orchestrator.api.plan import Estimate
from orchestrator.api.queue import QLoRAQueue, QLoRAQueueSpec
from orchestrator.api.sweep import DecimalRange, IntegerRange, LogRange, QLoRASweepSpec, SweepDimension
from orchestrator.errors import InvalidObject
from tests.cluster.control_plane import ControlPlane
from tests.cluster.resources import clear

Json = dict[str, Any]
JOBS, QUEUES = path_of(API_VERSION, "qlorajobs", "team-b"), path_of(API_VERSION, "qloraqueues")
SPEC: Json = {"model": {"source": "hf://owner/model"}, "dataset": {"source": "s3://bucket/train.jsonl"}}
HELD_OUT: Json = {"dataset": {**SPEC["dataset"], "evalFraction": "0.1"}}
GATE: Json = {"metric": "f1", "atLeast": "0.5"}
GATED: Json = {"evaluation": {"generation": {}}, "tracking": {"promote": {"alias": "champion", "when": [GATE]}}}
QUOTA: Json = {"gpuClass": "24Gi", "nominal": 1}

# Tried on every field, whatever its type.
VALUES: list[object] = ["", "a", "A b", "a\u00a0b", "0", "1", "0.5", "1e-9", "01", "-1", "48Gi", True, 7, -1, 7.5]
VALUES += [[], ["a"], ["a b"], [""], [7], ["a"] * 17, ["a"] * 65, ["é" * 129], {}, {"a": "b"}, {"uri": "s3://b/k"}]
VALUES += [["a" * 128], ["a" * 129], ["f1"], "{{ a }}", "chatml", ".", "..", "a?b", " a"]
VALUES += [[{"metric": "f1", "atLeast": "-0.5"}]]
# What a text of a given length is made of: each fits the pattern of some field.
FILLERS = ("a", "é", "7", "{{ a", "hf://a", "s3://a", "s3://\u2003", "0.", "v")
# Where a double is not the decimal: comparisons must come out alike for both readers.
DECIMALS = ("0.5", "5e-1", "0.500000000001", "5000000000.000000001e-10", "0e9", "1E-99", "0.000000000001e-99", "1.0e0")
DECIMALS += ("0.999999999999", "9999999999.99999999e-10", "9999999999.999999999e-10", "10e-1", "9.5e-1", "0.0")


@pytest.fixture(scope="module")
def api(cluster: ControlPlane) -> Iterator[KubeApi]:
    """A cluster without jobs and queues."""
    api = cluster.api()
    clear(api)
    yield api
    clear(api)
    api.close()


def resolved(document: Json, node: Json) -> Json:
    """A field with its reference followed and null taken out of a union."""
    options = [option for option in node.get("anyOf", []) if option.get("type") != "null"]
    if len(options) == 1:
        node = {**node, **options[0]}
    return document["$defs"][node["$ref"].rsplit("/", 1)[1]] if "$ref" in node else node


def leaves(model: type[Model]) -> Iterator[tuple[str, Json]]:
    """Path and schema of everything below the spec that is no object."""
    document = model.model_json_schema(by_alias=True)

    def walk(node: Json, path: str) -> Iterator[tuple[str, Json]]:
        for name, raw in node["properties"].items():
            field = resolved(document, raw)
            if "properties" in field:
                yield from walk(field, f"{path}{name}.")
            else:
                yield f"{path}{name}", field

    yield from walk(document, "")


def candidates(node: Json) -> list[object]:
    """Values on both sides of every bound."""
    found = [*VALUES, *DECIMALS, *node.get("enum", [])]
    for key in ("minimum", "maximum"):
        if key in node:
            found += [node[key] - 1, node[key], node[key] + 1]
    for length in {node.get("minLength", 1), node.get("maxLength", 1)}:
        for filler in FILLERS:
            found += [(filler + filler[-1] * length)[:length], (filler + filler[-1] * length)[: length + 1]]
    return found


def changed(spec: Mapping[str, Any], path: str, value: object) -> Json:
    copied: Json = copy.deepcopy(dict(spec))
    *parents, last = path.split(".")
    target = copied
    for parent in parents:
        target = target.setdefault(parent, {})
    target[last] = value
    return copied


def wire(kind: type[QLoRAJob] | type[QLoRAQueue], spec: Json) -> Json:
    return {"apiVersion": API_VERSION, "kind": kind.__name__, "metadata": {"name": "case"}, "spec": spec}


def complaints(api: KubeApi, kind: type[QLoRAJob] | type[QLoRAQueue], spec: Json) -> tuple[str, str]:
    """What the models and the API server have against it; nothing where it is valid."""
    return complaints_about(api, kind, JOBS if kind is QLoRAJob else QUEUES, wire(kind, spec))


def complaints_about(api: KubeApi, kind: type[BaseModel], objects: str, document: Json) -> tuple[str, str]:
    """The same of a whole document, which would be stored under that path."""
    ours = theirs = ""
    try:
        kind.model_validate_json(json.dumps(document), strict=True)
    except ValidationError as error:
        ours = str(error)
    try:
        api.create(f"{objects}?dryRun=All&fieldValidation=Strict", document)
    except InvalidObject as error:
        theirs = str(error)
    return ours, theirs


JOB_FIELDS = dict(leaves(QLoRAJobSpec))
QUEUE_FIELDS = dict(leaves(QLoRAQueueSpec))


@pytest.mark.parametrize("path", JOB_FIELDS)
def test_every_bound_of_a_job_is_the_same_for_both(api: KubeApi, path: str) -> None:
    needed: Json = {
        "dataset.evalSplit": {"dataset": {**SPEC["dataset"], "evalSource": "s3://b/e"}},
        "adapter.experts": {"adapter": {"dropout": "0"}},
        "evictionBudget.windowSeconds": {"evictionBudget": {"maxEvictions": 1}},
        "evaluation.generation.regex": {"evaluation": {"generation": {"metrics": ["regex"]}}, "tracking": {}},
    }
    if path.startswith("evaluation."):
        needed.setdefault(path, HELD_OUT)
    if path.startswith("training.objective."):  # the bounds of what only preferences have
        needed[path] = preferences()
    if path.startswith(("evaluation.generation.", "tracking.promote.")):
        needed[path] = {**HELD_OUT, **GATED, **needed.get(path, {})}
    agree_on_all(api, QLoRAJob, {**SPEC, **needed.get(path, {})}, path, JOB_FIELDS[path])


@pytest.mark.parametrize("path", QUEUE_FIELDS)
def test_every_bound_of_a_queue_is_the_same_for_both(api: KubeApi, path: str) -> None:
    needed: Json = {"budget.whenSpent": {"budget": {"gpuHours": 1}}}
    agree_on_all(api, QLoRAQueue, needed.get(path, {}), path, QUEUE_FIELDS[path])


def agree_on_all(api: KubeApi, kind: type[QLoRAJob] | type[QLoRAQueue], spec: Json, path: str, node: Json) -> None:
    verdicts: set[bool] = set()
    for value in candidates(node):
        ours, theirs = complaints(api, kind, changed(spec, path, value))
        assert bool(ours) == bool(theirs), f"{path}={value!r:.80}: the models: {ours}; the API server: {theirs}"
        verdicts.add(not ours)
    assert verdicts == {True, False}, f"no value of {path} was accepted, or none refused"


IN_STATUS = (Estimate, ModelTrace)
OF_SWEEPS = (DecimalRange, LogRange, IntegerRange, SweepDimension, QLoRASweepSpec)
"""Whose rules `test_sweep_objects` tries."""


def rule_breakers() -> list[tuple[str, object]]:
    """Something that only it forbids, for every rule of a job's spec."""
    both = {"source": "s3://b/t", "evalSource": "s3://b/e", "evalFraction": "0.1"}
    found: list[tuple[str, object]] = [("dataset.evalFraction", "0.6"), ("dataset", both)]
    found += [("adapter.dropout", "1"), ("tracking.alias", "v1"), ("tracking.registeredModel", "..")]
    found += [("tracking.registeredModel", "a/b"), ("adapter", {"experts": True})]
    found += [("adapter", {"experts": True, "dropout": "0", "useDora": True})]
    found += [("dataset.evalSplit", "test"), ("training.epochs", "1000001")]
    found += [("model.chatTemplate", "templates/chat.jinja"), ("model.chatTemplate", "{{ '模' }}" + "模" * 20_000)]
    aliases = {
        name: field.alias for name, field in type(QLoRAJobSpec.model_fields["training"].default).model_fields.items()
    }
    found += [(f"training.{aliases[name]}", "0") for name in TRAINING_FIELDS_ABOVE_ZERO]
    return found + [(f"training.{aliases[name]}", "1") for name in TRAINING_FIELDS_BELOW_ONE]


def answer_rule_breakers() -> Iterator[Json]:
    """Specs that one rule about answers to held-out prompts forbids."""
    yield {"evaluation": {"generation": {}}}
    yield {"dataset": {**HELD_OUT["dataset"], "trainOn": "all"}, "evaluation": {"generation": {}}}
    yield {**HELD_OUT, "evaluation": {"generation": {"metrics": ["f1", "f1"]}}}
    yield {**HELD_OUT, "evaluation": {"generation": {"regex": "a"}}}
    yield {"tracking": GATED["tracking"]}
    yield {**HELD_OUT, "evaluation": {"metric": "rewards/margins"}}
    yield {"evaluation": {"metric": "perplexity"}}
    yield {"training": {"onNonFinite": "rollback"}}
    for promote in (
        {"alias": "candidate", "when": [GATE]},
        {"alias": "v1", "when": [GATE]},
        {"alias": "champion", "when": [{**GATE, "confidence": "0.4"}]},
    ):
        yield {**HELD_OUT, **GATED, "tracking": {"promote": promote}}


def preferences(*, objective: Json | None = None, **dataset: str) -> Json:
    """The sections of a spec of preferences."""
    return {
        "dataset": {**SPEC["dataset"], "format": "preference", **dataset},
        "training": {"objective": {"type": "dpo", **(objective or {})}},
    }


def preference_rule_breakers() -> Iterator[Json]:
    """Specs that one rule about preferences forbids."""
    yield {"training": {"objective": {"type": "dpo"}}}
    yield {"training": {"objective": {"beta": "0.2"}}}
    yield {"training": {"objective": {"labelSmoothing": "0.2"}}}
    yield preferences(objective={"beta": "0"})
    yield preferences(objective={"labelSmoothing": "0.5"})
    yield preferences(tooLong="truncate")
    yield preferences(trainOn="all")
    yield {**preferences(evalFraction="0.1"), "evaluation": {"generation": {}}}


def format_rule_breakers() -> Iterator[Json]:
    """Specs that one rule about formats forbids."""
    yield {"publish": {"formats": ["merged", "merged"]}}
    yield {"publish": {"formats": ["merged"]}, "adapter": {"experts": True, "dropout": "0"}}
    yield {"publish": {"formats": ["gguf-adapter"]}, "adapter": {"useDora": True}}


def test_every_rule_of_a_spec_is_enforced_in_the_same_words(api: KubeApi) -> None:
    """The field that each names is in the answer, too."""
    own = {
        rule
        for model, rules in RULES.items()
        if model not in (*IN_STATUS, *OF_SWEEPS)
        for each in rules.values()
        for rule in each
    }
    cases = [(QLoRAJob, changed(SPEC, path, value)) for path, value in rule_breakers()]
    cases += [
        (QLoRAJob, {**SPEC, **each})
        for each in (*answer_rule_breakers(), *preference_rule_breakers(), *format_rule_breakers())
    ]
    named_twice = {"notifications": [{"name": "chat", "url": "https://example.org/a"}] * 2}
    cases += [(QLoRAJob, {**SPEC, **named_twice}), (QLoRAQueue, named_twice)]
    two = {"turnSeconds": 600, "fairSharing": "PerUser"}
    cases += [(QLoRAQueue, each) for each in ({"quotas": [QUOTA, QUOTA]}, {"budget": {}}, two)]
    met = set[Any]()
    for kind, spec in cases:
        ours, theirs = complaints(api, kind, spec)
        told = {rule for rule in own if rule.message in theirs and f".{rule.field}: " in theirs}
        assert len(told) == 1, theirs
        assert all(rule.message in ours for rule in told), ours
        met |= told
    assert met == own


@pytest.mark.parametrize("names", [("q_proj", "v_proj"), ("a" * 128,), ("m.0.q_proj",)])
def test_modules_may_be_named(api: KubeApi, names: tuple[str, ...]) -> None:
    assert complaints(api, QLoRAJob, changed(SPEC, "adapter.targetModules", list(names))) == ("", "")


@pytest.mark.parametrize(
    ("before", "after"),
    [(None, {"uri": "s3://b/k"}), ({"uri": "s3://b/k"}, None), ({"uri": "s3://b/k"}, {"uri": "s3://b/other"})],
)
def test_a_store_is_neither_set_nor_taken_away_later(api: KubeApi, before: Json | None, after: Json | None) -> None:
    clear(api)
    api.create(JOBS, wire(QLoRAJob, {**SPEC, **({"store": before} if before else {})}))
    message = next(rule.message for rule in IMMUTABLE if rule.field == "store")
    with pytest.raises(InvalidObject, match=message):
        api.patch(f"{JOBS}/case", {"spec": {"store": after}})


def test_null_is_unset_and_kept_only_where_it_is_a_choice(api: KubeApi) -> None:
    """The server's own view of null: where there is a default it takes effect, which the models leave to the writer."""
    clear(api)
    spec = {**SPEC, "store": None, "training": {"maxSteps": None, "seed": None}, "tracking": {"alias": None}}
    stored = api.create(f"{JOBS}?dryRun=All&fieldValidation=Strict", wire(QLoRAJob, spec))["spec"]
    del spec["training"]["seed"]
    assert stored == QLoRAJobSpec.model_validate(spec).to_wire()
    assert stored["tracking"] == {"alias": None}


def sample(document: Json, node: Json) -> Any:
    """A value with every field set."""
    node = resolved(document, node)
    if "enum" in node:
        return node["enum"][0]
    if any(option.get("type") == "array" for option in node.get("anyOf", [])):  # a word or a list of texts
        return sample(document, next(option for option in node["anyOf"] if option.get("type") == "array"))
    match node["type"]:
        case "object" if "properties" in node:
            return {name: sample(document, child) for name, child in node["properties"].items()}
        case "object":
            return {"key": sample(document, node["additionalProperties"])}
        case "array":
            return [sample(document, node["items"])]
        case "string" if node.get("format") == "date-time":
            return "2026-01-01T12:00:00Z"
        case "string":
            pattern = node.get("pattern", "")
            known = {"sha256": f"sha256:{'0' * 64}", KIND_LETTERS: "a", "hf|": "hf://a/b", "(job|queue)": "job/a"}
            return next((value for part, value in known.items() if part in pattern), "text")
        case kind:
            return {"boolean": True, "integer": 1, "number": 0.5}[kind]


def full_status() -> Json:
    document = QLoRAJobStatus.model_json_schema(by_alias=True)
    return QLoRAJobStatus.model_validate(sample(document, document)).to_wire()


def put_status(api: KubeApi, status: Json) -> Json:
    job = api.get(f"{JOBS}/case")
    return api.replace(f"{JOBS}/case/status?fieldValidation=Strict", {**job, "status": status})["status"]


def test_the_server_keeps_every_field_of_a_status(api: KubeApi) -> None:
    clear(api)
    api.create(JOBS, wire(QLoRAJob, SPEC))
    full = full_status()
    assert set(full) == {field.alias for field in QLoRAJobStatus.model_fields.values()}
    assert put_status(api, full) == full


def test_a_status_that_the_models_refuse_is_refused(api: KubeApi) -> None:
    clear(api)
    api.create(JOBS, wire(QLoRAJob, SPEC))
    full = full_status()
    condition = full["conditions"][0]
    refused: Mapping[str, tuple[str, object]] = {
        "peakBytes must be the sum": ("estimate.peakBytes", 2),
        "keys have at most 256 characters": ("evictions", {"k" * 257: 1}),
        "Unsupported value": ("attempts", [{**full["attempts"][0], "stage": "merge"}]),
        "Required value": ("checkpoint", {"step": 1}),
    }
    for words, (path, value) in refused.items():
        broken = changed(full, path, value)
        with pytest.raises(ValidationError):
            QLoRAJobStatus.model_validate(broken)
        with pytest.raises(InvalidObject, match=words):
            put_status(api, broken)
    with pytest.raises(InvalidObject, match="Duplicate value"):  # which only a list merged by key can say
        put_status(api, {**full, "conditions": [condition, condition]})
