"""Write `examples/brief-es`: questions of `examples/medical-es`, each with a brief answer preferred to a long one.

    python -m examples.brief_es

The brief answer is the first sentence of the long one. Files are the same every time.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

FOLDER = Path(__file__).parent / "brief-es"
SOURCE = Path(__file__).parent / "medical-es"
TRAIN, HELDOUT = 160, 32


def write(folder: Path) -> None:
    """Both files."""
    for name, count in (("train", TRAIN), ("heldout", HELDOUT)):
        lines = (SOURCE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        pairs = islice(filter(None, map(preference, lines)), count)
        text = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def preference(line: str) -> dict[str, object] | None:
    """The preference that a chat gives, if its answer has more than one sentence."""
    question, answer = json.loads(line)["messages"]
    brief, stop, rest = answer["content"].partition(". ")
    if not rest:
        return None
    return {"prompt": [question], "chosen": [{**answer, "content": brief + stop.strip()}], "rejected": [answer]}


if __name__ == "__main__":
    write(FOLDER)
