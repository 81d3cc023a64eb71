"""The manifests that documents show are valid as they stand."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.sdk.manifest import parse_manifest

REPOSITORY = Path(__file__).parents[2]
BLOCK = re.compile(r"^```yaml\n(.*?)^```", re.MULTILINE | re.DOTALL)


def manifests() -> Iterator[tuple[str, str]]:
    """(where it stands, the text) of every manifest in a document or by itself."""
    for path in (REPOSITORY / "README.md", *(REPOSITORY / "docs").rglob("*.md")):
        for block in BLOCK.findall(path.read_text()):
            if "apiVersion: qlora.dev/" in block:
                yield path.name, block
    for path in (REPOSITORY / "manifests" / "examples").glob("*.yaml"):
        yield path.name, path.read_text()


@pytest.mark.parametrize(("name", "text"), list(manifests()), ids=lambda value: value[:24])
def test_it_is_valid(name: str, text: str) -> None:
    assert parse_manifest(text, name=name, folder=REPOSITORY)


def test_the_readme_has_one_whose_files_are_there() -> None:
    (found,) = [text for name, text in manifests() if name == "README.md"]

    (path,) = re.findall(r"file://\./([\w./-]+)", found)
    assert (REPOSITORY / path).exists()
