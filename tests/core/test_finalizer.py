"""When a job's object is held, and when it is let go."""

from __future__ import annotations

import pytest

from orchestrator.api.job import RELEASE_FINALIZER, MlflowStatus, QLoRAJobStatus
from orchestrator.api.reasons import Reason
from orchestrator.core.commands import FinishRun, ReleaseJob
from orchestrator.core.decide import decide
from orchestrator.core.job.finalizer import finalizers_with, is_at_rest, owes_run_its_end
from tests.builders import NOW, POLICY, after, make_attempt, make_job, running_status, snapshot

OTHER = "example.com/backup"
NOTHING = QLoRAJobStatus()
PREPARING = QLoRAJobStatus(attempts=(make_attempt("prepare", 1),), attempts_total=1)
TRAINING = running_status().model_copy(update={"mlflow": MlflowStatus()})
OPEN = QLoRAJobStatus(mlflow=MlflowStatus(run_id="run", run_status="RUNNING"))
OVER = QLoRAJobStatus(finish_time=NOW)
OVER_WITH_RUN = QLoRAJobStatus(finish_time=NOW, mlflow=MlflowStatus(run_id="run", run_status="FAILED"))


@pytest.mark.parametrize(
    ("stored", "held", "written", "after"),
    [
        pytest.param(NOTHING, False, PREPARING, False, id="a CPU stage holds nothing"),
        pytest.param(PREPARING, False, TRAINING, True, id="a GPU is held"),
        pytest.param(PREPARING, False, OPEN, True, id="a run is open"),
        pytest.param(OPEN, True, OVER_WITH_RUN, True, id="a finished job owes its run the end"),
        pytest.param(OPEN, False, OVER_WITH_RUN, True, id="also one that an older version did not hold"),
        pytest.param(PREPARING, False, OVER_WITH_RUN, True, id="also one whose run comes with the end"),
        pytest.param(TRAINING, True, OVER, False, id="a job that ends without a run is released"),
        pytest.param(OVER_WITH_RUN, False, OVER_WITH_RUN, False, id="who was released stays so"),
    ],
)
def test_a_job_is_held_by_what_its_status_owes(
    stored: QLoRAJobStatus, held: bool, written: QLoRAJobStatus, after: bool
) -> None:
    before = (OTHER, RELEASE_FINALIZER) if held else (OTHER,)
    job = make_job(status=stored, finalizers=before)
    assert finalizers_with(job, written) == ((OTHER, RELEASE_FINALIZER) if after else (OTHER,))


def test_a_finished_job_is_at_rest_once_its_run_has_ended() -> None:
    owing = make_job(status=OVER_WITH_RUN, finalizers=(RELEASE_FINALIZER,))
    assert owes_run_its_end(owing)
    assert not is_at_rest(owing)
    assert is_at_rest(make_job(status=OVER_WITH_RUN))
    assert is_at_rest(make_job(status=OVER, finalizers=(RELEASE_FINALIZER,)))


@pytest.mark.parametrize(
    ("deleted_seconds", "finished_seconds", "is_released"),
    [
        pytest.param(-3600, -7200, True, id="waited for as long as it may take"),
        pytest.param(-3599, -7200, False, id="a moment before"),
        pytest.param(-7200, -60, False, id="deleted long ago, and it has only just ended"),
        pytest.param(None, -7200, False, id="nobody deletes it"),
    ],
)
def test_a_deleted_job_waits_for_mlflow_within_a_bound_and_says_what_is_left_there(
    deleted_seconds: float | None, finished_seconds: float, is_released: bool
) -> None:
    status = OVER_WITH_RUN.model_copy(update={"finish_time": after(finished_seconds)})
    if deleted_seconds is not None:  # as the controller has noted it, by its own clock
        status = status.model_copy(update={"release_since": after(max(deleted_seconds, finished_seconds))})
    owing = make_job(status=status, finalizers=(RELEASE_FINALIZER,))
    deleted = after(deleted_seconds) if deleted_seconds is not None else None
    owing = owing.model_copy(update={"metadata": owing.metadata.model_copy(update={"deletion_timestamp": deleted})})
    commands = decide(snapshot(owing))
    assert [type(command) for command in commands].count(FinishRun) == 1, "it is tried on"
    released = [command for command in commands if isinstance(command, ReleaseJob)]
    assert bool(released) is is_released
    if is_released:
        event = released[0].event
        assert (event.reason, event.warning) == (Reason.TRACKING_UNAVAILABLE, True)
        assert "run run" in event.message
        assert f"{POLICY.release_limit_seconds:.0f} s" in event.message
