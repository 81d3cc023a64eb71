"""The publish stage: metrics reconciled, adapter in the registry, once.

Runs on a CPU and needs neither torch nor the base model. It may be killed at any instruction and repeated any number of
times: every step first looks whether it has been done (see `tracking`). MLflow away is transient; publish is then
retried by itself, without a GPU.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.api.base import Digest
from orchestrator.api.formats import ADAPTER_FOLDER, JOURNAL_NAME, MANIFEST_NAME, CheckpointManifest, JournalRecord
from orchestrator.api.results import PublishResult
from orchestrator.api.task import StageTask
from qlora_trainer import tracking
from qlora_trainer.checkpoint import ADAPTER_CONFIG_NAME, ADAPTER_NAME, library_versions
from qlora_trainer.jobstore import DamagedFolder, JobStore
from qlora_trainer.journal import Journal
from qlora_trainer.outcome import UserError
from qlora_trainer.summary import losses

CARD_NAME = "README.md"
SERVING_MODEL = Path(__file__).with_name("serving_model.py")
SERVING_LIBRARIES = ("mlflow", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors")
DEFAULT_MAX_NEW_TOKENS = 256

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """The final adapter on this machine, verified."""

    folder: Path
    manifest: CheckpointManifest
    digest: Digest
    journal: Sequence[JournalRecord]


def run(task: StageTask) -> PublishResult:
    """Bring the run up to date and the adapter into the registry."""
    if task.run_id is None:
        raise UserError("a publish task needs the job's MLflow run; the task names none")
    store = JobStore(task.store_uri)
    store.take_fence(task.attempt)
    with tempfile.TemporaryDirectory(prefix="qlora-") as scratch:
        adapter = fetch_adapter(store, Path(scratch) / "stored")
        tracking.reconcile(task.run_id, adapter.journal)
        log.info("the run %s has all %d records of the journal", task.run_id, len(adapter.journal))
        card = model_card(task, adapter)
        registration = tracking.Registration(
            task=task, run_id=task.run_id, adapter_digest=adapter.digest, description=without_front_matter(card)
        )
        store.check_fence(task.attempt)
        version = tracking.register(
            registration,
            lambda folder, mlflow_model: save_model(adapter, card, folder, mlflow_model),
            Path(scratch) / "logged",
        )
    name = registration.registered_model
    return PublishResult(registered_model=name, model_version=version, model_uri=f"models:/{name}/{version}")


def fetch_adapter(store: JobStore, into: Path) -> Adapter:
    """The job's final adapter, as its manifest vouches for it."""
    manifest = store.read_manifest(ADAPTER_FOLDER, CheckpointManifest)
    uri = store.folder_uri(ADAPTER_FOLDER)
    if manifest is None or not manifest.complete:
        raise UserError(f"{uri} holds no finished adapter; it was there when training ended: submit the job again")
    try:
        folder = store.fetch_folder(ADAPTER_FOLDER, manifest.files, into)
    except DamagedFolder as error:
        raise UserError(f"the final adapter is damaged: {error}; restore the file or submit the job again") from error
    sha256 = next(entry.sha256 for entry in manifest.files if entry.name == ADAPTER_NAME)
    journal = Journal.load(folder / JOURNAL_NAME).records()
    return Adapter(folder=folder, manifest=manifest, digest=f"sha256:{sha256}", journal=journal)


def save_model(adapter: Adapter, card: str, folder: Path, mlflow_model: Any) -> None:
    """Write the MLflow model: this adapter as a plain PEFT folder with its card, and the code that serves it."""
    import mlflow.pyfunc

    with tempfile.TemporaryDirectory(prefix="qlora-") as scratch:
        peft_folder = Path(scratch) / "adapter"
        peft_folder.mkdir()
        for entry in adapter.manifest.files:
            if entry.name not in (JOURNAL_NAME, MANIFEST_NAME):
                shutil.copyfile(adapter.folder / entry.name, peft_folder / entry.name)
        (peft_folder / CARD_NAME).write_text(card)
        with warnings.catch_warnings():
            # MLflow asks for type hints and an example to infer a signature from; this one is stated.
            warnings.simplefilter("ignore", UserWarning)
            mlflow.pyfunc.save_model(
                str(folder),
                python_model=str(SERVING_MODEL),
                artifacts={"adapter": str(peft_folder)},
                signature=signature(),
                pip_requirements=requirements(adapter.manifest.versions),
                model_config={"base_model": ""},
                mlflow_model=mlflow_model,
            )


def signature() -> Any:
    """Rows of `messages` or `prompt` in, one text a row out."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array, Object, Property

    message = Object([Property("role", DataType.string), Property("content", DataType.string)])
    return ModelSignature(
        inputs=Schema(
            [
                ColSpec(Array(message), "messages", required=False),
                ColSpec(DataType.string, "prompt", required=False),
            ]
        ),
        outputs=Schema([ColSpec(DataType.string)]),
        params=ParamSchema(
            [
                ParamSpec("max_new_tokens", DataType.long, DEFAULT_MAX_NEW_TOKENS),
                ParamSpec("temperature", DataType.double, 0.0),
            ]
        ),
    )


def requirements(trained_with: dict[str, str]) -> list[str]:
    """Pinned to what the adapter was trained with; what training did not record, to what is installed here."""
    versions = {**library_versions(), **trained_with}
    # `2.13.0+cu130` names a build that package indexes do not carry under that version.
    return [f"{name}=={versions[name].partition('+')[0]}" for name in SERVING_LIBRARIES if name in versions]


# --- the model card


def model_card(task: StageTask, adapter: Adapter) -> str:
    """README.md as the Hugging Face hub reads it: front matter, then text. It depends on the job alone."""
    config = json.loads((adapter.folder / ADAPTER_CONFIG_NAME).read_text())
    base = config["base_model_name_or_path"]
    name = task.spec.tracking.registered_model or task.job
    sections = (
        front_matter(task, base),
        f"# {name}\n\nA LoRA adapter for `{base}`, tuned with QLoRA (NF4 base with double quantization).",
        f"## Results\n\n{results(task, adapter)}",
        f"## Use\n\n{usage(task, name, base)}",
        f"## Hyperparameters\n\n{hyperparameters(task)}",
        f"## Provenance\n\n{provenance(task, adapter)}",
    )
    return "\n\n".join(sections) + "\n"


def front_matter(task: StageTask, base: str) -> str:
    """The metadata that hubs index. JSON strings are YAML strings."""
    dataset = task.prepared.digest if task.prepared else "unknown"
    return "\n".join(
        (
            "---",
            f"base_model: {json.dumps(base)}",
            "library_name: peft",
            "pipeline_tag: text-generation",
            "tags: [lora, qlora, peft, text-generation]",
            f"dataset_digest: {json.dumps(dataset)}",
            "---",
        )
    )


def without_front_matter(card: str) -> str:
    """The card's text, for people."""
    return card.split("---\n", 2)[2].lstrip()


def results(task: StageTask, adapter: Adapter) -> str:
    """Losses before and after, from the journal."""
    found = losses(adapter.journal, keep_best=task.spec.evaluation.keep_best)
    rows = {
        "held-out loss of the base": found.eval_loss_before,
        "held-out loss with the adapter": found.eval_loss,
        "training loss at the end": found.train_loss,
        "optimizer steps": adapter.manifest.step,
    }
    return _table("measure", "value", {name: _number(value) for name, value in rows.items() if value is not None})


def usage(task: StageTask, name: str, base: str) -> str:
    """How to load it, with MLflow alone and with PEFT."""
    uri = f"models:/{name}@{task.spec.tracking.alias}" if task.spec.tracking.alias else f"models:/{name}/<version>"
    return f"""With MLflow alone (set `QLORA_BASE_MODEL` where the base lies elsewhere):

```python
import mlflow

model = mlflow.pyfunc.load_model("{uri}")
model.predict([{{"messages": [{{"role": "user", "content": "..."}}]}}], params={{"max_new_tokens": 64}})
```

With PEFT:

```python
import mlflow
from peft import PeftModel
from transformers import AutoModelForCausalLM

folder = mlflow.artifacts.download_artifacts("{uri}") + "/artifacts/adapter"
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), folder)
```"""


def hyperparameters(task: StageTask) -> str:
    """The whole recipe: adapter and training sections of the job."""
    rows = {
        key: value
        for key, value in tracking.parameters(task).items()
        if key.split(".")[0] in ("adapter", "training") or key in ("dataset.format", "dataset.trainOn")
    }
    return _table("parameter", "value", rows)


def provenance(task: StageTask, adapter: Adapter) -> str:
    """Where it comes from."""
    rows = {
        "job": f"{task.namespace}/{task.job}",
        "job uid": task.uid,
        "base model": task.spec.model.source,
        "dataset": task.spec.dataset.source,
        "SHA-256 of the adapter": adapter.digest.removeprefix("sha256:"),
    }
    if task.prepared is not None:
        rows["base revision"] = task.prepared.model.revision
        rows["prepared data"] = task.prepared.digest
        rows["records, tokens"] = f"{task.prepared.train_records}, {task.prepared.train_tokens}"
    rows |= adapter.manifest.versions
    return _table("what", "value", rows)


def _table(left: str, right: str, rows: dict[str, str]) -> str:
    lines = [f"| {key} | {value.replace('|', '&#124;')} |" for key, value in rows.items()]
    return "\n".join((f"| {left} | {right} |", "|---|---|", *lines))


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4f}"
