"""Builds train tasks that a CPU finishes in seconds: a tiny model and a prepared dataset that can be learned.

The prepared folder is written here from its documented format, not by the prepare stage, so that these tests hold the
trainer to the contract.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as untyped_pyarrow  # pyright: ignore[reportMissingTypeStubs] - it has none
import pyarrow.parquet as untyped_parquet  # pyright: ignore[reportMissingTypeStubs] - it has none
from tiny_model import tiny_model

from orchestrator.api.formats import FileEntry, PreparedManifest
from orchestrator.api.job import (
    AdapterSpec,
    CheckpointSpec,
    DatasetSource,
    EvaluationSpec,
    ModelSource,
    QLoRAJobSpec,
    TrainingSpec,
)
from orchestrator.api.model_facts import ModelFacts
from orchestrator.api.plan import MemoryPlan
from orchestrator.api.results import PrepareResult
from orchestrator.api.task import StageTask

pyarrow: Any = untyped_pyarrow
parquet: Any = untyped_parquet

DIGEST = "sha256:" + "a1" * 32
VOCABULARY = 512
Row = dict[str, list[int]]


def make_rows(count: int, *, seed: int, strides: Sequence[Sequence[int]] = ((1, 2, 3), (1, 2, 3))) -> list[Row]:
    """Rows of two records; each record counts upwards in its own stride, its first token carries no loss."""
    source = random.Random(seed)
    return [_row([_record(source, of_record) for of_record in strides]) for _ in range(count)]


def _record(source: random.Random, strides: Sequence[int]) -> list[int]:
    start, stride, length = source.randrange(16, 64), source.choice(strides), source.randrange(8, 16)
    return [start + stride * place for place in range(length)]


def _row(records: list[list[int]]) -> Row:
    return {
        "input_ids": [token for record in records for token in record],
        "labels": [label for record in records for label in (-100, *record[1:])],
        "position_ids": [place for record in records for place in range(len(record))],
    }


def write_rows(rows: list[Row], path: Path) -> Path:
    """Write prepared rows in the columns that prepare documents."""
    kind = pyarrow.list_(pyarrow.int32())
    names = ("input_ids", "labels", "position_ids", *(["samples"] if "samples" in rows[0] else []))
    columns = {name: pyarrow.array([row[name] for row in rows], kind) for name in names}
    parquet.write_table(pyarrow.table(columns), path)
    return path


def make_task(
    store: Path,
    *,
    attempt: int = 1,
    steps: int = 12,
    rows: int = 20,
    eval_rows: int = 4,
    strides: Sequence[Sequence[int]] = ((1, 2, 3), (1, 2, 3)),
    micro_batch_size: int = 2,
    recompute_layers: int = 1,
    global_batch_size: int = 4,
    bad_tokens: Mapping[int, int] | None = None,
    training: Mapping[str, Any] | None = None,
    adapter: Mapping[str, Any] | None = None,
    dataset: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    checkpoint: Mapping[str, Any] | None = None,
    family: str = "llama",
    layers: int = 2,
    streamed_layers: int = 0,
    grace_seconds: int = 60,
) -> StageTask:
    """A train task over a store that holds its prepared data; the same arguments give the same job.

    `bad_tokens` are what some training rows end with instead.
    """
    model = tiny_model(family, layers=layers)
    prepared = write_prepared(
        store, steps=steps, rows=rows, eval_rows=eval_rows, strides=strides, bad_tokens=bad_tokens
    )
    small = {"learning_rate": "1e-2", "global_batch_size": global_batch_size, "sequence_length": 64}
    spec = QLoRAJobSpec(
        model=ModelSource(source=model.as_uri()),
        dataset=DatasetSource.model_validate(
            {"source": "file:///unused.jsonl", "eval_fraction": "0.1" if eval_rows else "0", **(dataset or {})}
        ),
        adapter=AdapterSpec.model_validate({"rank": 4, "alpha": 8, "dropout": "0.1", **(adapter or {})}),
        training=TrainingSpec.model_validate({**small, **(training or {})}),
        evaluation=EvaluationSpec.model_validate({"every_steps": 5, **(evaluation or {})}),
        checkpoint=CheckpointSpec.model_validate(checkpoint or {}),
    )
    return StageTask(
        stage="train",
        namespace="team-a",
        job="toy",
        uid="u-1",
        attempt=attempt,
        spec=spec,
        store_uri=store.as_uri(),
        plan=MemoryPlan(
            micro_batch_size=micro_batch_size,
            accumulation_steps=global_batch_size // micro_batch_size,
            recompute_layers=recompute_layers,
            streamed_layers=streamed_layers,
            loss_chunk_tokens=16,
        ),
        prepared=prepared,
        grace_seconds=grace_seconds,
        threads=1,
    )


def write_prepared(
    store: Path,
    *,
    steps: int,
    rows: int,
    eval_rows: int,
    strides: Sequence[Sequence[int]] = ((1, 2, 3), (1, 2, 3)),
    bad_tokens: Mapping[int, int] | None = None,
) -> PrepareResult:
    """The prepared folder in the job's store, as the prepare stage leaves it."""
    folder = store / "prepared" / DIGEST.removeprefix("sha256:")[:16]
    folder.mkdir(parents=True, exist_ok=True)
    train = make_rows(rows, seed=1, strides=strides)
    for index, row in enumerate(train):
        row["samples"] = [2 * index, 2 * index + 1]
    for index, token in (bad_tokens or {}).items():
        train[index]["input_ids"][-2] = token
    write_rows(train, folder / "train.parquet")
    if eval_rows:
        write_rows(make_rows(eval_rows, seed=2, strides=strides), folder / "eval.parquet")
    result = PrepareResult(
        digest=DIGEST,
        uri=folder.as_uri(),
        model=ModelFacts(
            model_type="llama",
            architecture="LlamaForCausalLM",
            hidden_size=64,
            intermediate_size=128,
            num_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            vocab_size=VOCABULARY,
            tied_embeddings=False,
            revision="sha256:0",
        ),
        train_records=2 * rows,
        train_sequences=rows,
        train_tokens=24 * rows,
        supervised_tokens=20 * rows,
        eval_records=2 * eval_rows,
        eval_sequences=eval_rows,
        steps=steps,
    )
    files = tuple(describe_file(path) for path in sorted(folder.glob("*.parquet")))
    manifest = PreparedManifest(inputs=DIGEST, result=result, files=files)
    (folder / "manifest.json").write_text(manifest.model_dump_json(by_alias=True))
    return result


def describe_file(path: Path) -> FileEntry:
    """As a manifest vouches for it."""
    data = path.read_bytes()
    return FileEntry(name=path.name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def digest_of_adapter(store: Path) -> str:
    """SHA-256 of the final adapter's weights on disk."""
    return hashlib.sha256((store / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
