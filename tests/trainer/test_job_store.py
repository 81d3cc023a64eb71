"""The job's store: folders that exist when their manifest does, the fence, and what its failures are called.

Every rule runs over a file system and over fsspec's object-store interface (`memory://`, which cannot rename).
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest
from qlora_trainer.outcome import FencedError, Transient, UserError
from qlora_trainer.storage.backends import DamagedFolder
from qlora_trainer.storage.backoff import Backoff
from qlora_trainer.storage.job_store import JobStore
from qlora_trainer.storage.uri import local_path

from orchestrator.api.formats import CheckpointManifest, FileEntry

DIGEST = "sha256:" + "0" * 64
NAME = "checkpoints/step-00000001"


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> JobStore:
    if request.param == "file":
        return JobStore(f"{tmp_path.as_uri()}/team-a/job-1")
    return JobStore(f"memory://{uuid.uuid4().hex}/job-1")


def make_manifest(files: tuple[FileEntry, ...]) -> CheckpointManifest:
    return CheckpointManifest(step=1, attempt=1, prepared=DIGEST, versions={}, files=files)


def make_folder(folder: Path, **contents: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return folder


def publish(store: JobStore, name: str = NAME, **contents: bytes) -> str:
    with store.scratch_folder() as folder:
        return store.publish_folder(make_folder(folder, **contents), name, make_manifest)


def fetch(store: JobStore, into: Path, name: str = NAME) -> dict[str, bytes]:
    manifest = store.read_manifest(name, CheckpointManifest)
    assert manifest is not None
    folder = store.fetch_folder(name, manifest.files, into)
    return {entry.name: (folder / entry.name).read_bytes() for entry in manifest.files}


def paths_outside(store: JobStore) -> list[str]:
    """What lies in the store, seen without its code."""
    fs, root = fsspec.core.url_to_fs(store.uri)
    return sorted(path.removeprefix(root + "/") for path in fs.find(root))


def test_a_published_folder_lies_under_its_name_with_a_manifest_that_vouches_for_it(store: JobStore) -> None:
    uri = publish(store, one=b"1", two=b"22")
    assert uri == f"{store.uri}/{NAME}"
    assert paths_outside(store) == [f"{NAME}/manifest.json", f"{NAME}/one", f"{NAME}/two"]
    manifest = store.read_manifest(NAME, CheckpointManifest)
    assert manifest is not None
    assert [(entry.name, entry.bytes, entry.sha256) for entry in manifest.files] == [
        ("one", 1, hashlib.sha256(b"1").hexdigest()),
        ("two", 2, hashlib.sha256(b"22").hexdigest()),
    ]


def test_a_folder_from_elsewhere_is_copied_and_stays_where_it_was(store: JobStore, tmp_path: Path) -> None:
    source = make_folder(tmp_path / "elsewhere", one=b"1")
    store.publish_folder(source, NAME, make_manifest)
    assert (source / "one").read_bytes() == b"1"
    assert fetch(store, tmp_path / "fetched") == {"one": b"1"}


def test_a_folder_of_the_same_name_is_replaced_as_a_whole(store: JobStore, tmp_path: Path) -> None:
    publish(store, one=b"1", two=b"22")
    publish(store, one=b"other")
    assert fetch(store, tmp_path / "fetched") == {"one": b"other"}
    assert paths_outside(store) == [f"{NAME}/manifest.json", f"{NAME}/one"]


def test_publishing_the_same_bytes_again_leaves_the_files_alone(tmp_path: Path) -> None:
    store = JobStore(f"{tmp_path.as_uri()}/job")
    publish(store, one=b"1")
    before = (tmp_path / "job" / NAME / "one").stat()
    publish(store, one=b"1")
    after = (tmp_path / "job" / NAME / "one").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_a_folder_that_was_never_finished_does_not_exist_and_is_swept(store: JobStore) -> None:
    def refuse(files: tuple[FileEntry, ...]) -> CheckpointManifest:
        raise FencedError("a later attempt owns the store")

    publish(store, "checkpoints/step-00000002", one=b"1")
    with store.scratch_folder() as folder, pytest.raises(FencedError):
        store.publish_folder(make_folder(folder, one=b"1"), NAME, refuse)
    assert f"{NAME}/one" in paths_outside(store)
    assert store.list_folders("checkpoints") == ["checkpoints/step-00000002"]
    assert store.read_manifest(NAME, CheckpointManifest) is None
    store.sweep()
    assert paths_outside(store) == ["checkpoints/step-00000002/manifest.json", "checkpoints/step-00000002/one"]


def test_what_a_killed_writer_left_in_its_scratch_folder_is_swept(tmp_path: Path) -> None:
    store = JobStore(f"{tmp_path.as_uri()}/job")
    publish(store, one=b"1")
    make_folder(tmp_path / "job" / ".partial" / "abc", half=b"...")
    store.sweep()
    assert paths_outside(store) == [f"{NAME}/manifest.json", f"{NAME}/one"]


def test_a_deleted_folder_is_gone(store: JobStore) -> None:
    publish(store, one=b"1")
    store.delete_folder(NAME)
    assert paths_outside(store) == []


@pytest.mark.parametrize("damage", ["changed", "cut", "missing"])
def test_a_file_that_is_not_what_the_manifest_says_is_damage_that_names_it(
    store: JobStore, tmp_path: Path, damage: str
) -> None:
    publish(store, one=b"1234", two=b"22")
    fs, root = fsspec.core.url_to_fs(store.uri)
    fs.rm_file(f"{root}/{NAME}/one")
    if damage != "missing":
        fs.pipe_file(f"{root}/{NAME}/one", b"1235" if damage == "changed" else b"123")
    with pytest.raises(DamagedFolder, match=r"step-00000001.*one"):
        fetch(store, tmp_path / "fetched")


def test_an_unreadable_manifest_counts_as_none(store: JobStore) -> None:
    publish(store, one=b"1")
    fs, root = fsspec.core.url_to_fs(store.uri)
    fs.pipe_file(f"{root}/{NAME}/manifest.json", b"{half a manif")
    assert store.read_manifest(NAME, CheckpointManifest) is None


def test_the_highest_attempt_owns_the_store(store: JobStore) -> None:
    store.take_fence(1)
    store.take_fence(3)
    store.check_fence(3)
    for refused in (store.take_fence, store.check_fence):
        with pytest.raises(FencedError, match="attempt 3 owns"):
            refused(2)
    store.take_fence(3)  # the same attempt, restarted


def test_a_fence_overwritten_by_a_race_is_healed_by_the_later_attempt(store: JobStore) -> None:
    store.take_fence(5)
    fs, root = fsspec.core.url_to_fs(store.uri)
    fs.pipe_file(f"{root}/fence.json", b'{"attempt": 4}')
    store.check_fence(5)
    with pytest.raises(FencedError):
        store.check_fence(4)


def test_uris_name_local_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_PVC_ROOT", str(tmp_path))
    (tmp_path / "data").mkdir()
    assert local_path("pvc://data/jobs/a") == tmp_path / "data" / "jobs" / "a"
    assert local_path("file:///srv/two%20words") == Path("/srv/two words")
    assert local_path("s3://bucket/key") is None
    for uri, complaint in {
        "pvc://other/jobs": "not mounted",
        "pvc://data/../../etc": r"leaves its claim",
        "file://host/path": "three slashes",
    }.items():
        with pytest.raises(UserError, match=complaint):
            local_path(uri)


def test_a_store_that_is_a_file_is_a_users_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_bytes(b"")
    with pytest.raises(UserError, match="must name a folder"):
        JobStore(f"{tmp_path.as_uri()}/taken/job").take_fence(1)


def test_an_unwritable_store_is_a_users_error_that_names_it() -> None:
    # Not under tmp_path, whose parents only their owner may enter.
    with tempfile.TemporaryDirectory() as closed:
        Path(closed).chmod(0o555)
        with as_ordinary_user(), pytest.raises(UserError, match=rf"{closed}/job.*may read and write"):
            JobStore(f"file://{closed}/job").take_fence(1)


@contextmanager
def as_ordinary_user() -> Iterator[None]:
    """Root may write anywhere, so look at the world as nobody."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"needs the right to mount a tmpfs: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_transient_names_the_store_and_loses_nothing(small_disk: Path, tmp_path: Path) -> None:
    store = JobStore(f"{small_disk.as_uri()}/job")
    publish(store, one=b"1" * 100_000)
    source = make_folder(tmp_path / "source", one=b"2" * 200_000)
    with pytest.raises(Transient, match=r"small/job: the disk is full \(\d+ bytes are free\)"):
        store.publish_folder(source, "checkpoints/step-00000002", make_manifest)
    store.sweep()
    assert fetch(store, tmp_path / "fetched") == {"one": b"1" * 100_000}


def test_a_store_that_does_not_answer_is_asked_again_and_then_transient(monkeypatch: pytest.MonkeyPatch) -> None:
    # Port 9 of the loopback answers nobody; a real client with real errors meets it.
    s3fs = pytest.importorskip("s3fs")
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # the client's own tries, on top of which come ours
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with pytest.raises(Transient, match=r"s3://bucket/job: the store does not answer"):
        JobStore("s3://bucket/job", Backoff(tries=2, first_pause_seconds=0.01)).take_fence(1)
