"""The documentation as a site: it builds without a complaint, finds dead links, and fetches nothing from elsewhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from docs import diagrams
from tests.documents.blocks import REPOSITORY

FETCHED = re.compile(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"?(?:https?:)?//[^>]*>")


def build(project: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """`make docs-site` of a folder."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as it is committed."""
    folder = tmp_path_factory.mktemp("site")
    done = build(REPOSITORY, folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_pages_fetch_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))

    assert len(pages) > 30
    assert [(page.name, found) for page in pages for found in FETCHED.findall(page.read_text())] == []
    assert not any('class="mermaid"' in page.read_text() for page in pages), "mermaid would be fetched to draw it"
    assert not any('data-md-component="source"' in page.read_text() for page in pages), "it asks GitHub for stars"


def test_decisions_and_diagrams_are_on_it(site: Path) -> None:
    assert "1. Truth is the QLoRAJob object" in (site / "architecture.html").read_text()
    assert re.search(
        r'<img alt="diagram" src="\.\./pictures/diagram-\w+\.svg"', (site / "reference/states.html").read_text()
    )


def test_no_picture_is_of_a_diagram_that_is_gone() -> None:
    assert {path.name for path in diagrams.PICTURES.iterdir()} == set(diagrams.diagrams())


@pytest.mark.parametrize(
    ("page", "old", "new", "found"),
    [
        ("questions.md", "(scope.md)", "(scopes.md)", "scopes.md"),
        ("questions.md", "reading-results.md#the-model", "reading-results.md#a-model", "#a-model"),
        ("concepts.md", "no plan does", "none does", "1 diagrams have no picture yet: python -m docs.diagrams"),
        ("lost.md", "", "# Lost\n", "lost.md"),
    ],
    ids=["a page that is not there", "a heading that is not there", "a changed diagram", "a page without a place"],
)
def test_what_is_dead_is_found(tmp_path: Path, page: str, old: str, new: str, found: str) -> None:
    shutil.copytree(REPOSITORY / "docs", tmp_path / "docs")
    shutil.copyfile(REPOSITORY / "mkdocs.yml", tmp_path / "mkdocs.yml")
    place = tmp_path / "docs" / page
    text = place.read_text() if old else ""
    assert old in text
    place.write_text(text.replace(old, new) if old else new)

    done = build(tmp_path, tmp_path / "site")

    assert done.returncode != 0
    assert found in done.stderr
