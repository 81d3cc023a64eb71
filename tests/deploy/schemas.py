"""JSON schemas for kubeconform, from sources that are here: the API server's own, and the CRDs.

kubeconform's usual schemas are downloads. The same information is in the source of Kubernetes (the OpenAPI document
that the API server serves) and in CRDs (ours, and those of the Prometheus operator for its two kinds).
Objects are closed, so that a misspelled field is an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import yaml

from tests.deploy.tools import ROOT, go_module, kubernetes_source

PROMETHEUS_OPERATOR = ("github.com/prometheus-operator/prometheus-operator", "v0.91.0")
LOCATION = "{{.Group}}_{{.ResourceAPIVersion}}_{{.ResourceKind}}.json"

Json = dict[str, Any]


def write_schemas(folder: Path) -> str:
    """Write one schema a kind; the pattern that kubeconform finds them by."""
    for name, schema in (*_kubernetes(), *_custom()):
        (folder / f"{name}.json").write_text(json.dumps(schema))
    return f"{folder}/{LOCATION}"


def _kubernetes() -> Iterator[tuple[str, Json]]:
    document = json.loads((kubernetes_source() / "api" / "openapi-spec" / "swagger.json").read_text())
    definitions = {name: _closed(schema) for name, schema in document["definitions"].items()}
    for name, schema in document["definitions"].items():
        for kind in schema.get("x-kubernetes-group-version-kind", []):
            root = {"$ref": f"#/definitions/{name}", "definitions": _reachable(name, definitions)}
            yield _name(kind["group"], kind["version"], kind["kind"]), root


def _custom() -> Iterator[tuple[str, Json]]:
    operator = go_module(*PROMETHEUS_OPERATOR) / "example" / "prometheus-operator-crd"
    theirs = [operator / f"monitoring.coreos.com_{kinds}.yaml" for kinds in ("prometheusrules", "servicemonitors")]
    for path in (*sorted((ROOT / "manifests" / "crds").glob("*.yaml")), *theirs):
        for crd in yaml.safe_load_all(path.read_text()):
            spec = crd["spec"]
            for version in spec["versions"]:
                schema = _closed(version["schema"]["openAPIV3Schema"])
                schema["properties"] |= {"apiVersion": {}, "kind": {}, "metadata": {}}
                yield _name(spec["group"], version["name"], spec["names"]["kind"]), schema


def _name(group: str, version: str, kind: str) -> str:
    return f"{group or version}_{version}_{kind}".lower()  # kubeconform takes the core group's version for its name


def _closed(schema: Any) -> Any:
    """The schema with no room for fields that it does not name; quantities and ports are what the API takes."""
    if isinstance(schema, list):
        return [_closed(item) for item in cast("list[Any]", schema)]
    if not isinstance(schema, dict):
        return schema
    return _closed_object(cast(Json, schema))


def _closed_object(schema: Json) -> Json:
    if schema.get("x-kubernetes-int-or-string") or schema.get("format") == "int-or-string":
        return {"type": ["string", "integer"]}
    closed = {key: _closed(value) for key, value in schema.items() if key not in ("format", "properties")}
    named: Json | None = schema.get("properties")
    if isinstance(named, dict):  # by name, and a field may be named like a keyword
        closed["properties"] = {name: _closed(field) for name, field in named.items()}
    open_ended = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(named, dict) and not open_ended:
        closed["additionalProperties"] = False
    return closed


def _reachable(name: str, definitions: Json) -> Json:
    """The definitions that one of them needs, itself included."""
    found: Json = {}
    waiting = [name]
    while waiting:
        current = waiting.pop()
        if current not in found:
            found[current] = definitions[current]
            waiting += _references(definitions[current])
    # A quantity may be a number in YAML; the document calls it a string.
    quantity = "io.k8s.apimachinery.pkg.api.resource.Quantity"
    return {**found, quantity: {"type": ["string", "number"]}} if quantity in found else found


def _references(schema: Any) -> list[str]:
    if isinstance(schema, list):
        return [name for item in cast("list[Any]", schema) for name in _references(item)]
    if not isinstance(schema, dict):
        return []
    fields = cast(Json, schema)
    reference = fields.get("$ref")
    own = [reference.rsplit("/", 1)[1]] if isinstance(reference, str) else []
    return own + [name for value in fields.values() for name in _references(value)]
