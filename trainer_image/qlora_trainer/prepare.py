"""The prepare stage: a job's model and dataset in, training sequences and facts out. Needs no GPU.

`run` reads top to bottom: the dataset's files, the model, the tokens,
the prepared folder. Whatever is wrong with the job is told here, before a GPU is taken.

The folder is named after the digest of all that shapes the data. If the store holds it already, nothing is tokenised
again; what does not shape the data (steps, the model's facts) is worked out anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import tempfile
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from orchestrator.api.base import decimal
from orchestrator.api.formats import PREPARED_FOLDER, FileEntry, PreparedManifest
from orchestrator.api.job import QLoRAJobSpec, TrainingSpec
from orchestrator.api.model_facts import ModelFacts
from orchestrator.api.results import PrepareResult
from orchestrator.api.task import StageTask
from qlora_trainer.data.dataset import Split, arrange, check_chat_template, read_splits, write_rows
from qlora_trainer.data.packing import Row
from qlora_trainer.data.reader import Records
from qlora_trainer.model.source import (
    check_architecture,
    context_length,
    describe_model,
    load_tokenizer,
    read_facts,
    tokenizer_digest,
)
from qlora_trainer.outcome import UserError
from qlora_trainer.storage.backends import DamagedFolder
from qlora_trainer.storage.job_store import JobStore

FORMAT_VERSION = 1
"""Raise it when the same inputs would give other data than before."""
TRAIN_NAME = "train.parquet"
EVAL_NAME = "eval.parquet"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """What of the base model matters to the data."""

    facts: ModelFacts
    tokenizer: Any
    tokenizer_digest: str
    context_length: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Datasets:
    """Where the records come from."""

    train: Records
    evaluation: Records | None


def run(task: StageTask) -> PrepareResult:
    """Prepare a job's data, or find it prepared."""
    store = JobStore(task.store_uri)
    store.take_fence(task.attempt)
    store.sweep()
    with tempfile.TemporaryDirectory(prefix="qlora-") as scratch:
        datasets = _open_datasets(task.spec, Path(scratch))
        model = _open_model(task.spec)
        digest = inputs_digest(task.spec, datasets, model)
        found = _find_prepared(store, digest, Path(scratch) / "prepared")
        if found is not None:
            log.info("%s is prepared already", found.uri)
            steps = optimizer_steps(task.spec.training, found.train_sequences)
            return found.model_copy(update={"model": model.facts, "steps": steps})
        train, evaluation = _read(task.spec, datasets, model)
    return _publish(task, store, digest, model, train, evaluation)


def _open_datasets(spec: QLoRAJobSpec, scratch: Path) -> _Datasets:
    dataset = spec.dataset
    train = Records(dataset.source, split=dataset.split, scratch=scratch, field="spec.dataset.source")
    if dataset.eval_source is None:
        return _Datasets(train=train, evaluation=None)
    held_out = Records(dataset.eval_source, split=dataset.split, scratch=scratch, field="spec.dataset.evalSource")
    return _Datasets(train=train, evaluation=held_out)


def _open_model(spec: QLoRAJobSpec) -> _Model:
    source = spec.model.source
    description = describe_model(source, spec.model.revision)
    facts = read_facts(description, source)
    check_architecture(description, source, spec.adapter)
    tokenizer = load_tokenizer(description.folder, source, spec.model.chat_template)
    check_chat_template(tokenizer, spec.dataset, source)
    log.info("base model %s: %s at %s", source, facts.architecture, facts.revision)
    return _Model(
        facts=facts,
        tokenizer=tokenizer,
        tokenizer_digest=tokenizer_digest(description.folder),
        context_length=context_length(description, source),
    )


def inputs_digest(spec: QLoRAJobSpec, datasets: _Datasets, model: _Model) -> str:
    """Digest over all that shapes the data, and nothing else: of two jobs that differ elsewhere, both may use it."""
    dataset, training = spec.dataset, spec.training
    drawn = training.packing or decimal(dataset.eval_fraction) != 0
    inputs = {
        "version": FORMAT_VERSION,
        "format": dataset.format,
        "train_on": dataset.train_on,
        "too_long": dataset.too_long,
        "eval_fraction": str(decimal(dataset.eval_fraction).normalize()),
        "sequence_length": training.sequence_length,
        "packing": training.packing,
        "seed": training.seed if drawn else None,
        "train": datasets.train.digest(),
        "eval": datasets.evaluation.digest() if datasets.evaluation else None,
        "tokenizer": model.tokenizer_digest,
        "chat_template": model.tokenizer.chat_template,
    }
    return f"sha256:{hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()}"


def optimizer_steps(training: TrainingSpec, train_sequences: int) -> int:
    """Optimizer steps of the whole job; the last one may be of fewer sequences."""
    if training.max_steps is not None:
        return training.max_steps
    # Exact: 0.1 epochs of 160 sequences is one batch of 16, not a little more.
    return math.ceil(Fraction(decimal(training.epochs)) * train_sequences / training.global_batch_size)


def _find_prepared(store: JobStore, digest: str, scratch: Path) -> PrepareResult | None:
    name = _folder(digest)
    manifest = store.read_manifest(name, PreparedManifest)
    if manifest is None or manifest.inputs != digest:
        return None
    try:
        store.fetch_folder(name, manifest.files, scratch)
    except DamagedFolder as error:
        log.warning("the prepared data is made again: %s", error)
        return None
    return manifest.result


def _folder(digest: str) -> str:
    return f"{PREPARED_FOLDER}/{digest.removeprefix('sha256:')[:16]}"


def _read(spec: QLoRAJobSpec, datasets: _Datasets, model: _Model) -> tuple[Split, Split]:
    """Both splits, in tokens that the model has."""
    train, evaluation = read_splits(datasets.train, model.tokenizer, spec.dataset, spec.training)
    if datasets.evaluation is not None:
        evaluation, _ = read_splits(datasets.evaluation, model.tokenizer, spec.dataset, spec.training)
    for split in (train, evaluation):
        _refuse_beyond_model(split, model, spec)
    return train, evaluation


def _refuse_beyond_model(split: Split, model: _Model, spec: QLoRAJobSpec) -> None:
    if split.largest_token >= model.facts.vocab_size:
        raise UserError(
            f"{spec.model.source}: its tokenizer gives token {split.largest_token}, but the model has only "
            f"{model.facts.vocab_size}; the tokenizer is another model's, or its new tokens were never given embeddings"
        )
    if model.context_length is not None and split.longest > model.context_length:
        raise UserError(
            f"the longest record has {split.longest} tokens, but {spec.model.source} was made for "
            f"{model.context_length} positions: set spec.training.sequenceLength to that, with spec.dataset.tooLong "
            "truncate or drop, or choose a model with a longer context"
        )


def _publish(
    task: StageTask, store: JobStore, digest: str, model: _Model, train: Split, evaluation: Split
) -> PrepareResult:
    """Write the prepared folder; its manifest, which makes it exist, comes last."""
    training = task.spec.training
    train_rows, eval_rows = arrange(train, training), arrange(evaluation, training)
    result = PrepareResult(
        digest=digest,
        uri=store.folder_uri(_folder(digest)),
        model=model.facts,
        train_records=len(train.records),
        train_sequences=len(train_rows),
        train_tokens=train.tokens,
        supervised_tokens=train.supervised,
        eval_records=len(evaluation.records),
        eval_sequences=len(eval_rows),
        steps=optimizer_steps(training, len(train_rows)),
        truncated_records=train.truncated + evaluation.truncated,
        dropped_records=train.dropped + evaluation.dropped,
    )
    _report(result, train_rows, training)

    def make_manifest(files: tuple[FileEntry, ...]) -> PreparedManifest:
        store.check_fence(task.attempt)
        return PreparedManifest(inputs=digest, result=result, files=files)

    with store.scratch_folder() as folder:
        write_rows(folder / TRAIN_NAME, train, train_rows)
        write_rows(folder / EVAL_NAME, evaluation, eval_rows)
        model.tokenizer.save_pretrained(folder)
        store.publish_folder(folder, _folder(digest), make_manifest)
    return result


def _report(result: PrepareResult, train_rows: list[Row], training: TrainingSpec) -> None:
    log.info(
        "%d training records with %d tokens (%d supervised) in %d sequences; %d held out in %d; %d steps",
        result.train_records,
        result.train_tokens,
        result.supervised_tokens,
        result.train_sequences,
        result.eval_records,
        result.eval_sequences,
        result.steps,
    )
    if result.truncated_records or result.dropped_records:
        log.warning(
            "records longer than %d tokens: %d truncated, %d dropped",
            training.sequence_length,
            result.truncated_records,
            result.dropped_records,
        )
    if training.packing:
        room = len(train_rows) * training.sequence_length
        log.info("packing leaves %.2f %% of the sequences empty", 100 * (1 - result.train_tokens / room))
