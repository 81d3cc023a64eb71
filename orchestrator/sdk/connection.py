"""What the client talks to: an object store, the place of the stages' logs, and whether anybody is at work.

`Client` holds one. `embedded` opens the service of this machine; it imports no ray and no mlflow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.controller.ports import Store
from orchestrator.core.facts import GpuClass


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """One service, as its clients see it."""

    store: Store
    stages_folder: Path
    """Where stages keep their logs, by namespace and stage name."""
    is_running: Callable[[], bool]
    """Whether a controller is at work; objects can be read and written without one."""
    gpu_classes: Callable[[], Sequence[GpuClass]]
    """What jobs are sized for."""
    default_store_uri: str
    """Where jobs that name no store keep their data."""
