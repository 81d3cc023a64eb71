"""Answers to held-out prompts: whose they are, that they are right, kept, and generated once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from plain_base import base_in_nf4
from qlora_trainer import train
from qlora_trainer.data.micro_batch import PreparedRows
from qlora_trainer.data.prompts import Prompt, all_prompts, chosen_prompts
from qlora_trainer.kernels.packed_attention import PackedAttention
from qlora_trainer.model.adapter import add_adapter
from qlora_trainer.model.answering import Answerer
from qlora_trainer.model.loading import load_base
from qlora_trainer.model.rehearsal import rehearse
from qlora_trainer.model.training_model import TrainingModel
from qlora_trainer.outcome import Preempted, UserError
from qlora_trainer.storage.job_store import JobStore
from qlora_trainer.storage.journal import Journal
from qlora_trainer.training.samples import MOST_EVALUATIONS, Sampler, is_sampled
from qlora_trainer.training.stop import Stop
from tiny_model import EOS, SPECIAL_TOKENS, save_tokenizer, tiny_model
from toy_job import Row, describe_file, make_task, write_rows
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaModel

from orchestrator.api.formats import Answer, AnswerTable, Sample
from orchestrator.api.job import AdapterSpec, EvaluationSpec, SamplesSpec
from orchestrator.api.plan import MemoryPlan
from orchestrator.api.task import StageTask

PLAN = MemoryPlan(micro_batch_size=1, accumulation_steps=1, recompute_layers=1, loss_chunk_tokens=16)
ENDS = [SPECIAL_TOKENS.index(EOS)]


# --- what is asked


def row(*records: Sequence[tuple[bool, int]]) -> Row:
    """A packed row; each record is stretches of so many tokens that carry loss, or do not."""
    labels = [[supervised for supervised, count in record for _ in range(count)] for record in records]
    return {
        "input_ids": [10 * index + place for index, each in enumerate(labels) for place in range(len(each))],
        "labels": [1 if supervised else -100 for each in labels for supervised in each],
        "position_ids": [place for each in labels for place in range(len(each))],
    }


def prompts_of(folder: Path, *rows: Row, sequence_length: int = 64) -> list[tuple[list[int], list[int]]]:
    found = all_prompts(PreparedRows(write_rows(list(rows), folder / "eval.parquet")), sequence_length)
    return [(each.prompt.tolist(), each.reference.tolist()) for each in found]


def test_the_last_answer_of_a_record_is_asked_for(tmp_path: Path) -> None:
    chat = [(False, 2), (True, 1), (False, 1), (True, 2), (False, 1)]
    assert prompts_of(tmp_path, row(chat, [(False, 1), (True, 2)])) == [([0, 1, 2, 3], [4, 5]), ([10], [11, 12])]


def test_a_record_without_prompt_or_answer_is_not_asked(tmp_path: Path) -> None:
    assert prompts_of(tmp_path, row([(True, 3)], [(False, 3)])) == []
    assert prompts_of(tmp_path, row([(False, 4), (True, 4)]), sequence_length=8) == [], "it may have been cut"


def test_which_records_are_asked_depends_on_the_seed_alone(tmp_path: Path) -> None:
    rows = PreparedRows(write_rows([row(*[[(False, 1), (True, 2)]] * 6)] * 5, tmp_path / "eval.parquet"))

    def chosen(count: int, seed: int) -> list[int]:
        return [int(each.prompt[0]) for each in chosen_prompts(rows, count=count, sequence_length=64, seed=seed)]

    assert chosen(4, 0) == chosen(4, 0)
    assert len(chosen(99, 0)) == 30
    assert chosen(4, 0) != chosen(4, 1)


# --- the answers are those of transformers and PEFT


def trained(family: str, adapter: AdapterSpec, folder: Path | None = None) -> TrainingModel:
    attention = PackedAttention()
    base = load_base(folder or tiny_model(family), torch.device("cpu"), attention)
    model = TrainingModel(add_adapter(base, adapter, seed=0), PLAN, attention, 0.0)
    model.check()
    generator = torch.Generator().manual_seed(1)
    for _, parameter in model.trainable():  # as if it had been trained: B is zero at first
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def saved(model: TrainingModel, folder: Path) -> Path:
    model.peft_model.save_pretrained(str(folder))
    return folder


def plain(base: Path, adapter: Path | None) -> Any:
    """The same weights, by transformers and PEFT alone."""
    model: Any = base_in_nf4(base)
    for layer in model.modules():  # whose repacked weights round otherwise on some CPUs
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False
    model.generation_config.eos_token_id = ENDS
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=False)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(torch.bfloat16)
    return model.eval()


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    found: list[int] = output[0, len(prompt) :].tolist()
    return found[:-1] if found and found[-1] in ENDS else found


def some_prompts(vocabulary: int = 500) -> list[list[int]]:
    drawn = np.random.RandomState(5)
    return [drawn.randint(5, vocabulary, size=size).tolist() for size in (3, 9, 17, 40)]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("family", "adapter"),
    [
        ("llama", {}),
        ("qwen2", {"use_rslora": True}),
        ("qwen3", {"use_dora": True}),
        ("gemma2", {"target_modules": ("q_proj", "v_proj")}),
        ("olmo2", {}),
    ],
)
def test_answers_are_the_tokens_that_transformers_and_peft_give(
    tmp_path: Path, family: str, adapter: dict[str, Any]
) -> None:
    model = trained(family, AdapterSpec.model_validate({"rank": 4, "alpha": 16, **adapter}))
    folder = saved(model, tmp_path / "adapter")
    answerer = Answerer(model, ENDS)
    with_adapter, base = plain(tiny_model(family), folder), plain(tiny_model(family), None)
    differing = 0
    for prompt in some_prompts():
        ours = answerer.answer(prompt, 24, lambda: False)
        assert ours == greedy(with_adapter, prompt, 24)
        with answerer.without_adapter():
            plainly = answerer.answer(prompt, 24, lambda: False)
        assert plainly == greedy(base, prompt, 24)
        assert answerer.answer(prompt, 24, lambda: False) == ours, "the adapter is back"
        differing += plainly != ours
    assert differing, "the adapter changes nothing, so this shows nothing"


def test_a_mixtures_base_answers_without_its_experts_adapters() -> None:
    model = trained("qwen3_moe", AdapterSpec(rank=4, alpha=16, dropout="0", experts=True))
    answerer, base = Answerer(model, ENDS), plain_mixture()
    for prompt in some_prompts():
        with answerer.without_adapter():
            assert answerer.answer(prompt, 16, lambda: False) == base.answer(prompt, 16, lambda: False)


def plain_mixture() -> Answerer:
    """The same base with an adapter that was never trained, and so changes nothing."""
    attention = PackedAttention()
    base = load_base(tiny_model("qwen3_moe"), torch.device("cpu"), attention)
    spec = AdapterSpec(rank=4, target_modules=("q_proj",), dropout="0")
    return Answerer(TrainingModel(add_adapter(base, spec, seed=0), PLAN, attention, 0.0), ENDS)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_another_adapter_answers_as_if_it_were_alone(tmp_path: Path) -> None:
    other = trained("llama", AdapterSpec(rank=2, alpha=32, target_modules=("q_proj", "down_proj")))
    folder = saved(other, tmp_path / "other")
    answerer = Answerer(trained("llama", AdapterSpec(rank=8, alpha=16)), ENDS)
    alone = plain(tiny_model("llama"), folder)
    for prompt in some_prompts():
        ours = answerer.answer(prompt, 16, lambda: False)
        with answerer.with_adapter(str(folder)):
            theirs = answerer.answer(prompt, 16, lambda: False)
        assert theirs == greedy(alone, prompt, 16)
        assert answerer.answer(prompt, 16, lambda: False) == ours


def test_a_table_on_the_host_answers_alike() -> None:
    adapter = AdapterSpec(rank=4)
    on_card = Answerer(trained("llama", adapter), ENDS)
    attention = PackedAttention()
    base = load_base(tiny_model("llama"), torch.device("cpu"), attention)
    plan = PLAN.model_copy(update={"offload": ("embeddings",)})
    model = TrainingModel(add_adapter(base, adapter, seed=0), plan, attention, 0.0)
    generator = torch.Generator().manual_seed(1)
    for _, parameter in model.trainable():
        parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    on_host = Answerer(model, ENDS)
    for prompt in some_prompts():
        assert on_host.answer(prompt, 16, lambda: False) == on_card.answer(prompt, 16, lambda: False)


def forget_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let positions begin anew with every token of a cache."""
    original = LlamaModel.forward

    def forgetful(self: Any, *args: Any, position_ids: Any = None, use_cache: Any = None, **others: Any) -> Any:
        if use_cache and position_ids is not None:
            position_ids = torch.zeros_like(position_ids)
        return original(self, *args, position_ids=position_ids, use_cache=use_cache, **others)

    monkeypatch.setattr(LlamaModel, "forward", forgetful)


def test_what_generates_other_than_it_trains_is_refused_where_answers_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = AutoConfig.from_pretrained(tiny_model("llama"))
    rehearse(config, "llama", AdapterSpec(), answers=True)
    forget_positions(monkeypatch)
    rehearse(config, "llama", AdapterSpec())
    with pytest.raises(UserError, match=r"spec\.evaluation\.generation: what LlamaForCausalLM generates .* off"):
        rehearse(config, "llama", AdapterSpec(), answers=True)


# --- in the train stage


def asking(folder: Path, **fields: Any) -> StageTask:
    evaluation = {"generation": {"prompts": 5, "max_new_tokens": 8}}
    return with_tokenizer(make_task(folder, steps=4, evaluation=evaluation, **fields), folder)


def with_tokenizer(task: StageTask, folder: Path) -> StageTask:
    """The task, with a tokenizer among its prepared data."""
    assert task.prepared is not None
    prepared = folder / "prepared" / task.prepared.uri.rpartition("/")[2]
    save_tokenizer(prepared)
    manifest = json.loads((prepared / "manifest.json").read_text())
    names = sorted(path.name for path in prepared.iterdir() if path.name != "manifest.json")
    manifest["files"] = [describe_file(prepared / name).model_dump(mode="json") for name in names]
    (prepared / "manifest.json").write_text(json.dumps(manifest))
    return task


def table_of(folder: Path) -> AnswerTable:
    return AnswerTable.model_validate_json((folder / "adapter" / "answers.json").read_bytes())


def test_a_job_that_asks_for_answers_ends_with_all_of_them(tmp_path: Path) -> None:
    result = train.run(asking(tmp_path))
    assert result.complete
    table = table_of(tmp_path)
    assert len(table.prompts) == 5
    assert all(each.prompt and each.reference and each.holder is None for each in table.prompts)
    assert any(each.adapter != each.base for each in table.prompts)
    assert table.holder is not None
    assert "MLFLOW_TRACKING_URI is not set" in table.holder.refusal
    assert not (tmp_path / "answers").exists()


def test_a_job_that_asks_for_none_has_none(tmp_path: Path) -> None:
    train.run(make_task(tmp_path, steps=2))
    assert not (tmp_path / "adapter" / "answers.json").exists()


class StopAfter:
    """Asks to stop when so many answers have been generated; counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
        self.generated: list[str] = []
        keep, store_class = JobStore.keep_answer, JobStore
        stops: list[Stop] = []
        begin = Stop.__init__

        def noted(stop: Stop, grace_seconds: float) -> None:
            begin(stop, grace_seconds)
            stops.append(stop)

        def counted(store: JobStore, attempt: int, digest: str, answer: Answer) -> None:
            keep(store, attempt, digest, answer)
            self.generated.append(digest)
            if len(self.generated) == most:
                stops[-1].ask(30)

        monkeypatch.setattr(Stop, "__init__", noted)
        monkeypatch.setattr(store_class, "keep_answer", counted)


@pytest.mark.parametrize("most", [1, 5, 7, 9])
def test_whoever_is_stopped_goes_on_with_the_next_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    whole = tmp_path / "whole"
    train.run(asking(whole))
    task = asking(tmp_path / "stopped")
    with monkeypatch.context() as patched:
        first = StopAfter(patched, most)
        with pytest.raises(Preempted) as stopped:
            train.run(task)
    assert stopped.value.result is not None
    assert (stopped.value.result.step, stopped.value.result.complete) == (4, False)
    assert not (tmp_path / "stopped" / "adapter").exists()
    with monkeypatch.context() as patched:
        second = StopAfter(patched, -1)
        train.run(task.model_copy(update={"attempt": 2}))
    assert len(first.generated) == most
    assert len(first.generated) + len(second.generated) == 10
    assert not set(first.generated) & set(second.generated)
    assert table_of(tmp_path / "stopped") == table_of(whole)


def test_other_weights_are_not_given_answers_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = asking(tmp_path)
    with monkeypatch.context() as patched:
        StopAfter(patched, 3)
        with pytest.raises(Preempted):
            train.run(task)
    (newest,) = (tmp_path / "checkpoints").iterdir()
    (newest / "manifest.json").unlink()  # trained anew, at another learning rate
    training = task.spec.training.model_copy(update={"learning_rate": "5e-2"})
    other = task.model_copy(update={"attempt": 2, "spec": task.spec.model_copy(update={"training": training})})
    with monkeypatch.context() as patched:
        second = StopAfter(patched, -1)
        train.run(other)
    assert len(second.generated) == 10


# --- at evaluations


class Numbers:
    """A tokenizer whose texts are the tokens' numbers."""

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, tokens))


def sampler(prompts: Sequence[Sequence[int]], *, ends: Sequence[int] = ENDS, row_tokens: int = 1000) -> Sampler:
    asked = [Prompt(prompt=np.array(prompt, np.int32), reference=np.array([1], np.int32)) for prompt in prompts]
    spec = SamplesSpec(prompts=len(prompts), max_new_tokens=12)
    return Sampler(spec, asked, tokenizer=Numbers(), ends=ends, sequence_length=48, row_tokens=row_tokens)


def answered(asker: Sampler, model: TrainingModel) -> list[list[int]]:
    return [[int(token) for token in sample.answer.split()] for sample in asker.ask(model, lambda: None)]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("family", "adapter"),
    [("llama", {}), ("qwen3", {"use_dora": True}), ("gemma2", {}), ("qwen3_moe", {}), ("cohere2", {})],
)
def test_what_is_answered_while_training_goes_on_are_the_likeliest_tokens(
    tmp_path: Path, family: str, adapter: dict[str, Any]
) -> None:
    """By transformers and PEFT on the same weights, but for what two ways through bfloat16 round apart."""
    model = trained(family, AdapterSpec.model_validate({"rank": 4, "alpha": 16, **adapter}))
    prompts = some_prompts()
    answers = answered(sampler(prompts), model)
    judge = plain(tiny_model(family), saved(model, tmp_path / "adapter"))
    assert any(answers)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(prompt) + len(answer) <= 48
        with torch.inference_mode():
            logits = judge(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
        best, spread = logits.max(-1).values, logits.std()
        chosen = logits[range(len(answer)), answer]
        assert ((best - chosen) <= 0.1 * spread).all()


def test_an_answer_depends_on_its_own_prompt_alone_and_ends_where_answers_end() -> None:
    model, prompts = trained("llama", AdapterSpec(rank=4, alpha=16)), some_prompts()
    together, apart = answered(sampler(prompts), model), answered(sampler(prompts, row_tokens=48), model)
    assert together == apart == [answered(sampler([prompt]), model)[0] for prompt in prompts]
    end = together[0][5]
    cut = answered(sampler(prompts, ends=[end]), model)
    assert cut == [answer[: answer.index(end)] if end in answer else answer for answer in together]
    assert answered(sampler([list(range(5, 53))]), model) == [[]], "a prompt that fills the sequence has no room"


@pytest.mark.parametrize("steps", [1, 7, 640, 6399, 100_000])
@pytest.mark.parametrize("every", [1, 10, 1000])
def test_prompts_are_asked_at_a_bounded_number_of_evaluations_and_at_the_last(steps: int, every: int) -> None:
    evaluation = EvaluationSpec(every_steps=every)
    evaluated = [step for step in range(steps + 1) if step % every == 0 or step == steps]
    asked = [step for step in evaluated if is_sampled(step, steps, evaluation)]
    assert asked[0] == 0
    assert asked[-1] == steps
    assert min(len(evaluated), MOST_EVALUATIONS // 2) <= len(asked) <= MOST_EVALUATIONS


def sampling(folder: Path, **evaluation: Any) -> StageTask:
    task = make_task(folder, steps=6, evaluation={"every_steps": 2, **evaluation})
    return with_tokenizer(task, folder)


def sampled_of(folder: Path) -> dict[int, tuple[Sample, ...]]:
    journal = Journal.load(folder / "adapter" / "journal.jsonl").records()
    return {record.step: record.samples for record in journal if record.samples}


def test_samples_are_in_the_journal_and_change_no_bit_whoever_is_stopped_among_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = {"samples": {"prompts": 2, "max_new_tokens": 5}}
    plainly = train.run(sampling(tmp_path / "plain"))
    folder = tmp_path / "sampled"
    task = sampling(folder, **samples)
    assert train.run(task).adapter_digest == plainly.adapter_digest
    found = sampled_of(folder)
    assert list(found) == [0, 2, 4, 6]
    assert all(len(each) == 2 and all(sample.prompt and sample.reference for sample in each) for each in found.values())
    assert found[0] != found[6], "training changes nothing, so this shows nothing"

    stopped = tmp_path / "stopped"
    task = sampling(stopped, **samples)
    ask = Sampler.ask

    def stop_in_the_middle(asker: Sampler, model: TrainingModel, between: Any) -> Any:
        passes = iter(range(3))

        def count() -> None:
            if next(passes, None) is None:
                raise Killed
            between()

        return ask(asker, model, count)

    with monkeypatch.context() as patched:
        patched.setattr(Sampler, "ask", stop_in_the_middle)
        with pytest.raises(Killed):
            train.run(task)
    result = train.run(task.model_copy(update={"attempt": 2}))
    assert result.adapter_digest == plainly.adapter_digest
    assert sampled_of(stopped) == found


class Killed(Exception):
    """Nobody expects it."""
