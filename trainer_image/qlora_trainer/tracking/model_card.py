"""The card of a registered adapter: what it is, how it was made, how to use it."""

from __future__ import annotations

import html
import json

from orchestrator.api.losses import losses
from orchestrator.api.task import StageTask
from orchestrator.api.words import on_one_line
from qlora_trainer.storage.final_adapter import ADAPTER_CONFIG_NAME, FinalAdapter
from qlora_trainer.tracking.mlflow_run import parameters

CARD_NAME = "README.md"


def model_card(task: StageTask, adapter: FinalAdapter) -> str:
    """README.md as the Hugging Face hub reads it: front matter, then text. It depends on the job alone."""
    config = json.loads((adapter.folder / ADAPTER_CONFIG_NAME).read_text())
    base = config["base_model_name_or_path"]
    name = task.spec.tracking.registered_model or task.job
    sections = (
        front_matter(task, base),
        f"# {_shown(name)}\n\nA LoRA adapter for {_shown(base)}, tuned with QLoRA (NF4 base with double quantization).",
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


def results(task: StageTask, adapter: FinalAdapter) -> str:
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

model = mlflow.pyfunc.load_model({_quoted(uri)})
model.predict([{{"messages": [{{"role": "user", "content": "..."}}]}}], params={{"max_new_tokens": 64}})
```

With PEFT:

```python
import mlflow
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

folder = mlflow.artifacts.download_artifacts({_quoted(uri)}) + "/artifacts/adapter"
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({_quoted(base)}), folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
ends = GenerationConfig.from_pretrained(folder)  # with the token that ends an answer
inputs = tokenizer.apply_chat_template([...], add_generation_prompt=True, return_tensors="pt", return_dict=True)
model.generate(**inputs, generation_config=ends, max_new_tokens=64)
```"""


def hyperparameters(task: StageTask) -> str:
    """The whole recipe: adapter and training sections of the job."""
    rows = {
        key: value
        for key, value in parameters(task).items()
        if key.split(".")[0] in ("adapter", "training") or key in ("dataset.format", "dataset.trainOn")
    }
    return _table("parameter", "value", rows)


def provenance(task: StageTask, adapter: FinalAdapter) -> str:
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
    lines = [f"| {_shown(key)} | {_shown(value)} |" for key, value in rows.items()]
    return "\n".join((f"| {left} | {right} |", "|---|---|", *lines))


def _shown(text: str) -> str:
    """Whatever somebody has named something, on one line and without a meaning in Markdown or HTML."""
    escaped = html.escape(on_one_line(text), quote=False)
    return "".join(f"&#{ord(character)};" if character in "|[]`\\" else character for character in escaped)


def _quoted(text: str) -> str:
    """As a Python literal that ends where it seems to."""
    return json.dumps(text)


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4f}"
