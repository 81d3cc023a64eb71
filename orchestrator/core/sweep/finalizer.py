"""What has to be settled before a sweep's object may go: its MLflow run, which waits for its last status.

RELEASE_FINALIZER is on while trials are on record, any of which may have opened the run, and the status does not yet
say what the run has ended as. A sweep that is deleted meanwhile is one that is cancelled: once its trials have ended,
so has its run, then its object goes, and with it the objects of its trials.
"""

from __future__ import annotations

from orchestrator.api.job import RELEASE_FINALIZER, ObjectMeta
from orchestrator.api.sweep import QLoRASweep, QLoRASweepStatus


def owes_run_its_end(status: QLoRASweepStatus) -> bool:
    """Whether the run of a sweep with this status may be open."""
    if status.mlflow.run_status is not None:
        return False
    may_begin = status.finish_time is None
    return any(may_begin or trial.uid for trial in status.trials)


def finalizers_with(sweep: QLoRASweep, status: QLoRASweepStatus) -> tuple[str, ...]:
    """The sweep's finalizers once it has this status; an object that is marked as deleted gets no new one."""
    left, meta = released(sweep.metadata), sweep.metadata
    is_held = RELEASE_FINALIZER in meta.finalizers
    if owes_run_its_end(status) and (is_held or meta.deletion_timestamp is None):
        return meta.finalizers if is_held else (*left, RELEASE_FINALIZER)
    return left


def released(meta: ObjectMeta) -> tuple[str, ...]:
    """Its finalizers without ours."""
    return tuple(finalizer for finalizer in meta.finalizers if finalizer != RELEASE_FINALIZER)
