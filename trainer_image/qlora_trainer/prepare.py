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
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from orchestrator.api.adapter import JOB_PREFIX
from orchestrator.api.base import decimal
from orchestrator.api.formats import (
    PREPARED_FOLDER,
    SHOWN_NAME,
    START_FOLDER,
    FileEntry,
    PreparedManifest,
    ShownRecords,
    StartManifest,
)
from orchestrator.api.job import QLoRAJobSpec
from orchestrator.api.linear_regex import compile_regex
from orchestrator.api.model_facts import ModelFacts
from orchestrator.api.optimizer_steps import FEW_STEPS, optimizer_steps, steps_warning
from orchestrator.api.package_data import known_type
from orchestrator.api.packing import FEWEST_ROWS
from orchestrator.api.results import PrepareResult, ResultTooLong, StageResult, StartingAdapter
from orchestrator.api.task import StageTask
from orchestrator.api.trainer_facts import ANSWER_TOKENS
from orchestrator.api.words import on_one_line
from qlora_trainer.data.chat_templates import named_template
from qlora_trainer.data.dataset import (
    EncodeRanges,
    Split,
    arrange,
    check_tokenizer,
    in_process,
    read_dataset,
    read_first,
    write_rows,
)
from qlora_trainer.data.reader import Records
from qlora_trainer.data.report import (
    HIGH_RATE,
    NOTHING_HELD_OUT,
    OF_START,
    RECORD_BY_RECORD,
    WITH_A_STATE,
    bounded,
    counts,
    data_warnings,
    first_shown,
    held_out_warning,
    in_brackets,
    mode_warning,
    rate_warning,
    state_warning,
)
from qlora_trainer.model.source import (
    CONFIG_NAME,
    ModelDescription,
    describe_model,
    known_config,
    load_tokenizer,
    read_facts,
    tokenizer_digest,
)
from qlora_trainer.outcome import UserError
from qlora_trainer.storage.backends import DamagedFolder
from qlora_trainer.storage.final_adapter import ADAPTER_NAME
from qlora_trainer.storage.job_store import JobStore
from qlora_trainer.tracking.names import refuse_foreign_names
from qlora_trainer.tracking.starting_version import fetch_version

if TYPE_CHECKING:
    from qlora_trainer.model.architecture import CheckedModel
    from qlora_trainer.model.starting_adapter import Known

FORMAT_VERSION = 5
"""Raise it when the same inputs would give other data than before."""
TRAIN_NAME = "train.parquet"
EVAL_NAME = "eval.parquet"
MAX_REASON_CHARACTERS = 400
"""Of what a library says of a model that it cannot compute."""
SHOWN_RECORDS = 3
"""So many of the first records are logged and kept with their masks."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """What of the base model matters to the data."""

    facts: ModelFacts
    tokenizer: Any
    tokenizer_digest: str
    warnings: list[str]
    start: StartingAdapter | None
    """The adapter that training begins with, where that is not a new one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Start:
    """The adapter that training begins with."""

    adapter: StartingAdapter | None
    """None for a new one."""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Splits:
    """What is trained and evaluated on."""

    train: Split
    evaluation: Split
    warnings: list[str]
    chats: bool
    """See `PrepareResult.chats`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Datasets:
    """Where the records come from."""

    train: Records
    evaluation: Records | None


def run(task: StageTask) -> PrepareResult:
    """Prepare a job's data, or find it prepared."""
    _refuse_regex(task.spec)
    store = JobStore(task.store_uri, is_new=True)
    store.take_fence(task.attempt)
    store.sweep()
    keep = partial(_keep_start, task, store) if task.spec.adapter.start is not None else None
    with tempfile.TemporaryDirectory(prefix="qlora-") as scratch:
        datasets = _open_datasets(task.spec, Path(scratch))
        model = _open_model(task.spec, keep)
        digest = inputs_digest(task.spec, datasets, model)
        found = _find_prepared(store, digest, Path(scratch) / "prepared")
        splits = None if found is not None else _read(task.spec, datasets, model)
        refuse_foreign_names(task)
        if found is not None:
            log.info("%s is prepared already", found.result.uri)
            _refuse_without_prompts(found.folder, task.spec)
            return _told(_with_steps(found.result, model, task.spec), task.spec)
    assert splits is not None, "what is not prepared has been read"
    return _told(_publish(task, store, digest, model, splits), task.spec)


def _refuse_regex(spec: QLoRAJobSpec) -> None:
    """UserError for a pattern that is none, as no rule of an API server can say it."""
    generation = spec.evaluation.generation
    if generation is None or generation.regex is None:
        return
    try:
        compile_regex(generation.regex)
    except ValueError as error:
        raise UserError(
            f"spec.evaluation.generation.regex: {error}; write it as RE2 reads it, without look-around and "
            "back-references"
        ) from error


def _refuse_without_prompts(folder: Path, spec: QLoRAJobSpec) -> None:
    """UserError where answers or samples are asked for and no held-out record has a question and an answer."""
    from qlora_trainer.data.micro_batch import PreparedRows  # here, because torch takes seconds
    from qlora_trainer.data.prompts import all_prompts

    generation, samples = spec.evaluation.generation, spec.evaluation.samples
    if generation is None and samples is None:
        return
    count = sum(1 for _ in all_prompts(PreparedRows(folder / EVAL_NAME), spec.training.sequence_length))
    if count == 0:
        raise UserError(
            f"spec.evaluation.{'samples' if generation is None else 'generation'}: no held-out record has a prompt "
            f"and, within spec.training.sequenceLength and {ANSWER_TOKENS} tokens, a whole answer to it; hold out "
            "others, or leave this out"
        )
    if generation is not None:
        log.info("%d of the held-out records can be asked, %d will be", count, min(count, generation.prompts))


def _told(result: PrepareResult, spec: QLoRAJobSpec) -> PrepareResult:
    """The result; UserError where it is more than a pod's status holds, which a trace of many moments may be."""
    try:
        StageResult(prepare=result).to_termination_message()
    except ResultTooLong as error:
        raise UserError(
            f"{spec.model.source}: its layers are of so many kinds that what they take does not fit a pod's status, so "
            "no GPU is taken; choose another model, or shorter names of the store"
        ) from error
    return result


def show(task: StageTask, count: int) -> ShownRecords:
    """The first records as they would be trained; reads no more of the data set and writes nothing."""
    with tempfile.TemporaryDirectory(prefix="qlora-") as scratch:
        datasets = _open_datasets(task.spec, Path(scratch))
        model = _open_model(task.spec)
        read = read_first(count, datasets.train, model.tokenizer, task.spec.dataset, task.spec.training)
    records = first_shown(model.tokenizer, read.train, count, pairs=task.spec.dataset.format == "preference")
    return ShownRecords(records=records, warnings=read.warnings)


def trace(task: StageTask, config: str) -> ModelFacts:
    """The facts of a model that only its config.json is here of, with its layers as prepare would trace them."""
    source = task.spec.model.source
    with tempfile.TemporaryDirectory(prefix="qlora-") as name:
        folder = Path(name)
        (folder / CONFIG_NAME).write_text(config)
        facts = read_facts(ModelDescription(folder=folder, revision="", tensors=None), source)
        known = known_type(facts.model_type)
        packs = known is None or known.separate_because is None
        return traced_model(facts, known_config(folder, source), task.spec, packs=packs)


def _open_datasets(spec: QLoRAJobSpec, scratch: Path) -> _Datasets:
    dataset = spec.dataset
    train = Records(
        dataset.source, split=dataset.split, config=dataset.config, scratch=scratch, field="spec.dataset.source"
    )
    if dataset.eval_source is None:
        return _Datasets(train=train, evaluation=None)
    held_out = Records(
        dataset.eval_source,
        split=dataset.eval_split or dataset.split,
        config=dataset.config if dataset.eval_source.startswith("hf://") else None,
        scratch=scratch,
        field="spec.dataset.evalSource",
    )
    return _Datasets(train=train, evaluation=held_out)


def _open_model(spec: QLoRAJobSpec, keep_start: Callable[[ModelDescription], _Start] | None = None) -> _Model:
    """`keep_start` gives the adapter that training begins with; without one, a new one is what the spec asks for."""
    from qlora_trainer.kernels.flash_attention import has_kernels_for  # here, because torch takes seconds
    from qlora_trainer.model.architecture import check_architecture

    source = spec.model.source
    description = describe_model(source, spec.model.revision)
    facts = read_facts(description, source)
    start = keep_start(description) if keep_start is not None else _Start(adapter=None)
    spec = _settled(spec, start.adapter)
    checked = check_architecture(
        description,
        source,
        spec.adapter,
        answers=spec.evaluation.generation is not None,
        formats=spec.publish.formats,
    )
    if checked.stores_tied_twice:
        log.info("%s has tensors of their own for weights that config.json ties, so each is counted", source)
        facts = facts.model_copy(update={"tied_embeddings": False})
    config = known_config(description.folder, source)
    facts = traced_model(facts, config, spec, packs=checked.separate_because is None)
    tokenizer = load_tokenizer(description.folder, source, named_template(spec.model.chat_template))
    check_tokenizer(tokenizer, spec.dataset, source)
    _refuse_formats(spec, config, tokenizer)
    log.info("base model %s: %s at %s", source, facts.architecture, facts.revision)
    if facts.part_of is not None:
        log.info("text part of %s: the image tower is not loaded", facts.part_of)
    here = {
        "record_by_record": checked.separate_because is not None,
        "flash_attention": has_kernels_for(facts.head_dim),
    }
    return _Model(
        facts=facts.model_copy(update=here),
        tokenizer=tokenizer,
        tokenizer_digest=tokenizer_digest(description.folder),
        warnings=[*start.warnings, *_model_warnings(checked, spec)],
        start=start.adapter,
    )


def _keep_start(task: StageTask, store: JobStore, description: ModelDescription) -> _Start:
    """The adapter that the job goes on from, kept in its store: what its source names later is another job's."""
    from qlora_trainer.model.starting_adapter import take_adapter  # here, because torch takes seconds
    from qlora_trainer.storage.tensors import save_tensors

    asked = task.spec.adapter.start
    assert asked is not None, "the job goes on from one"
    known = store.read_manifest(START_FOLDER, StartManifest)
    if known is not None and known.asked == asked and _is_whole(store, known):
        log.info("training goes on from %s, %s, which is in the job's store", known.start.source, known.start.digest)
        return _Start(adapter=known.start, warnings=known.warnings)
    with tempfile.TemporaryDirectory(prefix="qlora-") as scratch:
        taken = take_adapter(task.spec, description, _known_start(task, Path(scratch)))
    if known is not None and known.asked == asked and known.start.digest != taken.start.digest:
        raise UserError(
            f"spec.adapter.from: the job's own copy of {known.start.digest} is damaged, and {asked} is another adapter "
            "by now; submit the job anew"
        )

    def make_manifest(files: tuple[FileEntry, ...]) -> StartManifest:
        store.check_fence(task.attempt)
        return StartManifest(asked=asked, start=taken.start, warnings=taken.warnings, files=files)

    with store.scratch_folder() as folder:
        save_tensors(taken.tensors, folder / ADAPTER_NAME)
        store.check_fence(task.attempt)
        store.publish_folder(folder, START_FOLDER, make_manifest)
    return _Start(adapter=taken.start, warnings=taken.warnings)


def _settled(spec: QLoRAJobSpec, start: StartingAdapter | None) -> QLoRAJobSpec:
    """The spec with what is taken over; UserError where that goes against a rule of specs."""
    if start is None:
        return spec
    settled = spec.settled(start)
    try:
        QLoRAJobSpec.model_validate(settled.model_dump())
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"spec.adapter.from: with what {start.source} is, the spec cannot be: {reason}") from error
    return settled


def _known_start(task: StageTask, scratch: Path) -> Known | None:
    """What is on record of a job's adapter that the job goes on from; None where an address is named."""
    from qlora_trainer.model.starting_adapter import Known  # here, because torch takes seconds

    if task.spec.adapter.starting_job is not None:
        job = task.starting_job
        if job is None:
            raise UserError("a prepare task of a job that goes on from another one needs that one; the task names none")
        return Known(
            source=f"{JOB_PREFIX}{task.spec.adapter.starting_job}",
            uri=job.adapter_uri,
            digest=job.adapter_digest,
            base=job.base,
            base_revision=job.base_revision,
        )
    return None if task.spec.adapter.start_uri is not None else fetch_version(task, scratch)


def _is_whole(store: JobStore, known: StartManifest) -> bool:
    with tempfile.TemporaryDirectory(prefix="qlora-") as scratch:
        try:
            store.fetch_folder(START_FOLDER, known.files, Path(scratch))
        except DamagedFolder as error:
            log.warning("the job's copy of the adapter that it goes on from is made again: %s", error)
            return False
    return True


def _refuse_formats(spec: QLoRAJobSpec, config: Any, tokenizer: Any) -> None:
    """UserError for a model that GGUF is not written of, where the job asks for it."""
    from qlora_trainer.exporting.gguf_families import family_of, pre_tokenizer_of

    names, source = spec.publish.formats, spec.model.source
    if any(name.startswith("gguf") for name in names):
        family_of(config, source)
    if "gguf-f16" in names or "gguf-q8_0" in names:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        pre_tokenizer_of(json.loads(backend.to_str()) if backend is not None else {}, source)


def _model_warnings(checked: CheckedModel, spec: QLoRAJobSpec) -> Iterator[str]:
    if checked.separate_because is not None:
        yield mode_warning(checked.separate_because)
    words = state_warning(checked.state_packages, deterministic=spec.training.deterministic)
    if words is not None:
        yield words


def traced_model(facts: ModelFacts, config: Any, spec: QLoRAJobSpec, *, packs: bool) -> ModelFacts:
    """With what layers take that no table knows; UserError where that cannot be found out: a GPU is not to try it."""
    from qlora_trainer.model.layer_trace import Untraceable, traced_facts  # here, because torch takes seconds

    length = spec.training.sequence_length
    try:
        return traced_facts(facts, config, spec.adapter, packs=packs, record_tokens=length)
    except Untraceable as error:
        reason = on_one_line(str(error))[:MAX_REASON_CHARACTERS]
        raise UserError(
            f"{spec.model.source}: what layers of model type {facts.model_type} take on a GPU cannot be found out "
            f"({reason}), so no GPU is taken; choose another model, or another adapter"
        ) from error


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


def _with_steps(found: PrepareResult, model: _Model, spec: QLoRAJobSpec) -> PrepareResult:
    """The result of data that is prepared already, for this job's model and steps."""
    steps = optimizer_steps(spec.training, found.train_sequences)
    result = found.model_copy(update={"model": model.facts, "steps": steps, "start": model.start})
    not_data = FEW_STEPS, HIGH_RATE, NOTHING_HELD_OUT, RECORD_BY_RECORD, WITH_A_STATE, OF_START
    about_data = [warning for warning in found.warnings if not warning.startswith(not_data)]
    return _warned(result, spec, [*model.warnings, *about_data])


def _warned(result: PrepareResult, spec: QLoRAJobSpec, about_data: list[str]) -> PrepareResult:
    of_steps = steps_warning(result.steps, result.train_sequences, spec.training)
    warnings = [*of_steps, *rate_warning(spec.training), *held_out_warning(spec), *about_data]
    for warning in warnings:
        log.warning("%s", warning)
    return result.model_copy(update={"warnings": bounded(warnings)})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """Data that is prepared already."""

    result: PrepareResult
    folder: Path


def _find_prepared(store: JobStore, digest: str, scratch: Path) -> _Found | None:
    name = _folder(digest)
    manifest = store.read_manifest(name, PreparedManifest)
    if manifest is None or manifest.inputs != digest:
        return None
    try:
        folder = store.fetch_folder(name, manifest.files, scratch)
    except DamagedFolder as error:
        log.warning("the prepared data is made again: %s", error)
        return None
    return _Found(result=manifest.result, folder=folder)


def _folder(digest: str) -> str:
    return f"{PREPARED_FOLDER}/{digest.removeprefix('sha256:')[:16]}"


def _read(spec: QLoRAJobSpec, datasets: _Datasets, model: _Model) -> _Splits:
    """Both splits, in tokens that the model has."""
    with encoding(spec.prepare.parallelism) as encode:
        read = read_dataset(datasets.train, model.tokenizer, spec.dataset, spec.training, encode)
        evaluation = read.evaluation
        if datasets.evaluation is not None:
            evaluation = read_dataset(datasets.evaluation, model.tokenizer, spec.dataset, spec.training, encode).train
    for split in (read.train, evaluation):
        _refuse_beyond_model(split, model, spec)
    return _Splits(
        train=read.train,
        evaluation=evaluation,
        warnings=[*data_warnings(read.train, evaluation), *read.warnings],
        chats=read.chats,
    )


def encoding(parallelism: int) -> AbstractContextManager[EncodeRanges]:
    """Where ranges of records are encoded: in this process, or in so many Ray workers."""
    if parallelism == 1:
        return nullcontext(in_process)
    from qlora_trainer.data.ray_tasks import ray_tasks  # here, because Ray takes seconds

    return ray_tasks(parallelism)


def _refuse_beyond_model(split: Split, model: _Model, spec: QLoRAJobSpec) -> None:
    if split.largest_token >= model.facts.vocab_size:
        raise UserError(
            f"{spec.model.source}: its tokenizer gives token {split.largest_token}, but the model has only "
            f"{model.facts.vocab_size}; the tokenizer is another model's, or its new tokens were never given embeddings"
        )
    context_length = model.facts.context_length
    if context_length is not None and split.longest > context_length:
        raise UserError(
            f"the longest record has {split.longest} tokens, but {spec.model.source} was made for "
            f"{context_length} positions: set spec.training.sequenceLength to that, with spec.dataset.tooLong "
            f"{'' if spec.dataset.format == 'preference' else 'truncate or '}drop, or choose a model with a longer "
            "context"
        )


def _publish(task: StageTask, store: JobStore, digest: str, model: _Model, splits: _Splits) -> PrepareResult:
    """Write the prepared folder; its manifest, which makes it exist, comes last."""
    training, train, evaluation = task.spec.training, splits.train, splits.evaluation
    pairs = task.spec.dataset.format == "preference"
    train_rows = arrange(train, training, pairs=pairs, fewest_rows=FEWEST_ROWS)
    eval_rows = arrange(evaluation, training, pairs=pairs)
    result = PrepareResult(
        digest=digest,
        uri=store.folder_uri(_folder(digest)),
        model=model.facts,
        train_records=train.samples,
        train_sequences=len(train_rows),
        train_tokens=train.tokens,
        supervised_tokens=train.supervised,
        eval_records=evaluation.samples,
        eval_sequences=len(eval_rows),
        steps=optimizer_steps(training, len(train_rows)),
        truncated_records=train.truncated + evaluation.truncated,
        dropped_records=train.dropped + evaluation.dropped,
        chats=splits.chats,
        start=model.start,
    )
    log.info("%s", counts(result, training))
    first = first_shown(model.tokenizer, train, SHOWN_RECORDS, pairs=pairs)
    for number, record in enumerate(first, start=1):
        log.info("record %d, what carries loss in brackets: %r", number, in_brackets(record))
    result = _warned(result, task.spec, [*model.warnings, *splits.warnings])

    def make_manifest(files: tuple[FileEntry, ...]) -> PreparedManifest:
        store.check_fence(task.attempt)
        return PreparedManifest(inputs=digest, result=result, files=files)

    with store.scratch_folder() as folder:
        write_rows(folder / TRAIN_NAME, train, train_rows)
        write_rows(folder / EVAL_NAME, evaluation, eval_rows)
        _refuse_without_prompts(folder, task.spec)
        model.tokenizer.save_pretrained(folder)
        (folder / SHOWN_NAME).write_text(ShownRecords(records=first, warnings=result.warnings).model_dump_json())
        store.check_fence(task.attempt)  # a folder of the name is about to be replaced
        store.publish_folder(folder, _folder(digest), make_manifest)
    return result
