"""Direct preference optimization: TRL's loss, gradients, figures and tokens; the paper's formula; what it teaches."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from plain_base import base_in_nf4
from qlora_trainer import train
from qlora_trainer.data.micro_batch import collate
from qlora_trainer.model.loss import Head, record_log_probabilities
from qlora_trainer.storage.journal import Journal
from qlora_trainer.storage.tensors import read_tensors
from qlora_trainer.training.objectives.dpo import DirectPreference, preference_figures
from test_model import make_model, make_records, wake_adapter
from test_preferences import CHAT, TEXTS, read
from test_resume import run_until
from tiny_model import CHAT_TEMPLATE, tiny_model
from toy_job import Row, make_rows, make_task
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.api.task import StageTask

FIGURES = DirectPreference.figures
RECORDS: dict[str, list[Any]] = {
    "texts": [TEXTS, {"prompt": "Name a colour.", "chosen": " Blue is one of them.", "rejected": " A horse"}],
    "chats": [CHAT, {**CHAT, "prompt": [{"role": "system", "content": "Guess."}, {"role": "user", "content": "Why?"}]}],
}


def dpo_task(store: Path, objective: dict[str, Any] | None = None, **fields: Any) -> StageTask:
    training = {"objective": {"type": "dpo", **(objective or {})}, **fields.pop("training", {})}
    return make_task(store, dataset={"format": "preference"}, training=training, **fields)


def figures_of(store: Path, group: str) -> dict[int, list[float]]:
    records = Journal.load(store / "adapter" / "journal.jsonl").records()
    names = [f"{group}/{name}" for name in FIGURES]
    return {each.step: [each.metrics[name] for name in names] for each in records if names[0] in each.metrics}


# --- the paper's formula, and TRL


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_figures_are_the_papers(label_smoothing: float) -> None:
    draw = np.random.RandomState(0)
    policy, reference = draw.uniform(-60, -20, size=(2, 12))
    found = preference_figures(torch.tensor(policy), torch.tensor(reference), beta=0.3, label_smoothing=label_smoothing)
    ratios = policy - reference
    for pair in range(6):
        chosen, rejected = 0.3 * ratios[2 * pair], 0.3 * ratios[2 * pair + 1]
        right = 1 / (1 + np.exp(rejected - chosen))  # Bradley and Terry's probability that chosen is better
        loss = -(1 - label_smoothing) * np.log(right) - label_smoothing * np.log(1 - right)
        expected = [
            loss, chosen, rejected, chosen > rejected, chosen - rejected, policy[2 * pair], policy[2 * pair + 1]
        ]  # fmt: skip
        np.testing.assert_allclose(found[:, pair].numpy(), expected, rtol=1e-9)


PEFT_WARNINGS = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def trl_trainer(folder: Path, model: Any, tokenizer: Any, records: list[Any], *, beta: float) -> Any:
    """TRL's own, which has tokenized the records, and remembers the model as it is now as its reference."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    arguments = trl.DPOConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], beta=beta
    )
    data = Dataset.from_list(records)
    return trl.DPOTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer)


def encoded(folder: Path, tokenizer: Any, records: list[Any]) -> list[tuple[Any, Any, Any]]:
    """A row for each record that prepare makes: chosen and rejected by turns."""
    found = read(folder, tokenizer, *records).train.records
    return [(each.input_ids, each.labels, np.arange(len(each.input_ids), dtype=np.int32)) for each in found]


@PEFT_WARNINGS
@pytest.mark.parametrize("kind", RECORDS)
def test_loss_gradients_figures_and_tokens_are_trls(tmp_path: Path, kind: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model())
    tokenizer.chat_template = CHAT_TEMPLATE.replace(" + '\\n' }}{% endfor", " }}{% endfor")  # ours ends with the EOS
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)
    model: Any = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainer = trl_trainer(tmp_path, model, tokenizer, RECORDS[kind], beta=0.4)
    adapter = {name: each for name, each in model.named_parameters() if "lora_" in name and ".default." in name}
    for name, parameter in adapter.items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    trainer.model.train()
    theirs = trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
    theirs.backward()
    expected = {name: parameter.grad.clone() for name, parameter in adapter.items()}
    told = [trainer._metrics["train"][name][-1] for name in FIGURES[1:]]
    model.zero_grad()

    rows = encoded(tmp_path, tokenizer, RECORDS[kind])
    tokens = [
        (each["prompt_ids"], each[answer])
        for each in trainer.train_dataset
        for answer in ("chosen_ids", "rejected_ids")
    ]
    assert [(list(ids[labels < 0]), list(ids[labels >= 0])) for ids, labels, _ in rows] == tokens

    def log_probabilities() -> torch.Tensor:
        batch = collate(rows)
        states = [base.model(input_ids=torch.tensor(ids)[None].long()).last_hidden_state[0] for ids, _, _ in rows]
        return record_log_probabilities(
            torch.cat(states),
            batch.targets[0],
            Head(weight=base.lm_head.weight.detach()),
            chunk_tokens=5,
            positions=batch.supervised,
            lengths=batch.supervised_by_record(),
        )

    with torch.no_grad(), model.disable_adapter():
        reference = log_probabilities()
    figures = preference_figures(log_probabilities(), reference, beta=0.4, label_smoothing=0.0).mean(1)
    figures[0].backward()
    assert float(figures[0]) == pytest.approx(float(theirs), rel=1e-5)
    assert figures[1:].tolist() == pytest.approx(told, rel=1e-4, abs=1e-5)
    for name, parameter in adapter.items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-6)


@PEFT_WARNINGS
def test_held_out_figures_are_what_transformers_and_peft_measure(tmp_path: Path) -> None:
    train.run(dpo_task(tmp_path, {"beta": "0.5"}, steps=8, training={"max_grad_norm": "1"}))
    base = base_in_nf4(tiny_model())
    model = PeftModel.from_pretrained(base, tmp_path / "adapter", autocast_adapter_dtype=False).eval()

    def log_probabilities(row: Row) -> list[float]:
        places = np.array(row["position_ids"])
        bounds = [*np.flatnonzero(places == 0), len(places)]
        found: list[float] = []
        for start, end in pairwise(bounds):
            ids = torch.tensor([row["input_ids"][start:end]])
            scores = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
            found.append(float(scores.gather(1, ids[0, 1:, None]).sum()))
        return found

    pairs: list[list[float]] = []
    for row in make_rows(4, seed=2):
        with torch.no_grad():
            policy = log_probabilities(row)
            with model.disable_adapter():
                reference = log_probabilities(row)
        chosen, rejected = (0.5 * (own - base) for own, base in zip(policy, reference, strict=True))
        loss = math.log1p(math.exp(rejected - chosen))
        pairs.append([loss, chosen, rejected, float(chosen > rejected), chosen - rejected, *policy])
    assert figures_of(tmp_path, "eval")[8] == pytest.approx(np.mean(pairs, axis=0), abs=0.05)


# --- the reference


@pytest.mark.parametrize(
    ("family", "adapter"),
    [
        ("llama", {"dropout": "0.5"}),
        ("llama", {"dropout": "0.5", "use_dora": True}),
        ("qwen3_moe", {"experts": True}),
    ],
)
def test_the_reference_is_the_model_without_its_adapter(family: str, adapter: dict[str, Any]) -> None:
    model = make_model(tiny_model(family), **adapter)
    batch = collate(make_records())
    model.train()
    before = model.reference_log_probabilities(batch)  # B is zero
    wake_adapter(model)
    state = torch.get_rng_state()
    assert torch.equal(model.reference_log_probabilities(batch), before)
    assert torch.equal(torch.get_rng_state(), state), "a resumed step draws the same"
    assert model.peft_model.training
    own = model.log_probabilities(batch)
    assert (own - before).abs().min() > 1e-3, "the adapter is there again"
    own.sum().backward()
    assert all(parameter.grad is not None for _, parameter in model.trainable())


def test_training_begins_at_the_reference_itself(tmp_path: Path) -> None:
    train.run(dpo_task(tmp_path, steps=1, adapter={"dropout": "0"}))
    for found in (figures_of(tmp_path, "eval")[0], figures_of(tmp_path, "train")[1]):
        assert found[:5] == pytest.approx([math.log(2), 0, 0, 0, 0], abs=1e-7)


def test_how_a_step_is_split_changes_no_more_than_roundings(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"steps": 4, "adapter": {"dropout": "0"}}
    for size in (1, 4):
        train.run(dpo_task(tmp_path / str(size), micro_batch_size=size, **fields))
    one, four = (figures_of(tmp_path / str(size), "train") for size in (1, 4))
    for step in range(1, 5):
        assert one[step] == pytest.approx(four[step], abs=0.05)


def test_each_record_is_asked_about_once_and_a_checkpoint_keeps_the_answers(tmp_path: Path) -> None:
    task = dpo_task(tmp_path, steps=12, rows=20, evaluation={"every_steps": 2})
    result = run_until(task, 3)
    kept = read_tensors(tmp_path / "checkpoints" / f"step-{result.step:08d}" / "objective.safetensors")
    assert {name: tuple(each.shape) for name, each in kept.items()} == {"train": (40,), "eval": (8,)}
    assert int(kept["train"].isfinite().sum()) == 2 * 4 * result.step, "of the rows of these steps"
    assert bool(kept["eval"].isfinite().all())
    train.run(task.model_copy(update={"attempt": 2}))
    newest = max(tmp_path.glob("checkpoints/*"))
    later = read_tensors(newest / "objective.safetensors")
    assert bool(later["train"].isfinite().all())
    known = kept["train"].isfinite()
    assert torch.equal(later["train"][known], kept["train"][known])
    assert torch.equal(later["eval"], kept["eval"])


# --- what it teaches


@pytest.mark.parametrize("seed", range(3))
def test_the_held_out_margin_rises(tmp_path: Path, seed: int) -> None:
    task = dpo_task(
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
    margins = [found[step][FIGURES.index("rewards/margins")] for step in (0, 20, 40)]
    assert margins[0] == 0
    assert margins[2] > margins[1] > 0.3
    assert found[40][FIGURES.index("rewards/accuracies")] >= 0.9
    assert result.eval_loss is not None
    assert result.eval_loss < 0.5
