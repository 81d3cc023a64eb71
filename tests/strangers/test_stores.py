"""Files of a job's store and of a model's folder, whatever somebody has made of them: read, passed over, or refused.

What a stage raises about them is a verdict in words (`StageError`) or `DamagedFolder`, never anything that would end as
an internal error, which is tried again. `QLORA_FUZZ` says how many.
"""

from __future__ import annotations

import hashlib
import json
import random
import struct
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from qlora_trainer.model.source import describe_model
from qlora_trainer.outcome import FencedError, StageError, UserError
from qlora_trainer.storage.backends import DamagedFolder
from qlora_trainer.storage.checkpoint import Checkpointer, Provenance
from qlora_trainer.storage.final_adapter import fetch_final_adapter
from qlora_trainer.storage.job_store import JobStore

from orchestrator.api.formats import (
    ADAPTER_FOLDER,
    ATTEMPTS_NAME,
    CHECKPOINTS_FOLDER,
    FENCE_NAME,
    AttemptLog,
    CheckpointManifest,
    Fence,
    JournalRecord,
    checkpoint_folder,
    checkpoint_step,
)
from tests.builders import DIGEST
from tests.strangers.generate import instance
from tests.strangers.test_fuzz import ROUNDS, SEED, any_value, mutated
from tests.strangers.test_readers import CONFIG, DEEP, HUGE, any_text

Json = dict[str, Any]
STATE: Json = {"step": 7, "best": {"step": 3, "loss": 0.5}, "evaluations_without_gain": 0}
TENSOR: Json = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


def tensors_of(dice: random.Random) -> bytes:
    """A safetensors file, or what calls itself one."""
    header: Any = {"__metadata__": {"format": "pt"}, "a": dict(TENSOR), "b": {**TENSOR, "data_offsets": [16, 32]}}
    text = json.dumps(header).encode() if dice.random() < 0.2 else any_header(dice, header)
    length = dice.choice([len(text)] * 8 + [0, 1, 2**63, len(text) + 1])
    return struct.pack("<Q", length) + text + b"\0" * dice.choice([32, 32, 32, 16, 0])


def any_header(dice: random.Random, header: Json) -> bytes:
    match dice.randrange(4):
        case 0:
            return json.dumps(mutated(dice, header)).encode()
        case 1:
            field = dice.choice(["dtype", "shape", "data_offsets"])
            sizes: list[object] = [[-1, 2], [1.5, 2], ["2", "2"], [True, 4], [2**63, 2], 10**400, None, "F32"]
            odd = dice.choice([any_value(dice), *sizes])
            return json.dumps({**header, "b": {**TENSOR, field: odd}}).encode()
        case 2:
            return dice.choice([DEEP.encode(), HUGE.encode(), b"[]", b"null", b"\xff", ('{"a":' + DEEP).encode()])
        case _:
            return any_text(dice, header)


def outcome(call: Callable[[], object]) -> str:
    try:
        return "nothing" if call() is None else "read"
    except (StageError, DamagedFolder):
        return "refused"


def test_a_models_headers_are_read_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dice, seen = random.Random(SEED), Counter[str]()
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for _ in range(ROUNDS):
        index = tmp_path / "model.safetensors.index.json"
        index.unlink(missing_ok=True)
        if dice.random() < 0.2:
            index.write_bytes(any_text(dice, {"weight_map": {"a": "model.safetensors", "b": "model.safetensors"}}))
        (tmp_path / "model.safetensors").write_bytes(tensors_of(dice))
        seen[outcome(lambda: describe_model(f"file://{tmp_path}", "main"))] += 1
    with capsys.disabled():
        print(f"\n{ROUNDS} safetensors headers with seed {SEED}: {dict(seen)}")
    assert min(seen["read"], seen["refused"]) > ROUNDS / 20


def put(folder: Path, files: dict[str, bytes], manifest: Json, dice: random.Random) -> None:
    """A folder with files that its manifest vouches for, or nearly."""
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    listed = [
        {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
    ]
    kept = listed if dice.random() < 0.7 else dice.sample(listed, dice.randrange(len(listed)))
    text = json.dumps({**manifest, "files": kept}).encode()
    (folder / "manifest.json").write_bytes(text if dice.random() < 0.8 else any_text(dice, json.loads(text)))


def journal_of(dice: random.Random) -> bytes:
    records = [instance(dice, JournalRecord) for _ in range(dice.randrange(4))]
    if dice.random() < 0.5:
        records.sort(key=lambda record: record["step"])
    return b"\n".join(json.dumps(each).encode() if dice.random() < 0.8 else any_text(dice, each) for each in records)


def a_store(dice: random.Random, folder: Path) -> JobStore:
    tensors = (lambda: tensors_of(dice)) if dice.random() < 0.5 else whole_tensors
    for step in (3, 7, 123_456_789):
        state = {**STATE, "step": step}
        files = {
            "adapter_model.safetensors": tensors(),
            "adapter_config.json": b"{}",
            "optimizer.safetensors": whole_tensors(),
            "state.json": json.dumps(state).encode() if dice.random() < 0.5 else any_text(dice, state),
            "journal.jsonl": journal_of(dice),
        }
        manifest = {**instance(dice, CheckpointManifest), "step": step, "prepared": DIGEST, "complete": False}
        put(folder / CHECKPOINTS_FOLDER / checkpoint_folder(step), files, manifest, dice)
    files = {"adapter_model.safetensors": b"x", "adapter_config.json": b"{}", "journal.jsonl": journal_of(dice)}
    put(folder / ADAPTER_FOLDER, files, {**manifest, "complete": True}, dice)
    for name, kind in ((FENCE_NAME, Fence), (ATTEMPTS_NAME, AttemptLog)):
        (folder / name).write_bytes(any_text(dice, instance(dice, kind)))
    return JobStore(f"file://{folder}")


def whole_tensors() -> bytes:
    text = json.dumps({"a": TENSOR}).encode()
    return struct.pack("<Q", len(text)) + text + b"\0" * 16


def test_a_store_is_resumed_from_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dice, seen = random.Random(SEED), Counter[str]()
    provenance = Provenance(attempt=2**40, prepared=DIGEST, adapter_config={}, versions={})
    for number in range(max(40, ROUNDS // 10)):
        store, into = a_store(dice, tmp_path / str(number)), tmp_path / f"into-{number}"
        calls: dict[str, Callable[[], object]] = {
            "fence": partial(store.take_fence, provenance.attempt),
            "tags": store.attempt_tags,
            "checkpoint": Checkpointer(store, provenance, keep=1).latest,
            "adapter": partial(fetch_final_adapter, store, into),
        }
        seen.update(f"{name} {outcome(call)}" for name, call in calls.items())
    with capsys.disabled():
        print(f"\nstores with seed {SEED}: {dict(seen)}")
    for expected in ("fence refused", "tags read", "checkpoint read", "checkpoint nothing", "adapter refused"):
        assert seen[expected] > 0, expected


def test_a_fence_that_somebody_wrote_is_told_of(tmp_path: Path) -> None:
    store = JobStore(f"file://{tmp_path}")
    store.take_fence(3)
    (tmp_path / FENCE_NAME).write_text('{"attempt": "x"}')
    with pytest.raises(UserError, match=r"fence.json, which says who may write there, was changed .* remove it once"):
        store.check_fence(3)
    (tmp_path / FENCE_NAME).write_text('{"attempt": 4}')
    with pytest.raises(FencedError):
        store.check_fence(3)


def test_checkpoints_sort_by_step_beyond_eight_digits() -> None:
    steps = [123_456_789, 99_999_999, 100_000_000, 7, 2**53 - 1]
    names = [f"{CHECKPOINTS_FOLDER}/{checkpoint_folder(step)}" for step in steps]
    assert sorted(names, key=checkpoint_step) == [f"checkpoints/step-{step:08d}" for step in sorted(steps)]
    assert checkpoint_step("checkpoints/step-x") == -1
    assert checkpoint_step("checkpoints/step-" + "9" * 5000) == -1
