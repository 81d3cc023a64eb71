"""The train stage as a whole, in this process, on a tiny model: what it learns, says, keeps and refuses."""

from __future__ import annotations

import logging
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from plain_base import base_in_nf4
from qlora_trainer import train
from qlora_trainer.outcome import DivergedError, FencedError, UserError
from qlora_trainer.storage.job_store import JobStore
from qlora_trainer.storage.journal import Journal
from safetensors.torch import load_file
from tiny_model import tiny_model
from toy_job import digest_of_adapter, make_rows, make_task

from orchestrator.api.plan import MemoryPlan

PEFT_WARNING = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"


def journal_of(store: Path) -> Journal:
    return Journal.load(store / "adapter" / "journal.jsonl")


def metric(store: Path, name: str) -> dict[int, float]:
    return {record.step: record.metrics[name] for record in journal_of(store).records() if name in record.metrics}


def held_out_loss(adapter: Path | None) -> float:
    """The loss on the toy job's held-out rows, by transformers and PEFT alone, record by record."""
    model = base_in_nf4(tiny_model())
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False)
    model.eval()
    total, tokens = 0.0, 0
    for row in make_rows(4, seed=2):
        boundaries = [*np.flatnonzero(np.array(row["position_ids"]) == 0), len(row["input_ids"])]
        for start, end in pairwise(boundaries):
            ids, labels = (torch.tensor([row[name][start:end]]) for name in ("input_ids", "labels"))
            with torch.no_grad():
                total += float(model(input_ids=ids, labels=labels).loss) * (end - start - 1)
            tokens += end - start - 1
    return total / tokens


@pytest.mark.filterwarnings(PEFT_WARNING)
def test_a_job_learns_and_its_losses_are_what_others_measure(tmp_path: Path) -> None:
    task = make_task(tmp_path, steps=80, training={"learning_rate": "2e-2", "max_grad_norm": "1"})
    result = train.run(task)
    assert result.complete
    assert result.step == 80
    assert result.eval_loss_before == pytest.approx(held_out_loss(None), abs=5e-3)
    assert result.eval_loss == pytest.approx(held_out_loss(tmp_path / "adapter"), abs=5e-3)
    assert result.eval_loss is not None
    assert result.eval_loss_before is not None
    assert result.eval_loss < result.eval_loss_before - 0.3
    assert result.adapter_digest == "sha256:" + digest_of_adapter(tmp_path)
    assert all(
        tensor.dtype == torch.bfloat16 for tensor in load_file(tmp_path / "adapter/adapter_model.safetensors").values()
    )


def test_every_step_is_in_the_journal_once_and_evaluations_are_where_they_belong(tmp_path: Path) -> None:
    train.run(make_task(tmp_path, steps=12, evaluation={"every_steps": 5}))
    assert list(metric(tmp_path, "train/loss")) == list(range(1, 13))
    assert list(metric(tmp_path, "eval/loss")) == [0, 5, 10, 12]
    for name in (
        "train/learning_rate",
        "train/grad_norm",
        "train/tokens_per_second",
        "system/checkpoint_stall_seconds",
    ):
        assert list(metric(tmp_path, name)) == list(range(1, 13)), name
    # What a CPU cannot tell is absent.
    names = {name for record in journal_of(tmp_path).records() for name in record.metrics}
    assert not names & {"train/mfu", "system/vram_allocated_bytes", "system/energy_joules"}


def test_a_job_without_held_out_data_is_trained_without_evaluation(tmp_path: Path) -> None:
    result = train.run(make_task(tmp_path, steps=2, eval_rows=0))
    assert result.complete
    assert (result.eval_loss, result.eval_loss_before) == (None, None)
    assert metric(tmp_path, "eval/loss") == {}


def test_a_finished_job_is_not_trained_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = train.run(make_task(tmp_path, steps=2))
    written = (tmp_path / "adapter" / "manifest.json").stat().st_mtime_ns
    with caplog.at_level(logging.INFO):
        again = train.run(make_task(tmp_path, steps=2, attempt=2))
    assert again == first.model_copy(update={"checkpoint_uri": None})
    assert (tmp_path / "adapter" / "manifest.json").stat().st_mtime_ns == written
    assert not [message for message in caplog.messages if message.startswith("step ")]


def test_training_stops_early_and_ends_with_the_best_adapter(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def run(folder: str, patience: int, **fields: object) -> Path:
        task = make_task(
            tmp_path / folder,
            steps=30,
            # Overshoots, and never calms down.
            training={"learning_rate": "3", "scheduler": "constant", "max_grad_norm": "10"},
            evaluation={"every_steps": 1, "early_stopping_patience": patience, **fields},
            checkpoint={"every_steps": 1, "keep": 30},
        )
        with caplog.at_level(logging.INFO):
            result = train.run(task)
        losses = metric(tmp_path / folder, "eval/loss")
        del losses[0]
        best = min(losses, key=losses.__getitem__)
        assert result.step == best + patience == max(losses) < 30
        assert result.eval_loss == (losses[best] if fields.get("keep_best") else losses[max(losses)])
        kept = best if fields.get("keep_best") else result.step
        checkpoint = tmp_path / folder / "checkpoints" / f"step-{kept:08d}" / "adapter_model.safetensors"
        assert checkpoint.read_bytes() == (tmp_path / folder / "adapter/adapter_model.safetensors").read_bytes()
        return checkpoint

    last, best = run("last", 3), run("best", 3, keep_best=True)
    assert last.read_bytes() != best.read_bytes()
    assert any("stopped early" in message for message in caplog.messages)


def test_a_loss_that_is_no_number_ends_the_job_with_its_step_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    task = make_task(tmp_path, training={"learning_rate": "1e38"}, checkpoint={"every_steps": 1}, eval_rows=0)
    with pytest.raises(
        DivergedError, match=r"training diverged in step (\d+): loss .*lower training.learningRate"
    ) as caught:
        train.run(task)
    step = int(str(caught.value).split("step ")[1].split(":")[0])
    assert f"checkpoint of step {step - 1} is kept" in str(caught.value)
    assert (tmp_path / "checkpoints" / f"step-{step - 1:08d}" / "manifest.json").is_file()
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("eval_rows", "message"),
    [(0, r"adapter weights are not finite after step 1"), (4, r"the held-out loss after step 1 is nan")],
)
def test_what_is_no_number_after_the_last_step_ends_the_job_too(tmp_path: Path, eval_rows: int, message: str) -> None:
    # Adam's first step is the learning rate, which is a float32 and more than bfloat16 holds.
    task = make_task(tmp_path, steps=1, training={"learning_rate": "3.4e38"}, eval_rows=eval_rows)
    with pytest.raises(DivergedError, match=message):
        train.run(task)
    assert not (tmp_path / "adapter").exists()


def test_the_plan_changes_nothing_that_is_learned_beyond_rounding(tmp_path: Path) -> None:
    losses = []
    for folder, micro_batch_size, recompute_layers in (("a", 1, 0), ("b", 2, 2), ("c", 4, 1)):
        task = make_task(
            tmp_path / folder,
            steps=8,
            micro_batch_size=micro_batch_size,
            recompute_layers=recompute_layers,
            adapter={"dropout": "0"},
        )
        train.run(task)
        losses.append(list(metric(tmp_path / folder, "train/loss").values()))
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    assert losses[2] == pytest.approx(losses[0], rel=2e-3)


def test_every_setting_is_logged_with_its_origin(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        train.run(make_task(tmp_path, steps=1, eval_rows=0))
    for line in (
        "adapter.rank = 4 (spec)",
        "adapter.useDora = False (default)",
        "training.learningRate = 1e-2 (spec)",
        "training.scheduler = constant (default)",
        "microBatchSize = 2 (plan)",
        "steps = 1 (prepare)",
    ):
        assert line in caplog.messages


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (MemoryPlan(micro_batch_size=3, accumulation_steps=1, recompute_layers=0), "3 x 1 sequences are not"),
        (None, "needs a memory plan"),
    ],
)
def test_a_plan_that_cannot_be_followed_is_refused(tmp_path: Path, plan: MemoryPlan | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train.run(make_task(tmp_path).model_copy(update={"plan": plan}))


def test_an_attempt_that_was_overtaken_does_not_start(tmp_path: Path) -> None:
    JobStore(tmp_path.as_uri()).take_fence(5)
    with pytest.raises(FencedError, match="attempt 5 owns"):
        train.run(make_task(tmp_path, attempt=4))
