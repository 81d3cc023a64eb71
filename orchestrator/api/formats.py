"""What lies in a job's store, and how it is laid out.

    <job>/fence.json                      the highest attempt that has taken the store
    <job>/attempts.json                   what each train attempt says of itself: its plan, libraries and card
    <job>/logs/<stage>-<attempt>/         log.jsonl, and log.1.jsonl with what came before it
    <job>/prepared/<digest>/manifest.json train.parquet, eval.parquet, shown.json, tokenizer files
    <job>/start/                          adapter_model.safetensors that training begins with, in the trainer's type,
                                          and, last, manifest.json
    <job>/checkpoints/step-00000120/      adapter_model.safetensors, adapter_config.json, optimizer.safetensors,
                                          state.json, journal.jsonl, best_adapter.safetensors (when it is not this one),
                                          objective.safetensors (what it remembers of records, where it does)
                                          and, written last, manifest.json
    <job>/answers/<digest>.json           an answer to a held-out prompt, by all that it depends on
    <job>/formats/<format>/               the model in a format of spec.publish.formats and, last, manifest.json
    <job>/added/formats/<format>/         <file>.json for each file that is there before the manifest is
    <job>/adapter/                        PEFT's layout plus tokenizer files, journal.jsonl, answers.json (to held-out
                                          prompts, where they were asked) and, last, manifest.json

A folder exists when its manifest does, but for logs, which vouch for nothing, answers, each of which is a whole file
that is gone once all are in the table, and what says which files of a format are there. Nothing is pickled.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated, Literal, cast

from pydantic import BeforeValidator, Field, FiniteFloat, StringConstraints

from orchestrator.api.base import Count, Digest, Model, PositiveCount, ShortText
from orchestrator.api.job import PublishFormat, QLoRAJob
from orchestrator.api.reasons import ConditionType
from orchestrator.api.results import PrepareResult, PrepareWarning, StartingAdapter
from orchestrator.api.stage_name import StageKind

MANIFEST_NAME = "manifest.json"
JOURNAL_NAME = "journal.jsonl"
FENCE_NAME = "fence.json"
ATTEMPTS_NAME = "attempts.json"
ADAPTER_FOLDER = "adapter"
CHECKPOINTS_FOLDER = "checkpoints"
PREPARED_FOLDER = "prepared"
START_FOLDER = "start"
LOGS_FOLDER = "logs"
FORMATS_FOLDER, ADDED_FOLDER = "formats", "added"
ANSWERS_FOLDER, ANSWERS_NAME = "answers", "answers.json"
LOG_NAME, EARLIER_LOG_NAME = "log.jsonl", "log.1.jsonl"
SHOWN_NAME = "shown.json"
MAX_SHOWN_RECORDS = 100


_CHECKPOINT = re.compile(r"step-([0-9]{8,16})")


def format_folder(name: PublishFormat) -> str:
    """The folder of a format."""
    return f"{FORMATS_FOLDER}/{name}"


def format_uris(store_uri: str, names: Iterable[PublishFormat]) -> dict[PublishFormat, str]:
    """Where a job's formats lie, by its own folder in the store."""
    return {name: f"{store_uri.rstrip('/')}/{format_folder(name)}" for name in names}


def formats_of(job: QLoRAJob) -> dict[PublishFormat, str]:
    """Where a job's formats lie; none before all are there."""
    store = job.status.store_uri
    if store is None or not job.status.is_true(ConditionType.PUBLISHED):
        return {}
    return format_uris(store, job.spec.publish.formats)


def checkpoint_folder(step: int) -> str:
    """The folder name of a step's checkpoint. Names sort by step below 10^8; `checkpoint_step` does for all."""
    return f"step-{step:08d}"


def checkpoint_step(folder: str) -> int:
    """The step of a checkpoint by its folder's name, with or without what the folder lies in; -1 for any other name."""
    match = _CHECKPOINT.fullmatch(folder.rpartition("/")[2])
    return int(match[1]) if match is not None else -1


def log_folder(stage: StageKind, attempt: int) -> str:
    """The folder of an attempt's log."""
    return f"{LOGS_FOLDER}/{stage}-{attempt}"


class FileEntry(Model):
    """One file that a manifest vouches for."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=128)]
    bytes: Count
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


Files = Annotated[tuple[FileEntry, ...], Field(max_length=256)]


class CheckpointManifest(Model):
    """Vouches for a checkpoint or for the final adapter."""

    step: Count
    attempt: PositiveCount
    prepared: Digest
    """The prepared data that the steps were made on; a checkpoint of other data is not resumed."""
    complete: bool = False
    """Whether this is the final adapter."""
    versions: dict[ShortText, ShortText]
    files: Files


class FormatManifest(Model):
    """Vouches for what a job made of its adapter in another format."""

    format: PublishFormat
    inputs: Digest
    """Digest over what its files depend on: adapter, base, and how they are made."""
    files: Files


class AddedFile(Model):
    """A file that is in its folder already, durable and whole, while others are still to come."""

    inputs: Digest
    entry: FileEntry


class PreparedManifest(Model):
    """Vouches for prepared data."""

    inputs: Digest
    """Digest over the spec fields and source files that the data came from."""
    result: PrepareResult
    files: Files


class StartManifest(Model):
    """Vouches for the adapter that training begins with."""

    asked: str
    """What `adapter.from` says: what it names may be another adapter by now, and the job keeps its own."""
    start: StartingAdapter
    warnings: tuple[PrepareWarning, ...] = ()
    files: Files


class ShownPart(Model):
    """A piece of a record's text, all of which carries loss or none of it."""

    text: str
    supervised: bool


class ShownRecord(Model):
    """A training record as it will be trained, to be looked at; long parts are cut in their middle."""

    tokens: Count
    supervised_tokens: Count
    parts: tuple[ShownPart, ...]
    answer: Literal["chosen", "rejected"] | None = None
    """Which answer of a preference it is."""


class ShownRecords(Model):
    """The first training records of a data set, and what there is to be warned of."""

    records: Annotated[tuple[ShownRecord, ...], Field(max_length=MAX_SHOWN_RECORDS)]
    warnings: tuple[str, ...] = ()


class Fence(Model):
    """The attempt that owns the store. A trainer that reads a higher one than its own must stop."""

    attempt: PositiveCount


class Answer(Model):
    """One generated answer."""

    text: str
    tokens: Count


class AnsweredPrompt(Model):
    """A held-out prompt, the answer that was wanted, and those that were given."""

    prompt: str
    """Its end, where it is long."""
    reference: str
    base: Answer
    """Of the base without an adapter."""
    adapter: Answer
    holder: Answer | None = None
    """Of the version that had the alias."""


class Holder(Model):
    """Who had the alias when answers were generated."""

    alias: ShortText
    version: ShortText | None = None
    """None where nobody had it."""
    refusal: str = ""
    """Why it did not answer, if it did not."""


class AnswerTable(Model):
    """All answers of a job."""

    prompts: tuple[AnsweredPrompt, ...]
    holder: Holder | None = None
    """None where no alias is asked for."""


def _finite(metrics: object) -> object:
    """Without what a diverging step makes of its figures."""
    if not isinstance(metrics, dict):
        return metrics
    found = cast(dict[object, object], metrics)
    return {k: v for k, v in found.items() if v is not None and not (isinstance(v, float) and not math.isfinite(v))}


class AttemptLog(Model):
    """What the train attempts of a job say of themselves, as the tags that their MLflow run is to have."""

    tags: dict[Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]{0,15}$")], dict[str, str]] = {}
    """By attempt number."""


class Sample(Model):
    """What training answers to a held-out prompt so far."""

    prompt: str
    """Its end, where it is long."""
    reference: str
    answer: str


class JournalRecord(Model):
    """One line of the metrics journal: the metrics of one step, logged to MLflow exactly once.

    `step` 0 holds the evaluation before the first step.
    """

    step: Count
    time_ms: Count
    metrics: Annotated[dict[ShortText, FiniteFloat], BeforeValidator(_finite)]
    """What is not finite is left out: neither JSON nor MLflow's store has a word for it."""
    samples: tuple[Sample, ...] = ()
    """Of an evaluation, where the job asks for some."""


TRAINED, EVALUATED = "train", "eval"
"""What an objective's figures have before the slash."""


class Metric(StrEnum):
    """Names of metrics in the journal and in MLflow; the part before the slash groups them in its UI."""

    TRAIN_LOSS = "train/loss"
    LEARNING_RATE = "train/learning_rate"
    GRADIENT_NORM = "train/grad_norm"
    SKIPPED_STEPS = "train/skipped_steps"
    ROLLBACKS = "train/rollbacks"
    TOKENS_PER_SECOND = "train/tokens_per_second"
    MFU = "train/mfu"
    EVAL_LOSS = "eval/loss"
    VRAM_ALLOCATED_BYTES = "system/vram_allocated_bytes"
    VRAM_RESERVED_BYTES = "system/vram_reserved_bytes"
    ENERGY_JOULES = "system/energy_joules"
    CHECKPOINT_STALL_SECONDS = "system/checkpoint_stall_seconds"
