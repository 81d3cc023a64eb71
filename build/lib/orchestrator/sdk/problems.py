"""What is wrong with an object that a user wrote, in the user's words.

`manifest` calls `problems_of` with pydantic's errors. Every problem names the field by its wire path
(`spec.training.learningRate`), says what was found and, wherever it can be worked out, what to write instead.
"""

from __future__ import annotations

import difflib
import json
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, cast

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from orchestrator.api.base import (
    DECIMAL_PATTERN,
    DNS_LABEL_PATTERN,
    MAX_COUNT,
    NAME_PATTERN,
    STORE_URI_PATTERN,
    URI_PATTERN,
    Model,
)
from orchestrator.api.job import CHAT_TEMPLATE_PATTERN
from orchestrator.api.words import on_one_line

FieldPath = tuple[str | int, ...]
MAX_SHOWN_CHARACTERS = 60
MAX_FIX_CHARACTERS = 300
MAX_DIGITS = 40
"""Of a number that is written out in full."""
_NUMBER_WITH_UNIT = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*$")
_GIB_PER_UNIT = {"": Decimal(1), "g": Decimal(1), "m": Decimal(1) / 1024, "t": Decimal(1024)}


class WrittenFloat(float):
    """A float that remembers how it was written, so that a message can quote it."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing to correct."""

    path: FieldPath
    """Keys and indices from the top of the object; may end in a field that is missing."""
    message: str

    @property
    def field(self) -> str:
        """The wire path as people write it: `spec.quotas[0].gpuClass`."""
        return field_name(self.path)


def field_name(path: FieldPath) -> str:
    """`('spec', 'quotas', 0)` as `spec.quotas[0]`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{cut(part)}" if text else cut(part)
    return text


def problems_of(error: ValidationError, kind: type[Model], data: Mapping[str, object]) -> tuple[Problem, ...]:
    """The problems behind a validation error of `data` as a `kind`, in the object's order, one a field."""
    found: dict[FieldPath, list[str]] = {}
    alternatives: set[FieldPath] = set()
    for details in error.errors(include_url=False):
        path = _path_in(data, details)
        if len(path) < len(details["loc"]):
            alternatives.add(path)
        messages = found.setdefault(path, [])
        message = _message(details, kind, path, _value_at(data, path))
        if message not in messages:
            messages.append(message)
    for path in alternatives:
        # Of the alternatives of one field, the one that got deeper is the one that was meant.
        if any(other[: len(path)] == path and len(other) > len(path) for other in found):
            found.pop(path, None)
    return tuple(Problem(path=path, message=_either(messages)) for path, messages in found.items())


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` was most likely meant to be."""
    if len(word) > MAX_SHOWN_CHARACTERS:
        return None
    by_lower = {name.lower(): name for name in known}
    plain = word.lower().replace("_", "").replace("-", "")
    matches = difflib.get_close_matches(plain, by_lower, n=1, cutoff=0.6)
    return by_lower[matches[0]] if matches else None


def shown(value: object) -> str:
    """A value as it is quoted in a message: compact, one line, bounded."""
    return cut(json.dumps(value, ensure_ascii=False, default=str))


def cut(text: str, characters: int = MAX_SHOWN_CHARACTERS) -> str:
    """A text of the user's, fit to be shown: on one line, and no longer than that."""
    return on_one_line(text if len(text) <= characters else text[: characters - 3] + "...")


def _path_in(data: object, details: ErrorDetails) -> FieldPath:
    """pydantic's location without the parts that name a union's alternative instead of a field."""
    path: list[str | int] = []
    absent = details["type"] in ("missing", "extra_forbidden")
    for part in details["loc"]:
        if isinstance(data, dict) and part in data:
            data = cast(dict[object, object], data)[part]
        elif isinstance(data, list) and isinstance(part, int) and part < len(cast(list[object], data)):
            data = cast(list[object], data)[part]
        elif not (absent and part == details["loc"][-1]):
            continue
        path.append(part)
    return tuple(path)


def _value_at(data: object, path: FieldPath) -> object:
    """What stands at a path; nothing where it ends in a missing field."""
    here: object = data
    for part in path:
        if isinstance(here, dict):
            here = cast(dict[object, object], here).get(part)
        elif isinstance(here, list) and isinstance(part, int):
            here = cast(list[object], here)[part]
    return cast(object, here)


def _either(messages: Sequence[str]) -> str:
    """The messages of a union's alternatives as one sentence."""
    if len(messages) == 1:
        return messages[0]
    bare = [message.split("; found ")[0] for message in messages]
    found = messages[0].split("; found ")[1:]
    return "; found ".join([" or ".join([bare[0], *(text.removeprefix("must be ") for text in bare[1:])]), *found])


def _message(details: ErrorDetails, kind: type[Model], path: FieldPath, value: object) -> str:
    context: dict[str, Any] = details.get("ctx", {})
    match details["type"]:
        case "extra_forbidden":
            return _unknown_field(kind, path)
        case "missing":
            return "is required"
        case "string_type":
            return _not_text(value, path)
        case "string_pattern_mismatch":
            return _wrong_text(str(value), str(context["pattern"]), path)
        case "literal_error":
            return _not_one_of(value, str(context["expected"]))
        case "value_error":
            found = "" if isinstance(value, dict) else f"; found {shown(value)}"
            return _in_wire_names(str(context["error"]), kind, path) + found
        case other:
            return _by_type(other, context) + f"; found {shown(value)}"


def _by_type(error_type: str, context: Mapping[str, Any]) -> str:
    """The rule behind pydantic's plainer error types."""
    rules = {
        "int_type": "must be a whole number, without quotes or decimals",
        "int_from_float": "must be a whole number, without quotes or decimals",
        "bool_type": "must be true or false, without quotes",
        "tuple_type": "must be a list",
        "dict_type": "must be a mapping of names to values",
        "model_type": "must be a mapping of fields; give it fields or leave it out",
        "greater_than_equal": "must be at least {ge}",
        "less_than_equal": "must be at most {le}",
        "greater_than": "must be above {gt}",
        "less_than": "must be below {lt}",
        "string_too_short": "must have at least {min_length} character(s)",
        "string_too_long": "must have at most {max_length} characters",
        "too_short": "must have at least {min_length} item(s)",
        "too_long": "must have at most {max_length} items",
    }
    return rules.get(error_type, f"is not valid ({error_type.replace('_', ' ')})").format(**context)


def _unknown_field(kind: type[Model], path: FieldPath) -> str:
    name = str(path[-1])
    parent = _model_at(kind, path[:-1])
    known = wire_fields(parent) if parent is not None else {}
    elsewhere = [field_name(p) for p in _all_paths(kind) if p[-1] == name]
    if elsewhere:
        return f"unknown field here; it belongs in {' or '.join(elsewhere)}"
    near = closest(name, known)
    if near is not None:
        return f"unknown field; did you mean {near}?"
    everywhere = {str(p[-1]): p for p in _all_paths(kind)}
    far = closest(name, everywhere)
    if far is not None:
        return f"unknown field; did you mean {field_name(everywhere[far])}?"
    return f"unknown field; known are {', '.join(known)}"


def _not_text(value: object, path: FieldPath) -> str:
    if path and path[-1] == "vram" and isinstance(value, int | float) and abs(value) < MAX_COUNT:
        return f'must be auto or a quantity in Gi; found the number {value}; write "{value:g}Gi"'
    if isinstance(value, bool):
        return (
            f"must be text; found {shown(value)}; YAML reads yes, no, on and off as true or false: write it in quotes"
        )
    if isinstance(value, int | float):
        text = cut(value.text if isinstance(value, WrittenFloat) else str(value))
        return f'must be text; found the number {text}; write it in quotes: "{decimal_text(text) or text}"'
    if value is None:
        return "must be text; found nothing; give it a value or leave it out"
    return f"must be text; found {shown(value)}"


def _wrong_text(text: str, pattern: str, path: FieldPath) -> str:
    rule, fix = _rule_and_fix(text, pattern, path)
    fits = fix is not None and len(fix) <= MAX_FIX_CHARACTERS and re.match(pattern, fix)
    advice = f"; write {json.dumps(fix, ensure_ascii=False)}" if fits else ""
    return f"{rule}; found {shown(text)}{advice}"


def _rule_and_fix(text: str, pattern: str, path: FieldPath) -> tuple[str, str | None]:
    if path[-1:] == ("vram",):
        return "must be auto or a quantity in Gi", _vram_fix(text)
    if pattern == DECIMAL_PATTERN:
        return 'must be a decimal number of at least 0, such as "0.05" or "2e-4"', decimal_text(text)
    if pattern == DNS_LABEL_PATTERN:
        rule = "may hold lower-case letters, digits and '-', and starts and ends with a letter or digit"
        return rule, re.sub(r"[^a-z0-9-]+", "-", text.lower()).strip("-")
    if pattern == NAME_PATTERN:
        return "must not begin or end with a blank, nor hold control characters or others that are not seen", None
    if pattern == CHAT_TEMPLATE_PATTERN:
        return "must be text without control characters but tabs and line ends", None
    if pattern in (URI_PATTERN, STORE_URI_PATTERN):
        return _uri_rule(text, pattern == STORE_URI_PATTERN), _uri_fix(text, pattern == STORE_URI_PATTERN)
    return f"does not match {pattern}", None


def _vram_fix(text: str) -> str | None:
    """`48GB`, `48 gib`, `48` as `48Gi`; `49152Mi` too."""
    parts = _NUMBER_WITH_UNIT.match(text) if len(text) <= MAX_DIGITS else None
    scale = _GIB_PER_UNIT.get(parts[2].lower().removesuffix("b").removesuffix("i")) if parts else None
    return f"{(Decimal(parts[1]) * scale).normalize():f}Gi" if parts and scale else None


def decimal_text(text: str) -> str | None:
    """A number as a decimal string of the contract, `5%` and `0,05` included; nothing where there is none."""
    plain = text.strip().replace(",", ".").replace("_", "")
    try:
        number = Decimal(plain.removesuffix("%")) / (100 if plain.endswith("%") else 1)
    except ArithmeticError:
        return None
    if re.match(DECIMAL_PATTERN, plain):
        return plain
    if not number.is_finite() or abs(number.adjusted()) > MAX_DIGITS:
        return None
    candidates = (f"{number:f}", f"{number.normalize():E}".replace("E+", "e"))
    return next((candidate for candidate in candidates if re.match(DECIMAL_PATTERN, candidate)), None)


def _uri_rule(text: str, is_store: bool) -> str:
    if re.search(r"\s", text):
        return "must not contain spaces"
    if text.startswith(("http://", "https://")):
        return "nothing is fetched from the web: give a local copy as file:///path, or s3://bucket/key"
    if re.match(r"[a-z0-9]+://[^/?#]*[^!-Z\\^-~]", text):
        return "must name bucket, claim or owner in letters, digits and signs of ASCII, without brackets"
    if is_store:
        return "must be one of file:///path, s3://bucket/prefix, pvc://claim/path"
    return "must be one of file:///path, s3://bucket/key, pvc://claim/path, hf://owner/name"


def _uri_fix(text: str, is_store: bool) -> str | None:
    if "://" in text:
        return None
    if text.startswith("/"):
        return f"file://{text}"
    if text.startswith("."):
        return f"file://{text}"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not is_store and not re.search(r"\.(jsonl?|csv|parquet|gz)$", text):
        return f"hf://{text}"
    return f"file://./{text}"


def _not_one_of(value: object, expected: str) -> str:
    choices = re.findall(r"'([^']*)'", expected)
    near = closest(value, choices) if isinstance(value, str) else None
    rule = f"must be {choices[0]}" if len(choices) == 1 else f"must be one of {', '.join(choices)}"
    return f"{rule}; found {shown(value)}" + (f"; did you mean {near}?" if near and len(choices) > 1 else "")


def _in_wire_names(text: str, kind: type[Model], path: FieldPath) -> str:
    model = _model_at(kind, path)
    for name, field in model.model_fields.items() if model is not None else ():
        if field.alias:
            text = re.sub(rf"\b{name}\b", field.alias, text)
    return text


def wire_fields(model: type[Model]) -> dict[str, Any]:
    """A model's fields' types by wire name."""
    return {field.alias or name: field.annotation for name, field in model.model_fields.items()}


def _model_at(kind: type[Model], path: FieldPath) -> type[Model] | None:
    model: type[Model] | None = kind
    for part in path:
        if isinstance(part, int) or model is None:
            continue
        model = model_in(wire_fields(model).get(part))
    return model


def model_in(annotation: Any) -> type[Model] | None:
    """The contract model inside a type: itself, an optional's or a tuple's."""
    if isinstance(annotation, type) and issubclass(annotation, Model):
        return annotation
    return next(filter(None, map(model_in, typing.get_args(annotation))), None)


def _all_paths(kind: type[Model]) -> list[FieldPath]:
    """The wire paths of all fields under `spec`, shallow ones first."""
    pending: list[tuple[FieldPath, type[Model]]] = [(("spec",), cast(type[Model], wire_fields(kind)["spec"]))]
    paths: list[FieldPath] = []
    while pending:
        prefix, model = pending.pop(0)
        for name, annotation in wire_fields(model).items():
            paths.append((*prefix, name))
            inner = model_in(annotation)
            if inner is not None:
                pending.append(((*prefix, name), inner))
    return paths
