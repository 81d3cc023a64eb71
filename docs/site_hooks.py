"""What the site needs beyond the Markdown that the repository shows: mkdocs calls these by their names.

- Links that leave `docs/` go to the repository.
- Diagrams are pictures that `docs.diagrams` has drawn, so that neither build nor page fetches a program for them.
- Decisions stand in the navigation by their titles, whoever adds one.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import Any

from docs import diagrams

DOCS = Path(__file__).parent
LINK = re.compile(r"(\]\()(?!\w+:)([^)#\s]+)((?:#[^)\s]*)?\))")


def on_config(config: Any) -> Any:
    """The navigation with all decisions; raises where a diagram has no picture."""
    if missing := diagrams.missing():
        raise SystemExit(f"{len(missing)} diagrams have no picture yet: python -m docs.diagrams")
    inside = config["nav"][-1]["Inside"]
    inside[-1]["Decisions"] = [{title(path): f"adr/{path.name}"} for path in sorted((DOCS / "adr").glob("*.md"))]
    return config


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """The page's text with pictures for diagrams, and links to the repository for what is not on the site."""
    folder = PurePosixPath(page.file.src_uri).parent
    up = "../" * len(folder.parts)
    markdown = diagrams.FENCE.sub(lambda found: f"![diagram]({up}pictures/{diagrams.name_of(found['text'])})", markdown)

    def outside(found: re.Match[str]) -> str:
        path = normpath(f"docs/{folder}/{found[2]}")
        if path.startswith("docs/"):
            return found[0]
        return f"{found[1]}{config['extra']['repository']}/blob/main/{path}{found[3]}"

    return LINK.sub(outside, markdown)


def title(path: Path) -> str:
    """A page's heading."""
    return path.read_text().partition("\n")[0].removeprefix("# ")
