"""The documents followed to the letter: every block of `RUN` in one shell, in a new environment, from the built wheel.

A copy of the tracked files stands for the clone, an empty home for a new user's, and `pip` is uv's, which takes the
packages from its cache, at the versions of the lock file. Two things are smaller than in the documents: models of the
hub are the folder that QLORA_TEST_MODEL names, and the example of medical terminology has its first 16 records.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.documents.blocks import PASTED, REPOSITORY, RUN, RUN_NIGHTLY, Block, blocks_of

pytestmark = pytest.mark.timeout(1800)  # three stages of a real job, also on a machine that is busy with other things

MODEL_VARIABLE = "QLORA_TEST_MODEL"
DOCUMENTS = (*RUN, *RUN_NIGHTLY) if os.environ.get("QLORA_DOCUMENTS") == "all" else RUN
HUB_MODEL = re.compile(r"hf://[\w.-]+/[\w.-]+")
RECORDS = 16
SHORTENED = "examples/medical-es/train.jsonl"
LIMIT_SECONDS = 1700
TAIL_CHARACTERS = 4000


@dataclass(frozen=True, slots=True, kw_only=True)
class Followed:
    """What became of the documents."""

    status: int
    output: str
    seconds: Mapping[str, float]
    """How long each block took, by its place; the last one is where it stopped."""


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Followed:
    """The documents, followed once."""
    model = os.environ.get(MODEL_VARIABLE)
    if model is None:
        pytest.skip(f"set {MODEL_VARIABLE} to a small model's folder: make test-docs does")
    folder = tmp_path_factory.mktemp("documents")
    clone, environment = make_clone(folder), new_user(folder)
    script = write_script(folder, [block for document in DOCUMENTS for block in blocks_of(document)], Path(model))
    try:
        return follow(folder, script, clone, environment)
    finally:
        subprocess.run(["bash", "-c", "qlora down"], cwd=clone, env=environment, check=False, capture_output=True)


def make_clone(folder: Path) -> Path:
    """The tracked files as they are now, with fewer records."""
    clone = folder / "qlora-orchestrator"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY, check=True, capture_output=True, text=True,
    )  # fmt: skip
    for name in listed.stdout.splitlines():
        if (REPOSITORY / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPOSITORY / name, clone / name)
    data = clone / SHORTENED
    data.write_text("".join(data.read_text().splitlines(keepends=True)[:RECORDS]))
    return clone


def new_user(folder: Path) -> dict[str, str]:
    """The environment of somebody with an empty home and an environment of Python that has nothing but pip."""
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert uv is not None, "the development environment has uv"
    cache = subprocess.run([uv, "cache", "dir"], check=True, capture_output=True, text=True).stdout.strip()
    venv, home = folder / "venv", folder / "home"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    home.mkdir()
    pip = venv / "bin" / "pip"
    pip.write_text(f'#!/bin/sh\nexec "{uv}" pip "$@"\n')
    pip.chmod(0o755)
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("QLORA_", "PYTHON", "XDG_", "MLFLOW"))
    }
    return {
        **kept,
        "HOME": str(home),
        "PATH": f"{venv / 'bin'}:{os.environ['PATH']}",
        "VIRTUAL_ENV": str(venv),
        "UV_CACHE_DIR": cache,
        "UV_CONSTRAINT": str(REPOSITORY / "requirements" / "local.txt"),
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }


def write_script(folder: Path, blocks: list[Block], model: Path) -> Path:
    """One script that tells where it is before each block; shell blocks share its variables, as in a terminal."""
    lines = ["set -eo pipefail"]
    for number, block in enumerate(blocks):
        if block.language not in PASTED or block.mark in ("not run", "spec", "values"):
            continue
        lines.append(f"echo '@@ {block.place}'")
        text = HUB_MODEL.sub(model.as_uri(), block.text)
        part = folder / f"{number}.{block.language}"
        part.write_text(text)
        if block.mark == "file":
            lines.append(f"cp {part} {block.detail}")
        elif block.mark == "served":
            lines.append(f"{sys.executable} {Path(__file__).with_name('serve.py')} {part}")
        elif block.language == "python":
            lines.append(f"python -P {part}")
        else:
            lines.append(text)
    script = folder / "followed.sh"
    script.write_text("\n".join(lines) + "\necho '@@ end'\n")
    return script


def follow(folder: Path, script: Path, clone: Path, environment: dict[str, str]) -> Followed:
    """Run the script, and note when each block began."""
    began: dict[str, float] = {}
    output: list[str] = []
    with (
        subprocess.Popen(
            ["bash", script], cwd=clone, env=environment, text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ) as process,
        (folder / "followed.log").open("w") as log,
        bounded(process, LIMIT_SECONDS),
    ):  # fmt: skip
        assert process.stdout is not None, "it is a pipe"
        for line in process.stdout:
            output.append(line)
            log.write(line)
            log.flush()
            if line.startswith("@@ "):
                began[line.removeprefix("@@ ").strip()] = time.monotonic()
        status = process.wait(timeout=60)
    ends = [*list(began.values())[1:], time.monotonic()]
    seconds = {place: end - start for (place, start), end in zip(began.items(), ends, strict=True)}
    return Followed(status=status, output="".join(output), seconds=seconds)


@contextmanager
def bounded(process: subprocess.Popen[str], limit_seconds: float) -> Generator[None]:
    """Kill the process and all of its session once the time is over, and when the block is left."""

    def kill() -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    limit = threading.Timer(limit_seconds, kill)
    limit.start()
    try:
        yield
    finally:
        limit.cancel()
        kill()


def test_every_block_runs_after_those_before_it(followed: Followed) -> None:
    for place, seconds in followed.seconds.items():
        print(f"{seconds:7.1f} s  {place}")
    last = list(followed.seconds)[-1]
    assert (followed.status, last) == (0, "end"), f"{last} failed:\n{followed.output[-TAIL_CHARACTERS:]}"


def test_what_was_installed_is_what_runs_and_the_results_are_there(followed: Followed) -> None:
    assert re.search(r"^state: Succeeded$", followed.output, re.MULTILINE)
    assert re.search(r"^model: models:/default-medical-es/1$", followed.output, re.MULTILINE)
    assert re.search(r"^model: models:/default-medical-terms/1$", followed.output, re.MULTILINE)
    assert "interrupted: exit status 0" in followed.output
