"""A trainer's end of the fabric and nothing else: the real client, reporting steps until it is asked to stop.

    python fabric_trainer.py <file to note checkpoints in>

Each request to make a checkpoint, and the one to stop, appends a line to the file.
"""

from __future__ import annotations

import os
import sys
from datetime import UTC, datetime
from pathlib import Path

from qlora_trainer.training.stop import AgentClient, Stop

from orchestrator.api.results import ProgressReport

STEP_SECONDS = 0.1
PREEMPTED = 85


def main(notes: Path) -> int:
    stop = Stop(grace_seconds=3600)
    stop.end_start_up()
    client = AgentClient(Path(os.environ["QLORA_AGENT_SOCKET"]), stop)
    client.start()
    step = 0
    with stop.listening(), notes.open("a", buffering=1) as file:
        while not stop.asked.wait(STEP_SECONDS):
            step += 1
            client.report(ProgressReport(stage="train", step=step, steps=1_000_000, time=datetime.now(tz=UTC)))
            if stop.take_checkpoint_request():
                file.write(f"checkpoint {step}\n")
        file.write(f"stop within {stop.seconds_left():.0f}\n")
    client.close()
    return PREEMPTED


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
