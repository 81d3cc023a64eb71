"""What an API server says of an object, by the generated resource definitions and without a cluster.

The structural schemas are judged by `jsonschema`, which knows nothing of pydantic: nulls are dropped and defaults set
first, as the server does, and unknown fields are refused, as `kubectl apply` has the server do. Labels and annotations
are judged by the rules of Kubernetes' API conventions. Rules in CEL are left out: `tests/cluster/test_crd_bounds` tries
each of them on a real server.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

from jsonschema import Draft202012Validator

from orchestrator.api.crd import custom_resource_definitions

Json = dict[str, Any]
SCHEMAS: Mapping[str, Json] = {
    definition["spec"]["names"]["kind"]: definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    for definition in custom_resource_definitions()
}
MAX_NAME = 48
SERVED_METADATA = {"name", "namespace", "labels", "annotations"}
QUALIFIED = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")
SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
MAX_ANNOTATIONS_BYTES = 256 * 1024
# Go's classes, in the terms of Python's `re`; Z is Unicode's separators.
_Z = " \u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"


def server_refuses(item: object) -> str:
    """Why a server would refuse a new object; empty where it would take it."""
    if not isinstance(item, dict):
        return "no object"
    document = cast(Json, item)
    kind = document.get("kind")
    if document.get("apiVersion") != "qlora.dev/v1alpha1" or not isinstance(kind, str) or kind not in SCHEMAS:
        return "no such resource"
    schema = SCHEMAS[kind]
    wire = _defaulted(_without_nulls({k: v for k, v in document.items() if k != "status"}, schema), schema)
    validator: Any = VALIDATORS[kind]  # its errors have no types
    error = next(validator.iter_errors(wire), None)
    return (
        f"{error.json_path}: {error.message}"[:300] if error is not None else next(_metadata(wire.get("metadata")), "")
    )


def _metadata(meta: object) -> Iterator[str]:
    if not isinstance(meta, dict):
        yield "metadata is no object"
        return
    fields = {
        key: _without_null_values(value)
        for key, value in cast(Json, meta).items()
        if value is not None or key not in SERVED_METADATA
    }
    if unknown := fields.keys() - SERVED_METADATA:
        yield f"metadata: unknown {unknown}"
    name, namespace = fields.get("name"), fields.get("namespace", "default")
    if not isinstance(name, str) or len(name) > MAX_NAME or not LABEL.fullmatch(name):
        yield "metadata.name"
    if not isinstance(namespace, str) or len(namespace) > 63 or not LABEL.fullmatch(namespace):
        yield "metadata.namespace"
    for field in ("labels", "annotations"):
        found: Any = fields.get(field, {})
        if not isinstance(found, dict) or not all(isinstance(value, str) for value in cast(Json, found).values()):
            yield f"metadata.{field}: no texts"
            return
    labels: dict[str, str] = fields.get("labels", {})
    for key, value in labels.items():
        if not _is_qualified(key) or len(value) > 63 or not (value == "" or QUALIFIED.fullmatch(value)):
            yield f"metadata.labels: {key}"
    annotations: dict[str, str] = fields.get("annotations", {})
    yield from (f"metadata.annotations: {key}" for key in annotations if not _is_qualified(key.lower()))
    if sum(len(key.encode()) + len(value.encode()) for key, value in annotations.items()) > MAX_ANNOTATIONS_BYTES:
        yield "metadata.annotations: too long"


def _without_null_values(value: Any) -> Any:
    return {k: v for k, v in cast(Json, value).items() if v is not None} if isinstance(value, dict) else value


def _is_qualified(key: str) -> bool:
    prefix, slash, name = key.rpartition("/")
    fits = len(name) <= 63 and QUALIFIED.fullmatch(name) is not None
    return fits and (not slash or (len(prefix) <= 253 and SUBDOMAIN.fullmatch(prefix) is not None))


def _without_nulls(value: Any, schema: Json) -> Any:
    """`PruneNonNullableNullsWithoutDefaults`, and the defaults that take a null's place come after it."""
    if isinstance(value, dict):
        known, more = schema.get("properties", {}), schema.get("additionalProperties", {})
        kept: Json = {}
        for key, item in cast(Json, value).items():
            inner = known.get(key, more)
            is_unknown = key not in known and not more  # which `kubectl apply` has the server refuse, null or not
            if item is not None or inner.get("nullable") or is_unknown:
                kept[key] = _without_nulls(item, inner)
        return kept
    if isinstance(value, list):
        return [_without_nulls(item, schema.get("items", {})) for item in cast("list[Any]", value)]
    return value


def _defaulted(value: Any, schema: Json) -> Any:
    if not isinstance(value, dict):
        return value
    fields = cast(Json, value)
    for name, inner in schema.get("properties", {}).items():
        if name not in fields and "default" in inner:
            fields[name] = copy.deepcopy(inner["default"])
        if name in fields:
            fields[name] = _defaulted(fields[name], inner)
    return fields


def _json_schema(node: Json, *, closed: bool) -> Json:
    """A structural schema as one of JSON Schema that is as strict as `kubectl apply`."""
    found = {key: value for key, value in node.items() if not key.startswith("x-") and key not in _CONVERTED}
    if "pattern" in node:
        found["pattern"] = _python_pattern(node["pattern"])
    if node.get("nullable"):
        found["type"] = [node["type"], "null"]
    if "properties" in node:
        found["properties"] = {k: _json_schema(v, closed=k != "metadata") for k, v in node["properties"].items()}
        if closed:
            found["additionalProperties"] = False
    for key in ("items", "additionalProperties"):
        if key in node:
            found[key] = _json_schema(node[key], closed=True)
    return found


_CONVERTED = {"pattern", "nullable", "properties", "items", "additionalProperties", "default", "description", "format"}


def _python_pattern(pattern: str) -> str:
    """RE2 in the terms of Python: `$` is the end, and classes are ASCII's."""
    pattern = pattern.replace(r"\p{Z}", _Z).replace(r"[^\s\v", r"[^\t\n\f\r \v")
    pattern = re.sub(r"\\x\{([0-9a-f]+)\}", lambda found: re.escape(chr(int(found[1], 16))), pattern)
    return re.sub(r"\$$", r"\\Z", pattern)


VALIDATORS: Mapping[str, Draft202012Validator] = {
    kind: Draft202012Validator(_json_schema(schema, closed=True)) for kind, schema in SCHEMAS.items()
}
