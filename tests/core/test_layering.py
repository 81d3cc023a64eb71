"""The import contracts can fail: one line that breaks a rule breaks the contract that states it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
CODE = ("orchestrator", "trainer_image/qlora_trainer")
LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"

LAYERS = "The orchestrator in layers: who is above may import who is below"
PURITY = "The core and the sizing are pure: no clock, no randomness, no files, no logging, nothing installed"
WINGS = "The trainer in wings: who is above may import who is below"
BREACHES = {
    "a clock in the core": ("orchestrator/core/decide.py", "import time", PURITY),
    "randomness in the sizing": ("orchestrator/sizing/footprint.py", "import random", PURITY),
    "an adapter that imports the client": (
        "orchestrator/adapters/sqlite/store.py",
        "import orchestrator.sdk.client",
        LAYERS,
    ),
    "the core importing an adapter": (
        "orchestrator/core/decide.py",
        "import orchestrator.adapters.sqlite.store",
        LAYERS,
    ),
    "a package that no layer names": ("orchestrator/utilities/__init__.py", "", LAYERS),
    "kernels importing the training loop": (
        "trainer_image/qlora_trainer/kernels/layer.py",
        "import qlora_trainer.training.loop",
        WINGS,
    ),
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the code and of the contracts, and nothing else."""
    copy = tmp_path_factory.mktemp("tree")
    shutil.copy(REPOSITORY / "pyproject.toml", copy)
    for folder in CODE:
        shutil.copytree(REPOSITORY / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def lint(tree: Path) -> tuple[int, str]:
    """The exit code and the words, on one line, of import-linter over the tree."""
    done = subprocess.run(
        [sys.executable, "-c", LINT, "--no-logo"],
        cwd=tree,
        env={"PYTHONPATH": f"{tree}:{tree / 'trainer_image'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def test_the_tree_as_it_is_keeps_every_contract(tree: Path) -> None:
    code, said = lint(tree)

    assert code == 0, said
    assert " 0 broken" in said


@pytest.mark.parametrize("breach", BREACHES)
def test_one_line_breaks_the_contract(tree: Path, breach: str) -> None:
    name, line, contract = BREACHES[breach]
    path = tree / name
    before = path.read_text() if path.exists() else None
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{before or ''}\n{line}\n")
    try:
        code, said = lint(tree)
    finally:
        shutil.rmtree(path.parent) if before is None else path.write_text(before)

    assert code == 1, said
    assert f"{contract} BROKEN" in said
