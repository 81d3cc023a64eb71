"""What a job says of itself on MLflow's pages, beside its metrics: parameters, tags, data sets, a description."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from orchestrator.api.formats import JournalRecord, ShownRecords
from orchestrator.api.mlflow_pages import ANSWERS_PATH, SAMPLES_PATH, SCORES_PATH
from orchestrator.api.ownership import NAMESPACE_TAG
from orchestrator.api.task import StageTask
from orchestrator.api.words import in_lines, on_one_line
from qlora_trainer.storage.versions import library_versions
from qlora_trainer.tracking.answers_page import ScoredAnswers
from qlora_trainer.tracking.records_page import TABLE_PATH

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

Json = dict[str, Any]  # Any: whatever JSON holds

CARD_NAME = "README.md"
JOB_UID_TAG = "qlora.dev/job-uid"
START_TAG, START_DIGEST_TAG = "qlora.dev/continues", "qlora.dev/continues-digest"
"""The adapter that training went on from: where it was, and the SHA-256 of its weights."""
PLAN_TAG = "qlora.dev/plan"
NOTE_TAG = "mlflow.note.content"
"""What MLflow shows as a run's description."""
TABLES_TAG = "mlflow.loggedArtifacts"
"""What tells MLflow which artifacts are tables."""
MAX_VALUE_CHARACTERS = 500
MAX_NOTE_CHARACTERS = 5000
MAX_DIGEST_CHARACTERS = 36
"""MLflow's bound on the digest of a data set."""
RECIPE = ("model", "dataset", "adapter", "training", "evaluation")
"""The sections of a spec that say what is trained; the others say where and when."""
OF_PREFERENCES = {"training.objective.beta": ("dpo", "orpo"), "training.objective.labelSmoothing": ("dpo",)}
"""Of which objectives a field is."""
OF_HUB_DATA = ("dataset.split", "dataset.evalSplit", "dataset.config")


# --- parameters


def parameters(task: StageTask) -> dict[str, str]:
    """The job's recipe as MLflow parameters, `training.learningRate` -> `2e-4`, as far as it applied."""
    spec = {section: part for section, part in task.spec.to_wire().items() if section in RECIPE}
    named = dict(_flattened(spec, ""))
    if task.prepared is not None:
        named |= _prepared(task)
    return {name: in_lines(value)[:MAX_VALUE_CHARACTERS] for name, value in named.items() if not _is_idle(name, task)}


def _flattened(value: object, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, part in cast("dict[str, Any]", value).items():  # Any: whatever JSON holds
            yield from _flattened(part, f"{name}.{key}" if name else key)
    else:
        yield name, value if isinstance(value, str) else json.dumps(value)


def _prepared(task: StageTask) -> dict[str, str]:
    """What prepare made of the recipe."""
    assert task.prepared is not None
    facts = task.prepared.to_wire()
    counts = ("steps", "trainRecords", "trainSequences", "trainTokens", "supervisedTokens", "evalRecords")
    return {f"prepared.{name}": str(facts[name]) for name in counts} | {"model.revision": task.prepared.model.revision}


def _is_idle(name: str, task: StageTask) -> bool:
    """Whether a field had no say in what was trained."""
    spec = task.spec
    if name == "training.epochs":
        return spec.training.max_steps is not None
    if name == "dataset.evalFraction":
        return spec.dataset.eval_source is not None
    if name in OF_PREFERENCES:
        return spec.training.objective.type not in OF_PREFERENCES[name]
    if name == "dataset.trainOn":
        return spec.dataset.format == "preference"
    if name in OF_HUB_DATA:
        return not spec.dataset.source.startswith("hf://")
    if name.startswith("evaluation."):
        return task.prepared is not None and task.prepared.eval_sequences == 0
    return False


# --- tags


def tags(task: StageTask) -> dict[str, str]:
    """What a run, logged model or version says about where it comes from."""
    found = {
        "qlora.dev/job": task.job,
        NAMESPACE_TAG: task.namespace,
        JOB_UID_TAG: task.uid,
        "qlora.dev/queue": task.spec.queue,
        "qlora.dev/base-model": task.spec.model.source,
    }
    if task.prepared is not None:
        found["qlora.dev/base-revision"] = task.prepared.model.revision
        found["qlora.dev/dataset-digest"] = task.prepared.digest
        if (start := task.prepared.start) is not None:
            found |= {START_TAG: start.source, START_DIGEST_TAG: start.digest}
        found |= {
            f"qlora.dev/warning/{number}": warning for number, warning in enumerate(task.prepared.warnings, start=1)
        }
    return {key: on_one_line(value)[:MAX_VALUE_CHARACTERS] for key, value in found.items()}


def attempt_tags(task: StageTask) -> dict[str, str]:
    """What a train attempt says of itself: its plan, under a name of its own, its libraries and its card."""
    plan = {} if task.plan is None else {f"{PLAN_TAG}/{task.attempt}": task.plan.model_dump_json(by_alias=True)}
    versions = {f"qlora.dev/version/{name}": version for name, version in library_versions().items()}
    return {**versions, **plan, "qlora.dev/card": _card()}


def _card() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


# --- description, data sets and results


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """What a finished training adds to its run."""

    card: str
    """The model card's text."""
    records: ShownRecords | None
    """Training records with their masks, where prepare kept some."""
    answers: ScoredAnswers | None = None
    """To held-out prompts, where the job asked for some."""
    samples: Sequence[JournalRecord] = ()
    """The evaluations at which prompts were asked, where the job wanted that."""

    @property
    def table_paths(self) -> tuple[str, ...]:
        """Where its tables lie."""
        of_answers = () if self.answers is None else (SCORES_PATH, ANSWERS_PATH)
        of_samples = (SAMPLES_PATH,) if self.samples else ()
        return (*of_answers, *of_samples, *(() if self.records is None else (TABLE_PATH,)))


def page_tags(task: StageTask, results: Results | None, known: Mapping[str, str]) -> dict[str, str]:
    """The tags that MLflow makes a page of; a description that a person wrote stays."""
    is_ours = known.get(NOTE_TAG) in (None, first_note(task))
    note = {NOTE_TAG: results.card[:MAX_NOTE_CHARACTERS] if results else first_note(task)} if is_ours else {}
    tables = [{"path": path, "type": "table"} for path in (results.table_paths if results is not None else ())]
    return note | ({TABLES_TAG: json.dumps(tables)} if tables else {})


def first_note(task: StageTask) -> str:
    """What is said of a run until its adapter is published and the card takes its place."""
    base, data_set = (on_one_line(source) for source in (task.spec.model.source, task.spec.dataset.source))
    made = f"An adapter for `{base}` on `{data_set}`"
    if task.prepared is None:
        return f"{made}."
    data = task.prepared
    if data.start is not None:
        made += f", going on from `{on_one_line(data.start.source)}`"
    return f"{made}: {data.train_records} records with {data.train_tokens} tokens, {data.steps} steps."


def data_sets(task: StageTask) -> list[DatasetInput]:
    """The training data, and what was held out, as the inputs of a run; none before they are prepared."""
    prepared, dataset = task.prepared, task.spec.dataset
    if prepared is None:
        return []
    counts = {"records": prepared.train_records, "tokens": prepared.train_tokens, "steps": prepared.steps}
    found = [_input(dataset.source, prepared.digest, "training", counts)]
    if prepared.eval_records:
        # Another digest, because the same source may be both.
        held_out, digest = dataset.eval_source or dataset.source, f"held out of {prepared.digest[7:]}"
        found.append(_input(held_out, digest, "evaluation", {"records": prepared.eval_records}))
    return found


def _input(source: str, digest: str, context: str, profile: dict[str, int]) -> DatasetInput:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    is_hub = source.startswith("hf://")
    dataset = Dataset(
        name=source.rstrip("/").rpartition("/")[2],
        digest=digest.removeprefix("sha256:")[:MAX_DIGEST_CHARACTERS],
        source_type="hugging_face" if is_hub else "external",
        source=json.dumps({"path": source.removeprefix("hf://")} if is_hub else {"uri": source}),
        profile=json.dumps(profile),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])
