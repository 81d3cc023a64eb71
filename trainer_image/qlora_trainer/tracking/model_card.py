"""The card of a registered adapter: what it is, how it was made, how to use it."""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.api.formats import format_uris
from orchestrator.api.job import DatasetSource
from orchestrator.api.losses import LOSSES_AVERAGED, losses
from orchestrator.api.ownership import registered_model_name
from orchestrator.api.record_fields import CHAT_FORMATS, Format
from orchestrator.api.task import TRACKING_URI_VARIABLE, StageTask
from orchestrator.api.words import on_one_line, without_logins
from qlora_trainer.storage.final_adapter import ADAPTER_CONFIG_NAME, FinalAdapter
from qlora_trainer.tracking.answers_page import ScoredAnswers, score_rows, words
from qlora_trainer.tracking.run_page import PLAN_TAG, parameters
from qlora_trainer.tracking.vllm import serving_words

SAMPLES, SAMPLE_CHARACTERS = 3, 300
"""Answers that a card shows, and how much of each."""
MASKS = {
    "assistant": "the assistant's turns, each with the token that ends it",
    "completion": "the last answer alone, with the token that ends it",
    "all": "every token",
}


def _mask(dataset: DatasetSource) -> str:
    if dataset.format == "preference":
        return "chosen answers against rejected ones to the same prompt"
    return MASKS[dataset.train_on]


def model_card(
    task: StageTask, adapter: FinalAdapter, attempts: Mapping[str, str], answers: ScoredAnswers | None = None
) -> str:
    """README.md as the Hugging Face hub reads it: front matter, then text.

    It depends on the job and the address of the registry alone; `attempts` are the tags of its train attempts, and
    `answers` those to held-out prompts.
    """
    config = json.loads((adapter.folder / ADAPTER_CONFIG_NAME).read_text())
    base = config["base_model_name_or_path"]
    name = registered_model_name(task.spec.tracking, task.namespace, task.job)
    sections = (
        front_matter(task, base),
        f"# {_shown(name)}\n\n{_summary(task, base)}",
        f"## Results\n\n{results(task, adapter)}",
        *(() if answers is None else (f"## Answers\n\n{answered(answers)}",)),
        f"## Use\n\n{usage(task, name, base)}",
        f"## Serve\n\n{served(task, config, base)}",
        f"## Hyperparameters\n\n{hyperparameters(task)}",
        f"## Provenance\n\n{provenance(task, adapter, attempts)}",
    )
    return "\n\n".join(sections) + "\n"


def _summary(task: StageTask, base: str) -> str:
    made = f"A LoRA adapter for {_shown(base)}, tuned with QLoRA (NF4 base with double quantization)"
    if task.prepared is None or task.prepared.start is None:
        return f"{made}."
    return f"{made}. Training went on from the adapter {_shown(task.prepared.start.source)}."


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
    found = losses(adapter.journal, task.spec.evaluation)
    rows = {
        _before(task): found.eval_loss_before,
        "held-out loss with the adapter": found.eval_loss,
        f"training loss, mean of the last {LOSSES_AVERAGED} steps": found.train_loss,
        "optimizer steps": adapter.manifest.step,
    }
    return _table("measure", "value", {name: _number(value) for name, value in rows.items() if value is not None})


def _before(task: StageTask) -> str:
    went_on = task.prepared is not None and task.prepared.start is not None
    return f"held-out loss of the {'adapter that training went on from' if went_on else 'base'}"


def answered(answers: ScoredAnswers) -> str:
    """Scores of answers to held-out prompts, and the first of these."""
    columns, rows = score_rows(answers)
    parts = [_shown(sentence) for sentence in words(answers)]
    parts.append("\n".join(_line(each) for each in (columns, ["---"] * len(columns), *rows)))
    parts += [
        _table(
            f"prompt {number}",
            _ending(each.prompt),
            {
                "wanted": _beginning(each.reference),
                "base": _beginning(each.base.text),
                **({} if each.holder is None else {"holder": _beginning(each.holder.text)}),
                "adapter": _beginning(each.adapter.text),
            },
        )
        for number, each in enumerate(answers.table.prompts[:SAMPLES], start=1)
    ]
    return "\n\n".join(parts)


def usage(task: StageTask, name: str, base: str) -> str:
    """How to load it, with MLflow alone and with PEFT."""
    is_part = task.prepared is not None and task.prepared.model.part_of is not None
    auto = "AutoModelForImageTextToText" if is_part else "AutoModelForCausalLM"
    uri = f"models:/{name}@{task.spec.tracking.alias}" if task.spec.tracking.alias else f"models:/{name}/<version>"
    return f"""With MLflow alone (set `QLORA_BASE_MODEL` where the base lies elsewhere):

```python
import mlflow

mlflow.set_tracking_uri({_quoted(registry_address())})
model = mlflow.pyfunc.load_model({_quoted(uri)})
model.predict([{question(task)}], params={{"max_new_tokens": 64}})
```

With transformers and PEFT:

```python
import mlflow
import torch
from peft import PeftModel
from transformers import {auto}, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

mlflow.set_tracking_uri({_quoted(registry_address())})
folder = mlflow.artifacts.download_artifacts({_quoted(uri)}) + "/artifacts/adapter"
nf4 = BitsAndBytesConfig(  # the base as the adapter met it; without, the base in full precision
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
)
base = {auto}.from_pretrained({_quoted(base)}, quantization_config=nf4, dtype=torch.bfloat16)
model = PeftModel.from_pretrained(base, folder)
model.generation_config = GenerationConfig.from_pretrained(folder)  # with the token that ends an answer
tokenizer = AutoTokenizer.from_pretrained(folder)
{encoding(task)}
output = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```"""


def served(task: StageTask, config: Mapping[str, Any], base: str) -> str:
    """How vLLM serves the adapter, and where the model is in other formats."""
    uris = format_uris(without_logins(task.store_uri), task.spec.publish.formats)
    others = [f"- `{name}`: `{uri}`" for name, uri in uris.items()]
    return "\n\n".join([serving_words(config, task.job, base), *(["\n".join(others)] if others else [])])


def trained_format(task: StageTask) -> Format:
    """The format of the records; preferences that are chats are like messages."""
    own = task.spec.dataset.format
    chats = own == "preference" and task.prepared is not None and task.prepared.chats
    return "messages" if chats else own


def question(task: StageTask) -> str:
    """A row in the form that was trained."""
    match trained_format(task):
        case "messages" | "sharegpt":
            return '{"messages": [{"role": "user", "content": "..."}]}'
        case "alpaca":
            return '{"instruction": "...", "input": ""}'
        case "prompt-completion" | "text" | "preference":
            return '{"prompt": "..."}'


def encoding(task: StageTask) -> str:
    """The line that makes tokens of a question in the form that was trained."""
    match trained_format(task):
        case "messages" | "sharegpt":
            asked = '[{"role": "user", "content": "..."}]'
            return (
                f"inputs = tokenizer.apply_chat_template(\n    {asked}, add_generation_prompt=True, "
                'return_tensors="pt", return_dict=True\n)'
            )
        case "alpaca":
            return 'inputs = tokenizer("...", return_tensors="pt")  # Stanford Alpaca\'s prompt, up to `### Response:`'
        case "prompt-completion" | "text" | "preference":
            return 'inputs = tokenizer("...", return_tensors="pt")'


def registry_address() -> str:
    """Where the registry is, as this process knows it, without a login that the address may hold."""
    address = os.environ.get("MLFLOW_REGISTRY_URI") or os.environ.get(TRACKING_URI_VARIABLE, "...")
    return without_logins(address, instead="")


def hyperparameters(task: StageTask) -> str:
    """The whole recipe: adapter and training sections of the job."""
    rows = {
        key: value
        for key, value in parameters(task).items()
        if key.split(".")[0] in ("adapter", "training") or key in ("dataset.format", "dataset.trainOn")
    }
    return _table("parameter", "value", rows)


def provenance(task: StageTask, adapter: FinalAdapter, attempts: Mapping[str, str]) -> str:
    """Where it comes from."""
    of_attempt = re.compile(rf"{re.escape(PLAN_TAG)}/(\d{{1,9}})")
    plans = {int(found[1]): plan for name, plan in attempts.items() if (found := of_attempt.fullmatch(name))}
    rows = {
        "job": f"{task.namespace}/{task.job}",
        "job uid": task.uid,
        "base model": task.spec.model.source,
        "dataset": task.spec.dataset.source,
        "what carried loss": _mask(task.spec.dataset),
        "chat template": template(task),
        "SHA-256 of the adapter": adapter.digest.removeprefix("sha256:"),
    }
    if task.prepared is not None:
        rows["base revision"] = task.prepared.model.revision
        if (start := task.prepared.start) is not None:
            rows["went on from"] = start.source
            rows["SHA-256 of what it went on from"] = start.digest.removeprefix("sha256:")
        rows["prepared data"] = task.prepared.digest
        rows["records, tokens"] = f"{task.prepared.train_records}, {task.prepared.train_tokens}"
    if plans:
        rows["memory plan"] = plans[max(plans)]
    rows |= adapter.manifest.versions
    return _table("what", "value", rows)


def template(task: StageTask) -> str:
    """Whose chat template the adapter carries."""
    given = task.spec.model.chat_template
    if trained_format(task) not in CHAT_FORMATS:
        return "none was used"
    if given is None:
        return "the base's own, saved with the tokenizer"
    named = f"`{given}`" if given.isidentifier() else "the job's own"
    return f"{named}, saved with the tokenizer"


def _table(left: str, right: str, rows: dict[str, str]) -> str:
    return "\n".join(_line(each) for each in ((left, right), ("---", "---"), *rows.items()))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_shown, cells))} |"


def _beginning(text: str) -> str:
    return text if len(text) <= SAMPLE_CHARACTERS else f"{text[:SAMPLE_CHARACTERS]} ..."


def _ending(text: str) -> str:
    return text if len(text) <= SAMPLE_CHARACTERS else f"... {text[-SAMPLE_CHARACTERS:]}"


def _shown(text: str) -> str:
    """Whatever somebody has named something, on one line and without a meaning in Markdown or HTML."""
    escaped = html.escape(on_one_line(text), quote=False)
    return "".join(f"&#{ord(character)};" if character in "|[]`\\" else character for character in escaped)


def _quoted(text: str) -> str:
    """As a Python literal that ends where it seems to."""
    return json.dumps(text)


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4f}"
