"""What a container writes to stderr: one JSON object a line, with the job and the attempt that it is about."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys, warnings
from pathlib import Path
from orchestrator.controller.logs import log_to_stderr
from orchestrator.errors import StoreUnavailable
from tests.builders import submitted_job
from tests.controller.test_loop import World

log_to_stderr()
world = World(Path(sys.argv[1]))
world.store.create_job(submitted_job())
world.runtime.error = lambda call: StoreUnavailable("away") if "ensure" in call and "publish" in call else None
world.rounds(lambda: world.job().status.attempts_total == 3)
for _ in range(5):
    world.controller.round()
"""


def test_every_line_is_json_and_names_its_job_and_attempt(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, timeout=120, check=True
    )
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert {line["logger"] for line in lines} == {"orchestrator.controller.act"}
    about = {(line["job"], line["attempt"]): line["message"].split(":")[0] for line in lines if "Admitted" in str(line)}
    assert about == {("team-a/medical", 2): "Admitted"}
    waits = [line for line in lines if line["message"].startswith("EnsureStage")]
    assert waits
    assert {(line["level"], line["job"], line["attempt"]) for line in waits} == {("WARNING", "team-a/medical", 3)}
