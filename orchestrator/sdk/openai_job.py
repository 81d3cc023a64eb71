"""A fine-tuning job of OpenAI's, as its API returns or takes it, as a job of this service.

What means the same is taken over; what was turned into something, or has no counterpart here, is a note. Nothing is
guessed: its models have no weights to train, so the model is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, cast

from pydantic import ConfigDict, Field, StringConstraints, ValidationError
from pydantic.alias_generators import to_camel

from orchestrator.api.base import API_VERSION, Model
from orchestrator.api.job import MAX_EPOCHS, TrainingSpec
from orchestrator.api.json_text import read_json
from orchestrator.errors import InvalidObject
from orchestrator.sdk import first_job
from orchestrator.sdk.manifest import parse_object
from orchestrator.sdk.problems import cut, problems_of, shown

MAX_JOB_BYTES = 1 << 20
FILES = "https://api.openai.com/v1/files"
OUTCOME = frozenset(
    {
        "object",
        "id",
        "created_at",
        "finished_at",
        "estimated_finish",
        "status",
        "error",
        "fine_tuned_model",
        "organization_id",
        "result_files",
        "trained_tokens",
    }
)
"""Fields that tell what became of a job; a new one has nothing to take over from them."""
COUNTERPARTS = {
    "n_epochs": "epochs",
    "batch_size": "global_batch_size",
    "learning_rate_multiplier": "learning_rate",
}
"""Hyperparameters -> fields of the training."""
METHODS = ("supervised", "dpo")
"""Those that can be trained here: on what is to be said, and on preferences."""
NOTHING: tuple[object, ...] = (None, "", [], {})

Identifier = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=128)]
Auto = Literal["auto"]


class _Read(Model):
    """A part of OpenAI's object, by its own names; what is not known is kept, to be told."""

    model_config = ConfigDict(extra="allow", alias_generator=None)

    def unknown(self) -> Iterator[str]:
        """Names of fields that say something, and are not known."""
        yield from (name for name, value in (self.model_extra or {}).items() if value not in NOTHING)


class _Hyperparameters(_Read):
    n_epochs: Auto | Annotated[int, Field(ge=1, le=MAX_EPOCHS)] | None = None
    batch_size: Auto | Annotated[int, Field(ge=1, le=65536)] | None = None
    learning_rate_multiplier: Auto | Annotated[float, Field(ge=1e-6, le=1000)] | None = None


class _Supervised(_Read):
    hyperparameters: _Hyperparameters | None = None


class _PreferenceHyperparameters(_Hyperparameters):
    beta: Auto | Annotated[float, Field(gt=0, le=1000)] | None = None


class _Preferences(_Read):
    hyperparameters: _PreferenceHyperparameters | None = None


class _Method(_Read):
    type: str
    supervised: _Supervised | None = None
    dpo: _Preferences | None = None


class _Job(_Read):
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    id: Identifier | None = None
    model: str
    training_file: Identifier
    validation_file: Identifier | None = None
    method: _Method | None = None
    hyperparameters: _PreferenceHyperparameters | None = None
    """Where it stood before there were methods; jobs have it still."""
    seed: int | None = Field(default=None, ge=0, le=2**31 - 1)
    suffix: str | None = None
    """Of a request; jobs have `user_provided_suffix`."""
    user_provided_suffix: str | None = None
    metadata: dict[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What came of a job of OpenAI's."""

    document: Mapping[str, object]
    """A QLoRAJob in its wire form."""
    notes: tuple[str, ...]
    """Sentences that begin with a field of OpenAI's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What the job cannot tell: names as people write them, folders, files or URIs."""

    model: str | None
    training_file: str | None = None
    validation_file: str | None = None
    folder: Path
    """Where the manifest will lie, and where files of OpenAI's are looked for by their ids."""


def imported(text: bytes, name: str, choices: Choices) -> Imported:
    """The job in a JSON text; raises InvalidObject, which names the field."""
    job = _read(text, name)
    if job.method is not None and job.method.type not in METHODS:
        raise InvalidObject(
            f"{name}: method.type: {' and '.join(METHODS)} can be trained here; found {shown(job.method.type)}"
        )
    if choices.model is None:
        raise InvalidObject(
            f"{name}: model: {cut(job.model)} cannot be had outside of OpenAI; "
            "choose the one to train: --model owner/name"
        )
    notes: list[str] = []
    dataset = _dataset(job, name, choices, notes)
    document = {
        "apiVersion": API_VERSION,
        "kind": "QLoRAJob",
        "metadata": _metadata(job, notes),
        "spec": {
            "model": {"source": first_job.model_source(choices.model)},
            "dataset": dataset,
            "training": _training(job, notes),
        },
    }
    notes += [f"{field}: has no counterpart here, and is left out" for field in _left_out(job)]
    parse_object(document, name=f"the job of {name}", folder=choices.folder.resolve())
    return Imported(document=document, notes=tuple(notes))


def _read(text: bytes, name: str) -> _Job:
    if len(text) > MAX_JOB_BYTES:
        raise InvalidObject(f"{name}: larger than {MAX_JOB_BYTES} bytes; give a fine-tuning job, and not its files")
    try:
        data = read_json(text)
    except ValueError as error:
        raise InvalidObject(f"{name}: not valid JSON: {cut(str(error))}") from error
    if not isinstance(data, dict):
        raise InvalidObject(f"{name}: must be a fine-tuning job, as the API returns it; found {shown(data)}")
    fields = cast("dict[str, object]", data)
    try:
        return _Job.model_validate(fields, strict=True)
    except ValidationError as error:
        problems = problems_of(error, _Job, fields)
        raise InvalidObject("\n".join(f"{name}: {each.field}: {each.message}" for each in problems)) from error


def _metadata(job: _Job, notes: list[str]) -> Mapping[str, object]:
    """A name from the suffix or the id, and OpenAI's metadata as annotations."""
    annotations: dict[str, str] = {}
    for key, value in (job.metadata or {}).items():
        # Names with a slash belong to whose domain they name: some of them steer this service.
        if re.fullmatch(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?", key):
            annotations[key] = value
        else:
            notes.append(f"metadata.{cut(key)}: cannot be the name of an annotation, and is left out")
    suffix = job.suffix or job.user_provided_suffix
    name = first_job.name_of(suffix or job.id or job.training_file)
    if suffix not in (None, name):
        notes.append(f"suffix: {shown(suffix)} became the job's name {name}")
    return {"name": name} | ({"annotations": annotations} if annotations else {})


def _dataset(job: _Job, name: str, choices: Choices, notes: list[str]) -> dict[str, object]:
    source, form = _data("training_file", job.training_file, choices.training_file, choices.folder, notes)
    prefers = _prefers(job)
    if form is None:
        what = "preferences" if prefers else "records of chats"
        notes.append(f"training_file: cannot be read from here, and is taken for {what}: dataset.format")
        form = "preference" if prefers else "messages"
    if (form == "preference") != prefers:
        raise InvalidObject(
            f"{name}: method.type: {METHODS[prefers]}, but the first record of the training file is "
            f"{'no preference' if prefers else 'a preference'}; name the job's own file with --training-file"
        )
    dataset: dict[str, object] = {"source": source, "format": form}
    if job.validation_file is not None or choices.validation_file is not None:
        held_out = job.validation_file or ""
        dataset["evalSource"], _ = _data("validation_file", held_out, choices.validation_file, choices.folder, notes)
    return dataset


def _data(field: str, identifier: str, given: str | None, folder: Path, notes: list[str]) -> tuple[str, str | None]:
    """The source of a file, and its format if it can be looked at."""
    if given is not None and "://" in given:
        return given, None
    path = Path(given) if given is not None else folder / f"{identifier}.jsonl"
    source = first_job.file_source(path, folder)
    if given is None and not path.exists():
        notes.append(
            f"{field}: {path} is not there; name another file with --{field.replace('_', '-')}, or fetch it: "
            f'curl {FILES}/{identifier}/content -H "Authorization: Bearer $OPENAI_API_KEY" -o {path}'
        )
        return source, None
    return source, first_job.format_of(path)


def _training(job: _Job, notes: list[str]) -> dict[str, object]:
    given = _given(job)
    usual, training = TrainingSpec(), dict[str, object]()
    if _prefers(job):
        training |= first_job.PREFERENCE_TRAINING
        usual = TrainingSpec.model_validate(first_job.PREFERENCE_TRAINING)
        if isinstance(given.beta, float):
            training["objective"] = {"type": "dpo", "beta": f"{given.beta:.6g}"}
        else:
            notes.append(f"beta: auto; training.objective.beta has its default here, {usual.objective.beta}")
    elif given.beta is not None:
        notes.append("beta: is of preferences, and is left out")
    for name, field in COUNTERPARTS.items():
        if getattr(given, name) in (None, "auto"):
            notes.append(f"{name}: auto; training.{to_camel(field)} has its default here, {getattr(usual, field)}")
    if isinstance(given.n_epochs, int):
        training["epochs"] = str(given.n_epochs)
    if isinstance(given.batch_size, int):
        training |= {"globalBatchSize": given.batch_size, "packing": False}
        notes.append("batch_size: counts records, so that none share a row: training.packing is false")
    if isinstance(given.learning_rate_multiplier, float):
        training["learningRate"] = rate = f"{float(usual.learning_rate) * given.learning_rate_multiplier:.6g}"
        notes.append(
            f"learning_rate_multiplier: of the default here, as OpenAI's is not known: training.learningRate is {rate}"
        )
    if job.seed is not None:
        training["seed"] = job.seed
    return training


def _prefers(job: _Job) -> bool:
    return job.method is not None and job.method.type == "dpo"


def _given(job: _Job) -> _PreferenceHyperparameters:
    """The hyperparameters of the job's method, or where they stood before there were methods."""
    method = job.method and (job.method.dpo if _prefers(job) else job.method.supervised)
    found = (method and method.hyperparameters) or job.hyperparameters
    return _PreferenceHyperparameters.model_validate(found.model_dump()) if found else _PreferenceHyperparameters()


def _left_out(job: _Job) -> Iterator[str]:
    """Fields that say something of how to train, and have no counterpart."""
    yield from (cut(name) for name in job.unknown() if name not in OUTCOME)
    parts: dict[str, _Read | None] = {"method": job.method, "hyperparameters": job.hyperparameters}
    for name in METHODS if job.method is not None else ():
        own: _Supervised | _Preferences | None = getattr(job.method, name)
        parts |= {f"method.{name}": own, f"method.{name}.hyperparameters": own and own.hyperparameters}
    for place, part in parts.items():
        yield from (f"{place}.{cut(name)}" for name in (part.unknown() if part is not None else ()))
