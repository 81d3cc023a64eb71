"""The resource definitions without a cluster: nothing of the models is lost in them, and every YAML reader agrees."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.api import crd
from orchestrator.api.job import AdapterSpec, QLoRAJobSpec, QLoRAJobStatus
from orchestrator.api.queue import QLoRAQueueSpec
from orchestrator.api.sweep import QLoRASweepSpec, QLoRASweepStatus

ROOT = Path(__file__).parents[2]
Json = dict[str, Any]
JOBS, QUEUES, SWEEPS = crd.custom_resource_definitions()


def schema(definition: Json) -> Json:
    return definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


def nodes(node: Json, path: str = "") -> Iterator[tuple[str, Json]]:
    """Every schema in it by path; lists and maps add `[]`."""
    yield path, node
    for name, child in node.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    for child in (node.get("items"), node.get("additionalProperties")):
        if child is not None:
            yield from nodes(child, f"{path}[]")


def model_paths(document: Json, node: Json, path: str = "") -> Iterator[str]:
    """The same paths as pydantic's own schema has them."""
    options = [option for option in node.get("anyOf", []) if option.get("type") != "null"]
    for option in options:
        yield from model_paths(document, option, path)
    if "$ref" in node:
        node = document["$defs"][node["$ref"].rsplit("/", 1)[1]]
    if not options:
        yield path
    for name, child in node.get("properties", {}).items():
        yield from model_paths(document, child, f"{path}.{name}")
    for child in (node.get("items"), node.get("additionalProperties")):
        if isinstance(child, dict):
            yield from model_paths(document, child, f"{path}[]")


@pytest.mark.parametrize(
    ("definition", "part", "model"),
    [
        (JOBS, "spec", QLoRAJobSpec),
        (JOBS, "status", QLoRAJobStatus),
        (QUEUES, "spec", QLoRAQueueSpec),
        (SWEEPS, "spec", QLoRASweepSpec),
        (SWEEPS, "status", QLoRASweepStatus),
    ],
)
def test_every_field_is_there(definition: Json, part: str, model: type[Any]) -> None:
    document = model.model_json_schema(by_alias=True)
    found = {path for path, _ in nodes(schema(definition)["properties"][part])}
    assert found == set(model_paths(document, document))
    assert len(found) > 5


@pytest.mark.parametrize("definition", [JOBS, QUEUES, SWEEPS])
def test_everything_that_can_grow_is_bounded(definition: Json) -> None:
    """CEL's cost is estimated from the bounds, and etcd takes objects of 1.5 MB."""
    parts = schema(definition)["properties"]
    for part in {"spec", "status"} & parts.keys():
        for path, node in nodes(parts[part], part):
            match node.get("type"):
                case "string":
                    assert {"maxLength", "enum"} & node.keys() or node["format"] == "date-time", path
                case "array":
                    assert "maxItems" in node, path
                case "object" if "additionalProperties" in node:
                    assert "maxProperties" in node, path
                case _:
                    pass


def test_defaults_are_the_specs_alone() -> None:
    """A default in the status would be a claim that the controller never made."""
    parts = schema(JOBS)["properties"]
    assert not [path for path, node in nodes(parts["status"]) if "default" in node or node.get("nullable")]
    assert [path for path, node in nodes(parts["spec"]) if node.get("nullable")] == [".tracking.alias"]


def test_a_validator_without_rules_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = {model: rules for model, rules in crd.RULES.items() if model is not AdapterSpec}
    monkeypatch.setattr(crd, "RULES", rules)
    with pytest.raises(TypeError, match=r"AdapterSpec: .*_dropout_is_a_probability"):
        crd.custom_resource_definitions()


def test_helm_reads_what_was_written() -> None:
    """Its YAML reader takes more texts for numbers than PyYAML does; `install.yaml` is what it made of the files."""
    installed = {
        document["metadata"]["name"]: document["spec"]
        for document in yaml.safe_load_all((ROOT / "manifests" / "install.yaml").read_text())
        if document["kind"] == "CustomResourceDefinition"
    }
    assert installed == {definition["metadata"]["name"]: definition["spec"] for definition in (JOBS, QUEUES, SWEEPS)}
