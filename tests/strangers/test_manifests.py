"""Whatever a manifest holds, the answer is an object or words: each of these once ended in a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.errors import InvalidObject
from orchestrator.sdk.manifest import parse_manifest, parse_object
from tests.strangers.harm import harmful

HEAD = "apiVersion: qlora.dev/v1alpha1\nkind: QLoRAJob\nmetadata: {name: medical}\n"
SPEC = "spec:\n  model: {source: hf://owner/model}\n  dataset: {source: s3://bucket/train.jsonl}\n"
JOB = HEAD + SPEC
BOMB = "a0: &a0 {x: 1}\n" + "".join(f"a{n + 1}: &a{n + 1} {{<<: [*a{n}, *a{n}], k{n}: 1}}\n" for n in range(40))
LAUGHS = "a0: &a0 [1]\n" + "".join(f"a{n + 1}: &a{n + 1} [*a{n}, *a{n}]\n" for n in range(40)) + JOB

POISON = {
    "an integer of 6,000 digits": (JOB + f"  priority: {'9' * 6000}\n", "line 7: not valid YAML: int cannot be read"),
    "an integer of 4,000 digits": (JOB + f"  priority: {'9' * 4000}\n", "line 7: spec.priority: is a number of more"),
    "a number for a text, of 400 digits": (
        JOB + f"  resources: {{vram: {'9' * 400}}}\n",
        "spec.resources.vram: is a number",
    ),
    "a float of no digits": (JOB + "  priority: !!float x\n", "line 7: not valid YAML: float cannot be read"),
    "an integer of no digits": (JOB + '  priority: !!int ""\n', "not valid YAML: int cannot be read"),
    "a truth that is none": (JOB + "  suspend: !!bool maybe\n", "not valid YAML: bool cannot be read"),
    "a day that is none": (JOB + "  queue: !!timestamp 2020-13-45\n", "not valid YAML: timestamp cannot be read"),
    "a time that is none": (JOB + "  queue: !!timestamp now\n", "not valid YAML: timestamp cannot be read"),
    "a day": (JOB + "  queue: !!timestamp 2020-12-04\n", "spec.queue: holds a value that JSON cannot express (date)"),
    "bytes": (JOB + "  queue: !!binary aGVsbG8=\n", "spec.queue: holds a value that JSON cannot express (bytes)"),
    "a set": (JOB + "  queue: !!set {a}\n", "spec.queue: holds a value that JSON cannot express (set)"),
    "a text that is said to be a mapping": (JOB + "  queue: !!map x\n", "expected a mapping node"),
    "a text that is said to be a set": (JOB + "  queue: !!set x\n", "expected a mapping node"),
    "a list as a key": (JOB + "  ? [a, b]\n  : 1\n", "not valid YAML"),
    "a mapping as a key": (JOB + "  ? {a: b}\n  : 1\n", "not valid YAML"),
    "a tuple as a key": (JOB + "  ? !!python/tuple [a, b]\n  : 1\n", "not valid YAML"),
    "a list that holds itself": (JOB + "  resources: {gpuClasses: &a [*a]}\n", "nested more than 100 deep"),
    "a mapping that holds itself": (HEAD + "spec: &a {model: *a}\n", "nested more than 100 deep"),
    "an object that is its own kind": ("&a\napiVersion: qlora.dev/v1alpha1\nkind: *a\n", "nested more than 100 deep"),
    "a version that is the object": ("&a\napiVersion: *a\nkind: QLoRAJob\n", "nested more than 100 deep"),
    "a merge into itself": (HEAD + "spec: &a\n  <<: *a\n", "spec.model: is required"),
    "merges that multiply": (BOMB, "merge keys come to more than 100000 values"),
    "aliases that multiply": (LAUGHS, "holds more than 100000 values"),
    "lists in lists": (JOB + "  queue: " + "[" * 300 + "]" * 300 + "\n", "nested"),
    "mappings in mappings, without end": (JOB + "  queue: " + "{a: " * 20_000, "nested too deeply"),
    "an infinite number": (JOB + "  priority: .inf\n", "spec.priority: is infinite or no number"),
    "no number": (JOB + "  priority: .nan\n", "spec.priority: is infinite or no number"),
    "half a character": (JOB + '  queue: "\\ud800"\n', "spec.queue: holds half of a character"),
    "a decimal that takes a gigabyte to write out": (
        JOB + "  training: {epochs: 1e999999999}\n",
        "spec.training.epochs",
    ),
    "a percentage beyond decimals": (JOB + '  training: {epochs: "1e999999%"}\n', "spec.training.epochs"),
    "escape sequences": (JOB + '  queue: "\\e[2J\\u202egnp\\u2028x"\n', r"found \"\u001b[2J\u202egnp x\""),
    "escape sequences in a key": (JOB + '  "\\e]0;x\\a\\u009b2J": 1\n', r"spec.\x1b]0;x\x07\x9b2J: unknown field"),
    "a key of a megabyte": (
        JOB + f"  {'k' * 900_000}: 1\n".replace("  k", "  ? k").replace(": 1", "\n  : 1"),
        "unknown field",
    ),
    "a value of a megabyte": (JOB + f"  queue: {'Q' * 900_000}\n", "spec.queue: must have at most 63 characters"),
    "ten thousand wrong items": (
        JOB + f"  resources: {{gpuClasses: [{', '.join(['[]'] * 10_000)}]}}\n",
        "job.yaml, line 7",
    ),
    "keys that stand twice, in escapes": (JOB + '  "\\e[2J": 1\n  "\\e[2J": 1\n', r"the key \x1b[2J stands twice"),
    "a control character": ("\x01" + JOB, "not valid YAML"),
    "a document that never ends": ('"' + JOB, "not valid YAML"),
}


@pytest.mark.parametrize(("text", "expected"), POISON.values(), ids=POISON)
def test_a_manifest_of_any_kind_gets_an_answer_in_words(text: str, expected: str) -> None:
    with pytest.raises(InvalidObject) as caught:
        parse_manifest(text, name="job.yaml", folder=Path("/jobs"))
    message = str(caught.value)
    assert expected.replace(r"\"", '"') in message
    assert harmful(message.replace("\n", "")) == []
    assert len(message) < 5000


@pytest.mark.parametrize(
    "data", [{"apiVersion": {(1, 2): 3}}, {"kind": len}, {1: 2, None: 3}, {"a": {"b": b""}}, {b"a": 1}], ids=repr
)
def test_an_object_built_in_python_gets_one_too(data: dict[str, object]) -> None:
    with pytest.raises(InvalidObject):
        parse_object(data)


@pytest.mark.parametrize(
    "extra",
    [
        "  training: {epochs: null, maxSteps: null}\n",
        "  checkpoint:\n",
        "  store: ~\n",
        "  tracking: {alias: null, experiment: null}\n",
    ],
)
def test_null_is_nothing_as_it_is_to_the_api_server(extra: str) -> None:
    [job] = parse_manifest(JOB + extra, name="job.yaml", folder=Path("/jobs"))
    [plain] = parse_manifest(JOB, name="job.yaml", folder=Path("/jobs"))
    assert job == plain or extra.startswith("  tracking")


def test_metadata_that_the_api_server_takes_is_taken() -> None:
    note, labels = "x" * 200_000, {f"example.org/label-{number}": "x" * 63 for number in range(200)}
    metadata = {"name": "medical", "labels": labels, "annotations": {"Example.ORG/Note": note}}
    [plain] = parse_manifest(JOB, name="job.yaml", folder=Path("/jobs"))
    wire = {**plain.to_wire(), "metadata": metadata}
    job = parse_object(wire)
    assert (dict(job.metadata.labels), job.metadata.annotations) == (labels, {"Example.ORG/Note": note})


@pytest.mark.parametrize(
    "metadata",
    [
        {"labels": {"a b": "c"}},
        {"labels": {"/a": "c"}},
        {"labels": {"A.b/c": "d"}},
        {"labels": {"a": "b c"}},
        {"labels": {"a": "b" * 64}},
        {"labels": {"a" * 64: "b"}},
        {"labels": {"": "b"}},
        {"annotations": {"a b": "c"}},
        {"annotations": {"a": "x" * (1 << 18)}},
        {"annotations": {"-a": ""}},
    ],
    ids=lambda metadata: repr(metadata)[:40],
)
def test_metadata_that_the_api_server_refuses_is_refused(metadata: dict[str, object]) -> None:
    [plain] = parse_manifest(JOB, name="job.yaml", folder=Path("/jobs"))
    with pytest.raises(InvalidObject, match="metadata"):
        parse_object({**plain.to_wire(), "metadata": {"name": "medical", **metadata}})
