"""Seeded mutations of valid objects: no traceback, and one verdict of the SDK, the API server's schema and the view.

`QLORA_FUZZ` says how many, a few hundred by default; what was found becomes a case of `test_manifests`.
"""

from __future__ import annotations

import copy
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.adapters.kubernetes.objects import Parser
from orchestrator.api.base import DECIMAL_PATTERN
from orchestrator.api.crd import RULES
from orchestrator.api.job import AdapterSpec, DatasetSource, QLoRAJob, TrainingSpec
from orchestrator.errors import InvalidObject
from orchestrator.sdk.manifest import parse_manifest, parse_object
from tests.strangers.harm import harmful
from tests.strangers.structural import server_refuses

Json = dict[str, Any]
ROUNDS = int(os.environ.get("QLORA_FUZZ", "400"))
SEED = int(os.environ.get("QLORA_FUZZ_SEED", "1"))
JOB: Json = {
    "apiVersion": "qlora.dev/v1alpha1",
    "kind": "QLoRAJob",
    "metadata": {"name": "medical", "namespace": "team-a", "labels": {"team": "a"}, "annotations": {"a/b": "c"}},
    "spec": {
        "model": {"source": "hf://owner/model", "revision": "main", "chatTemplate": "{{ messages }}"},
        "dataset": {"source": "s3://bucket/train.jsonl", "format": "messages", "evalFraction": "0.02"},
        "adapter": {"rank": 16, "alpha": 16, "dropout": "0.05", "targetModules": ["q_proj", "v_proj"]},
        "training": {"epochs": "3", "sequenceLength": 2048, "learningRate": "2e-4", "packing": True, "seed": 0},
        "resources": {"vram": "48Gi", "gpuClasses": ["48Gi"], "spot": "allowed"},
        "queue": "default",
        "priority": 100,
        "store": {"uri": "s3://adapters/medical"},
        "checkpoint": {"everySeconds": 600, "keep": 2},
        "evaluation": {"everySteps": 100},
        "tracking": {"experiment": "medical", "registeredModel": "medical", "alias": "candidate"},
        "backoffLimit": 3,
        "activeDeadlineSeconds": 86400,
        "suspend": False,
    },
}
QUEUE: Json = {
    "apiVersion": "qlora.dev/v1alpha1",
    "kind": "QLoRAQueue",
    "metadata": {"name": "team-a"},
    "spec": {"cohort": "all", "weight": 2, "quotas": [{"gpuClass": "48Gi", "nominal": 2, "borrowingLimit": 1}]},
}
CHARACTERS = "aZ09-_./:@ %{}[]'\"\\\t\n\r\0\x1b\x7f\x85\u00a0\u00ad\u200b\u200d\u2028\u202e\u3000\ufeffé模😀"
TEXTS = ["", " ", "a", "A b", "0", "01", "1.5", "1e99", "-1", "null", "true", "48Gi", "auto", "latest", "v1", ".", ".."]
TEXTS += ["hf://a", "s3://b/\u2003c", "pvc://", "file:///x", "http://a", "1e-99", "9999999999.999999999999e99", "1e30"]
TEXTS += ["x" * 63, "x" * 64, "x" * 256, "x" * 257, "é" * 129, "{{ x }}" + "模" * 20_000, "x" * 70_000, "constant"]
NUMBERS = [0, 1, -1, 2, 16, 1024, 1 << 31, (1 << 63) - 1, 1 << 63, 10**30, 0.5, -0.5, 1e300, 1.0, 16.0]
NAMES = ["a", "spec", "learning_rate", "a b", "qlora.dev/cancel", "x" * 300, "\u202ex", "", "maxSteps", "evalSource"]

LISTED: dict[str, str] = {
    "a rule in CEL": "tests/cluster/test_crd_bounds tries every rule on a real server; the schema alone cannot say it",
    "a relative file": "the SDK makes file://./x absolute, and tells file://x apart from it, before anything is sent",
    "a whole number with a point": "1.0 is an integer to JSON Schema and the server; the SDK asks for 1",
    "a number for a decimal": "the SDK sends its text, which is what the server is asked for",
    "many labels": "the server bounds an object's bytes, the SDK the number of labels",
}
"""Why verdicts may differ."""
CEL_MESSAGES = tuple(rule.message for of_model in RULES.values() for rules in of_model.values() for rule in rules)


def any_text(dice: random.Random) -> str:
    if dice.random() < 0.6:
        return dice.choice(TEXTS)
    return "".join(dice.choice(CHARACTERS) for _ in range(dice.randrange(12)))


def any_value(dice: random.Random, depth: int = 0) -> Any:
    kind = dice.randrange(9 if depth < 3 else 6)
    if kind <= 2:
        return any_text(dice)
    if kind == 3:
        return dice.choice(NUMBERS)
    if kind == 4:
        return dice.choice([True, False])
    if kind == 5:
        return None
    if kind <= 7:
        return [any_value(dice, depth + 1) for _ in range(dice.choice([0, 1, 1, 2, 3, 17, 65]))]
    return {dice.choice(NAMES): any_value(dice, depth + 1) for _ in range(dice.randrange(3))}


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in it with each of its keys."""
    found: list[tuple[Any, Any]] = []
    pending = [value]
    while pending:
        here = pending.pop()
        keys = list(here) if isinstance(here, dict) else range(len(here)) if isinstance(here, list) else []
        for key in keys:
            found.append((here, key))
            pending.append(here[key])
    return found


def mutated(dice: random.Random, item: Json) -> Json:
    """The object with one to three things changed."""
    item = copy.deepcopy(item)
    for _ in range(dice.choice([1, 1, 1, 2, 3])):
        if not (found := places(item)):
            break
        container, key = dice.choice(found)
        match dice.randrange(6):
            case 0:
                container.pop(key)
            case 1 if isinstance(container, dict):
                container[dice.choice(NAMES)] = any_value(dice)
            case 2 if isinstance(container, dict) and container:
                container[any_text(dice)] = container.pop(dice.choice(list(container)))
            case 3 if isinstance(container[key], str):
                text = container[key]
                at = dice.randrange(len(text) + 1)
                container[key] = text[:at] + dice.choice(CHARACTERS) + text[at + dice.randrange(2) :]
            case 4 if isinstance(container[key], int | float):
                container[key] = dice.choice(NUMBERS)
            case _:
                container[key] = any_value(dice)
    return item


def sdk_refuses(item: Json) -> str:
    try:
        parse_object(copy.deepcopy(item))
    except InvalidObject as error:
        return str(error)
    return ""


def difference(item: Json, sdk: str, server: str) -> str | None:
    """Why the two may differ about the object; None where nothing is listed that explains it."""
    if sdk and not server:
        lines = sdk.split("\n")
        if all(any(message in line for message in CEL_MESSAGES) for line in lines):
            return "a rule in CEL"
        if all("must be file:///absolute/path or file://./relative/path" in line for line in lines):
            return "a relative file"
        if all("whole number, without quotes or decimals" in line for line in lines):
            return "a whole number with a point"
    if server and not sdk and any(isinstance(value, int | float) for value in decimals(item)):
        return "a number for a decimal"
    return None


def decimals(item: Json) -> Iterator[object]:
    """What stands in the fields of a job's spec that are decimals."""
    for part, model in (("dataset", DatasetSource), ("adapter", AdapterSpec), ("training", TrainingSpec)):
        for field in model.model_fields.values():
            if any(getattr(each, "pattern", None) == DECIMAL_PATTERN for each in field.metadata):
                yield item["spec"][part].get(field.alias)


@pytest.mark.parametrize("base", [JOB, QUEUE], ids=["QLoRAJob", "QLoRAQueue"])
def test_sdk_and_server_say_the_same_of_any_object(base: Json, capsys: pytest.CaptureFixture[str]) -> None:
    dice, seen, unexplained = random.Random(SEED), Counter[str](), list[str]()
    assert (sdk_refuses(base), server_refuses(copy.deepcopy(base))) == ("", "")
    for _ in range(ROUNDS):
        item = mutated(dice, base)
        sdk, server = sdk_refuses(item), server_refuses(copy.deepcopy(item))
        assert harmful(sdk.replace("\n", "")) == []
        seen["refused" if server else "taken"] += 1
        if bool(sdk) != bool(server):
            why = difference(item, sdk, server)
            seen[why or "unexplained"] += 1
            if why is None:
                unexplained.append(f"sdk: {sdk!r}\nserver: {server!r}\n{item!a}"[:2000])
        elif not sdk and base is JOB:
            assert isinstance(Parser().job(with_server_fields(item)), QLoRAJob), "what the server takes can be read"
    with capsys.disabled():
        print(f"\n{ROUNDS} mutations of a {base['kind']} with seed {SEED}: {dict(seen)}")
    assert set(seen) - {"refused", "taken", "unexplained"} <= set(LISTED)
    assert not unexplained, f"{len(unexplained)} verdicts differ:\n" + "\n\n".join(unexplained[:5])
    assert seen["taken"] > ROUNDS / 50
    assert seen["refused"] > ROUNDS / 50


def with_server_fields(item: Json) -> Json:
    """As a server tells of it: defaults set and nulls gone."""
    wire = parse_object(copy.deepcopy(item)).to_wire()
    meta = {**wire["metadata"], "uid": "u", "resourceVersion": "1", "creationTimestamp": "2026-01-01T00:00:00Z"}  # type: ignore[dict-item]  # pyright: ignore
    return {**wire, "metadata": meta, "status": {}}


TOKENS = ["&a ", "*a", "!!float ", "!!int ", "!!timestamp ", "!!binary ", "!!set ", "!!bool ", "!!null ", "<<: ", "? "]
TOKENS += [": ", "- ", "[", "]", "{", "}", '"', "'", "|", ">", "#", "%", "---\n", "...\n", "\t", "\n", "  ", "\\x1b"]
TOKENS += [
    "9" * 5000,
    "1e999999999",
    "0x",
    "0b",
    "1:2:3",
    "2020-13-45",
    ".inf",
    ".nan",
    "~",
    "\0",
    "\x85",
    "\u2028",
    "!",
    "@",
]
MEANS: list[Callable[[random.Random, str, int, int], str]] = [
    lambda dice, text, i, _: text[:i] + dice.choice(TOKENS) + text[i:],
    lambda _, text, i, j: text[:i] + text[j:],
    lambda _, text, i, j: text[:i] + text[i:j] * 2 + text[j:],
    lambda dice, text, i, _: text[:i] + dice.choice(CHARACTERS) + text[i + 1 :],
]


def text_refusal(text: str) -> str:
    try:
        parse_manifest(text, name="job.yaml", folder=Path("/jobs"))
    except InvalidObject as error:
        return str(error)
    return ""


def test_any_text_is_read_or_refused_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    dice, seen = random.Random(SEED), Counter[str]()
    base = yaml.safe_dump(JOB, sort_keys=False)
    for _ in range(ROUNDS):
        text = base
        for _ in range(dice.randrange(1, 5)):
            i = dice.randrange(len(text) + 1)
            text = dice.choice(MEANS)(dice, text, i, min(len(text), i + dice.randrange(1, 40)))
        refusal = text_refusal(text)
        seen["refused" if refusal else "read"] += 1
        assert harmful(refusal.replace("\n", "")) == []
    with capsys.disabled():
        print(f"\n{ROUNDS} mutations of a manifest's text with seed {SEED}: {dict(seen)}")
    assert seen["read"] > ROUNDS / 100
    assert seen["refused"] > ROUNDS / 100
