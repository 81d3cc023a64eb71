"""Seconds from the start of a train process to its first step on a tiny model, and where its imports spend them.

    python -m benchmarks.startup [--repeat 5] [--save startup]

Runs the real train stage so often, quantized weights cached and all files in the page cache, and tells the medians;
between two of its runs a process imports the same libraries as they come. One run more under `-X importtime`, which
itself takes time, shares the imports among top-level packages.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from datetime import datetime
from pathlib import Path
from statistics import median

from benchmarks.report import argument_parser, emit
from benchmarks.shapes import write_texts
from benchmarks.stages import Bench, environment, log_path, prepare
from orchestrator.api.job import QLoRAJobSpec
from orchestrator.api.plan import MemoryPlan
from orchestrator.api.task import StageTask
from tests.trainer.tiny_model import build_tiny_model

UNTOUCHED = """
import json, sys, time
from qlora_trainer import train
from qlora_trainer.model import training_model
from qlora_trainer.storage import checkpoint
from qlora_trainer.tracking import mlflow_run
from qlora_trainer.training import loop
print(json.dumps([time.time(), len(sys.modules)]))
"""
IMPORTED, LOADED, STEPPED = "the libraries are imported", "loaded ", "step 1 of "
TIMED = re.compile(r"import time: +(\d+) \| +\d+ \| +(\w+)")
PACKAGES_TOLD = 12


def main() -> None:
    """Measure and tell."""
    parser = argument_parser(__doc__)
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        emit(measure(bench(Path(name)), arguments.repeat), save=arguments.save)


def bench(folder: Path) -> Bench:
    """A job of one step."""
    build_tiny_model(folder / "model")
    write_texts(folder / "train.jsonl", records=16, words=32)
    spec = QLoRAJobSpec.model_validate(
        {
            "model": {"source": f"file://{folder}/model"},
            "dataset": {"source": f"file://{folder}/train.jsonl", "format": "text", "tooLong": "truncate"},
            "training": {"maxSteps": 1, "sequenceLength": 128, "globalBatchSize": 1},
        }
    )
    return Bench(
        folder=folder, spec=spec, plan=MemoryPlan(micro_batch_size=1, accumulation_steps=1, recompute_layers=0)
    )


def measure(bench: Bench, repeat: int) -> dict[str, object]:
    """The medians, after one run that fills the caches."""
    train(bench, prepare(bench, "first"))
    untouched: list[dict[str, float]] = []
    runs: list[dict[str, float]] = []
    for number in range(repeat):
        untouched.append(import_untouched())
        runs.append(train(bench, prepare(bench, f"run-{number}")))
    train(bench, timed := prepare(bench, "timed"), "-X", "importtime")
    return {
        "repeat": repeat,
        "plain_imports": medians(untouched),
        "train_stage": medians(runs),
        "import_seconds_by_package": by_package(log_path(bench, timed).read_text()),
    }


def import_untouched() -> dict[str, float]:
    """What the train stage's imports would take without `qlora_trainer.imports`."""
    began = time.time()
    done = subprocess.run([sys.executable, "-c", UNTOUCHED], check=True, capture_output=True, text=True)
    ended, modules = json.loads(done.stdout.splitlines()[-1])
    return {"imported_seconds": ended - began, "modules": modules}


def train(bench: Bench, task: StageTask, *options: str) -> dict[str, float]:
    """Seconds since the process was started, at the lines of its log that tell how far it is."""
    began = time.time()
    with log_path(bench, task).open("wb") as log:
        command = [sys.executable, *options, "-m", "qlora_trainer", "train"]
        variables = {**environment(bench, task), "QLORA_MODEL_CACHE": str(bench.folder / "cache")}
        subprocess.run(command, env=variables, stderr=log, check=True)
    seconds: dict[str, float] = {}
    modules = 0
    for line in log_path(bench, task).read_text().splitlines():
        if not line.startswith("{"):
            continue
        entry = json.loads(line)
        for name, start in (("imported", IMPORTED), ("loaded", LOADED), ("stepped", STEPPED)):
            if entry["message"].startswith(start):
                seconds[f"{name}_seconds"] = datetime.fromisoformat(entry["time"]).timestamp() - began
        if entry["message"].startswith(IMPORTED):
            modules = int(entry["message"].split()[-2])
    return {**seconds, "modules": modules}


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """The median of each figure."""
    return {name: round(median(run[name] for run in runs), 2) for name in runs[0]}


def by_package(log: str) -> dict[str, float]:
    """Each top-level package's own share of the imports before the model is loaded, the largest first."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for microseconds, package in TIMED.findall(log[: log.index(IMPORTED)]):
        seconds[package] += int(microseconds) / 1e6
    longest = sorted(seconds, key=seconds.__getitem__, reverse=True)[:PACKAGES_TOLD]
    told = {package: round(seconds[package], 2) for package in longest}
    return {**told, "others": round(sum(seconds.values()) - sum(told.values()), 2)}


if __name__ == "__main__":
    main()
