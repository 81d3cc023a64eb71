"""Checkpoints: what comes back is what went in, damage is passed over, and a kill at any instant loses nothing."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from peft_fields import known_fields
from qlora_trainer.outcome import FencedError, Transient
from qlora_trainer.storage.checkpoint import (
    Checkpointer,
    Provenance,
    Snapshot,
    TrainingState,
)
from qlora_trainer.storage.final_adapter import adapter_config, fetch_final_adapter
from qlora_trainer.storage.job_store import JobStore
from qlora_trainer.storage.tensors import on_host
from safetensors.torch import load_file
from tiny_model import tiny_model

from orchestrator.api.formats import CheckpointManifest, FileEntry, JournalRecord
from orchestrator.api.job import DatasetSource, ModelSource, QLoRAJobSpec
from orchestrator.api.task import StageTask

DIGEST = "sha256:" + "1" * 64
OTHER_DIGEST = "sha256:" + "2" * 64


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    store = JobStore(f"{tmp_path.as_uri()}/job")
    store.take_fence(1)
    return store


def make_checkpointer(store: JobStore, *, attempt: int = 1, prepared: str = DIGEST, keep: int = 2) -> Checkpointer:
    provenance = Provenance(
        attempt=attempt, prepared=prepared, adapter_config={"peft_type": "LORA"}, versions={"torch": "2"}
    )
    return Checkpointer(store, provenance, keep=keep)


def make_snapshot(step: int, *, best: bool = False) -> Snapshot:
    generator = torch.Generator().manual_seed(step)
    return Snapshot(
        state=TrainingState(step=step),
        adapter={
            "b.lora_A.weight": torch.randn(4, 8, generator=generator).to(torch.bfloat16),
            "a.lora_B.weight": torch.randn(8, 4, generator=generator),
        },
        optimizer={"a.exp_avg": torch.randint(0, 255, (32,), generator=generator, dtype=torch.uint8)},
        journal=[
            JournalRecord(step=s, time_ms=1_000 + s, metrics={"train/loss": 1 / (s + 1)}) for s in range(step + 1)
        ],
        best_adapter={"a.lora_B.weight": torch.zeros(8, 4)} if best else None,
    )


def assert_same(found: Snapshot | None, expected: Snapshot) -> None:
    assert found is not None
    assert found.state == expected.state
    assert found.journal == expected.journal
    for name in ("adapter", "optimizer", "best_adapter"):
        mine, theirs = getattr(found, name), getattr(expected, name)
        assert (mine is None) == (theirs is None)
        for key in {*(mine or {}), *(theirs or {})}:
            assert mine[key].dtype == theirs[key].dtype
            assert torch.equal(mine[key], theirs[key])


def names(store: JobStore) -> list[str]:
    folder = Path(store.uri.removeprefix("file://")) / "checkpoints"
    return sorted(path.name for path in folder.iterdir())


def damage(path: Path, *, at: float = 0.9) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("best", [False, True])
def test_a_checkpoint_gives_back_every_bit_in_a_new_checkpointer(store: JobStore, best: bool) -> None:
    saving = make_checkpointer(store)
    saving.save(make_snapshot(3, best=best), wait=True)
    loading = make_checkpointer(store, attempt=2)
    assert_same(loading.latest(), make_snapshot(3, best=best))
    assert saving.last == loading.last
    assert saving.last is not None
    assert saving.last.uri == f"{store.uri}/checkpoints/step-00000003"


def test_checkpoints_work_the_same_where_nothing_can_be_renamed() -> None:
    store = JobStore(f"memory://checkpoints-{time.time_ns()}/job")
    checkpointer = make_checkpointer(store)
    for step in (1, 2, 3):
        checkpointer.save(make_snapshot(step), wait=True)
    assert store.list_folders("checkpoints") == ["checkpoints/step-00000002", "checkpoints/step-00000003"]
    assert_same(make_checkpointer(store).latest(), make_snapshot(3))


def test_a_new_store_has_no_checkpoint(store: JobStore) -> None:
    assert make_checkpointer(store).latest() is None


def test_nothing_is_pickled_and_the_files_are_the_documented_ones(store: JobStore) -> None:
    make_checkpointer(store).save(make_snapshot(3, best=True), wait=True)
    folder = Path(store.uri.removeprefix("file://")) / "checkpoints" / "step-00000003"
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "best_adapter.safetensors",
        "journal.jsonl",
        "manifest.json",
        "optimizer.safetensors",
        "state.json",
    ]
    assert json.loads((folder / "state.json").read_bytes()) == {"step": 3}
    assert set(load_file(folder / "adapter_model.safetensors")) == {"a.lora_B.weight", "b.lora_A.weight"}


def test_a_state_with_fields_of_another_version_is_read() -> None:
    state = make_snapshot(3).state
    written = {**json.loads(state.to_bytes()), "cursor": {"epoch": 1}, "loss_window": []}
    assert TrainingState.from_bytes(json.dumps(written).encode()) == state


def test_only_the_newest_checkpoints_are_kept(store: JobStore) -> None:
    checkpointer = make_checkpointer(store, keep=2)
    for step in (1, 2, 3, 4):
        checkpointer.save(make_snapshot(step))
    checkpointer.finish()
    assert names(store) == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize(
    "name",
    ["adapter_model.safetensors", "optimizer.safetensors", "state.json", "journal.jsonl", "adapter_config.json"],
)
def test_a_damaged_byte_in_any_file_means_the_checkpoint_before(
    store: JobStore, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer = make_checkpointer(store)
    checkpointer.save(make_snapshot(1), wait=True)
    checkpointer.save(make_snapshot(2), wait=True)
    damage(Path(store.uri.removeprefix("file://")) / "checkpoints" / "step-00000002" / name)
    resumed = make_checkpointer(store, attempt=2)
    assert_same(resumed.latest(), make_snapshot(1))
    assert "step-00000002 is damaged" in caplog.text
    assert name in caplog.text


def test_a_manifest_that_is_not_json_means_the_checkpoint_before(store: JobStore) -> None:
    checkpointer = make_checkpointer(store)
    checkpointer.save(make_snapshot(1), wait=True)
    checkpointer.save(make_snapshot(2), wait=True)
    damage(Path(store.uri.removeprefix("file://")) / "checkpoints" / "step-00000002" / "manifest.json", at=0)
    assert_same(make_checkpointer(store).latest(), make_snapshot(1))


def test_a_damaged_checkpoint_does_not_count_as_one_that_is_kept(store: JobStore) -> None:
    first = make_checkpointer(store)
    first.save(make_snapshot(1), wait=True)
    first.save(make_snapshot(5), wait=True)
    damage(Path(store.uri.removeprefix("file://")) / "checkpoints" / "step-00000005" / "state.json")
    second = make_checkpointer(store)
    second.latest()
    second.save(make_snapshot(3), wait=True)
    assert names(store) == ["step-00000001", "step-00000003"]


def test_a_checkpoint_of_other_data_is_ignored_and_goes_when_ours_are_there(
    store: JobStore, caplog: pytest.LogCaptureFixture
) -> None:
    make_checkpointer(store, prepared=OTHER_DIGEST).save(make_snapshot(9), wait=True)
    checkpointer = make_checkpointer(store)
    assert checkpointer.latest() is None
    assert OTHER_DIGEST in caplog.text
    checkpointer.save(make_snapshot(1), wait=True)
    assert names(store) == ["step-00000001"]


def test_a_fenced_attempt_writes_no_manifest_and_hears_of_it_at_the_next_call(store: JobStore) -> None:
    old = make_checkpointer(store, attempt=1)
    old.save(make_snapshot(1), wait=True)
    JobStore(store.uri).take_fence(2)
    old.save(make_snapshot(2))
    with pytest.raises(FencedError, match="attempt 2 owns"):
        old.finish()
    assert store.list_folders("checkpoints") == ["checkpoints/step-00000001"]


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_a_trainer_that_comes_back_leaves_what_a_later_attempt_stored_under_the_same_name(
    tmp_path: Path, kind: str
) -> None:
    """Its node was out of reach, and its step is not the later attempt's bit for bit: that ran on another card."""
    uri = f"{tmp_path.as_uri()}/team-a/job" if kind == "file" else f"memory://{uuid.uuid4().hex}/job"
    old, new = make_checkpointer(JobStore(uri), attempt=1), make_checkpointer(JobStore(uri), attempt=2)
    JobStore(uri).take_fence(1)
    JobStore(uri).take_fence(2)
    later = make_snapshot(2)
    new.save(later, wait=True)
    stored = new.publish_adapter(2, later.adapter, later.journal, tmp_path)
    other = make_snapshot(2, best=True)
    old.save(other)
    with pytest.raises(FencedError, match="attempt 2 owns"):
        old.finish()
    with pytest.raises(FencedError, match="attempt 2 owns"):
        old.publish_adapter(2, make_snapshot(3).adapter, other.journal, tmp_path)
    assert_same(make_checkpointer(JobStore(uri), attempt=2).latest(), later)
    found = fetch_final_adapter(JobStore(uri), tmp_path / "fetched")
    assert found is not None
    assert found.digest == stored.digest


def test_a_failed_write_surfaces_at_the_next_save(tmp_path: Path) -> None:
    store = JobStore(f"{tmp_path.as_uri()}/job")
    store.take_fence(1)
    checkpointer = make_checkpointer(store)
    (tmp_path / "job" / "checkpoints").write_bytes(b"a file where a folder must be")
    checkpointer.save(make_snapshot(1))
    with pytest.raises(Exception, match="checkpoints"):
        checkpointer.save(make_snapshot(2))


class SlowStore(JobStore):
    """A store whose folders take until they are let go: to see what training may do meanwhile."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.go = Event()

    def publish_folder(
        self, local: Path, name: str, make_manifest: Callable[[tuple[FileEntry, ...]], CheckpointManifest]
    ) -> str:
        if not self.go.wait(30):
            raise Transient("nobody let the store go on")
        return super().publish_folder(local, name, make_manifest)


def test_training_may_change_its_tensors_while_the_checkpoint_is_written(tmp_path: Path) -> None:
    store = SlowStore(f"{tmp_path.as_uri()}/job")
    store.take_fence(1)
    checkpointer = make_checkpointer(store)
    snapshot = make_snapshot(1)
    started = time.perf_counter()
    checkpointer.save(snapshot)
    stalled = time.perf_counter() - started
    for tensor in (*snapshot.adapter.values(), *snapshot.optimizer.values()):
        tensor.zero_()
    assert checkpointer.last is None
    time.sleep(0.3)
    store.go.set()
    checkpointer.finish()
    assert_same(make_checkpointer(store).latest(), make_snapshot(1))
    assert checkpointer.last_seconds is not None
    assert stalled < 0.3 <= checkpointer.last_seconds


def test_tensors_of_one_storage_are_copied_as_they_are() -> None:
    whole = torch.arange(24, dtype=torch.float32)
    tensors = {"first": whole[:6].view(2, 3), "transposed": whole[6:18].view(3, 4).t(), "other": torch.tensor(7)}
    copies = on_host(tensors)
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    whole.zero_()
    assert copies.keys() == expected.keys()
    for name, copy in copies.items():
        assert copy.dtype == expected[name].dtype
        assert torch.equal(copy, expected[name])


LOOP = """
import sys
sys.path[:0] = sys.argv[2:]
from test_checkpoint import make_checkpointer, make_snapshot
from qlora_trainer.storage.job_store import JobStore
store = JobStore(sys.argv[1])
store.take_fence(1)
store.sweep()
checkpointer = make_checkpointer(store)
found = checkpointer.latest()
step = found.state.step if found else 0
while True:
    step += 1
    checkpointer.save(make_snapshot(step, best=step % 2 == 0))
    if checkpointer.last is not None:
        print("go", flush=True)
"""


def test_a_kill_at_any_instant_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    seed = 20240523
    chance = random.Random(seed)
    store = JobStore(f"{tmp_path.as_uri()}/job")
    paths = [str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, *paths])}
    step = 0
    for kill in range(6):
        command = [sys.executable, "-c", LOOP, store.uri, *paths]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
        assert process.stdout is not None
        with process, process.stdout:
            assert process.stdout.readline() == b"go\n"  # from here on something is durable
            time.sleep(chance.uniform(0.05, 0.6))
            process.send_signal(signal.SIGKILL)
        found = make_checkpointer(store).latest()
        assert found is not None, f"seed {seed}, kill {kill}"
        assert found.state.step >= step, f"seed {seed}, kill {kill}: went back behind a durable checkpoint"
        step = found.state.step
        assert_same(found, make_snapshot(step, best=step % 2 == 0))
    assert step > 6, "the loop must have been killed while it was saving"


def make_task(model: Path, store: JobStore) -> StageTask:
    spec = QLoRAJobSpec(model=ModelSource(source=model.as_uri()), dataset=DatasetSource(source="file:///data.jsonl"))
    return StageTask(stage="train", namespace="team-a", job="job", uid="u-1", attempt=1, spec=spec, store_uri=store.uri)


def publish_real_adapter(store: JobStore, model: Path) -> tuple[str, str, dict[str, torch.Tensor]]:
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    tuned = get_peft_model(base, config)
    torch.manual_seed(7)
    adapter = {
        key: torch.randn(value.shape).to(torch.bfloat16) for key, value in get_peft_model_state_dict(tuned).items()
    }
    provenance = Provenance(
        attempt=1, prepared=DIGEST, adapter_config=adapter_config(config, make_task(model, store)), versions={}
    )
    stored = Checkpointer(store, provenance, keep=1).publish_adapter(5, adapter, make_snapshot(5).journal, model)
    return stored.uri, stored.digest, adapter


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_the_final_adapter_loads_with_peft_alone(store: JobStore) -> None:
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = tiny_model()
    uri, digest, adapter = publish_real_adapter(store, model)
    folder = Path(uri.removeprefix("file://"))
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    loaded = get_peft_model_state_dict(PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False))
    assert loaded.keys() == adapter.keys()
    assert all(torch.equal(loaded[key], adapter[key]) for key in adapter)
    assert AutoTokenizer.from_pretrained(folder).chat_template
    sha256sum = subprocess.run(["sha256sum", folder / "adapter_model.safetensors"], capture_output=True, check=True)
    assert digest == "sha256:" + sha256sum.stdout.decode().split()[0]
    manifest = JobStore(store.uri).read_manifest("adapter", CheckpointManifest)
    assert manifest is not None
    assert manifest.complete
    assert manifest.step == 5


HASHES = """
import json, sys
from types import SimpleNamespace
from qlora_trainer.storage.final_adapter import adapter_config, fetch_final_adapter
from orchestrator.api.task import StageTask
names = {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"}
print(list(names), file=sys.stderr)
config = SimpleNamespace(to_dict=lambda: {"target_modules": names})
print(json.dumps(adapter_config(config, StageTask.model_validate_json(sys.argv[1]))))
"""


def test_the_adapters_configuration_does_not_depend_on_pythons_hashes(store: JobStore) -> None:
    task = make_task(Path("/models/base"), store).model_dump_json(by_alias=True)
    runs = [
        subprocess.run(
            [sys.executable, "-c", HASHES, task],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            check=True,
            timeout=120,
        )
        for seed in ("1", "2")
    ]
    assert runs[0].stderr != runs[1].stderr, "the seeds must order the set differently for this to show anything"
    assert runs[0].stdout == runs[1].stdout


@pytest.mark.parametrize(
    ("adapter", "since"),
    [
        ({}, "0.4.0"),
        ({"target_modules": ["q_proj", "v_proj"]}, "0.4.0"),
        ({"use_rslora": True}, "0.8.0"),
        ({"use_dora": True}, "0.9.0"),
    ],
    ids=["as it comes", "with modules", "rsLoRA", "DoRA"],
)
def test_every_peft_that_can_do_it_knows_every_field_of_the_adapters_configuration(
    store: JobStore, adapter: dict[str, Any], since: str
) -> None:
    """Since the first that has LoRA on 4-bit layers, 0.4.0, or has the variant."""
    from peft import LoraConfig

    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["q_proj"], **adapter})
    written = adapter_config(config, make_task(Path("/models/base"), store))
    versions = known_fields()
    capable = list(versions)[list(versions).index(since) :]
    assert capable[0] == since, "the table has the version that the variant came with"
    assert {version: written.keys() - versions[version] for version in capable} == {
        version: set[str]() for version in capable
    }
    assert since == "0.4.0" or adapter.keys() - versions[list(versions)[list(versions).index(since) - 1]]
    assert (written["r"], written["lora_alpha"], written["lora_dropout"]) == (4, 8, 0.1)
    assert written["inference_mode"] is True
    read = LoraConfig(**{key: value for key, value in written.items() if key != "peft_type"}).to_dict()
    assert {**read, "inference_mode": False, "base_model_name_or_path": None} == config.to_dict()


def test_the_table_of_peft_is_as_new_as_the_peft_that_is_installed() -> None:
    from dataclasses import fields

    from peft import LoraConfig

    newest = list(known_fields().values())[-1]
    installed = {field.name for field in fields(LoraConfig)}
    assert installed <= newest, "make it anew: python tests/trainer/peft_fields.py"


OLD_PEFT = """
import sys
import peft, torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
loaded = get_peft_model_state_dict(PeftModel.from_pretrained(base, sys.argv[2]))
stored = load_file(sys.argv[2] + "/adapter_model.safetensors")
same = loaded.keys() == stored.keys() and all(torch.equal(loaded[key].bfloat16(), stored[key]) for key in stored)
import json
print(json.dumps([peft.__version__, same]))
"""


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.skipif("QLORA_OLD_PEFT" not in os.environ, reason="installs old releases; set QLORA_OLD_PEFT=1")
@pytest.mark.parametrize("version", ["0.4.0", "0.9.0", "0.18.0", "0.21.0"])
def test_releases_of_peft_load_the_final_adapter(store: JobStore, tmp_path: Path, version: str) -> None:
    """Each beside the transformers that is installed; releases that it does not let import are not among them."""
    model = tiny_model()
    uri, _, _ = publish_real_adapter(store, model)
    releases = tmp_path / "releases"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(releases)]
    subprocess.run([*pip, f"peft=={version}"], check=True)
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", OLD_PEFT, str(model), uri.removeprefix("file://")],
        env={**os.environ, "PYTHONPATH": str(releases)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert json.loads(ended.stdout.splitlines()[-1]) == [version, True]


def test_the_order_of_tensors_does_not_change_the_file(store: JobStore, tmp_path: Path) -> None:
    adapter = dict(make_snapshot(1).adapter)
    one = make_checkpointer(store).publish_adapter(1, adapter, [], tmp_path)
    other = JobStore(f"{tmp_path.as_uri()}/other")
    other.take_fence(1)
    reversed_order = make_checkpointer(other).publish_adapter(1, dict(reversed(adapter.items())), [], tmp_path)
    assert one.digest == reversed_order.digest
