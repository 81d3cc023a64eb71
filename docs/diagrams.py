"""Draws the documents' mermaid diagrams as pictures for the site: `python -m docs.diagrams`.

A picture's name is the digest of its diagram's text, so it is known which are missing and which nobody needs any more.
Drawing needs npm, for mermaid itself, and Chromium; building the site needs neither.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

DOCS = Path(__file__).parent
PICTURES = DOCS / "pictures"
FENCE = re.compile(r"^```mermaid\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
MERMAID = "mermaid@11.17.2"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PAGE = """<!doctype html><meta charset="utf-8"><body><script src="mermaid.min.js"></script><script>
mermaid.initialize({startOnLoad: false, securityLevel: "strict", theme: "neutral", htmlLabels: false,
  flowchart: {htmlLabels: false}, fontFamily: "sans-serif", deterministicIds: true});
(async () => {
  const drawn = {};
  for (const [name, text] of Object.entries(%s)) drawn[name] = (await mermaid.render("d", text)).svg;
  document.body.textContent = JSON.stringify(drawn);
})();
</script></body>"""


def main() -> None:
    """Draw what is missing, and remove what no document has any more."""
    wanted = diagrams()
    if absent := missing():
        drawn = draw({name: wanted[name] for name in absent})
        PICTURES.mkdir(exist_ok=True)
        for name, svg in drawn.items():
            (PICTURES / name).write_text(svg + "\n")
    for path in PICTURES.glob("diagram-*.svg"):
        if path.name not in wanted:
            path.unlink()
    print(f"{len(wanted)} diagrams, {len(absent)} drawn")


def diagrams() -> Mapping[str, str]:
    """The text of every diagram, by the name of its picture."""
    found = (text for path in sorted(DOCS.rglob("*.md")) for text in FENCE.findall(path.read_text()))
    return {name_of(text): text for text in found}


def missing() -> list[str]:
    """The pictures that are not there."""
    return [name for name in diagrams() if not (PICTURES / name).is_file()]


def name_of(text: str) -> str:
    """The picture's file name."""
    return f"diagram-{hashlib.sha256(text.encode()).hexdigest()[:12]}.svg"


def draw(texts: Mapping[str, str]) -> Mapping[str, str]:
    """The diagrams as SVG, by name; exits where a program is missing or a diagram is none."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        packed = run(["npm", "pack", "--silent", MERMAID], folder).strip()
        run(["tar", "xzf", packed, "--strip-components=2", "package/dist/mermaid.min.js"], folder)
        (folder / "page.html").write_text(PAGE % json.dumps(texts))
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom"]
        dom = run([browser(), *options, (folder / "page.html").as_uri()], folder)
    found = re.search(r"<body>(\{.*\})</body>", dom, re.DOTALL)
    if found is None:
        raise SystemExit(f"nothing was drawn:\n{dom[:2000]}")
    drawn: Mapping[str, str] = json.loads(html.unescape(found[1]))
    return {name: on_paper(svg) for name, svg in drawn.items()}


def on_paper(svg: str) -> str:
    """The picture in its own size, and not as wide as the page; on white, for pages in the dark."""
    sized = re.sub(r'width="100%"(.*?viewBox="\S+ \S+ (\S+) \S+")', r'width="\2"\1', svg, count=1)
    return sized.replace('style="', 'style="background: white; ', 1)


def browser() -> str:
    """The first of BROWSERS that is here."""
    for name in BROWSERS:
        if subprocess.run(["which", name], capture_output=True, check=False).returncode == 0:
            return name
    raise SystemExit(f"none of {', '.join(BROWSERS)} is installed")


def run(command: list[str], folder: Path) -> str:
    """What a program prints."""
    return subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True, timeout=300).stdout


if __name__ == "__main__":
    sys.exit(main())
