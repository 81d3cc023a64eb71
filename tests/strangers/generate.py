"""Instances of the contract's models, odd but as far as possible valid: by their JSON schemas, from a seed.

A field takes the ends of its range as often as anything between, so that what is worked out from it meets them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, cast

from orchestrator.api.base import DECIMAL_PATTERN, DIGEST_PATTERN, MAX_COUNT, Model

Json = dict[str, Any]
TIMES = (
    "0001-01-01T00:00:00Z",
    "9999-12-31T23:59:59Z",
    "0001-01-01T00:00:00+14:00",
    "9999-12-31T23:59:59-12:00",
    "1970-01-01T00:00:00Z",
    "2025-12-31T23:00:00Z",
    "2026-01-01T11:00:00Z",
    "2026-01-01T12:00:00Z",
    "2026-01-01T12:00:00.000001Z",
    "2026-01-01T13:00:00+02:00",
)
COUNTS = (0, 0, 1, 1, 2, 3, 10, 100, 2**31 - 1, 2**31, 10**8, 10**15, MAX_COUNT - 1, MAX_COUNT)
FLOATS = (0.0, -0.0, 1.0, 0.5, -1.5, 5e-324, 1e-9, 1e15, 1e300, 1.7976931348623157e308, -1.7976931348623157e308)
TEXTS = ("", "a", "24Gi", "a b", "é" * 100, "\x1b[2J\u202egnp\u2028x", "file:///a", "hf://a/b", "1", "n" * 256, "{}")
BY_PATTERN: Mapping[str, tuple[str, ...]] = {
    DIGEST_PATTERN: ("sha256:" + "0" * 64, "sha256:" + "f" * 64),
    DECIMAL_PATTERN: ("0", "1", "0.5", "1e-99", "1000000", "9999999999.999999999999e0", "3", "2e-4"),
}
SAMPLES = (
    *("a", "a-b", "team-a", "default", "48Gi", "auto", "q_proj", "main", "hf://a/b", "s3://b/k", "pvc://c/d.jsonl"),
    *("file:///x", "x" * 48, "0" * 64, "train.parquet", "{{ messages }}", "a/b"),
)


def instance(dice: random.Random, model: type[Model], *, likely: float = 0.7) -> Json:
    """An object of JSON types as the model takes it; optional fields are there so often."""
    return _Writer(dice, _schema(model), likely).value(_schema(model))


@cache
def _schema(model: type[Model]) -> Json:
    return model.model_json_schema(by_alias=True)


class _Writer:
    """Writes values for one schema."""

    def __init__(self, dice: random.Random, document: Json, likely: float) -> None:
        self._dice, self._document, self._likely = dice, document, likely

    def value(self, node: Json) -> Any:
        """Something that the node takes."""
        if "$ref" in node:
            return self.value(self._document["$defs"][node["$ref"].rsplit("/", 1)[1]])
        if options := node.get("anyOf") or node.get("oneOf"):
            return self.value(self._dice.choice(options))
        if "const" in node:
            return node["const"]
        if "enum" in node:
            return self._dice.choice(node["enum"])
        match node.get("type"):
            case "object":
                return self._object(node)
            case "array":
                return self._array(node)
            case "integer":
                return self._within(COUNTS, node)
            case "number":
                return self._within(FLOATS, node)
            case "boolean":
                return self._dice.random() < 0.5
            case "string":
                return self._text(node)
            case _:
                return None

    def _object(self, node: Json) -> Json:
        required = set(node.get("required", ()))
        found: Json = {}
        for name, field in node.get("properties", {}).items():
            if name in required or self._dice.random() < self._likely:
                found[name] = self.value(field)
        more = node.get("additionalProperties")
        if isinstance(more, dict):
            keys = self._dice.sample(SAMPLES, self._dice.randrange(3))
            found |= {key: self.value(cast(Json, more)) for key in keys}
        return found

    def _array(self, node: Json) -> list[Any]:
        least, most = node.get("minItems", 0), node.get("maxItems", 3)
        length = self._dice.choice((least, 1, 2, 3, most if self._dice.random() < 0.05 else 1))
        return [self.value(node.get("items", {})) for _ in range(max(least, min(most, length)))]

    def _within(self, values: Sequence[float], node: Json) -> float:
        low = node.get("minimum", node.get("exclusiveMinimum", -(2**53)))
        high = node.get("maximum", node.get("exclusiveMaximum", 1.8e308))
        inside = [value for value in (*values, low, high, low + 1) if low <= value <= high]
        chosen = self._dice.choice(inside)
        return int(chosen) if node["type"] == "integer" else chosen

    def _text(self, node: Json) -> str:
        if node.get("format") == "date-time":
            return self._dice.choice(TIMES)
        pattern, most = node.get("pattern"), node.get("maxLength", 4096)
        if pattern is None:
            return self._dice.choice(TEXTS)[:most]
        fitting = BY_PATTERN.get(pattern) or tuple(text for text in SAMPLES if _fits(pattern, text))
        return self._dice.choice(fitting or ("a",))[:most]


def _fits(pattern: str, text: str) -> bool:
    try:
        return re.search(re.sub(r"\\x\{[0-9a-f]+\}", "", pattern.replace("^(?i)", "(?i)^")), text) is not None
    except re.error:
        return False
