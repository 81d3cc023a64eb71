"""The publish stage: metrics reconciled, the adapter in the registry, once, then the model in other formats.

Runs on a CPU. The adapter needs neither torch nor the base model; other formats, where the job asks for them, need
both. It may be killed at any instruction and repeated any number of times: every step first looks whether it has been
done (see `mlflow_run`). MLflow away is transient; publish is then retried by itself, without a GPU.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from orchestrator.api.formats import (
    ADAPTER_FOLDER,
    ANSWERS_NAME,
    JOURNAL_NAME,
    MANIFEST_NAME,
    PREPARED_FOLDER,
    SHOWN_NAME,
    JournalRecord,
    PreparedManifest,
    ShownRecords,
    format_uris,
)
from orchestrator.api.results import PublishResult
from orchestrator.api.task import StageTask
from qlora_trainer.outcome import UserError
from qlora_trainer.scoring.comparison import Comparison
from qlora_trainer.scoring.gate import judge
from qlora_trainer.storage.backends import DamagedFolder
from qlora_trainer.storage.final_adapter import FinalAdapter, fetch_final_adapter
from qlora_trainer.storage.job_store import JobStore, copy_verified
from qlora_trainer.storage.versions import library_versions
from qlora_trainer.tracking import mlflow_run, registry
from qlora_trainer.tracking.answers_page import ScoredAnswers, metrics, sampled
from qlora_trainer.tracking.model_card import model_card, without_front_matter
from qlora_trainer.tracking.run_page import CARD_NAME, Results

log = logging.getLogger(__name__)
SERVING_MODEL = Path(__file__).parent / "tracking" / "serving_model.py"
DEFAULT_MAX_NEW_TOKENS = 256
SERVING_LIBRARIES = ("mlflow", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors")


def run(task: StageTask) -> PublishResult:
    """Bring the run up to date and the adapter into the registry."""
    if task.run_id is None:
        raise UserError("a publish task needs the job's MLflow run; the task names none")
    store = JobStore(task.store_uri)
    store.take_fence(task.attempt)
    with tempfile.TemporaryDirectory(prefix="qlora-") as scratch:
        adapter = fetch_adapter(store, Path(scratch) / "stored")
        run_id = mlflow_run.ensure_run(task)
        attempts = store.attempt_tags()
        answers = score(task, adapter)
        records = [*adapter.journal, *(() if answers is None else (score_record(adapter, answers),))]
        mlflow_run.reconcile(run_id, records)
        log.info("the run %s has all %d records of the journal", run_id, len(adapter.journal))
        card = model_card(task, adapter, attempts, answers)
        results = Results(
            card=without_front_matter(card),
            records=read_shown(store, task),
            answers=answers,
            samples=sampled(adapter.journal),
        )
        mlflow_run.describe(task, run_id, attempts, results)
        registration = registry.Registration(
            task=task, run_id=run_id, adapter_digest=adapter.digest, description=without_front_matter(card)
        )
        store.check_fence(task.attempt)
        version = registry.register(
            registration,
            lambda folder, mlflow_model: save_model(adapter, card, folder, mlflow_model),
            Path(scratch) / "logged",
        )
        make_formats(task, store, adapter)
        registry.name_formats(registration, version, format_uris(store.uri, task.spec.publish.formats))
        promotion = None
        if answers is not None and answers.verdict is not None:
            promotion = registry.promote(registration, version, answers.verdict, answers.table.holder)
            log.info("%s: %s", promotion.reason, promotion.message)
    name = registration.registered_model
    return PublishResult(
        registered_model=name,
        model_version=version,
        model_uri=f"models:/{name}/{version}",
        run_id=run_id,
        promotion=promotion,
    )


def make_formats(task: StageTask, store: JobStore, adapter: FinalAdapter) -> None:
    """Put the model into the store in the other formats that the job asks for, each once."""
    if not task.spec.publish.formats:
        return
    from qlora_trainer.exporting.export import export  # here, because torch takes seconds

    export(task, store, adapter)


def score(task: StageTask, adapter: FinalAdapter) -> ScoredAnswers | None:
    """The adapter's answers to held-out prompts with their scores, where the job asked for some."""
    spec = task.spec.evaluation.generation
    if spec is None or adapter.answers is None:
        return None
    comparison = Comparison(adapter.answers, spec, task.spec.training.seed)
    promote = task.spec.tracking.promote
    verdict = judge(promote, comparison, adapter.answers.holder) if promote is not None else None
    return ScoredAnswers(table=adapter.answers, scores=comparison.scores(), verdict=verdict)


def score_record(adapter: FinalAdapter, answers: ScoredAnswers) -> JournalRecord:
    """The scores as metrics of the last step."""
    time_ms = adapter.journal[-1].time_ms if adapter.journal else 0
    return JournalRecord(step=adapter.manifest.step, time_ms=time_ms, metrics=metrics(answers))


def read_shown(store: JobStore, task: StageTask) -> ShownRecords | None:
    """The records that prepare kept to be looked at; None where it is gone, or of an older version."""
    if task.prepared is None:
        return None
    folder = f"{PREPARED_FOLDER}/{task.prepared.uri.rsplit('/', 1)[-1]}"
    manifest = store.read_manifest(folder, PreparedManifest)
    files = [entry for entry in manifest.files if entry.name == SHOWN_NAME] if manifest else []
    if not files:
        return None
    with tempfile.TemporaryDirectory(prefix="qlora-") as scratch:
        try:
            content = (store.fetch_folder(folder, files, Path(scratch) / "shown") / SHOWN_NAME).read_text()
            return ShownRecords.model_validate_json(content)
        except (DamagedFolder, ValidationError) as error:
            log.warning("the records to show are damaged: %s", error)
            return None


def fetch_adapter(store: JobStore, into: Path) -> FinalAdapter:
    """The job's final adapter; a store that has lost or damaged it is a user's error."""
    uri = store.folder_uri(ADAPTER_FOLDER)
    try:
        adapter = fetch_final_adapter(store, into)
    except DamagedFolder as error:
        raise UserError(f"the final adapter is damaged: {error}; restore the file or submit the job again") from error
    if adapter is None:
        raise UserError(f"{uri} holds no finished adapter; it was there when training ended: submit the job again")
    return adapter


def save_model(adapter: FinalAdapter, card: str, folder: Path, mlflow_model: Any) -> None:
    """Write the MLflow model: this adapter as a plain PEFT folder with its card, and the code that serves it."""
    pyfunc: Any = import_module("mlflow.pyfunc")  # Any: half of its parameters have no types
    with tempfile.TemporaryDirectory(prefix="qlora-") as scratch:
        peft_folder = Path(scratch) / "adapter"
        peft_folder.mkdir()
        for entry in adapter.manifest.files:
            if entry.name not in (ANSWERS_NAME, JOURNAL_NAME, MANIFEST_NAME):
                copy_verified(adapter.folder / entry.name, entry, peft_folder / entry.name)
        (peft_folder / CARD_NAME).write_text(card)
        with warnings.catch_warnings():
            # MLflow asks for type hints and an example to infer a signature from; this one is stated.
            warnings.simplefilter("ignore", UserWarning)
            pyfunc.save_model(
                str(folder),
                python_model=str(SERVING_MODEL),
                artifacts={"adapter": str(peft_folder)},
                signature=signature(),
                pip_requirements=requirements(adapter.manifest.versions),
                model_config={"base_model": ""},
                mlflow_model=mlflow_model,
            )


def signature() -> Any:
    """Rows of `messages` (with `tools`, if there are any), `prompt` or `instruction` in, one text a row out."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import AnyType, Array, Object, Property

    optional = {
        **dict.fromkeys(("name", "reasoning_content", "tool_call_id"), DataType.string),
        **dict.fromkeys(("content", "tool_calls"), AnyType()),  # a text or parts of one; JSON text or a list
    }
    message = Object(
        [
            Property("role", DataType.string),
            *(Property(name, kind, required=False) for name, kind in optional.items()),
        ]
    )
    return ModelSignature(
        inputs=Schema(
            [
                ColSpec(Array(message), "messages", required=False),
                ColSpec(AnyType(), "tools", required=False),
                *(
                    ColSpec(DataType.string, name, required=False)
                    for name in ("prompt", "instruction", "input", "system")
                ),
                ColSpec(AnyType(), "history", required=False),
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
