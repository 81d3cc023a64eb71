"""Training that goes on from an adapter: what is read, what is refused, and what the trained model then is.

The judge is PEFT: adapters are written by its own `save_pretrained`, and the model that it makes of one must answer as
the trainer's does before its first step.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# Why: torch, transformers, PEFT and safetensors declare some of these functions only in part.

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from peft import LoraConfig, PeftModel, get_peft_model
from plain_base import base_in_nf4
from qlora_trainer import prepare, publish, train
from qlora_trainer.data.micro_batch import collate
from qlora_trainer.outcome import Transient, UserError
from qlora_trainer.storage.journal import Journal
from safetensors.torch import load_file, save_file
from test_dpo import FIGURES, figures_of
from test_model import make_model, make_records
from test_prepare import make_task
from test_resume import digest_of_adapter, losses, run_until
from tiny_model import build_tiny_model, tiny_model
from transformers import AutoModelForCausalLM

from orchestrator.api.adapter import AdapterSpec, StartingJob
from orchestrator.api.formats import StartManifest
from orchestrator.api.plan import MemoryPlan
from orchestrator.api.results import PrepareResult
from orchestrator.api.task import StageTask

# PEFT asks transformers for a name that is to go.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

ALL = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
SMALL: dict[str, Any] = {"maxSteps": 6, "globalBatchSize": 4, "sequenceLength": 256, "learningRate": "1e-2"}


def write_adapter(
    folder: Path, *, model: Path | None = None, dtype: torch.dtype = torch.float32, seed: int = 3, **config: Any
) -> Path:
    """An adapter that does something, as PEFT saves it."""
    base = AutoModelForCausalLM.from_pretrained(model or tiny_model(), dtype=torch.float32)
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(base, LoraConfig(**{**fields, **config}))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            change = 0.05 * torch.randn(parameter.shape, generator=generator)
            parameter.data = (change if "lora_B" in name else parameter.data + change).to(dtype)
    adapted.save_pretrained(folder)
    return folder


def going_on(store: Path, start: Path, **sections: Any) -> StageTask:
    """A prepare task of a job that goes on from the adapter."""
    own = {"from": start.as_uri(), "dropout": "0", **sections.pop("adapter", {})}
    return make_task(store, adapter=own, training={**SMALL, **sections.pop("training", {})}, **sections)


def on_its_card(task: StageTask) -> StageTask:
    """The train task after the prepare task has run."""
    return after(task, prepare.run(task))


def after(task: StageTask, prepared: PrepareResult, *, attempt: int = 1) -> StageTask:
    """The train task, as the controller makes it."""
    plan = MemoryPlan(micro_batch_size=2, accumulation_steps=2, recompute_layers=1, loss_chunk_tokens=64)
    told = {"stage": "train", "spec": task.spec.settled(prepared.start), "prepared": prepared, "plan": plan}
    return task.model_copy(update={**told, "attempt": attempt})


def refusal(task: StageTask) -> str:
    with pytest.raises(UserError) as caught:
        prepare.run(task)
    return caught.value.message


def change_config(folder: Path, **fields: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


# --- what is taken over


CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "all layers": ({}, {}),
    "a list": ({"target_modules": ["q_proj", "v_proj"]}, {"target_modules": ("q_proj", "v_proj")}),
    "every name in a list": ({"target_modules": list(ALL)}, {}),
    "an expression": (
        {"target_modules": r".*\.self_attn\.(k|o)_proj"},
        {"target_modules": ("k_proj", "o_proj")},
    ),
    "some layers": (
        {"target_modules": ["up_proj"], "layers_to_transform": [1]},
        {"target_modules": ("model.layers.1.mlp.up_proj",)},
    ),
    "all but some": (
        {"exclude_modules": ["down_proj"]},
        {"target_modules": tuple(name for name in ALL if name != "down_proj")},
    ),
    "rsLoRA": ({"use_rslora": True, "r": 16, "lora_alpha": 4}, {"use_rslora": True, "rank": 16, "alpha": 4}),
    "DoRA": ({"use_dora": True, "lora_dropout": 0.3}, {"use_dora": True}),
    "an odd rank": ({"r": 3, "lora_alpha": 6.0}, {"rank": 3, "alpha": 6}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_model_begins_as_peft_makes_it(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    config, expected = CONFIGS[name]
    adapter = write_adapter(tmp_path / "adapter", dtype=dtype, **config)
    task = on_its_card(going_on(tmp_path / "job", adapter))
    found = task.spec.adapter
    usual = {"rank": 4, "alpha": 8, "target_modules": "all-linear", "use_rslora": False, "use_dora": False}
    assert {field: getattr(found, field) for field in usual} == {**usual, **expected}
    assert found.dropout == "0", "a way to train, which the job chooses"

    fields = {field: getattr(found, field) for field in usual}
    ours = make_model(**fields)
    start = load_file(tmp_path / "job" / "start" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in start.values()} == {torch.bfloat16}
    ours.begin_with(start, is_reference=False)
    ours.eval()
    theirs = PeftModel.from_pretrained(base_in_nf4(tiny_model()), str(adapter), autocast_adapter_dtype=False).eval()
    for parameter in theirs.parameters():
        if parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(torch.bfloat16)
    record = make_records()[1]
    with torch.no_grad():
        logits = theirs(input_ids=torch.tensor(record[0][None].astype("int64"))).logits[0].float()
        with theirs.disable_adapter():
            plain = theirs(input_ids=torch.tensor(record[0][None].astype("int64"))).logits[0].float()
        own = ours.logits(collate([record]))
    assert (own - logits).norm() < 0.02 * logits.norm()
    assert (own - plain).norm() > 5 * (own - logits).norm(), "the adapter does something"


def test_training_goes_on_from_it_and_the_first_evaluation_is_its_own(tmp_path: Path) -> None:
    first = on_its_card(make_task(tmp_path / "first", training=SMALL, adapter={"rank": 4, "alpha": 8}))
    before = train.run(first)
    again = going_on(tmp_path / "second", tmp_path / "first" / "adapter")
    result = train.run(on_its_card(again))
    assert result.eval_loss_before == pytest.approx(before.eval_loss, abs=1e-6)
    assert result.eval_loss is not None
    assert result.eval_loss_before is not None
    assert result.eval_loss < result.eval_loss_before
    steps = [each.step for each in Journal.load(tmp_path / "second" / "adapter" / "journal.jsonl").records()]
    assert max(steps) == 6, "a schedule of its own"


def test_without_a_learning_rate_it_ends_as_it_began_to_the_bit(tmp_path: Path) -> None:
    train.run(on_its_card(make_task(tmp_path / "first", training=SMALL, adapter={"rank": 4, "alpha": 8})))
    task = going_on(tmp_path / "second", tmp_path / "first" / "adapter", training={"learningRate": "1e-99"})
    train.run(on_its_card(task))
    assert digest_of_adapter(tmp_path / "second") == digest_of_adapter(tmp_path / "first")


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_stopped_and_resumed_it_ends_as_if_nothing_had_happened(tmp_path: Path, objective: str) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    fields = preferences(tmp_path) if objective == "dpo" else {}
    train.run(on_its_card(going_on(tmp_path / "undisturbed", adapter, **fields)))
    task = on_its_card(going_on(tmp_path / "stopped", adapter, **fields))
    shutil.rmtree(adapter)  # from now on the job has its own
    for attempt, step in enumerate((1, 3), start=1):
        run_until(task.model_copy(update={"attempt": attempt}), step)
    train.run(task.model_copy(update={"attempt": 3}))
    assert digest_of_adapter(tmp_path / "stopped") == digest_of_adapter(tmp_path / "undisturbed")
    assert losses(tmp_path / "stopped") == losses(tmp_path / "undisturbed")


def test_a_float32_adapter_is_rounded_and_the_log_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_adapter(tmp_path / "wide")
    write_adapter(tmp_path / "narrow", dtype=torch.bfloat16)
    prepare.run(going_on(tmp_path / "one", tmp_path / "narrow"))
    assert "is rounded to" not in caplog.text
    prepare.run(going_on(tmp_path / "other", tmp_path / "wide"))
    assert "is in float32 and is rounded to bfloat16" in caplog.text


def test_it_is_kept_in_the_jobs_store_whatever_becomes_of_its_source(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    task = going_on(tmp_path / "job", adapter)
    first = prepare.run(task)
    write_adapter(adapter, seed=9, r=8)
    again = prepare.run(task.model_copy(update={"attempt": 2}))
    assert again == first
    other = prepare.run(going_on(tmp_path / "other", adapter))
    assert other.start is not None
    assert first.start is not None
    assert (other.start.rank, other.start.digest == first.start.digest) == (8, False)
    manifest = StartManifest.model_validate_json((tmp_path / "job" / "start" / "manifest.json").read_bytes())
    assert manifest.start == first.start

    (tmp_path / "job" / "start" / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(Transient, match="the adapter that training begins with is damaged"):
        train.run(after(task, first, attempt=3))
    assert "is damaged, and" in refusal(task.model_copy(update={"attempt": 4}))


# --- preferences


def preferences(folder: Path) -> dict[str, Any]:
    path = folder / "pairs.jsonl"
    pairs = [
        {"prompt": f"Count {n}.", "chosen": f" {n} and {n + 1}", "rejected": f" {n} or {n - 1} or so"}
        for n in range(1, 25)
    ]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    dataset = {"source": path.as_uri(), "format": "preference", "evalSource": path.as_uri()}
    return {"dataset": dataset, "training": {"objective": {"type": "dpo"}, "learningRate": "1e-3"}}


def test_the_reference_of_preferences_is_the_model_with_the_adapter_that_it_begins_with(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    train.run(on_its_card(going_on(tmp_path / "job", adapter, **preferences(tmp_path))))
    before, after = (figures_of(tmp_path / "job", "eval")[step] for step in (0, 6))
    assert before[:5] == pytest.approx([math.log(2), 0, 0, 0, 0], abs=1e-7)
    assert after[FIGURES.index("rewards/margins")] > 0


@pytest.mark.parametrize(
    ("family", "adapter"), [("llama", {}), ("llama", {"use_dora": True}), ("qwen3_moe", {"experts": True})]
)
def test_the_reference_stays_while_the_adapter_moves(family: str, adapter: dict[str, Any]) -> None:
    model = make_model(tiny_model(family), **adapter)
    start = {name: tensor + 0.02 for name, tensor in model.adapter().items()}
    model.begin_with(start, is_reference=True)
    batch = collate(make_records())
    before = model.reference_log_probabilities(batch)
    assert torch.equal(before, model.log_probabilities(batch))
    for _, parameter in model.trainable():
        parameter.data.mul_(1.5)
    moved = {name: tensor.clone() for name, tensor in model.adapter().items()}
    model.train()
    state = torch.get_rng_state()
    assert torch.equal(model.reference_log_probabilities(batch), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.peft_model.training
    assert all(torch.equal(tensor, moved[name]) for name, tensor in model.adapter().items())


# --- what is refused, before a GPU is taken


def damaged_weights(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})

    return damage


def _nan(tensors: dict[str, Any]) -> None:
    next(iter(tensors.values()))[0, 0] = math.nan


def _too_large(tensors: dict[str, Any]) -> None:
    next(iter(tensors.values()))[0, 0] = torch.finfo(torch.float32).max


def _one_less(tensors: dict[str, Any]) -> None:
    del tensors["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"]


def _one_more(tensors: dict[str, Any]) -> None:
    tensors["base_model.model.lm_head.weight"] = torch.zeros(2)


def _in_integers(tensors: dict[str, Any]) -> None:
    name = next(iter(tensors))
    tensors[name] = tensors[name].to(torch.int8)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "another kind": (lambda f: change_config(f, peft_type="IA3"), "peft_type 'IA3'.*only adapters of the type LORA"),
    "another task": (lambda f: change_config(f, task_type="SEQ_CLS"), "task_type 'SEQ_CLS'"),
    "ranks by layer": (lambda f: change_config(f, rank_pattern={"q_proj": 8}), "rank_pattern .*does not know"),
    "alphas by layer": (lambda f: change_config(f, alpha_pattern={"q_proj": 8}), "alpha_pattern"),
    "a trained head": (lambda f: change_config(f, modules_to_save=["lm_head"]), "modules_to_save"),
    "biases": (lambda f: change_config(f, bias="all"), "bias 'all'"),
    "a field of tomorrow": (lambda f: change_config(f, use_quantum=True), "use_quantum True"),
    "weights taken from the base": (lambda f: change_config(f, init_lora_weights="pissa"), "init_lora_weights 'pissa'"),
    "half an alpha": (lambda f: change_config(f, lora_alpha=8.5), "alpha: Input should be a valid integer"),
    "no rank": (lambda f: change_config(f, r=None), "rank: Input should be a valid integer"),
    "a rank of another adapter": (lambda f: change_config(f, r=8), r"has the shape \(4, 64\).*would have \(8, 64\)"),
    "no list": (lambda f: (f / "adapter_config.json").write_text("[]"), "not a JSON object"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json is not valid JSON"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "holds no adapter_config.json"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "holds no adapter_model.safetensors"),
    "pickled weights": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        "holds its weights pickled.*save the adapter as safetensors",
    ),
    "cut weights": (
        lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:-9]),
        "adapter_model.safetensors is damaged",
    ),
    "no number": (damaged_weights(_nan), r"NaN or infinity"),
    "too large a number": (damaged_weights(_too_large), "too large for bfloat16"),
    "a tensor less": (damaged_weights(_one_less), r"lacks 1 tensors .*up_proj\.lora_B"),
    "a tensor more": (damaged_weights(_one_more), r"holds 1 tensors that no LoRA .*lm_head"),
    "integers": (damaged_weights(_in_integers), "is in I8; adapters are read in BF16, F16, F32"),
    "no folder": (shutil.rmtree, "there is no adapter folder at file://.* check spec.adapter.from"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_an_adapter_that_cannot_be_gone_on_from_is_refused(tmp_path: Path, name: str) -> None:
    damage, words = DAMAGES[name]
    adapter = write_adapter(tmp_path / "adapter")
    damage(adapter)
    found = refusal(going_on(tmp_path / "job", adapter))
    assert re.search(words, found), found


def test_a_model_is_no_adapter(tmp_path: Path) -> None:
    assert "holds a model, not an adapter" in refusal(going_on(tmp_path, tiny_model()))


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"rank": 8}, "spec.adapter.rank is 8, but .* has 4"),
        ({"alpha": 32}, "spec.adapter.alpha is 32"),
        ({"useDora": True}, "spec.adapter.useDora is True"),
        ({"useRslora": True}, "spec.adapter.useRslora is True"),
        ({"targetModules": ["q_proj"]}, "spec.adapter.targetModules is q_proj, but .* has k_proj, q_proj"),
    ],
)
def test_what_the_spec_says_otherwise_is_refused_by_its_name(tmp_path: Path, asked: dict[str, Any], words: str) -> None:
    adapter = write_adapter(tmp_path / "adapter", target_modules=["q_proj", "k_proj"])
    found = refusal(going_on(tmp_path / "job", adapter, adapter=asked))
    assert re.search(words, found), found


def test_what_the_spec_says_alike_is_not(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", target_modules=["q_proj", "k_proj"])
    asked = {"rank": 4, "alpha": 8, "targetModules": ["self_attn.q_proj", "k_proj"]}
    assert prepare.run(going_on(tmp_path / "job", adapter, adapter=asked)).start is not None


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    wider = build_tiny_model(tmp_path / "wider", hidden_size=128)
    adapter = write_adapter(tmp_path / "adapter", model=wider)
    assert "on this base it would have" in refusal(going_on(tmp_path / "job", adapter))


def test_a_base_whose_name_says_nothing_is_a_warning(tmp_path: Path) -> None:
    adapter = change_config(write_adapter(tmp_path / "adapter"), base_model_name_or_path="owner/model")
    warnings = prepare.run(going_on(tmp_path / "job", adapter)).warnings
    assert any("its base was owner/model, and nobody knows whether that is" in each for each in warnings)
    same = change_config(adapter, base_model_name_or_path=str(tiny_model()))
    assert not any("begins with" in each for each in prepare.run(going_on(tmp_path / "same", same)).warnings)


def test_experts_go_on_from_experts(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    usual = {"rank": 4, "alpha": 8, "dropout": "0", "experts": True}
    train.run(on_its_card(make_task(tmp_path / "first", model=model, training=SMALL, adapter=usual)))
    task = going_on(
        tmp_path / "second", tmp_path / "first" / "adapter", model=model, training={"learningRate": "1e-99"}
    )
    train.run(on_its_card(task))
    assert digest_of_adapter(tmp_path / "second") == digest_of_adapter(tmp_path / "first")
    dropping = going_on(tmp_path / "third", tmp_path / "first" / "adapter", model=model, adapter={"dropout": "0.05"})
    assert "experts have no dropout in PEFT" in refusal(dropping)


def test_what_is_taken_over_keeps_the_rules_of_specs(tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe")
    usual = {"rank": 4, "alpha": 8, "dropout": "0", "experts": True}
    train.run(on_its_card(make_task(tmp_path / "first", model=model, training=SMALL, adapter=usual)))
    task = going_on(tmp_path / "job", tmp_path / "first" / "adapter", model=model, publish={"formats": ["merged"]})
    assert "spec.adapter.from: with what file://" in refusal(task)


def test_a_field_with_its_default_asks_for_nothing() -> None:
    assert AdapterSpec.model_validate({"from": "hf://owner/adapter"}).rank == 64


# --- versions and jobs


def publish_job(store: Path, **fields: Any) -> StageTask:
    """A job's whole life, into MLflow on a file of its own; the task that it was published with."""
    task = on_its_card(make_task(store, training=SMALL, adapter={"rank": 4, "alpha": 8}, **fields))
    trained = train.run(task)
    told = {"stage": "publish", "run_id": mlflow_run_of(task), "adapter_uri": trained.adapter_uri, "attempt": 2}
    done = task.model_copy(update=told)
    publish.run(done)
    return done


def mlflow_run_of(task: StageTask) -> str:
    client = MlflowClient()
    experiment = client.get_experiment_by_name(task.namespace)
    assert experiment is not None
    return client.create_run(experiment.experiment_id, tags={"qlora.dev/job-uid": task.uid}).info.run_id


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    client = MlflowClient(tracking_uri=uri)
    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._tracking_uri", uri, raising=False)
    tags = {"qlora.dev/namespace": "team-a"}
    client.create_experiment("team-a", artifact_location=(tmp_path / "artifacts").as_uri(), tags=tags)
    return client


def from_version(store: Path, asked: str, **sections: Any) -> StageTask:
    training = {**SMALL, "learningRate": "1e-99"}
    return make_task(store, adapter={"from": asked, "dropout": "0"}, training=training, **sections)


def test_a_registered_version_is_gone_on_from_and_the_next_one_says_so(tmp_path: Path, registry: MlflowClient) -> None:
    publish_job(tmp_path / "first")
    name = "team-a-medical-es"
    for number, asked in enumerate((f"models:/{name}/1", f"models:/{name}@candidate")):
        store = tmp_path / str(number)
        task = on_its_card(from_version(store, asked))
        train.run(task)
        assert digest_of_adapter(store) == digest_of_adapter(tmp_path / "first")
    assert task.prepared is not None
    assert task.prepared.start is not None
    assert task.prepared.start.source == f"models:/{name}/1"

    told = {"stage": "publish", "run_id": mlflow_run_of(task), "attempt": 2, "uid": "0002"}
    publish.run(task.model_copy(update=told))
    version = registry.get_model_version(name, "2")
    assert version.tags["qlora.dev/continues"] == f"models:/{name}/1"
    assert version.tags["qlora.dev/continues-digest"] == task.prepared.start.digest
    assert version.description is not None
    assert f"Training went on from the adapter models:/{name}/1" in version.description


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("models:/nobody/1", "there is no registered model nobody"),
        ("models:/team-a-medical-es/9", "has no version 9"),
        ("models:/team-a-medical-es@champion", "no version of team-a-medical-es has the alias champion"),
        ("models:/theirs/1", "is not namespace team-a's; let its owner name team-a in its tag qlora.dev/namespace"),
        ("models:/ours/1", "version 1 of ours is none that a job has published"),
    ],
)
def test_a_version_that_cannot_be_gone_on_from_is_refused(
    tmp_path: Path, registry: MlflowClient, asked: str, words: str
) -> None:
    for name, owner in (("team-a-medical-es", "team-a"), ("theirs", "team-b"), ("ours", "team-b, team-a")):
        registry.create_registered_model(name, tags={"qlora.dev/namespace": owner})
        registry.create_model_version(name, source=tmp_path.as_uri())
    assert words in refusal(from_version(tmp_path / "job", asked))


def test_another_job_is_gone_on_from(tmp_path: Path) -> None:
    first = on_its_card(make_task(tmp_path / "first", training=SMALL, adapter={"rank": 4, "alpha": 8}))
    trained = train.run(first)
    assert first.prepared is not None
    known = StartingJob.model_validate(
        {
            "uid": "0001",
            "adapter_uri": trained.adapter_uri,
            "adapter_digest": trained.adapter_digest,
            "base": first.spec.model.source,
            "base_revision": first.prepared.model.revision,
        }
    )
    task = from_version(tmp_path / "second", "job:medical-es").model_copy(update={"starting_job": known})
    started = on_its_card(task)
    assert started.prepared is not None
    assert started.prepared.warnings == first.prepared.warnings
    train.run(started)
    assert digest_of_adapter(tmp_path / "second") == digest_of_adapter(tmp_path / "first")

    other = known.model_copy(update={"base_revision": "sha256:" + "0" * 64})
    assert "is an adapter for file://" in refusal(
        task.model_copy(update={"starting_job": other, "attempt": 2, "store_uri": (tmp_path / "third").as_uri()})
    )
    changed = known.model_copy(update={"adapter_digest": "sha256:" + "0" * 64})
    assert "is on record" in refusal(
        task.model_copy(update={"starting_job": changed, "store_uri": (tmp_path / "fourth").as_uri()})
    )
