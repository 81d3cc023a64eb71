"""Publishing: one version of one adapter, whatever is killed or repeated, and it loads without any code of ours."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.models import Model
from qlora_trainer import publish
from qlora_trainer.outcome import FencedError, UserError
from qlora_trainer.storage.checkpoint import Checkpointer, Provenance
from qlora_trainer.storage.job_store import JobStore
from qlora_trainer.storage.journal import Journal
from qlora_trainer.tracking import mlflow_run
from qlora_trainer.tracking.holder import HolderAdapter, fetch_holder
from qlora_trainer.tracking.registry import version_of_alias
from qlora_trainer.tracking.run_page import attempt_tags
from tiny_model import tiny_model

from orchestrator.api.formats import Answer, AnsweredPrompt, AnswerTable, Holder, JournalRecord
from orchestrator.api.job import (
    DatasetSource,
    EvaluationSpec,
    GenerationSpec,
    ModelSource,
    QLoRAJobSpec,
    TrackingSpec,
    TrainingSpec,
)
from orchestrator.api.model_facts import ModelFacts
from orchestrator.api.plan import MemoryPlan
from orchestrator.api.reasons import Reason
from orchestrator.api.results import PrepareResult, PublishResult
from orchestrator.api.task import StageTask

# MLflow and SQLAlchemy speak of their own deprecations; they are not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore")

DIGEST = "sha256:" + "1" * 64
RECORDS = [
    JournalRecord(step=0, time_ms=1, metrics={"eval/loss": 3.25}),
    JournalRecord(step=1, time_ms=2, metrics={"train/loss": 2.5, "eval/loss": 2.125}),
]


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    """MLflow on a SQLite file of its own, with the experiment that the controller makes."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    client = MlflowClient(tracking_uri=uri)
    tags = {"qlora.dev/namespace": "team-a"}
    client.create_experiment("team-a", artifact_location=(tmp_path / "artifacts").as_uri(), tags=tags)
    return client


def make_task(
    client: MlflowClient,
    store: JobStore,
    *,
    model: str = "file:///models/base",
    evaluation: EvaluationSpec | None = None,
    **fields: Any,
) -> StageTask:
    experiment = client.get_experiment_by_name("team-a")
    assert experiment is not None
    uid = fields.pop("uid", "u-1")
    facts = ModelFacts(
        model_type="llama",
        architecture="LlamaForCausalLM",
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=512,
        tied_embeddings=False,
        revision="c0ffee",
    )
    return StageTask(
        stage="publish",
        namespace="team-a",
        job="medical-es",
        uid=uid,
        attempt=2,
        spec=QLoRAJobSpec(
            model=ModelSource(source=model),
            dataset=DatasetSource(source="file:///data.jsonl", eval_fraction="0.1"),
            training=TrainingSpec(learning_rate="3e-4"),
            evaluation=evaluation or EvaluationSpec(),
            tracking=TrackingSpec.model_validate(fields),
        ),
        store_uri=store.uri,
        prepared=PrepareResult(
            digest=DIGEST,
            uri=f"{store.uri}/prepared/1",
            model=facts,
            train_records=9,
            train_sequences=3,
            train_tokens=99,
            supervised_tokens=50,
            eval_records=1,
            eval_sequences=1,
            steps=1,
        ),
        run_id=client.create_run(experiment.experiment_id, tags={"qlora.dev/job-uid": uid}).info.run_id,
    )


def make_store(
    tmp_path: Path, *, base: Path = Path("/models/base"), seed: int = 0, answers: AnswerTable | None = None
) -> JobStore:
    """A job's store with a finished adapter for the tiny model, its weights drawn from the seed."""
    import torch

    store = JobStore(f"{tmp_path.as_uri()}/store-{seed}")
    store.take_fence(1)
    generator = torch.Generator().manual_seed(seed)
    prefix = "base_model.model.model.layers"
    adapter = {
        f"{prefix}.{layer}.self_attn.q_proj.lora_{side}.weight": torch.randn(shape, generator=generator).bfloat16()
        for layer in (0, 1)
        for side, shape in (("A", (4, 64)), ("B", (64, 4)))
    }
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": 4,
        "lora_alpha": 16,
        "target_modules": ["q_proj"],
        "inference_mode": True,
    }
    provenance = Provenance(
        attempt=1, prepared=DIGEST, adapter_config=config, versions={"torch": "2.13.0+cu130", "peft": "0.21.2"}
    )
    Checkpointer(store, provenance, keep=1).publish_adapter(1, adapter, RECORDS, tiny_model(), answers=answers)
    return store


def versions(client: MlflowClient, name: str) -> list[str]:
    return [str(version.version) for version in client.search_model_versions(f"name = '{name}'")]


def logged_models(client: MlflowClient, uid: str) -> list[str]:
    experiment = client.get_experiment_by_name("team-a")
    assert experiment is not None
    found = client.search_logged_models([experiment.experiment_id], f"tags.`qlora.dev/job-uid` = '{uid}'")
    return [model.model_id for model in found]


def test_the_registry_holds_the_adapter_with_tags_alias_card_and_signature(
    client: MlflowClient, tmp_path: Path
) -> None:
    store = make_store(tmp_path)
    task = make_task(client, store, registered_model="terms", alias="candidate")
    result = publish.run(task)
    assert (result.registered_model, result.model_version, result.model_uri) == ("terms", "1", "models:/terms/1")
    assert result.run_id == task.run_id

    version = client.get_model_version_by_alias("terms", "candidate")
    assert (version.version, version.run_id, version.status) == (1, task.run_id, "READY")
    weights = tmp_path / "store-0" / "adapter" / "adapter_model.safetensors"
    sha256sum = subprocess.run(["sha256sum", weights], capture_output=True, check=True, text=True).stdout.split()[0]
    assert version.tags["qlora.dev/job-uid"] == "u-1"
    assert version.tags["qlora.dev/adapter-digest"] == f"sha256:{sha256sum}"
    assert version.description.startswith("# terms")

    folder = Path(download_artifacts("models:/terms@candidate", dst_path=str(tmp_path / "downloaded")))
    assert (folder / "artifacts" / "adapter" / "adapter_model.safetensors").read_bytes() == weights.read_bytes()
    signature = Model.load(str(folder)).signature
    columns = ["messages", "tools", "prompt", "instruction", "input", "system", "history"]
    assert [column.name for column in signature.inputs] == columns
    requirements = (folder / "requirements.txt").read_text().split()
    assert {"torch==2.13.0", "peft==0.21.2"} <= set(requirements)
    assert all("==" in line for line in requirements)

    history = [(metric.step, metric.value) for metric in client.get_metric_history(task.run_id, "eval/loss")]
    assert history == [(0, 3.25), (1, 2.125)]
    assert client.get_run(task.run_id).info.status == "RUNNING"


def test_the_runs_page_shows_data_card_and_the_version(client: MlflowClient, tmp_path: Path) -> None:
    task = make_task(client, make_store(tmp_path), registered_model="terms")
    publish.run(task)
    client.set_tag(task.run_id, "mlflow.note.content", "ours, and good")
    publish.run(task)
    run = client.get_run(task.run_id)
    assert run.outputs is not None
    (output,) = run.outputs.model_outputs
    assert [output.model_id] == logged_models(client, "u-1")
    tags = client.get_logged_model(output.model_id).tags
    assert json.loads(tags["mlflow.modelVersions"]) == [{"name": "terms", "version": "1"}]
    inputs = {given.tags[0].value: given.dataset for given in run.inputs.dataset_inputs}
    assert sorted(inputs) == ["evaluation", "training"]
    assert (inputs["training"].name, inputs["training"].digest) == ("data.jsonl", "1" * 36)
    assert json.loads(inputs["training"].profile) == {"records": 9, "tokens": 99, "steps": 1}
    assert {file.path for file in client.list_artifacts(task.run_id)} == {"README.md"}
    assert run.data.tags["mlflow.note.content"] == "ours, and good", "what a person wrote stays"


def test_a_run_is_described_by_its_job_and_then_by_its_card(client: MlflowClient, tmp_path: Path) -> None:
    task = make_task(client, make_store(tmp_path), registered_model="terms")
    assert task.run_id is not None
    mlflow_run.describe(task, task.run_id, {})
    first = client.get_run(task.run_id).data.tags["mlflow.note.content"]
    assert "9 records with 99 tokens" in first
    publish.run(task)
    assert client.get_run(task.run_id).data.tags["mlflow.note.content"].startswith("# terms")


def test_the_card_is_a_hub_card_that_tells_what_came_of_it(client: MlflowClient, tmp_path: Path) -> None:
    store = make_store(tmp_path)
    task = make_task(client, store, model="file:///models/base", registered_model="terms")
    plans = {"qlora.dev/plan/2": '{"microBatchSize":4}', "qlora.dev/plan/10": '{"microBatchSize":1}'}
    card = publish.model_card(task, publish.fetch_adapter(store, tmp_path / "fetched"), plans)
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == "/models/base"
    assert front["library_name"] == "peft"
    assert front["dataset_digest"] == DIGEST
    assert "| held-out loss of the base | 3.2500 |" in card
    assert "| held-out loss with the adapter | 2.1250 |" in card
    assert "| training.learningRate | 3e-4 |" in card
    assert "| base revision | c0ffee |" in card
    assert f"| prepared data | {DIGEST} |" in card
    assert "| what carried loss | the assistant's turns, each with the token that ends it |" in card
    assert "| chat template | the base's own, saved with the tokenizer |" in card
    assert '| memory plan | {"microBatchSize":1} |' in card, "that of the last attempt"
    assert f'mlflow.set_tracking_uri("sqlite:///{tmp_path}/mlflow.db")' in card
    assert 'mlflow.pyfunc.load_model("models:/terms@candidate")' in card
    assert "PeftModel.from_pretrained(" in card
    for snippet in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        compile(snippet, "card", "exec")


def test_a_repeat_finds_the_version_and_another_adapter_makes_a_new_one(client: MlflowClient, tmp_path: Path) -> None:
    task = make_task(client, make_store(tmp_path, seed=0), registered_model='o\'neil "the" model')
    first = publish.run(task)
    assert publish.run(task) == first
    other = publish.run(task.model_copy(update={"store_uri": make_store(tmp_path, seed=1).uri}))
    assert (first.model_version, other.model_version) == ("1", "2")
    assert len(logged_models(client, "u-1")) == 2


def test_a_damaged_or_missing_adapter_and_a_fenced_attempt_register_nothing(
    client: MlflowClient, tmp_path: Path
) -> None:
    store = make_store(tmp_path)
    task = make_task(client, store)
    with pytest.raises(UserError, match="holds no finished adapter"):
        publish.run(task.model_copy(update={"store_uri": f"{tmp_path.as_uri()}/empty"}))
    store.take_fence(3)
    with pytest.raises(FencedError, match="attempt 3 owns"):
        publish.run(task)
    weights = tmp_path / "store-0" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(UserError, match=r"adapter is damaged.*adapter_model\.safetensors"):
        publish.run(task.model_copy(update={"attempt": 3}))
    assert versions(client, "team-a-medical-es") == []


def test_publishing_needs_neither_torch_nor_transformers(client: MlflowClient, tmp_path: Path) -> None:
    task = make_task(client, make_store(tmp_path))
    program = (
        "import sys\n"
        "from qlora_trainer import publish\n"
        "from orchestrator.api.task import StageTask\n"
        "publish.run(StageTask.model_validate_json(sys.argv[1]))\n"
        "print(sorted({'torch', 'transformers', 'peft', 'bitsandbytes'} & set(sys.modules)))\n"
    )
    assert run_python(program, task.model_dump_json(by_alias=True)).splitlines()[-1] == "[]"
    assert versions(client, "team-a-medical-es") == ["1"]


def test_a_deleted_run_and_experiment_are_restored_and_the_adapter_registered(
    client: MlflowClient, tmp_path: Path
) -> None:
    store = make_store(tmp_path)
    task = make_task(client, store)
    client.update_run(task.run_id, name="tidied up")
    client.delete_run(task.run_id)
    client.delete_experiment(client.get_run(task.run_id).info.experiment_id)
    publish.run(task)
    run = client.get_run(task.run_id)
    assert run.info.lifecycle_stage == "active"
    assert client.get_experiment(run.info.experiment_id).lifecycle_stage == "active"
    assert [metric.step for metric in client.get_metric_history(task.run_id, "eval/loss")] == [0, 1]
    assert versions(client, "team-a-medical-es") == ["1"]


def test_a_run_that_is_gone_for_good_is_made_anew_once(client: MlflowClient, tmp_path: Path) -> None:
    task = make_task(client, make_store(tmp_path), uid="u-2").model_copy(update={"run_id": "0" * 32, "uid": "u-3"})
    found = publish.run(task)
    assert publish.run(task) == found
    experiment = client.get_experiment_by_name("team-a")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], "tags.`qlora.dev/job-uid` = 'u-3'")
    assert (run.info.status, run.info.run_id) == ("FINISHED", found.run_id)
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "eval/loss")] == [0, 1]
    assert client.get_model_version("team-a-medical-es", "1").run_id == run.info.run_id
    assert versions(client, "team-a-medical-es") == ["1"]


def test_what_attempts_said_of_themselves_is_in_the_run_though_mlflow_was_away(
    client: MlflowClient, tmp_path: Path
) -> None:
    store = make_store(tmp_path)
    store.record_attempt(1, {"qlora.dev/plan/1": "out of memory", "qlora.dev/card": "small"})
    store.take_fence(2)
    store.record_attempt(2, {"qlora.dev/plan/2": "fits", "qlora.dev/card": "large"})
    task = make_task(client, store)
    publish.run(task)
    data = client.get_run(task.run_id).data
    assert data.tags["qlora.dev/plan/1"] == "out of memory"
    assert data.tags["qlora.dev/plan/2"] == "fits"
    assert data.tags["qlora.dev/card"] == "large"
    assert data.params["training.learningRate"] == "3e-4"


def test_an_mlflow_that_never_answered_an_attempt_has_its_plan_and_metrics_in_the_end(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path)
    task = make_task(client, store)
    plan = MemoryPlan(micro_batch_size=1, accumulation_steps=16, recompute_layers=0, loss_chunk_tokens=64)
    attempt = task.model_copy(update={"stage": "train", "attempt": 1, "plan": plan, "run_id": None})
    with socket.socket() as deaf, monkeypatch.context() as then:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        then.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        then.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        store.record_attempt(1, attempt_tags(attempt))
        logger = mlflow_run.RunLogger(attempt, Journal(RECORDS), interval_seconds=0.05)
        started = time.monotonic()
        assert logger.close(1) == len(RECORDS)
        assert time.monotonic() - started < 30, "the end of an attempt waits for nobody"
    publish.run(task)
    data = client.get_run(task.run_id).data
    assert json.loads(data.tags["qlora.dev/plan/1"])["microBatchSize"] == 1
    assert data.tags["qlora.dev/version/torch"]
    assert [metric.step for metric in client.get_metric_history(task.run_id, "eval/loss")] == [0, 1]


KILLS = """
import os, signal, sys
from mlflow import MlflowClient
import mlflow.pyfunc
from qlora_trainer import publish
from orchestrator.api.task import StageTask

kill_at = None
instants = 0

def instant():
    global instants
    if instants == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    instants += 1

def interruptible(method):
    def call(*arguments, **named):
        instant()
        output = method(*arguments, **named)
        instant()
        return output
    return call

# Before and after each call that changes or asks MLflow is an instant to be killed at.
for name in ("get_run", "get_metric_history", "log_batch", "search_logged_models", "create_logged_model",
             "log_model_artifacts", "finalize_logged_model", "search_model_versions", "create_registered_model",
             "create_model_version", "set_registered_model_alias", "get_registered_model", "log_inputs", "log_outputs",
             "log_text", "log_dict", "set_logged_model_tags", "get_model_version_by_alias", "get_model_version",
             "set_model_version_tag"):
    setattr(MlflowClient, name, interruptible(getattr(MlflowClient, name)))
mlflow.pyfunc.save_model = interruptible(mlflow.pyfunc.save_model)

def in_child(task, kill):
    global kill_at
    child = os.fork()
    if child == 0:
        kill_at = kill
        publish.run(task)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

# Once for nothing, in a database of its own, so that children are born with everything imported.
warm_up, uri = StageTask.model_validate_json(sys.argv[1]), os.environ["MLFLOW_TRACKING_URI"]
os.environ["MLFLOW_TRACKING_URI"] = sys.argv[2]
experiment = MlflowClient().create_experiment("warm-up", artifact_location=sys.argv[3])
publish.run(warm_up.model_copy(update={"run_id": MlflowClient().create_run(experiment).info.run_id}))
os.environ["MLFLOW_TRACKING_URI"] = uri
instants = 0

killed = 0
for kill, line in enumerate(sys.stdin):
    task = StageTask.model_validate_json(line)
    killed += in_child(task, kill) == -signal.SIGKILL
    assert in_child(task, None) == 0, f"the repeat after kill {kill} failed"
print(killed)
"""


def test_a_kill_before_or_after_any_call_to_mlflow_leaves_one_version_and_one_model(
    client: MlflowClient, tmp_path: Path
) -> None:
    store = make_store(tmp_path, answers=some_answers())
    instants = 77
    promoting = gated({"over": "holder", "atLeast": "0"})
    tasks = [
        make_task(client, store, uid=f"u-{kill}", **{**promoting, "registered_model": f"m-{kill}"})
        for kill in range(instants + 1)
    ]
    lines = "\n".join(task.model_dump_json(by_alias=True) for task in tasks)
    elsewhere = (f"sqlite:///{tmp_path}/warm-up.db", (tmp_path / "warm-up").as_uri())
    killed = int(run_python(KILLS, tasks[0].model_dump_json(by_alias=True), *elsewhere, stdin=lines).splitlines()[-1])
    assert killed == instants, "the last of these must have come through unharmed, the others not"
    for kill, task in enumerate(tasks):
        assert versions(client, f"m-{kill}") == ["1"], f"kill {kill}"
        assert len(logged_models(client, f"u-{kill}")) == 1, f"kill {kill}"
        for alias in ("candidate", "champion"):
            assert client.get_model_version_by_alias(f"m-{kill}", alias).version == 1
        assert [metric.step for metric in client.get_metric_history(task.run_id, "eval/loss")] == [0, 1]


SERVED = """
import json, os, sys
import mlflow
served = mlflow.pyfunc.load_model("models:/terms@candidate")
python_model = served.unwrap_python_model()
# Looked at before anything is answered: on some CPUs bitsandbytes repacks a weight when it is first evaluated.
state = python_model.model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.quant_state
quant_type, nested = state.quant_type, state.nested
python_model = served.unwrap_python_model()
# Before the first forward: on some CPUs bitsandbytes then repacks the weights.
state = python_model.model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.quant_state
quantization = [state.quant_type, state.nested]
question = [{"role": "user", "content": "¿Qué es la disnea?"}]
short = {"max_new_tokens": 5}
answers = [
    *served.predict([{"messages": question}, {"messages": question}], params=short),
    *served.predict([{"prompt": "La disnea es"}], params=short),
    *served.predict({"messages": question}, params=short),
]

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
tokens = torch.tensor([[5, 9, 100, 42, 7, 300, 21]])
def loss(model):
    with torch.inference_mode():
        return float(model(input_ids=tokens, labels=tokens).loss)
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                         bnb_4bit_compute_dtype=torch.bfloat16)
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16, quantization_config=nf4)
plain = loss(base)
folder = mlflow.artifacts.download_artifacts("models:/terms@candidate") + "/artifacts/adapter"
with_peft = loss(PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False).eval())
assert not [name for name in sys.modules if name.startswith(("qlora_trainer", "orchestrator"))]
def complaint(**options):
    try:
        mlflow.pyfunc.load_model("models:/terms@candidate", **options)
    except Exception as error:
        return str(error)
elsewhere = [complaint(model_config={"base_model": "/nowhere"})]
os.environ["QLORA_BASE_MODEL"] = "/nowhere/else"
elsewhere.append(complaint())
print(json.dumps({
    "answers": answers,
    "elsewhere": elsewhere,
    "served": loss(python_model.model),
    "peft": with_peft,
    "base": plain,
    "quantization": quantization,
}))
"""


def test_the_version_loads_with_mlflow_alone_and_with_peft(client: MlflowClient, tmp_path: Path) -> None:
    model = tiny_model()
    publish.run(make_task(client, make_store(tmp_path, base=model), registered_model="terms"))
    found = json.loads(run_python(SERVED, str(model), paths=[], cwd=tmp_path).splitlines()[-1])
    assert found["served"] == pytest.approx(found["peft"], abs=1e-3)
    assert abs(found["served"] - found["base"]) > 1e-2, "the adapter must make a difference"
    assert found["quantization"] == ["nf4", True]
    assert len(found["answers"]) == 4
    assert all(isinstance(answer, str) for answer in found["answers"])
    assert found["answers"][0] == found["answers"][1] == found["answers"][3]
    by_configuration, by_environment = found["elsewhere"]
    assert "/nowhere" in by_configuration, "a base that lies elsewhere must be looked for there"
    assert "/nowhere/else" in by_environment


def run_python(
    program: str,
    *arguments: str,
    stdin: str = "",
    paths: list[str] | None = None,
    cwd: Path | None = None,
    **environment: str,
) -> str:
    """A Python process of its own; what it printed."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path if paths is None else paths), **environment}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=variables,
        cwd=cwd,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- answers to held-out prompts

ANSWERING = EvaluationSpec(generation=GenerationSpec(metrics=("exactMatch", "chrf")))


def some_answers(*, holder: bool = False) -> AnswerTable:
    """Of four, the adapter is right three times, the base once, the holder twice."""
    right = {"adapter": (0, 1, 2), "base": (0,), "holder": (0, 3)}

    def answer(who: str, number: int) -> Answer:
        return Answer(text=f"answer {number}" if number in right[who] else "no | *idea*", tokens=2)

    return AnswerTable(
        prompts=tuple(
            AnsweredPrompt(
                prompt=f"question {number} <b>|",
                reference=f"Answer {number}!",
                base=answer("base", number),
                adapter=answer("adapter", number),
                holder=answer("holder", number) if holder else None,
            )
            for number in range(4)
        ),
        holder=Holder(alias="champion", version="7") if holder else Holder(alias="champion"),
    )


def table_in(client: MlflowClient, run_id: str, path: str, folder: Path) -> Any:
    return json.loads(Path(client.download_artifacts(run_id, path, str(folder))).read_text())


@pytest.mark.parametrize("holder", [False, True])
def test_scores_and_answers_are_in_run_and_card_and_repeating_changes_nothing(
    client: MlflowClient, tmp_path: Path, holder: bool
) -> None:
    store = make_store(tmp_path, answers=some_answers(holder=holder))
    task = make_task(client, store, registered_model="terms", evaluation=ANSWERING)
    publish.run(task)
    first = client.get_run(task.run_id)
    publish.run(task)
    run = client.get_run(task.run_id)
    assert run.data.metrics == first.data.metrics
    scores = {name: value for name, value in run.data.metrics.items() if name.startswith("eval/exact_match")}
    assert scores == {
        "eval/exact_match": 0.75,
        "eval/exact_match_base": 0.25,
        "eval/exact_match_over_base": 0.5,
        **({"eval/exact_match_holder": 0.5, "eval/exact_match_over_holder": 0.25} if holder else {}),
    }
    assert [metric.step for metric in client.get_metric_history(task.run_id, "eval/exact_match")] == [1]
    tables = {each["path"] for each in json.loads(run.data.tags["mlflow.loggedArtifacts"])}
    assert tables == {"answers/scores.json", "answers/answers.json"}
    answers = table_in(client, task.run_id, "answers/answers.json", tmp_path)
    assert answers["columns"] == ["prompt", "reference", "base", *(["holder"] if holder else []), "adapter"]
    assert (len(answers["data"]), answers["data"][1][0]) == (4, "question 1 <b>|")
    (row, _) = table_in(client, task.run_id, "answers/scores.json", tmp_path)["data"]
    assert row[0] == "exactMatch"
    assert row[-2 if holder else -1].startswith("+0.500 [")
    folder = Path(download_artifacts("models:/terms@candidate", dst_path=str(tmp_path / "downloaded")))
    files = {path.name for path in (folder / "artifacts" / "adapter").iterdir()}
    assert "answers.json" not in files, "held-out data is not handed to whoever loads the model"
    card = (folder / "artifacts" / "adapter" / "README.md").read_text()
    assert "## Answers" in card
    assert "| exactMatch | 0.250 &#91;" in card
    assert "question 0 &lt;b&gt;&#124;" in card
    assert ("| version 7 |" in card) == holder


def gated(*rules: dict[str, str]) -> dict[str, Any]:
    """Tracking fields of a job whose alias `champion` has a gate."""
    when = [{"metric": "exactMatch", **rule} for rule in rules]
    return {"evaluation": ANSWERING, "registered_model": "terms", "promote": {"alias": "champion", "when": when}}


def holder_of(client: MlflowClient, alias: str) -> str | None:
    return version_of_alias(client, "terms", alias)


def test_a_gated_alias_moves_to_what_is_good_enough_and_stays_with_others(client: MlflowClient, tmp_path: Path) -> None:
    better = {"over": "base", "atLeast": "0.5"}
    task = make_task(client, make_store(tmp_path, answers=some_answers()), **gated(better))
    found = publish.run(task)
    assert found.promotion is not None
    assert (found.promotion.promoted, found.promotion.reason) == (True, Reason.PROMOTED)
    assert (holder_of(client, "champion"), holder_of(client, "candidate")) == ("1", "1")
    assert publish.run(task) == found
    tags = client.get_model_version("terms", "1").tags
    assert tags["qlora.dev/promoted/champion"] == "exactMatch over the base is +0.5, which reaches 0.5"

    worse = make_task(
        client,
        make_store(tmp_path, seed=1, answers=some_answers()),
        uid="u-2",
        **gated({"over": "base", "atLeast": "0.6"}),
    )
    refused = publish.run(worse)
    assert refused.promotion is not None
    assert (refused.promotion.promoted, refused.promotion.reason) == (False, Reason.GATE_NOT_PASSED)
    assert "the alias champion stays with version 1" in refused.promotion.message
    assert (holder_of(client, "champion"), holder_of(client, "candidate")) == ("1", "2")
    note = client.get_run(worse.run_id).data.tags["mlflow.note.content"]
    assert "The gate is not passed: exactMatch over the base" in note


def test_an_alias_whose_holder_was_not_compared_with_stays(client: MlflowClient, tmp_path: Path) -> None:
    rule = {"over": "holder", "atLeast": "0"}
    client.create_registered_model("terms", tags={"qlora.dev/namespace": "team-a"})
    for number in (1, 2):
        client.create_model_version("terms", source=f"/nowhere/{number}", tags={"qlora.dev/namespace": "team-a"})
    client.set_registered_model_alias("terms", "champion", "2")

    def published(seed: int, version: str | None) -> PublishResult:
        compared = Holder(alias="champion", version=version)
        answers = some_answers(holder=version is not None).model_copy(update={"holder": compared})
        store = make_store(tmp_path, seed=seed, answers=answers)
        return publish.run(make_task(client, store, uid=f"u-{seed}", **gated(rule)))

    for seed, version in ((3, "1"), (4, None)):
        found = published(seed, version).promotion
        assert found is not None
        assert (found.promoted, found.reason) == (False, Reason.HOLDER_CHANGED)
        assert holder_of(client, "champion") == "2"
    found = published(5, "2")
    assert found.promotion is not None
    assert found.promotion.promoted
    assert holder_of(client, "champion") == found.model_version


def test_an_alias_that_somebody_approves_is_left_alone_with_what_the_gate_found(
    client: MlflowClient, tmp_path: Path
) -> None:
    client.create_registered_model("terms", tags={"qlora.dev/namespace": "team-a"})
    for _ in range(7):  # of which the last is the one that has answered
        client.create_model_version("terms", source="/nowhere", tags={"qlora.dev/namespace": "team-a"})
    client.set_registered_model_alias("terms", "champion", "7")
    for seed, least, reason in ((1, "0", Reason.AWAITING_APPROVAL), (2, "0.5", Reason.GATE_NOT_PASSED)):
        tracking = gated({"over": "holder", "atLeast": least})
        tracking["promote"]["approval"] = "manual"
        store = make_store(tmp_path, seed=seed, answers=some_answers(holder=True))
        asked = make_task(client, store, uid=f"u-{seed}", **tracking)
        found = publish.run(asked)
        assert publish.run(asked) == found
        assert found.promotion is not None
        assert (found.promotion.promoted, found.promotion.reason) == (False, reason)
        assert "exactMatch over the holder is +0.25" in found.promotion.message
        assert ("qlora promote medical-es" in found.promotion.message) is (reason is Reason.AWAITING_APPROVAL)
        tags = client.get_model_version("terms", found.model_version).tags
        assert tags["qlora.dev/gate/champion"].startswith("exactMatch over the holder is +0.25")
        assert tags["qlora.dev/compared/champion"] == "7"
        assert "qlora.dev/promoted/champion" not in tags
    assert (holder_of(client, "champion"), holder_of(client, "candidate")) == ("7", "9")


def asked_for(task: StageTask, folder: Path, largest_bytes: int = 1 << 30) -> HolderAdapter:
    return fetch_holder(task, "candidate", folder, largest_bytes=largest_bytes, required=True)


def test_the_aliass_adapter_is_fetched_where_it_is_for_the_same_base(client: MlflowClient, tmp_path: Path) -> None:
    task = make_task(client, make_store(tmp_path), registered_model="terms", alias="candidate")
    assert asked_for(task, tmp_path / "before").holder == Holder(alias="candidate")
    publish.run(task)
    found = asked_for(task, tmp_path / "after")
    assert (found.holder.version, found.holder.refusal) == ("1", "")
    assert found.folder is not None
    weights = tmp_path / "store-0" / "adapter" / "adapter_model.safetensors"
    assert (found.folder / "adapter_model.safetensors").read_bytes() == weights.read_bytes()

    too_large = asked_for(task, tmp_path / "large", largest_bytes=100)
    assert (too_large.folder, too_large.holder.version) == (None, "1")
    assert "has room for 100" in too_large.holder.refusal
    other = make_task(client, make_store(tmp_path, seed=1), model="file:///other", registered_model="terms", uid="u-2")
    assert "it is for another base" in asked_for(other, tmp_path / "other").holder.refusal
    client.delete_model_version_tag("terms", "1", "qlora.dev/adapter-digest")
    assert "no job of this namespace made it" in asked_for(task, tmp_path / "foreign").holder.refusal
    client.set_model_version_tag("terms", "1", "qlora.dev/adapter-digest", "sha256:" + "0" * 64)
    assert "is not the one that was registered" in asked_for(task, tmp_path / "changed").holder.refusal
