"""A job that was stopped and resumed ends with the very adapter and journal of one that was not, bit for bit."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from qlora_trainer import train
from qlora_trainer.outcome import Preempted
from qlora_trainer.storage.checkpoint import Checkpointer, Provenance
from qlora_trainer.storage.job_store import JobStore
from qlora_trainer.storage.journal import Journal
from toy_job import DIGEST, digest_of_adapter, make_task

from orchestrator.api.formats import JournalRecord
from orchestrator.api.results import TrainResult
from orchestrator.api.task import StageTask

STEPS = 12
JOBS: dict[str, dict[str, Any]] = {
    "everything, 8-bit": {
        "adapter": {"dropout": "0.2", "use_dora": True, "use_rslora": True},
        "training": {
            "optimizer": "paged_adamw_8bit",
            "neftune_alpha": "5",
            "scheduler": "cosine",
            "warmup_ratio": "0.2",
        },
        "evaluation": {"every_steps": 4, "keep_best": True, "early_stopping_patience": 50},
        "micro_batch_size": 1,
        "recompute_layers": 2,
    },
    "defaults, 32-bit": {
        "adapter": {"dropout": "0.1", "rank": 64},
        "training": {"optimizer": "paged_adamw_32bit", "lora_plus_ratio": "4", "weight_decay": "0.01"},
        "micro_batch_size": 4,
        "recompute_layers": 0,
    },
    "norms at both ends, by hand": {
        "family": "gemma3_text",
        "adapter": {"dropout": "0.1"},
        "training": {"optimizer": "paged_adamw_8bit"},
        "recompute_layers": 1,
    },
    "preferences": {
        "dataset": {"format": "preference"},
        "adapter": {"dropout": "0.2"},
        "training": {"objective": {"type": "dpo", "beta": "0.3", "label_smoothing": "0.1"}},
        "evaluation": {"every_steps": 4, "keep_best": True, "metric": "rewards/margins"},
    },
    "a mixture of experts": {"family": "qwen2_moe", "training": {"optimizer": "paged_adamw_8bit"}},
}


class StopAt(logging.Handler):
    """Sends this process a SIGTERM when the loop says something that begins so."""

    def __init__(self, message: str) -> None:
        super().__init__()
        self._message = message

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith(self._message):
            os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def stopping_at(message: str) -> Iterator[None]:
    loop = logging.getLogger("qlora_trainer.training.loop")
    handler, level = StopAt(message), loop.level
    loop.addHandler(handler)
    loop.setLevel(logging.INFO)
    try:
        yield
    finally:
        loop.removeHandler(handler)
        loop.setLevel(level)


def run_until(task: StageTask, step: int) -> TrainResult:
    with stopping_at(f"step {step} of "), pytest.raises(Preempted) as caught:
        train.run(task)
    assert caught.value.result is not None
    return caught.value.result


def losses(store: Path) -> list[tuple[int, str, float]]:
    """Everything in the final journal that does not depend on the clock."""
    return [
        (record.step, name, value)
        for record in Journal.load(store / "adapter" / "journal.jsonl").records()
        for name, value in sorted(record.metrics.items())
        if name.startswith(("train/", "eval/")) and name not in ("train/tokens_per_second", "train/mfu")
    ]


@pytest.mark.parametrize("name", JOBS)
def test_stopped_four_times_it_ends_as_if_nothing_had_happened(tmp_path: Path, name: str) -> None:
    undisturbed = make_task(tmp_path / "undisturbed", steps=STEPS, **JOBS[name])
    expected = train.run(undisturbed)
    for attempt, step in enumerate((1, 4, 5, 11), start=1):  # 4 is also an evaluation's step
        stopped = run_until(make_task(tmp_path / "stopped", steps=STEPS, attempt=attempt, **JOBS[name]), step)
        assert (stopped.step, stopped.complete) == (step, False)
        assert stopped.checkpoint_uri == (tmp_path / "stopped" / "checkpoints" / f"step-{step:08d}").as_uri()
    resumed = train.run(make_task(tmp_path / "stopped", steps=STEPS, attempt=9, **JOBS[name]))
    assert digest_of_adapter(tmp_path / "stopped") == digest_of_adapter(tmp_path / "undisturbed")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "undisturbed")
    assert resumed.adapter_digest == expected.adapter_digest
    assert (resumed.eval_loss, resumed.train_loss) == (expected.eval_loss, expected.train_loss)


EARLY: dict[str, Any] = {
    "steps": 30,
    # Overshoots, and never calms down.
    "training": {"learning_rate": "3", "scheduler": "constant", "max_grad_norm": "10"},
    "evaluation": {"every_steps": 1, "early_stopping_patience": 3, "metric": "perplexity", "keep_best": True},
}


def test_stopped_it_ends_early_at_the_same_step_with_the_same_adapter(tmp_path: Path) -> None:
    stores = [tmp_path / name for name in ("undisturbed", "stopped")]
    expected = train.run(make_task(stores[0], **EARLY))
    assert expected.step < EARLY["steps"]
    best = expected.step - EARLY["evaluation"]["early_stopping_patience"]
    for attempt, step in enumerate((best, best + 1, expected.step), start=1):
        run_until(make_task(stores[1], attempt=attempt, **EARLY), step)
    assert train.run(make_task(stores[1], attempt=4, **EARLY)).step == expected.step
    assert digest_of_adapter(stores[1]) == digest_of_adapter(stores[0])
    assert losses(stores[1]) == losses(stores[0])


def test_an_attempt_that_was_stopped_right_after_the_best_evaluation_ends_with_the_last_adapter(tmp_path: Path) -> None:
    """Unless the job asks for the best: no step boundary comes between an evaluation and the step after it."""
    stores = [tmp_path / name for name in ("undisturbed", "stopped")]
    train.run(make_task(stores[0], steps=4))
    run_until(task := make_task(stores[1], steps=4), 2)
    provenance = Provenance(attempt=1, prepared=DIGEST, adapter_config={}, versions={})
    checkpointer = Checkpointer(JobStore(task.store_uri), provenance, keep=2)
    snapshot = checkpointer.latest()
    assert snapshot is not None
    evaluation = JournalRecord(step=2, time_ms=1, metrics={"eval/loss": 1e-3})
    checkpointer.save(replace(snapshot, journal=[*snapshot.journal, evaluation]), wait=True)
    train.run(make_task(stores[1], steps=4, attempt=2))
    assert digest_of_adapter(stores[1]) == digest_of_adapter(stores[0])


def test_a_damaged_checkpoint_costs_steps_but_changes_nothing(tmp_path: Path) -> None:
    train.run(make_task(tmp_path / "undisturbed", steps=6))
    run_until(make_task(tmp_path / "damaged", steps=6, checkpoint={"every_steps": 2}), 5)
    newest = tmp_path / "damaged" / "checkpoints" / "step-00000005" / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    train.run(make_task(tmp_path / "damaged", steps=6, attempt=2))
    assert digest_of_adapter(tmp_path / "damaged") == digest_of_adapter(tmp_path / "undisturbed")
    assert losses(tmp_path / "damaged") == losses(tmp_path / "undisturbed")


def test_another_seed_gives_another_adapter(tmp_path: Path) -> None:
    """So equal digests above mean something."""
    for seed in (0, 1):
        train.run(make_task(tmp_path / str(seed), steps=2, training={"seed": seed}))
    assert digest_of_adapter(tmp_path / "0") != digest_of_adapter(tmp_path / "1")


# --- as a process, the way the controller runs it


def start(task: StageTask, folder: Path, **environment: str) -> subprocess.Popen[bytes]:
    variables = {
        **os.environ,
        "QLORA_TASK": task.model_dump_json(by_alias=True, exclude_unset=True),
        "QLORA_TERMINATION_LOG": str(folder / "termination-log"),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        **environment,
    }
    variables.pop("MLFLOW_TRACKING_URI", None)
    with (folder / "log").open("wb") as log:
        return subprocess.Popen([sys.executable, "-m", "qlora_trainer", "train"], env=variables, stderr=log, stdout=log)


def wait_for_line(folder: Path, part: str, process: subprocess.Popen[bytes], *, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while part not in (text := (folder / "log").read_text()):
        assert process.poll() is None, text
        assert time.monotonic() < deadline, text
        time.sleep(0.02)


def termination(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "termination-log").read_text())


def test_killed_and_terminated_processes_resume_bit_for_bit(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"steps": 24, "eval_rows": 2, "checkpoint": {"every_steps": 3}, "recompute_layers": 0}
    train.run(make_task(tmp_path / "undisturbed", **fields))
    store = tmp_path / "stopped"

    process = start(make_task(store, attempt=1, **fields), tmp_path, PYTHONHASHSEED="1")
    wait_for_line(tmp_path, "step 7 of 24", process)
    process.kill()
    assert process.wait(10) == -signal.SIGKILL

    process = start(make_task(store, attempt=2, **fields), tmp_path, PYTHONHASHSEED="2")
    wait_for_line(tmp_path, "step 15 of 24", process)
    asked = time.monotonic()
    process.terminate()
    assert process.wait(20) == 85
    assert time.monotonic() - asked < 15
    message = termination(tmp_path)
    assert message["failure"]["reason"] == "Preempted"
    assert message["train"]["step"] >= 15
    assert not message["train"]["complete"]
    assert (store / "checkpoints" / f"step-{message['train']['step']:08d}" / "manifest.json").is_file()

    process = start(make_task(store, attempt=3, **fields), tmp_path, PYTHONHASHSEED="3")
    wait_for_line(tmp_path, "training.learningRate", process)
    process.terminate()  # it is importing torch or loading the model
    assert process.wait(20) == 85
    started = termination(tmp_path)
    assert started["train"] == {
        "step": message["train"]["step"],
        "checkpointUri": message["train"]["checkpointUri"],
        "complete": False,
    }

    process = start(make_task(store, attempt=4, **fields), tmp_path, PYTHONHASHSEED="4")
    assert process.wait(120) == 0, (tmp_path / "log").read_text()
    assert termination(tmp_path)["train"]["complete"]
    assert digest_of_adapter(store) == digest_of_adapter(tmp_path / "undisturbed")
    assert losses(store) == losses(tmp_path / "undisturbed")
