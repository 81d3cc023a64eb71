"""Fine-tuning jobs of OpenAI's, odd, changed or of no shape: a job that holds, or words that name a field."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.cli.output import as_yaml
from orchestrator.errors import InvalidObject
from orchestrator.sdk.manifest import parse_manifest
from orchestrator.sdk.openai_job import Choices, imported
from tests.strangers.harm import harmful
from tests.strangers.test_fuzz import ROUNDS, SEED
from tests.strangers.test_readers import VALUES, any_text
from tests.strangers.test_surfaces import BAD

Json = dict[str, Any]
JOB: Json = json.loads((Path(__file__).parents[2] / "examples" / "openai" / "ftjob.json").read_text())
CHOICES = Choices(model="owner/name", folder=Path())


def answer(text: bytes) -> str:
    """What became of a job: `read`, and then the manifest says the same, or `refused`, in words that harm nobody."""
    try:
        found = imported(text, "ftjob.json", CHOICES)
    except InvalidObject as error:
        found = str(error)
    if isinstance(found, str):
        assert "ftjob.json: " in found
        assert harmful(found.replace("\n", "")) == []
        assert len(found) < 5000
        return "refused"
    assert harmful("".join(found.notes)) == []
    written = as_yaml(found.document)
    assert harmful(written.replace("\n", "")) == []
    assert yaml.safe_load(written) == found.document
    parse_manifest(written, name="job.yaml", folder=Path("/jobs"))
    return "read"


def test_a_job_of_any_kind_gets_an_answer_in_words() -> None:
    dice = random.Random(SEED)
    seen = Counter(answer(any_text(dice, JOB)) for _ in range(ROUNDS))
    assert min(seen["read"], seen["refused"]) > ROUNDS / 10


def paths(value: Json, before: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The path of every field."""
    below = [path for key, item in value.items() if isinstance(item, dict) for path in paths(item, (*before, key))]
    return [*((*before, key) for key in value), *below]


@pytest.mark.parametrize("path", paths(JOB), ids=".".join)
def test_each_field_may_be_of_any_type(path: tuple[str, ...]) -> None:
    for value in (*VALUES, -1, 1e300, BAD, "\ud800", {BAD: BAD}, {"": {}}, "x" * 100_000):
        job = json.loads(json.dumps(JOB))
        part = job
        for name in path[:-1]:
            part = part[name]
        part[path[-1]] = value
        answer(json.dumps(job).encode())
