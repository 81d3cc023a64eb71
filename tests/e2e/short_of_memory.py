"""The trainer on a card that is smaller than promised: the trainer command of tests/e2e/test_out_of_memory.py.

    python short_of_memory.py ATTEMPTS STEPS prepare | train | publish

Of a job whose name begins with `short`, the first so many train attempts run out of memory after so many steps, as a
plan does that was sized too small: torch's own error, from within a forward pass. All else is the real trainer.
"""

from __future__ import annotations

import sys
from typing import Any

from qlora_trainer.__main__ import main, read_task
from qlora_trainer.model.training_model import TrainingModel
from torch import OutOfMemoryError, Tensor

from orchestrator.api.task import StageTask

FIRST_TRAIN_ATTEMPT = 2


def run_short(task: StageTask, attempts: int, steps: int) -> None:
    """Let the micro-batch after so many steps find no room."""
    if task.stage != "train" or not task.job.startswith("short") or task.attempt >= FIRST_TRAIN_ATTEMPT + attempts:
        return
    assert task.plan is not None
    room = steps * task.plan.accumulation_steps
    accumulate = TrainingModel.accumulate

    def limited(self: TrainingModel, *arguments: Any, **named: Any) -> Tensor:
        nonlocal room
        if room == 0:
            raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        room -= 1
        return accumulate(self, *arguments, **named)

    TrainingModel.accumulate = limited  # pyright: ignore[reportAttributeAccessIssue] - any call that the original takes


if __name__ == "__main__":
    run_short(read_task(sys.argv[3]), int(sys.argv[1]), int(sys.argv[2]))
    sys.exit(main(sys.argv[3:]))
