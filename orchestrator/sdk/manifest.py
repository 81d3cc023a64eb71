"""Reads manifests: YAML files of one or more objects into validated jobs, queues and sweeps.

Rules:
- only the safe YAML types are read, a key may stand once, and a file has a bounded size;
- an object is judged as the Kubernetes API server would judge it: strict types, wire names, nothing unknown, and null
  means unset but for the one field where it is a choice;
- whatever is written, the answer is an object or InvalidObject: values are JSON's, and few, and not deep;
- every error names the file, the document, the line and the field, and says what is right;
- `file://./x` is relative to the manifest's folder and leaves here absolute;
- what the service writes (status, uid, ...) is dropped, so that the output of `qlora get -o yaml` can be handed in.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from secrets import choice
from typing import Any, cast
from urllib.parse import unquote

import yaml
from pydantic import ValidationError

from orchestrator.api.base import API_VERSION, BY_PEOPLE, MAX_COUNT, Model
from orchestrator.api.job import REQUEST_ANNOTATIONS, QLoRAJob
from orchestrator.api.queue import QLoRAQueue
from orchestrator.api.sweep import QLoRASweep
from orchestrator.api.uris import file_uri
from orchestrator.api.words import on_one_line
from orchestrator.errors import InvalidObject
from orchestrator.sdk.problems import (
    FieldPath,
    Problem,
    WrittenFloat,
    closest,
    cut,
    model_in,
    problems_of,
    shown,
    wire_fields,
)

MAX_MANIFEST_BYTES = 1 << 20
MAX_VALUES = 100_000
"""Values in one document after YAML's aliases are expanded."""
MAX_DEPTH = 100
"""Of mappings and lists in each other; the contract has seven."""
MAX_PROBLEMS = 20
"""Told at one time; the next ones are told once these are mended."""

MAX_YAML_WORDS = 200
NAME_CHARACTERS, MADE_CHARACTERS = "bcdfghjklmnpqrstvwxz2456789", 5
"""Of the end of a made name: no vowels, so that no words come of it, and nothing that looks like something else."""
MAX_PREFIX_CHARACTERS = 43
"""With the made end the longest name of a job."""
NULL_IS_A_CHOICE: frozenset[FieldPath] = frozenset(
    {("spec", "tracking", "alias"), ("spec", "job", "tracking", "alias")}
)
"""Where null is not the default. Everywhere else the API server drops it."""

UserObject = QLoRAJob | QLoRAQueue | QLoRASweep
UserKind = type[QLoRAJob] | type[QLoRAQueue] | type[QLoRASweep]
KINDS: dict[str, UserKind] = {"QLoRAJob": QLoRAJob, "QLoRAQueue": QLoRAQueue, "QLoRASweep": QLoRASweep}
_SERVICE_METADATA = (
    "uid",
    "resourceVersion",
    "generation",
    "creationTimestamp",
    "deletionTimestamp",
    "finalizers",
    "ownerReferences",
)
_JOBS_URI_FIELDS = (
    ("model", "source"),
    ("dataset", "source"),
    ("dataset", "evalSource"),
    ("adapter", "from"),
    ("store", "uri"),
)
_URI_FIELDS: tuple[FieldPath, ...] = (
    *(("spec", *path) for path in _JOBS_URI_FIELDS),
    *(("spec", "job", *path) for path in _JOBS_URI_FIELDS),
)


Changes = Sequence[tuple[FieldPath, object]]
"""Fields of jobs' specs that are said beside the manifest, with JSON's values."""


def parse_changes(texts: Sequence[str]) -> Changes:
    """`training.epochs=1` as a field and its value, which is read as YAML; raises InvalidObject."""
    return [_change(text) for text in texts]


def _change(text: str) -> tuple[FieldPath, object]:
    name, equals, value = text.partition("=")
    parts = tuple(name.strip().removeprefix("spec.").split("."))
    if not equals or not all(parts):
        raise InvalidObject(f"{cut(text)}: must be a field of a job's spec and a value, such as training.epochs=1")
    try:
        read: object = yaml.load(value, Loader=_Loader)  # noqa: S506  the safe loader, with its refusals
    except (yaml.YAMLError, RecursionError) as error:
        raise InvalidObject(f"{cut(name)}: the value is not valid YAML: {cut(value)}") from error
    return ("spec", *parts), read


def load_manifest(path: Path | str, *, changes: Changes = ()) -> tuple[UserObject, ...]:
    """The objects of a YAML file, in its order, jobs with these changes; raises InvalidObject."""
    file = Path(path)
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise InvalidObject(f"{file}: cannot be read: {error.strerror}; give the path of a YAML file") from error
    if len(content) > MAX_MANIFEST_BYTES:
        raise InvalidObject(f"{file}: larger than {MAX_MANIFEST_BYTES} bytes; a manifest holds objects, not data")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise InvalidObject(f"{file}: not UTF-8 text; give a YAML file") from error
    return parse_manifest(text, name=str(file), folder=file.resolve().parent, changes=changes)


def parse_manifest(text: str, *, name: str, folder: Path, changes: Changes = ()) -> tuple[UserObject, ...]:
    """The objects of a YAML text; `name` stands for it in errors, `folder` is what `file://./x` is relative to."""
    try:
        documents = [(data, node) for data, node in _documents(text) if data is not None]
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InvalidObject(
            f"{name}, line {line}: not valid YAML: {cut(str(error.problem), MAX_YAML_WORDS)}"
        ) from error
    except RecursionError as error:
        raise InvalidObject(f"{name}: not valid YAML: its mappings and lists are nested too deeply") from error
    except yaml.YAMLError as error:
        first, *_ = str(error).splitlines() or [type(error).__name__]
        raise InvalidObject(f"{name}: not valid YAML: {cut(first, MAX_YAML_WORDS)}") from error
    if not documents:
        raise InvalidObject(f"{name}: holds no object; start with apiVersion: {API_VERSION} and kind: QLoRAJob")
    several = len(documents) > 1
    return tuple(
        _to_object(data, _Origin(name=f"{name}, document {n}" if several else name, folder=folder, node=node), changes)
        for n, (data, node) in enumerate(documents, 1)
    )


def parse_object(
    data: Mapping[str, object] | UserObject, *, name: str = "object", folder: Path | None = None
) -> UserObject:
    """One object from JSON types with wire names, or one built in Python, judged by the same rules."""
    if isinstance(data, QLoRAJob | QLoRAQueue | QLoRASweep):
        # What was set, nulls included (`tracking.alias: null` is a choice), and nothing else (a namespace by default).
        wire: object = {
            **data.model_dump(mode="json", by_alias=True, exclude_unset=True),
            "apiVersion": data.api_version,
            "kind": data.kind,
        }
        name = f"{data.kind} {data.metadata.name}"
    else:
        wire = dict(data)
    return _to_object(wire, _Origin(name=name, folder=folder or Path.cwd(), node=None))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Origin:
    """Where an object was written."""

    name: str
    folder: Path
    node: yaml.Node | None
    """The YAML behind it; knows the lines."""

    def error(self, *problems: Problem) -> InvalidObject:
        """One line a problem, from the top of the file to its bottom."""
        located = [(_line_of(self.node, problem.path), problem) for problem in problems[:MAX_PROBLEMS]]
        located.sort(key=lambda pair: pair[0] or 0)
        lines = [self._sentence(line, problem) for line, problem in located]
        if len(problems) > MAX_PROBLEMS:
            lines.append(f"{self.name}: and {len(problems) - MAX_PROBLEMS} more")
        return InvalidObject("\n".join(lines))

    def _sentence(self, line: int | None, problem: Problem) -> str:
        place = f"{self.name}, line {line}" if line is not None else self.name
        return on_one_line(": ".join(filter(None, (place, problem.field, problem.message))))


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key that stands twice, and leaves dates alone, as Kubernetes does."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        pairs: Any = node.value if type(cast(object, node)) is yaml.MappingNode else ()  # a tag may claim it of a text
        for key, _ in pairs:
            text = str(key.value)
            if text in seen and text != "<<":
                words = f"the key {cut(text)} stands twice"
                raise yaml.constructor.ConstructorError(None, None, words, key.start_mark)
            seen.add(text)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """What a value stands for; whatever YAML's own readers raise names the line."""
        untyped: Any = super()  # Any: the stubs of yaml leave its lower half, and a node's marks, out
        try:
            return untyped.construct_object(node, deep)
        except (yaml.YAMLError, RecursionError, MemoryError):
            raise
        except Exception as error:
            raise _unreadable(node, f"{node.tag.rpartition(':')[2]} cannot be read: {cut(str(error))}") from error

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge keys multiply: what they come to is bounded."""
        super().flatten_mapping(node)
        if len(node.value) > MAX_VALUES:
            raise _unreadable(node, f"merge keys come to more than {MAX_VALUES} values")


def _unreadable(node: yaml.Node, words: str) -> yaml.MarkedYAMLError:
    untyped: Any = node
    return yaml.constructor.ConstructorError(None, None, words, untyped.start_mark)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    number = WrittenFloat(loader.construct_yaml_float(node))
    number.text = str(node.value)
    return number


_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def _documents(text: str) -> Iterator[tuple[object, yaml.Node]]:
    loader: Any = _Loader(text)  # Any: the stubs of yaml leave its lower half out
    try:
        while loader.check_node():
            node: yaml.Node = loader.get_node()
            yield loader.construct_document(node), node
    finally:
        loader.dispose()


def _to_object(data: object, origin: _Origin, changes: Changes = ()) -> UserObject:
    plain = _Plain(origin).read(data)
    if not isinstance(plain, dict):
        raise origin.error(
            Problem(path=(), message=f"must be an object with apiVersion and kind; found {shown(plain)}")
        )
    wire = _without_service_fields(cast(dict[str, object], plain))
    kind = _kind_of(wire, origin)
    if kind is QLoRAJob:
        for path, value in changes:
            _put(wire, path, _Plain(origin).read(value, path), origin)
    wire = _named(_without_nulls(wire, kind), origin)
    for path in _URI_FIELDS:
        _resolve(wire, path, origin)
    text = json.dumps(wire)
    try:
        # JSON in strict mode: lists become tuples, but "16" does not become 16; Kubernetes judges the same way.
        return kind.model_validate_json(text, strict=True, by_alias=True, by_name=False, context=BY_PEOPLE)
    except ValidationError as error:
        raise origin.error(*problems_of(error, kind, wire)) from error


def _kind_of(wire: Mapping[str, object], origin: _Origin) -> UserKind:
    version, kind = wire.get("apiVersion"), wire.get("kind")
    if version != API_VERSION:
        found = "is missing" if version is None else f"is {shown(version)}"
        raise origin.error(Problem(path=("apiVersion",), message=f"{found}; write apiVersion: {API_VERSION}"))
    if not isinstance(kind, str) or kind not in KINDS:
        found = "is missing" if kind is None else f"is {shown(kind)}"
        near = closest(kind, KINDS) if isinstance(kind, str) else None
        advice = f"did you mean {near}?" if near else f"write one of {', '.join(KINDS)}"
        raise origin.error(Problem(path=("kind",), message=f"{found}; {advice}"))
    return KINDS[kind]


def _without_nulls(data: Mapping[str, object], model: type[Model] | None, path: FieldPath = ()) -> dict[str, object]:
    """The object without the nulls of fields that exist: those are unset, where null is no choice of its own."""
    known = wire_fields(model) if model is not None else data
    found: dict[str, object] = {}
    for name, value in data.items():
        inner, field = model_in(known.get(name)) if model is not None else None, (*path, name)
        if isinstance(value, dict):
            found[name] = _without_nulls(cast(dict[str, object], value), inner, field)
        elif isinstance(value, list) and inner is not None:
            items = cast(list[object], value)
            found[name] = [
                _without_nulls(cast(dict[str, object], item), inner) if isinstance(item, dict) else item
                for item in items
            ]
        elif value is not None or name not in known or field in NULL_IS_A_CHOICE:
            found[name] = value
    return found


def _without_service_fields(data: Mapping[str, object]) -> dict[str, object]:
    """The object without what only the service writes."""
    wire = {key: value for key, value in data.items() if key != "status"}
    metadata = wire.get("metadata")
    if isinstance(metadata, dict):
        kept = {k: v for k, v in cast(dict[str, object], metadata).items() if k not in _SERVICE_METADATA}
        annotations = kept.get("annotations")
        if isinstance(annotations, dict):
            named = cast(dict[str, object], annotations)
            kept["annotations"] = {
                k: v for k, v in named.items() if k not in REQUEST_ANNOTATIONS or not isinstance(v, str)
            }
        wire["metadata"] = kept
    return wire


def _named(wire: dict[str, object], origin: _Origin) -> dict[str, object]:
    """The object with a name made of `metadata.generateName`, as the API server makes one, where it has none."""
    metadata = wire.get("metadata")
    if not isinstance(metadata, dict) or "generateName" not in metadata:
        return wire
    found = cast(dict[str, object], metadata)
    prefix = found["generateName"]
    if not isinstance(prefix, str) or not prefix:
        raise origin.error(Problem(path=("metadata", "generateName"), message=f"must be text; found {shown(prefix)}"))
    made = prefix[:MAX_PREFIX_CHARACTERS] + "".join(choice(NAME_CHARACTERS) for _ in range(MADE_CHARACTERS))
    return {**wire, "metadata": {"name": made, **{key: value for key, value in found.items() if key != "generateName"}}}


def _put(wire: dict[str, object], path: FieldPath, value: object, origin: _Origin) -> None:
    """Set a field, making the mappings on the way to it."""
    parent = wire
    for depth, part in enumerate(path[:-1], 1):
        inner = parent.setdefault(cast(str, part), {})
        if not isinstance(inner, dict):
            raise origin.error(Problem(path=path[:depth], message=f"has no fields to set; found {shown(inner)}"))
        parent = cast(dict[str, object], inner)
    parent[cast(str, path[-1])] = value


def _resolve(wire: dict[str, object], path: FieldPath, origin: _Origin) -> None:
    """Make a `file://./x` absolute, copying the mappings on the way to it."""
    parent = wire
    for part in path[:-1]:
        inner = parent.get(cast(str, part))
        if not isinstance(inner, dict):
            return
        parent[cast(str, part)] = parent = dict(cast(dict[str, object], inner))
    name = cast(str, path[-1])
    value = parent.get(name)
    if not isinstance(value, str) or not value.startswith("file://") or value.startswith("file:///"):
        return
    relative = value.removeprefix("file://")
    if not relative.startswith(("./", "../")) and relative not in (".", ".."):
        advice = f"write file://{Path(relative).expanduser() if relative.startswith('~') else f'./{relative}'}"
        message = f"must be file:///absolute/path or file://./relative/path; found {shown(value)}; {advice}"
        raise origin.error(Problem(path=path, message=message))
    parent[name] = file_uri(Path(os.path.normpath(origin.folder / unquote(relative))))


@dataclass(slots=True)
class _Plain:
    """Reads what YAML or Python made into JSON's types, anew, so that no alias is left."""

    origin: _Origin
    values: int = 0

    def read(self, value: object, path: FieldPath = ()) -> object:
        """The value, and all in it; raises InvalidObject for what JSON cannot say, or a manifest need not."""
        self.values += 1
        if self.values > MAX_VALUES:
            raise self._refusal((), f"holds more than {MAX_VALUES} values; a manifest holds no data")
        if len(path) > MAX_DEPTH:
            raise self._refusal(path[:3], f"is nested more than {MAX_DEPTH} deep; a manifest is flat")
        if isinstance(value, Mapping):
            return self._mapping(cast(Mapping[object, object], value), path)
        if isinstance(value, list | tuple):
            items = cast(Sequence[object], value)
            return [self.read(item, (*path, index)) for index, item in enumerate(items)]
        return self._scalar(value, path)

    def _mapping(self, value: Mapping[object, object], path: FieldPath) -> dict[str, object]:
        found: dict[str, object] = {}
        for key, item in value.items():
            name = self._key(key, path)
            found[name] = self.read(item, (*path, name))
        return found

    def _key(self, key: object, path: FieldPath) -> str:
        if isinstance(key, str):
            return str(self._scalar(key, path))
        if isinstance(key, int | float):
            return json.dumps(self._scalar(key, path))
        raise self._refusal(path, f"has a key that is no text ({type(key).__name__}); write it in quotes")

    def _scalar(self, value: object, path: FieldPath) -> object:
        if isinstance(value, str):
            if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
                raise self._refusal(path, "holds half of a character (a surrogate); write the whole character")
            return value
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int):
            if abs(value) > MAX_COUNT:
                raise self._refusal(path, "is a number of more digits than any field takes")
            return value
        if isinstance(value, float):
            if not math.isfinite(value):
                raise self._refusal(path, "is infinite or no number, which JSON cannot express")
            return value
        message = (
            f"holds a value that JSON cannot express ({type(value).__name__}); use text, numbers, lists and mappings"
        )
        raise self._refusal(path, message)

    def _refusal(self, path: FieldPath, message: str) -> InvalidObject:
        return self.origin.error(Problem(path=path, message=message))


def _line_of(node: yaml.Node | None, path: FieldPath) -> int | None:
    """The line of the deepest part of the path that was written, counted from 1."""
    if node is None:
        return None
    here: Any = node  # Any: the stubs of yaml leave a node's marks open
    line: int = here.start_mark.line
    for part in path:
        if isinstance(here, yaml.MappingNode):
            entry = next(((key, value) for key, value in here.value if key.value == part), None)
            if entry is None:
                break
            line, here = entry[0].start_mark.line, entry[1]
        elif isinstance(here, yaml.SequenceNode) and isinstance(part, int) and part < len(here.value):
            here = here.value[part]
            line = here.start_mark.line
    return line + 1
