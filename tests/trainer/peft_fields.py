"""Which version of PEFT knows which field of a LoRA's adapter_config.json: `peft_fields.json`, and what makes it.

    python tests/trainer/peft_fields.py      # reads the releases anew, with pip, and writes the file

A release is downloaded as a wheel and its sources are read; nothing of it is run. Versions between two that know the
same fields are left out.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

TABLE = Path(__file__).with_suffix(".json")
FIRST, LAST = 3, 21
"""Minor versions of 0.x: the first with LoRA, and the newest that was looked at."""


def known_fields() -> dict[str, frozenset[str]]:
    """The fields that a version knows, by version, oldest first."""
    table: dict[str, list[str]] = json.loads(TABLE.read_text())
    return {version: frozenset(fields) for version, fields in table.items()}


def main() -> None:
    """Write the table."""
    table: dict[str, list[str]] = {}
    for minor in range(FIRST, LAST + 1):
        version = f"0.{minor}.0"
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
            subprocess.run([*command, "--dest", folder, f"peft=={version}"], check=True)
            (wheel,) = Path(folder).glob("*.whl")
            fields = sorted(set(lora_fields(wheel)))
        if not table or fields != list(table.values())[-1]:
            table[version] = fields
    TABLE.write_text(json.dumps(table, indent=1) + "\n")


def lora_fields(wheel: Path) -> Iterator[str]:
    """The fields of LoraConfig and of the classes that it extends."""
    classes: dict[str, ast.ClassDef] = {}
    with zipfile.ZipFile(wheel) as sources:
        for name in sources.namelist():
            if name.endswith((".py",)) and name.startswith(("peft/config", "peft/utils/config", "peft/tuners/lora")):
                tree = ast.parse(sources.read(name))
                classes |= {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    waiting = ["LoraConfig"]
    while waiting:
        found = classes.get(waiting.pop())
        if found is not None:
            waiting += [base.id for base in found.bases if isinstance(base, ast.Name)]
            yield from (
                node.target.id
                for node in found.body
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
            )


if __name__ == "__main__":
    main()
