"""Local data files of a job for a cluster, against a real S3 server of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.adapters.job_store import uploads
from orchestrator.cli.console import say
from orchestrator.errors import InvalidObject, StoreUnavailable
from orchestrator.sdk import Client
from tests.cluster.resources import require
from tests.sdk.paper_service import PaperService, job_document, service_that_is_up
from tests.trainer.s3_server import ACCESS, BUCKET, REGION, SECRET, S3Server, s3_server

pytest.importorskip("s3fs")
STORE = f"s3://{BUCKET}/jobs"
ON_THE_HUB = {"model": {"source": "hf://acme/tiny"}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    require("versitygw")
    with s3_server(tmp_path_factory.mktemp("s3")) as found:
        yield found


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PaperService:
    return service_that_is_up(tmp_path, monkeypatch)


def client_of(service: PaperService, monkeypatch: pytest.MonkeyPatch, port: int, store: str = STORE) -> Client:
    """A client of a cluster whose jobs are stored in the server's bucket."""
    account = {"AWS_ACCESS_KEY_ID": ACCESS, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": REGION}
    for name, value in {**account, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}.items():
        monkeypatch.setenv(name, value)
    settings = service.settings.model_copy(update={"store_uri": store})
    return Client(settings, connection=replace(service.connection, is_local=False))


def test_a_local_file_goes_into_the_jobs_bucket_once(
    service: PaperService, server: S3Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(uploads, "CHUNK_BYTES", 6 << 20)
    Path("held out.jsonl").write_bytes(b'{"messages": []}\n' * 1_000_000)
    Path("linked.jsonl").symlink_to("held out.jsonl")
    client = client_of(service, monkeypatch, server.port)
    document = job_document(**ON_THE_HUB)
    document["spec"]["dataset"]["evalSource"] = "file://./linked.jsonl"
    assert client.check(document).spec.dataset.source.startswith("file://"), "a check uploads nothing"
    assert list(server.bucket.rglob("*.jsonl")) == []
    spec = client.submit(document, told=say).object().spec
    assert spec.dataset.source.startswith(f"{STORE}/default/uploads/")
    objects = {path.name: path for path in (server.bucket / "jobs" / "default" / "uploads").iterdir()}
    for uri, local in ((spec.dataset.source, "train.jsonl"), (spec.dataset.eval_source or "", "linked.jsonl")):
        assert objects[uri.rpartition("/")[2]].read_bytes() == Path(local).read_bytes()
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "uploading train.jsonl: 100 % of 0.0 MiB"
    assert said[-1] == "uploading linked.jsonl: 100 % of 16.2 MiB"
    assert len(said) == 4, said
    before = {name: path.stat().st_mtime_ns for name, path in objects.items()}
    client.submit(document | {"metadata": {"name": "again"}}, told=say)
    assert capsys.readouterr().err == "", "it is there already"
    assert {name: path.stat().st_mtime_ns for name, path in objects.items()} == before


def test_a_local_model_goes_into_the_jobs_bucket_with_the_files_that_the_trainer_reads(
    service: PaperService, server: S3Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path("model")
    (folder / "model.safetensors").write_bytes(b"weights" * 1000)
    (folder / "code.py").write_text("print('never')")
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    client = client_of(service, monkeypatch, server.port)
    source = client.submit(job_document("mine"), told=say).object().spec.model.source
    assert source.startswith(f"{STORE}/default/uploads/")
    there = server.bucket / source.removeprefix(f"s3://{BUCKET}/")
    names = ("config.json", "model.safetensors", "tokenizer.json")
    assert sorted(path.name for path in there.iterdir()) == sorted(names)
    assert all((there / name).read_bytes() == (folder / name).read_bytes() for name in names)
    assert "uploading model: 100 % of 0.0 MiB" in capsys.readouterr().err
    (there / "model.safetensors").unlink()  # as if the first try had been cut off
    kept = (there / "config.json").stat().st_mtime_ns
    client.submit(job_document("again"), told=say)
    assert (there / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert (there / "config.json").stat().st_mtime_ns == kept
    (folder / "model.safetensors").write_bytes(b"others" * 1000)
    assert client.submit(job_document("other")).object().spec.model.source != source


def test_a_local_adapter_goes_into_the_jobs_bucket(
    service: PaperService, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, client = Path("starting"), client_of(service, monkeypatch, server.port)
    folder.mkdir()
    document = job_document(**ON_THE_HUB)
    document["spec"]["adapter"] = {"from": "file://./starting"}
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        with pytest.raises(InvalidObject, match=f"spec.adapter.from: there is no {name} in .*starting"):
            client.submit(document)
        (folder / name).write_bytes(b"{}")
    (folder / "adapter_model.bin").write_bytes(b"pickled")
    start = client.submit(document).object().spec.adapter.start
    assert start is not None
    assert start.startswith(f"{STORE}/default/uploads/")
    there = server.bucket / start.removeprefix(f"s3://{BUCKET}/")
    assert sorted(path.name for path in there.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_without_a_bucket_it_is_said_what_would_do(service: PaperService, monkeypatch: pytest.MonkeyPatch) -> None:
    for store in ("pvc://jobs/store", service.settings.store_uri):
        client = client_of(service, monkeypatch, 9, store)
        with pytest.raises(
            InvalidObject, match=r"dataset\.source: .* is a file of one .*QLORA_STORE_URI=s3://.*kubectl cp"
        ):
            client.submit(job_document(**ON_THE_HUB))


def test_what_cannot_be_uploaded_is_refused_before_anything_is_stored(
    service: PaperService, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_of(service, monkeypatch, 9)
    Path("model/model.safetensors").rename("model/weights.bin")
    with pytest.raises(InvalidObject, match=r"spec\.model\.source: .* holds only pickled weights"):
        client.submit(job_document())
    Path("train.jsonl").write_bytes(b"")
    with pytest.raises(InvalidObject, match=r"spec\.dataset\.source: .*train\.jsonl is empty"):
        client.check(job_document(**ON_THE_HUB))
    Path("train.jsonl").write_bytes(b"{}\n")
    monkeypatch.setattr(uploads, "MAX_UPLOAD_BYTES", 2)
    with pytest.raises(InvalidObject, match="no more than 2 are uploaded"):
        client.submit(job_document(**ON_THE_HUB))
    monkeypatch.undo()
    assert service.store.list_jobs() == []


def test_a_bucket_that_does_not_answer_is_told(service: PaperService, monkeypatch: pytest.MonkeyPatch) -> None:
    client = client_of(service, monkeypatch, 9)
    with pytest.raises(StoreUnavailable, match="could not be written"):
        client.submit(job_document(**ON_THE_HUB))
    assert service.store.list_jobs() == []
