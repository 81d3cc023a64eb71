"""The threat model claims nothing without a test that is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "operators" / "security.md"
ROWS = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and not line.startswith("| who ")]
PEOPLE = (
    "anonymous",
    "may create jobs",
    "may create pods",
    "reads Secrets",
    "pushes a model",
    "pushes data",
    "runs inside a trainer's pod",
    "user of the same machine",
    "operator",
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[:60])
def test_every_threat_names_tests_that_exist(row: str) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
    assert named, "a claim without a test"
    for file, name in named:
        tree = ast.parse((ROOT / file).read_text())
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"


@pytest.mark.parametrize("who", PEOPLE)
def test_everybody_is_thought_of(who: str) -> None:
    assert any(who in row.split("|")[1] for row in ROWS)
