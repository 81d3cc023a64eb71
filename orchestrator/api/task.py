"""StageTask: all that a stage is told, in one JSON document.

It travels in the stage's environment, in `QLORA_TASK` and, because Linux takes no variable of more than 128 KiB, the
rest of a long one in `QLORA_TASK_2` and so on. The trainer reads it and nothing else of the job. The other variables
below say where the stage's surroundings are.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count, takewhile
from typing import Annotated

from pydantic import Field, StringConstraints

from orchestrator.api.adapter import StartingJob
from orchestrator.api.base import DnsLabel, JobName, Model, PositiveCount, ShortText
from orchestrator.api.job import QLoRAJobSpec
from orchestrator.api.plan import MemoryPlan
from orchestrator.api.results import PrepareResult
from orchestrator.api.stage_name import StageKind, StageName

TASK_VARIABLE = "QLORA_TASK"
MAX_VARIABLE_CHARACTERS = 30_000
"""At most 120,000 bytes as UTF-8; Linux takes 131,071 of name and value together."""
TERMINATION_LOG_VARIABLE = "QLORA_TERMINATION_LOG"
"""Path of the termination log; default `/dev/termination-log`, as in a pod."""
AGENT_SOCKET_VARIABLE = "QLORA_AGENT_SOCKET"
"""Path of the agent's unix socket; unset means that nobody listens."""
TRACKING_URI_VARIABLE = "MLFLOW_TRACKING_URI"


class StageTask(Model):
    """One attempt at one stage of one job."""

    stage: StageKind
    namespace: DnsLabel
    job: JobName
    uid: ShortText
    attempt: PositiveCount
    spec: QLoRAJobSpec
    store_uri: Annotated[str, StringConstraints(max_length=2048)]
    """The job's own folder: `<store>/<namespace>/<job>-<uid>`."""
    plan: MemoryPlan | None = None
    """Set for train."""
    prepared: PrepareResult | None = None
    """Set for train and publish."""
    adapter_uri: Annotated[str, StringConstraints(max_length=2048)] | None = None
    """Set for publish."""
    starting_job: StartingJob | None = None
    """Set for prepare where the adapter of another job is gone on from."""
    run_id: ShortText | None = None
    """The job's MLflow run. Always set for publish; for train it may be absent while MLflow is away."""
    grace_seconds: int = Field(default=120, ge=1, le=86_400)
    """Seconds that a signal to stop leaves at least before it is killed."""
    checkpoint_lag_seconds: float = Field(default=900.0, gt=0, le=86_400)
    """Training waits for a checkpoint that has not reached the store for so long."""
    threads: int = Field(default=1, ge=1, le=1024)
    """CPU threads of the trainer; fixed, because the order of CPU sums depends on it."""
    host_memory_factor: float = Field(default=1.0, ge=1)
    """How much more host memory its machine gives it than a first attempt gets."""
    avoid_nodes: Annotated[tuple[ShortText, ...], Field(max_length=8)] = ()
    """Machines that it is not to be put on."""

    @property
    def stage_name(self) -> str:
        """`<job>-<stage>-<attempt>`."""
        return str(StageName(job=self.job, stage=self.stage, attempt=self.attempt))


def task_variables(text: str) -> dict[str, str]:
    """The environment variables that hold a task's JSON."""
    parts = [text[start : start + MAX_VARIABLE_CHARACTERS] for start in range(0, len(text), MAX_VARIABLE_CHARACTERS)]
    return {_variable(number): part for number, part in enumerate(parts, start=1)}


def task_text(environment: Mapping[str, str]) -> str | None:
    """The JSON that `task_variables` has spread over an environment; None where there is none."""
    numbers = takewhile(lambda number: _variable(number) in environment, count(1))
    return "".join(environment[_variable(number)] for number in numbers) or None


def _variable(number: int) -> str:
    return TASK_VARIABLE if number == 1 else f"{TASK_VARIABLE}_{number}"
