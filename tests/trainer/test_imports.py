"""What a process that trains does not load, and that it can still have what it put off.

Every check is a process of its own: this one has imported everything long ago.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from toy_job import make_task

from orchestrator.api.reasons import ExitCode

UNUSED = {
    "torch._dynamo.convert_frame",
    "torch._inductor",
    "torch.distributed.tensor",
    "networkx",
    "scipy",
    "sklearn",
    "pandas",
    "matplotlib",
    "datasets",
    "mlflow",
    "sqlalchemy",
    "flask",
}
TRAIN = """
import json, sys
from qlora_trainer.__main__ import main
print(json.dumps([main(["train"]), sorted(sys.modules)]))
"""
COMPILE = """
import importlib, json, sys
from qlora_trainer import imports
imports.load_torch()
import torch
assert not hasattr(sys.modules["torch._dynamo"], "__file__"), "the stand-in is gone before anybody asked for more"
importlib.import_module(sys.argv[1])
answer = torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item()
parts = [name for name in sys.modules if name.startswith(("torch._dynamo.", "torch._inductor."))]
loose = [name for name in parts if not hasattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2])]
print(json.dumps([answer, loose]))
"""


def run(program: str, *arguments: str, **variables: str) -> list[object]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **variables}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    answer: list[object] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # layers by hand; layers and checkpoints of torch's
def test_a_job_is_trained_without_what_it_has_no_use_for(tmp_path: Path, family: str) -> None:
    task = make_task(tmp_path, steps=2, family=family)
    environment = {
        "QLORA_TASK": task.model_dump_json(by_alias=True),
        "QLORA_TERMINATION_LOG": str(tmp_path / "termination"),
        "MLFLOW_TRACKING_URI": "",
    }
    code, modules = run(TRAIN, **environment)
    assert code == ExitCode.OK
    assert isinstance(modules, list)
    assert sorted(UNUSED.intersection(modules)) == []


def test_whoever_needs_the_compiler_gets_it_whole() -> None:
    for first in ("torch", "torch._inductor.config"):
        assert run(COMPILE, first) == [2.0, []]
