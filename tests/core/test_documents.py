"""Documents name only what exists: every link, every anchor, every path and module of the project."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SKIPPED = {".venv", ".git", ".pytest_cache", "node_modules", "build", "dist"}
DOCUMENTS = sorted(
    path
    for path in REPOSITORY.rglob("*.md")
    if not SKIPPED & set(path.relative_to(REPOSITORY).parts) and not path.name.startswith("pull_request")
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE_PATH = re.compile(
    r"`((?:orchestrator|trainer_image|qlora_trainer|benchmarks|docs|examples|tests|manifests|helm)/[\w./-]*|[\w/]+/\w+\.py)`"
)
MODULE = re.compile(r"python -m ((?:orchestrator|benchmarks|docs|examples|tests)(?:\.\w+)*)")
ROOTS = tuple(
    REPOSITORY / name
    for name in (".", "trainer_image", "trainer_image/qlora_trainer", "orchestrator", "orchestrator/core")
)


def prose(path: Path) -> str:
    """The document without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(path: Path) -> Iterator[str]:
    """The links of a document that lead nowhere in the repository; others' sites are not asked."""
    for target in LINK.findall(prose(path)):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        found = path.parent / name if name else path
        if not found.exists() or (anchor and anchor not in anchors(found)):
            yield target


def absent_names(path: Path) -> Iterator[str]:
    """The paths and modules that a document names and the repository lacks."""
    text = path.read_text()
    for name in CODE_PATH.findall(text):
        if not any((root / name).exists() for root in ROOTS):
            yield name
    for module in MODULE.findall(text):
        place = REPOSITORY / module.replace(".", "/")
        if not place.with_suffix(".py").exists() and not (place / "__init__.py").exists():
            yield module


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_link_and_name_exists(document: Path) -> None:
    assert [*dead_links(document), *absent_names(document)] == []


def test_the_glossary_has_every_term_once() -> None:
    glossary = (REPOSITORY / "docs" / "glossary.md").read_text().partition("<!-- history:begin -->")[0]
    terms = [term for row in re.findall(r"^\| ([^|]+) \|", glossary, flags=re.MULTILINE) for term in row.split(", ")]

    assert sorted({term for term in terms if terms.count(term) > 1 and term != "term"}) == []


def test_a_dead_link_an_absent_anchor_and_a_moved_file_are_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# Two words\n")
    document = tmp_path / "page.md"
    document.write_text(
        "[a](gone.md) [b](other.md#three-words) [c](other.md#two-words)\n"
        "`orchestrator/gone.py` `orchestrator/api/job.py` `python -m benchmarks.gone`\n"
    )

    assert list(dead_links(document)) == ["gone.md", "other.md#three-words"]
    assert list(absent_names(document)) == ["orchestrator/gone.py", "benchmarks.gone"]


def test_what_an_index_shows_has_no_relative_link() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    links = LINK.findall((REPOSITORY / project["readme"]).read_text())
    home = project["urls"]["Repository"]

    assert links
    assert [link for link in links if not link.startswith(home)] == []
    assert [
        link for link in links if "/blob/main/" in link and not (REPOSITORY / link.split("/blob/main/")[1]).exists()
    ] == []
