"""Steps that would do harm: a record whose loss is no number, and a gradient norm that leaps, on the real loop.

The embedding of one token is NaN, so it is the record with that token that does it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from qlora_trainer import train
from qlora_trainer.data.micro_batch import Schedule
from qlora_trainer.outcome import DivergedError
from qlora_trainer.storage.journal import Journal
from qlora_trainer.training.stability import Stability, numbered
from safetensors.torch import load_file
from test_resume import losses, run_until
from toy_job import digest_of_adapter, make_task

from orchestrator.api.formats import JournalRecord
from orchestrator.api.job import QLoRAJobSpec, TrainingSpec
from orchestrator.api.task import StageTask

BAD_TOKEN = 500
ROWS, STEPS = 60, 12
ORDER = Schedule(rows=ROWS, global_batch_size=4, seed=0)
EARLY, LATE = ORDER.rows_of_step(2)[1], ORDER.rows_of_step(7)[2]
"""Rows of the third step and of the eighth: each is trained once."""


@pytest.fixture
def broken_token() -> Iterator[None]:
    """In the meantime the embedding of one token is NaN; weights that are would be refused."""

    def break_token(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> Any:
        if isinstance(module, torch.nn.Embedding):
            return output.masked_fill((inputs[0] == BAD_TOKEN).unsqueeze(-1), torch.nan)
        return None

    hook = torch.nn.modules.module.register_module_forward_hook(break_token)  # pyright: ignore[reportArgumentType]
    yield
    hook.remove()


def job(
    store: Path, *bad_rows: int, attempt: int = 1, checkpoint: Mapping[str, Any] | None = None, **training: Any
) -> StageTask:
    return make_task(
        store,
        attempt=attempt,
        steps=STEPS,
        rows=ROWS,
        micro_batch_size=1,
        bad_tokens=dict.fromkeys(bad_rows, BAD_TOKEN),
        training=training,
        checkpoint=checkpoint or {},
    )


def metric(store: Path, name: str) -> dict[int, float]:
    records = Journal.load(store / "adapter" / "journal.jsonl").records()
    return {record.step: record.metrics[name] for record in records if name in record.metrics}


def state(store: Path, step: int) -> list[str]:
    """Digests of the weights and of the optimizer in a checkpoint."""
    folder = store / "checkpoints" / f"step-{step:08d}"
    names = ("adapter_model.safetensors", "optimizer.safetensors")
    return [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names]


@pytest.mark.usefixtures("broken_token")
def test_it_stops_and_names_step_and_records(tmp_path: Path) -> None:
    words = rf"diverged in step 3: loss nan, gradient norm nan; dataset records {2 * EARLY + 1}, {2 * EARLY + 2}; there"
    with pytest.raises(DivergedError, match=words):
        train.run(job(tmp_path, EARLY))


@pytest.mark.usefixtures("broken_token")
def test_a_skipped_step_changes_nothing_and_the_data_go_on(tmp_path: Path) -> None:
    every_step = {"every_steps": 1, "keep": STEPS}
    result = train.run(job(tmp_path, EARLY, LATE, checkpoint=every_step, on_non_finite="skip"))
    assert result.step == STEPS
    states = [state(tmp_path, step) for step in range(1, STEPS + 1)]
    assert [step for step in range(2, STEPS + 1) if states[step - 1] == states[step - 2]] == [3, 8]
    assert metric(tmp_path, "train/skipped_steps") == {3: 1, 8: 2}
    assert sorted(metric(tmp_path, "train/loss")) == [step for step in range(1, STEPS + 1) if step not in (3, 8)]
    rates = metric(tmp_path, "train/learning_rate")
    assert sorted(rates) == list(range(1, STEPS + 1)), "the schedule goes by the step"
    with pytest.raises(DivergedError, match=r"step 8: .*training\.maxSkips \(1\) updates are left out already"):
        train.run(job(tmp_path / "bounded", EARLY, LATE, on_non_finite="skip", max_skips=1))


@pytest.mark.usefixtures("broken_token")
def test_a_rollback_goes_to_the_checkpoint_of_a_step_and_ends_the_same_however_often_it_is_stopped(
    tmp_path: Path,
) -> None:
    fields: dict[str, Any] = {"on_non_finite": "rollback", "checkpoint": {"every_steps": 5, "keep": 1}}
    undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"
    train.run(job(undisturbed, EARLY, LATE, **fields))
    for attempt, step in enumerate((2, 3, 5, 7, 8, 9), start=1):  # checkpoints that others have not
        run_until(job(stopped, EARLY, LATE, attempt=attempt, **fields), step)
        if step == 3:
            weights = load_file(stopped / "checkpoints/step-00000003/adapter_model.safetensors")
            assert not any(bool(each.any()) for name, each in weights.items() if "lora_B" in name), "as before step 1"
            assert state(stopped, 3) == state(stopped, 0)
        if step == 8:
            assert state(stopped, 8) == state(stopped, 5)
    train.run(job(stopped, EARLY, LATE, attempt=9, **fields))
    assert metric(stopped, "train/rollbacks") == {3: 1, 8: 2}
    assert losses(stopped) == losses(undisturbed)
    assert digest_of_adapter(stopped) == digest_of_adapter(undisturbed)
    with pytest.raises(DivergedError, match=r"step 8: .* went back training\.maxRollbacks \(1\) times"):
        train.run(job(tmp_path / "bounded", EARLY, LATE, max_rollbacks=1, **fields))


def test_a_leap_of_the_gradient_norm_is_a_spike(tmp_path: Path) -> None:
    """Of an ordinary run, whose largest leap over the median of what was before is made to count."""
    train.run(make_task(tmp_path / "watched", steps=24, eval_rows=0))
    norms = metric(tmp_path / "watched", "train/grad_norm")
    leaps = {step: norms[step] / float(np.median([norms[each] for each in range(1, step)])) for step in range(17, 25)}
    largest = max(leaps, key=leaps.__getitem__)
    spikes = {"on_spike": "skip", "spike_ratio": f"{leaps[largest] * 0.999:.6f}"}
    train.run(make_task(tmp_path / "told", steps=largest, eval_rows=0, training=spikes))
    assert metric(tmp_path / "told", "train/skipped_steps") == {largest: 1}
    assert metric(tmp_path / "told", "train/grad_norm") == {step: norms[step] for step in range(1, largest + 1)}


FIGURES = st.sampled_from([0.5, 1.0, 1.5, 30.0, math.nan, math.inf])


@given(
    steps=st.lists(st.tuples(FIGURES, FIGURES), max_size=60),
    cuts=st.sets(st.integers(0, 59)),
    responses=st.tuples(st.sampled_from(["skip", "rollback", "stop"]), st.sampled_from(["ignore", "skip", "rollback"])),
)
def test_a_resumed_attempt_judges_every_step_as_if_it_had_not_been_stopped(
    steps: list[tuple[float, float]], cuts: set[int], responses: tuple[str, str]
) -> None:
    spec = TrainingSpec.model_validate({"on_non_finite": responses[0], "on_spike": responses[1], "max_skips": 4})

    def judged(cuts: set[int]) -> list[object]:
        journal = Journal()
        stability, verdicts = Stability(spec, []), list[object]()
        for number, (loss, norm) in enumerate(steps):
            if number in cuts:
                kept: list[JournalRecord] = Journal.from_bytes(journal.to_bytes()).records()
                stability = Stability(spec, kept)
            trouble = stability.trouble(loss, norm)
            verdicts.append(trouble)
            if trouble is not None and trouble[0] == "stop":
                break
            told = stability.note_response(trouble[0]) if trouble is not None else {}
            stability.note(norm)
            journal.record(number + 1, {"train/loss": loss, "train/grad_norm": norm, **told})
        return verdicts

    assert judged(cuts) == judged(set())


def test_records_are_named_as_people_count_them() -> None:
    assert numbered([]) == ""
    assert numbered([4]) == "dataset record 5"
    assert numbered([11, *range(9, -1, -1), 3]) == "dataset records 1, 2, 3, 4, 5, 6, 7, 8 and 3 more"


def test_a_rollback_needs_checkpoints_that_do_not_depend_on_the_clock() -> None:
    fields: dict[str, Any] = {"model": {"source": "hf://o/m"}, "dataset": {"source": "s3://b/a.jsonl"}}
    for field in ("onNonFinite", "onSpike"):
        with pytest.raises(ValidationError, match=r"set checkpoint\.everySteps"):
            QLoRAJobSpec.model_validate({**fields, "training": {field: "rollback"}})
        QLoRAJobSpec.model_validate({**fields, "training": {field: "rollback"}, "checkpoint": {"everySteps": 9}})
