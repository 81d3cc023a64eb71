"""What somebody tries with links: in a model folder, in a data set, in a job's store, on a claim.

The canary lies outside of all that the job names. Whatever the links are, its content is nowhere in the store, in a
message or in a log afterwards, and nothing outside has changed. `QLORA_FUZZ` says how many trees are made up.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from qlora_trainer import prepare, publish
from qlora_trainer.data.reader import Records
from qlora_trainer.model.source import describe_model, resolve_model
from qlora_trainer.outcome import StageError, UserError
from qlora_trainer.storage.job_store import JobStore
from tiny_model import build_tiny_model

from orchestrator.adapters.job_store import model_config, stored_adapter
from orchestrator.api.formats import CheckpointManifest
from orchestrator.api.job import ModelSource, QLoRAJobSpec
from orchestrator.api.task import StageTask
from orchestrator.errors import InvalidObject, OrchestratorError, PermanentError

ROUNDS = max(int(os.environ.get("QLORA_FUZZ", "400")) // 10, 20)
SEED = int(os.environ.get("QLORA_FUZZ_SEED", "1"))
CANARY = "CANARY-0f6d1c"
TEMPLATE = f"{{# {CANARY} #}}{{{{ messages[0]['content'] }}}}"
DIGEST = "sha256:" + "0" * 64


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder that no job names, with files that would pass for each of a job's."""
    folder = tmp_path / "outside"
    (folder / "step-00000001").mkdir(parents=True)
    (folder / "step-00000001" / "precious").write_text(CANARY)
    (folder / "secret").write_text(f"{CANARY}\n[default]\naws_secret_access_key = {CANARY}\n")
    (folder / "template.jinja").write_text(TEMPLATE)
    (folder / "config.json").write_text(json.dumps({"model_type": CANARY, "attempt": CANARY}))
    (folder / "train.csv").write_text(f"{CANARY},{CANARY}\n{CANARY},b\n")
    (folder / "train.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": CANARY}]}) + "\n")
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return build_tiny_model(tmp_path / "named" / "model")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "named" / "train.jsonl"
    path.parent.mkdir(exist_ok=True)
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good morning"}]
    path.write_text((json.dumps({"messages": turns}) + "\n") * 4)
    return path


def task(model: Path, data: Path, store: Path, attempt: int = 1) -> StageTask:
    spec = QLoRAJobSpec.model_validate(
        {
            "model": {"source": model.as_uri()},
            "dataset": {"source": data.as_uri()},
            "training": {"sequenceLength": 256},
        }
    )
    return StageTask(
        stage="prepare", namespace="a", job="j", uid="1", attempt=attempt, spec=spec, store_uri=store.as_uri()
    )


def content(folder: Path) -> dict[str, str]:
    """Every name below a folder, and what stands there, links themselves included."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = f"-> {os.readlink(path)}"
        else:
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return found


def holding_canary(folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return [str(path) for path in files if CANARY.encode() in path.read_bytes()]


# --- a model folder


@pytest.mark.parametrize("through", ["a link", "a relative link", "a chain", "a linked folder"])
def test_a_tenant_links_the_chat_template_to_a_credentials_file(
    outside: Path, model: Path, data: Path, tmp_path: Path, through: str
) -> None:
    template = model / "chat_template.jinja"
    template.unlink()
    if through == "a link":
        template.symlink_to(outside / "template.jinja")
    elif through == "a relative link":
        template.symlink_to("../../outside/template.jinja")
    elif through == "a chain":
        (model / "first").symlink_to("second")
        (model / "second").symlink_to(outside / "template.jinja")
        template.symlink_to("first")
    else:
        (model / "templates").symlink_to(outside, target_is_directory=True)
        template.symlink_to("templates/template.jinja")
    with pytest.raises(UserError, match=r"is a link that leaves its folder; copy the file that it points at"):
        prepare.run(task(model, data, tmp_path / "store"))
    with pytest.raises(UserError, match="is a link that leaves its folder"):
        resolve_model(model.as_uri(), "main")
    assert holding_canary(tmp_path / "store") == []


def test_a_tenant_swaps_a_link_between_the_check_and_the_use(outside: Path, model: Path) -> None:
    template, own = model / "chat_template.jinja", model / "own.jinja"
    template.rename(own)
    template.symlink_to("own.jinja")
    innocent = own.read_bytes()
    over = threading.Event()

    def swap() -> None:
        for turn in range(10**9):
            if over.is_set():
                return
            (model / "next").symlink_to("own.jinja" if turn % 2 else outside / "template.jinja")
            (model / "next").replace(template)

    swapping = threading.Thread(target=swap)
    swapping.start()
    seen: set[bytes] = set()
    try:
        for _ in range(60):
            with suppress(UserError):
                seen.add((resolve_model(model.as_uri(), "main") / "chat_template.jinja").read_bytes())
    finally:
        over.set()
        swapping.join()
    assert seen <= {innocent}
    assert seen, "it was never read at all, so nothing was tried"


def test_what_was_fetched_stays_what_it_was_when_the_folder_changes(outside: Path, model: Path) -> None:
    folder = describe_model(model.as_uri(), "main").folder
    (model / "chat_template.jinja").unlink()
    (model / "chat_template.jinja").symlink_to(outside / "template.jinja")
    assert CANARY not in (folder / "chat_template.jinja").read_text()


def test_a_link_named_like_a_hub_cache_does_not_open_the_way_to_elsewhere(
    outside: Path, model: Path, tmp_path: Path
) -> None:
    entry = tmp_path / "entry"
    (entry / "snapshots").mkdir(parents=True)
    snapshot = shutil.copytree(model, entry / "snapshots" / "c0ffee")
    (entry / "blobs").symlink_to(outside, target_is_directory=True)
    (snapshot / "chat_template.jinja").unlink()
    (snapshot / "chat_template.jinja").symlink_to("../../blobs/template.jinja")
    with pytest.raises(UserError, match="is a link that leaves its folder"):
        describe_model(snapshot.as_uri(), "main")


def test_a_pipe_in_a_model_folder_holds_nobody(model: Path) -> None:
    (model / "chat_template.jinja").unlink()
    os.mkfifo(model / "chat_template.jinja")
    assert not (describe_model(model.as_uri(), "main").folder / "chat_template.jinja").exists()


# --- data files


@pytest.mark.parametrize("name", ["train.csv", "train.jsonl"])
def test_a_tenant_links_a_data_file_to_somebody_elses(outside: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "named").mkdir()
    (tmp_path / "named" / name).symlink_to(outside / name)
    source = (tmp_path / "named" / name).as_uri()
    with pytest.raises(UserError, match="is a link that leaves its folder") as refused:
        Records(source, split="train", scratch=tmp_path, field="spec.dataset.source")
    assert CANARY not in str(refused.value)


def test_a_data_file_in_a_hub_cache_is_read_through_its_link(data: Path, tmp_path: Path) -> None:
    entry = tmp_path / "hub"
    (entry / "blobs").mkdir(parents=True)
    (entry / "snapshots" / "c0ffee" / "data").mkdir(parents=True)
    shutil.copy(data, entry / "blobs" / "1")
    link = entry / "snapshots" / "c0ffee" / "data" / "train.jsonl"
    link.symlink_to("../../../blobs/1")
    assert len(list(Records(link.as_uri(), split="train", scratch=tmp_path, field="f").read())) == 4


def test_a_data_file_that_is_swapped_is_read_as_it_was_when_its_digest_was_taken(outside: Path, data: Path) -> None:
    records = Records(data.as_uri(), split="train", scratch=data.parent, field="f")
    digest = records.digest()
    data.unlink()
    data.symlink_to(outside / "train.jsonl")
    assert records.digest() == digest
    assert CANARY not in str(list(records.read()))


# --- claims and buckets


@pytest.mark.parametrize(
    ("uri", "refusal"),
    [
        ("pvc://mine/../other/model", r"leaves its claim"),
        ("pvc://mine/%2e%2e/other/model", r"leaves its claim"),
        ("pvc://mine/way/model", r"leaves its claim"),
        ("pvc://../mine/model", r"names no claim"),
        ("pvc://%2e%2e/other/model", r"not mounted|names no claim"),
        ("s3://bucket/mine/../other", r"remove `\.\.` and `::` from it"),
        ("s3://bucket/mine::file:///etc", r"remove `\.\.` and `::` from it"),
    ],
)
def test_a_tenant_walks_out_of_a_claim_or_a_prefix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str, refusal: str
) -> None:
    monkeypatch.setenv("QLORA_PVC_ROOT", str(tmp_path))
    for claim in ("mine", "other"):
        (tmp_path / claim / "model").mkdir(parents=True)
    (tmp_path / "mine" / "way").symlink_to(tmp_path / "other")
    with pytest.raises(UserError, match=refusal):
        describe_model(uri, "main")
    with pytest.raises(UserError, match=refusal):
        JobStore(uri).take_fence(1)
    with pytest.raises(UserError, match=refusal):
        Records(f"{uri}/a.jsonl", split="train", scratch=tmp_path, field="f")


# --- the job's store


def in_store(store: Path, name: str, target: Path) -> None:
    """A link in a job's store, in place of what is there."""
    path = store / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


@pytest.mark.parametrize(
    "name", ["checkpoints", "prepared", "adapter", ".partial", "checkpoints/step-00000009", "fence.json"]
)
def test_a_tenant_links_the_store_so_that_the_sweep_empties_another_folder(
    outside: Path, model: Path, data: Path, tmp_path: Path, name: str
) -> None:
    store = tmp_path / "store" / "a" / "j-1"
    in_store(store, name, outside / "config.json" if name.endswith(".json") else outside)
    before = content(outside)
    with pytest.raises(UserError, match=r"is a link, and none is followed here") as refused:
        prepare.run(task(model, data, store))
    assert content(outside) == before
    assert CANARY not in str(refused.value)
    assert holding_canary(store) == []


def test_a_tenant_makes_a_jobs_own_folder_a_link_to_another_jobs(outside: Path, tmp_path: Path) -> None:
    in_store(tmp_path / "store" / "a", "j-1", outside)
    before = content(outside)
    store = JobStore((tmp_path / "store" / "a" / "j-1").as_uri())
    for attempt in (lambda: store.take_fence(1), store.sweep, lambda: store.delete_folder("step-00000001")):
        with pytest.raises(UserError, match="is a link, and none is followed here"):
            attempt()
    assert content(outside) == before


def test_a_file_of_a_stored_folder_becomes_a_link_after_it_was_vouched_for(outside: Path, tmp_path: Path) -> None:
    store = JobStore((tmp_path / "store" / "a" / "j-1").as_uri())
    make = lambda files: CheckpointManifest(step=1, attempt=1, prepared=DIGEST, versions={}, files=files)  # noqa: E731
    with store.scratch_folder() as folder:
        (folder / "adapter_model.safetensors").write_text(CANARY)
        uri = store.publish_folder(folder, "adapter", make)
    manifest = store.read_manifest("adapter", CheckpointManifest)
    assert manifest is not None
    in_store(tmp_path / "store" / "a" / "j-1", "adapter/adapter_model.safetensors", outside / "step-00000001/precious")
    with pytest.raises(UserError, match="is a link, and none is followed here"):
        store.fetch_folder("adapter", manifest.files, tmp_path)
    with pytest.raises(PermanentError, match="is a link that leaves its folder"):
        stored_adapter.download(uri, tmp_path / "downloaded", None)
    assert not (tmp_path / "downloaded").exists()


def test_the_config_of_a_model_that_is_a_link_is_not_read_for_a_plan(outside: Path, model: Path) -> None:
    (model / "config.json").unlink()
    (model / "config.json").symlink_to(outside / "config.json")
    with pytest.raises(InvalidObject, match="is a link that leaves its folder") as refused:
        model_config.read_facts(ModelSource(source=model.as_uri()))
    assert CANARY not in str(refused.value)


# --- anything


def tangled(rng: random.Random, folder: Path, outside: Path) -> None:
    """Put links of all kinds into a folder: to files and folders, near and far, absolute, relative, in chains."""
    here = [path for path in folder.rglob("*") if not path.is_symlink()]
    far = [outside, *outside.rglob("*")]
    for number in range(rng.randint(1, 4)):
        place = rng.choice([*here, folder / f"new-{number}"])
        target = rng.choice([*far, *far, *here, folder])
        if place in (folder, target) or not place.parent.is_dir():
            continue
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        place.unlink(missing_ok=True)
        if rng.random() < 0.3:
            middle = place.parent / f"middle-{number}"
            with suppress(FileExistsError):
                middle.symlink_to(target)
            target = middle
        place.symlink_to(os.path.relpath(target, place.parent) if rng.random() < 0.5 else target)


def attempts(model: Path, data: Path, store: Path) -> Iterator[Callable[[], object]]:
    """All that a job does with files."""
    own = JobStore(store.as_uri())
    yield lambda: prepare.run(task(model, data, store, attempt=2))
    yield lambda: resolve_model(model.as_uri(), "main")
    yield lambda: list(Records(data.as_uri(), split="train", scratch=store.parent, field="f").read())
    yield lambda: model_config.read_facts(ModelSource(source=model.as_uri()))
    yield own.sweep
    yield lambda: own.record_attempt(2, {"a": "b"})
    yield own.attempt_tags
    yield lambda: own.list_folders("checkpoints")
    yield lambda: own.delete_folder("checkpoints/step-00000001")
    yield lambda: publish.fetch_adapter(own, store.parent)
    yield lambda: stored_adapter.read_manifest(f"{store.as_uri()}/adapter")


@pytest.mark.parametrize("number", range(ROUNDS))
def test_links_of_any_kind_lead_nowhere(
    outside: Path, model: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    rng = random.Random(SEED * 1000 + number)
    store = tmp_path / "store" / "a" / "j-1"
    for name in ("checkpoints/step-00000001", "adapter", "prepared/0123", ".partial/x"):
        (store / name).mkdir(parents=True)
        (store / name / "file").write_text("ours")
    if rng.random() < 0.5:
        JobStore(store.as_uri()).take_fence(1)
    for folder in rng.sample([model, data.parent, store, store.parent], k=rng.randint(1, 3)):
        tangled(rng, folder, outside)
    before = content(outside)
    said: list[str] = []
    for attempt in attempts(model, data, store):
        try:
            said.append(repr(attempt()))
        except (StageError, OrchestratorError) as error:
            said.append(str(error))
    assert content(outside) == before
    assert holding_canary(tmp_path / "store") == []
    assert CANARY not in "\n".join([*said, caplog.text])
