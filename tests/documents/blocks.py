"""The fenced blocks of documents, and the comments before them that say what becomes of a block in tests.

Without a comment a block of `sh` or `python` is run, in the order of the document and after the blocks before it.

    <!-- file: job.yaml -->     the block is a file, which the next ones find under this name
    <!-- served -->             it serves until Ctrl-C: it is run until it has told an address, and then interrupted
    <!-- not run: cluster -->   it is not run, for one of `test_marks.REASONS`, which say what is checked instead
    <!-- spec -->               a part of a job's spec, which makes one with README's model and data
    <!-- values -->             values of the chart
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PASTED = ("sh", "python", "yaml")
SHOWN = ("mermaid", "text", "json")
"""Languages of what is looked at."""
WRITTEN = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "docs", "examples")
"""Where people are told what to paste; `docs/reference` is generated and tells nothing of the kind."""
RUN = (
    "README.md",
    "docs/your-data.md",
    "docs/your-model.md",
    "docs/coming-from-openai.md",
)
"""The documents whose blocks are run, in this order, in one shell; each goes on where the one before has ended."""
RUN_NIGHTLY = ("docs/reading-results.md", "docs/quickstart.md")
"""Those that generate or train once more; they come after the others where QLORA_DOCUMENTS is `all`."""
_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[^>]*) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One fenced block."""

    document: str
    """Its path in the repository."""
    line: int
    language: str
    text: str
    mark: str = ""
    """`file`, `served`, `not run`, `spec`, `values`, or nothing."""
    detail: str = ""
    """What stands after the mark's colon."""

    @property
    def place(self) -> str:
        """`README.md:54`."""
        return f"{self.document}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """The lines of a shell block, comments and continuations aside."""
        text = re.sub(r"\\\n\s*", "", self.text)
        return [line for raw in text.splitlines() if (line := re.sub(r"(^|\s)#.*", "", raw).strip())]


def blocks_of(document: str) -> Iterator[Block]:
    """The blocks of a document of the repository, in order."""
    yield from parse(document, (REPOSITORY / document).read_text())


def parse(document: str, text: str) -> Iterator[Block]:
    """The blocks of a document's text."""
    for found in _BLOCK.finditer(text):
        mark, _, detail = (found["mark"] or "").partition(": ")
        yield Block(
            document=document,
            line=text.count("\n", 0, found.start("language")) + 1,
            language=found["language"],
            text=found["text"],
            mark=mark,
            detail=detail,
        )


def written() -> list[Block]:
    """All blocks that people may paste."""
    paths = [path for name in WRITTEN for path in _markdown(REPOSITORY / name)]
    found = [block for path in sorted(paths) for block in blocks_of(str(path.relative_to(REPOSITORY)))]
    return [block for block in found if block.language not in SHOWN]


def _markdown(place: Path) -> Iterator[Path]:
    if place.is_file():
        yield place
        return
    yield from (path for path in place.rglob("*.md") if "reference" not in path.parts)
