"""Odds ratio preference optimization: TRL's odds, transformers' cross-entropy, the paper's formula; what it teaches."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from qlora_trainer import train
from qlora_trainer.data.micro_batch import collate
from qlora_trainer.model.loss import Head, record_log_probabilities
from qlora_trainer.storage.journal import Journal
from qlora_trainer.training.objectives.orpo import NEAREST_TO_CERTAIN, OddsRatio, odds_figures
from test_model import make_records
from test_resume import run_until
from tiny_model import tiny_model
from toy_job import make_task
from transformers import AutoModelForCausalLM

from orchestrator.api.task import StageTask

FIGURES = OddsRatio.figures


def orpo_task(store: Path, **fields: Any) -> StageTask:
    training = {"objective": {"type": "orpo", "beta": "0.3"}, **fields.pop("training", {})}
    return make_task(store, dataset={"format": "preference"}, training=training, **fields)


def figures_of(store: Path, group: str) -> dict[int, dict[str, float]]:
    records = Journal.load(store / "adapter" / "journal.jsonl").records()
    return {
        each.step: {name: each.metrics[f"{group}/{name}"] for name in FIGURES}
        for each in records
        if f"{group}/loss" in each.metrics
    }


def test_figures_are_the_papers() -> None:
    means = np.random.RandomState(0).uniform(-6, -0.01, size=12)
    found = odds_figures(torch.tensor(means), beta=0.3)
    for pair in range(6):
        chosen, rejected = means[2 * pair], means[2 * pair + 1]
        ratio = (math.exp(chosen) / (1 - math.exp(chosen))) / (math.exp(rejected) / (1 - math.exp(rejected)))
        preferring = math.log(1 / (1 + math.exp(-math.log(ratio))))
        expected = [
            -chosen - 0.3 * preferring, 0.3 * chosen, 0.3 * rejected, chosen > rejected, 0.3 * (chosen - rejected),
            chosen, rejected, -chosen, preferring, math.log(ratio),
        ]  # fmt: skip
        np.testing.assert_allclose(found[:, pair].numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("certain", [0.0, NEAREST_TO_CERTAIN / 2, -math.inf])
def test_what_is_certain_or_impossible_is_no_nan(certain: float) -> None:
    means = torch.tensor([certain, -2.0, -2.0, certain], requires_grad=True)
    loss = odds_figures(means.clamp(min=-1e4), beta=0.3)[0]
    assert bool(loss.isfinite().all())
    loss.sum().backward()
    assert means.grad is not None
    assert not bool(means.grad.isnan().any())


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_loss_and_gradients_are_those_of_trls_odds_and_transformers_cross_entropy() -> None:
    trainer: Any = pytest.importorskip("trl.experimental.orpo").ORPOTrainer
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)
    model: Any = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapter = {name: each for name, each in model.named_parameters() if "lora_" in name}
    for name, parameter in adapter.items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    rows = [row for row in make_records() if (row[1] >= 0).any()]
    rows = rows[: len(rows) // 2 * 2]

    chosen_loss, means = torch.zeros(()), list[torch.Tensor]()
    for place, (ids, labels, _) in enumerate(rows):
        ids, labels = torch.tensor(ids)[None].long(), torch.tensor(labels)[None].long()
        found = model(input_ids=ids, labels=labels)
        means.append(trainer.get_batch_logps(found.logits, labels, average_log_prob=True))
        if place % 2 == 0:
            chosen_loss = chosen_loss + found.loss / (len(rows) // 2)
    stub = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    preferring, chosen, rejected, ratio, log_odds = trainer.odds_ratio_loss(
        stub, torch.cat(means[0::2]), torch.cat(means[1::2])
    )
    theirs = chosen_loss - preferring.mean()
    theirs.backward()
    expected = {name: parameter.grad.clone() for name, parameter in adapter.items()}
    model.zero_grad()

    batch = collate(rows)
    states = [base.model(input_ids=torch.tensor(ids)[None].long()).last_hidden_state[0] for ids, _, _ in rows]
    lengths = batch.supervised_by_record()
    sums = record_log_probabilities(
        torch.cat(states),
        batch.targets[0],
        Head(weight=base.lm_head.weight.detach()),
        chunk_tokens=5,
        positions=batch.supervised,
        lengths=lengths,
    )
    figures = dict(zip(FIGURES, odds_figures(sums / torch.tensor(lengths), beta=0.3).mean(1), strict=True))
    figures["loss"].backward()
    told = {"loss": theirs, "rewards/chosen": chosen.mean(), "rewards/rejected": rejected.mean()}
    told |= {"log_odds_ratio": ratio, "log_odds_chosen": log_odds, "nll_loss": chosen_loss}
    for name, figure in told.items():
        assert float(figures[name]) == pytest.approx(float(figure), rel=1e-5), name
    for name, parameter in adapter.items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-6)


def test_how_a_step_is_split_changes_no_more_than_roundings(tmp_path: Path) -> None:
    for size in (1, 4):
        train.run(orpo_task(tmp_path / str(size), micro_batch_size=size, steps=3, adapter={"dropout": "0"}))
    one, four = (figures_of(tmp_path / str(size), "train") for size in (1, 4))
    for step in range(1, 4):
        assert one[step] == pytest.approx(four[step], abs=0.05)


def test_a_resumed_job_ends_with_the_same_adapter(tmp_path: Path) -> None:
    alone, moved = (orpo_task(tmp_path / name, steps=6) for name in ("alone", "moved"))
    train.run(alone)
    run_until(moved, 3)
    train.run(moved.model_copy(update={"attempt": 2}))
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "alone" / weights).read_bytes() == (tmp_path / "moved" / weights).read_bytes()
    assert figures_of(tmp_path / "alone", "train") == figures_of(tmp_path / "moved", "train")


@pytest.mark.parametrize("seed", range(2))
def test_held_out_odds_rise_and_the_chosen_answers_are_learned(tmp_path: Path, seed: int) -> None:
    task = orpo_task(
        tmp_path,
        steps=40,
        rows=40,
        eval_rows=16,
        strides=((1,), (3,)),  # what counts by ones is better
        training={"seed": seed, "learning_rate": "1e-2", "max_grad_norm": "1"},
        evaluation={"every_steps": 20},
    )
    result = train.run(task)
    found = figures_of(tmp_path, "eval")
    odds = [found[step]["log_odds_chosen"] for step in (0, 20, 40)]
    assert odds[2] > odds[1] > odds[0]
    assert found[40]["nll_loss"] < found[0]["nll_loss"]
    assert found[40]["rewards/accuracies"] >= 0.9
    assert result.eval_loss == pytest.approx(found[40]["loss"], rel=1e-5)
