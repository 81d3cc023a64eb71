"""Seconds that the first hour takes: from `pip install` to a registered adapter of 60 own records, and of commands.

    python -m benchmarks.first_hour --model FOLDER [--repeat 7] [--commands-only] [--save first_hour]

A copy of the tracked files is installed into a new environment with an empty home (dependencies come from uv's cache,
at the locked versions), and `qlora run --data` is followed to its end; then each command is timed so often, a process
each. Other people's work counts: the document tells the load average before and after.
"""

from __future__ import annotations

import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from statistics import median

from benchmarks.report import argument_parser, emit
from tests.documents.test_pasted import REPOSITORY, make_clone, new_user

RECORDS = 60
DATA = REPOSITORY / "examples" / "notes-es" / "train.jsonl"
TAB = {"COMP_WORDS": "qlora describe ", "COMP_CWORD": "2", "_QLORA_COMPLETE": "complete_bash"}
COMMANDS: Mapping[str, tuple[list[str], Mapping[str, str]]] = {
    "help": (["--help"], {}),
    "get": (["get"], {}),
    "plan": (["plan", "job.yaml"], {}),
    "tab": ([], TAB),
}


def main() -> None:
    """Measure and tell."""
    parser = argument_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a small model's folder")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--commands-only", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        results = measure(Path(name), arguments.model.resolve(), arguments.repeat, trains=not arguments.commands_only)
        emit(results, save=arguments.save)


def measure(folder: Path, model: Path, repeat: int, *, trains: bool) -> dict[str, object]:
    """What each part took, and how busy the machine was."""
    load_before = os.getloadavg()[0]
    environment, clone = new_user(folder), make_clone(folder)
    with DATA.open() as records:
        (clone / "own.jsonl").write_text("".join(islice(records, RECORDS)))
    results: dict[str, object] = {"cores": len(os.sched_getaffinity(0)), "load_before": round(load_before, 1)}
    installed = seconds(["pip", "install", "--quiet", ".[local]"], clone, environment)
    seconds(["qlora", "init", "own.jsonl", "--model", str(model), "--no-look"], clone, environment)
    results["install_seconds"] = round(installed, 1)
    if trains:
        trained = seconds(["qlora", "run", "job.yaml"], clone, environment)
        results |= {"records": RECORDS, "run_seconds": round(trained, 1)}
        results["install_to_adapter_seconds"] = round(installed + trained, 1)
    results["commands"] = {
        name: timed(["qlora", *words], clone, {**environment, **more}, repeat)
        for name, (words, more) in COMMANDS.items()
    }
    return results | {"load_after": round(os.getloadavg()[0], 1)}


def timed(command: list[str], folder: Path, environment: Mapping[str, str], repeat: int) -> dict[str, float]:
    """The median of what a command takes, and of the time that the processor worked for it."""
    runs: list[tuple[float, float]] = []
    for _ in range(repeat):
        before = processor_seconds()
        taken = seconds(command, folder, environment)
        runs.append((taken, processor_seconds() - before))
    taken, worked = (median(part) for part in zip(*runs, strict=True))
    return {"seconds": round(taken, 2), "processor_seconds": round(worked, 2)}


def processor_seconds() -> float:
    """What all ended children together took."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def seconds(command: list[str], folder: Path, environment: Mapping[str, str]) -> float:
    """How long a command takes that ends well."""
    began = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr}")
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
