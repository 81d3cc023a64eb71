"""A publish task for an adapter that PEFT has saved, and the job's store that it lies in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_trainer.model.source import describe_model, read_facts
from qlora_trainer.storage.checkpoint import Checkpointer, Provenance
from qlora_trainer.storage.job_store import JobStore
from qlora_trainer.storage.tensors import read_tensors

from orchestrator.api.formats import AnswerTable, JournalRecord
from orchestrator.api.job import DatasetSource, ModelSource, PublishSpec, QLoRAJobSpec
from orchestrator.api.results import PrepareResult
from orchestrator.api.task import StageTask

DIGEST = "sha256:" + "1" * 64


def store_with_adapter(
    folder: Path, base: Path, adapter: Path, answers: AnswerTable | None = None, generation: Any = None
) -> JobStore:
    """A job's store in a folder with PEFT's adapter as its finished one."""
    store = JobStore(folder.as_uri())
    store.take_fence(1)
    config = json.loads((adapter / "adapter_config.json").read_text())
    provenance = Provenance(attempt=1, prepared=DIGEST, adapter_config=config, versions={})
    weights = read_tensors(adapter / "adapter_model.safetensors")
    records = [JournalRecord(step=1, time_ms=1, metrics={"train/loss": 2.5})]
    Checkpointer(store, provenance, keep=1).publish_adapter(1, weights, records, base, generation, answers)
    store.take_fence(2)
    return store


def publish_task(
    store: JobStore, base: Path, formats: Sequence[str], run_id: str = "none", **sections: Any
) -> StageTask:
    """The second attempt of a job."""
    source = base.as_uri()
    return StageTask(
        stage="publish",
        namespace="team-a",
        job="medical-es",
        uid="u-1",
        attempt=2,
        spec=QLoRAJobSpec(
            model=ModelSource(source=source),
            dataset=DatasetSource(source="file:///data.jsonl"),
            publish=PublishSpec.model_validate({"formats": list(formats)}),
            **sections,
        ),
        store_uri=store.uri,
        prepared=PrepareResult(
            digest=DIGEST,
            uri=f"{store.uri}/prepared/1",
            model=read_facts(describe_model(source, "main"), source),
            train_records=9,
            train_sequences=3,
            train_tokens=99,
            supervised_tokens=50,
            eval_records=1,
            eval_sequences=1,
            steps=1,
        ),
        run_id=run_id,
    )
