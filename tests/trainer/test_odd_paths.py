"""Files of any name are the ones that are read: by the SDK before a job is sent, and by prepare."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from qlora_trainer.outcome import UserError
from qlora_trainer.storage.uri import PVC_ROOT_VARIABLE, local_path

from orchestrator.api.uris import claim_and_path, file_path, file_uri
from orchestrator.sdk import first_job
from orchestrator.sdk.data_count import count_data
from orchestrator.sdk.manifest import load_manifest

LETTERS = st.characters(blacklist_characters="/\0", blacklist_categories=("Cs",))
NAMES = st.text(LETTERS, min_size=1, max_size=20).filter(lambda name: name not in (".", ".."))
ODD = ("a#1.jsonl", "what?.jsonl", "100%.jsonl", "año.jsonl", "a;b&c=d.jsonl", "a+b@c.jsonl")
RECORD = json.dumps({"text": "one two three"})


@given(folder=NAMES, name=NAMES)
def test_a_paths_uri_is_read_back_as_the_path_by_service_and_trainer(folder: str, name: str) -> None:
    path = Path("/data") / folder / name
    uri = file_uri(path)
    assert uri.isascii()
    assert not set(uri) & set(" #?")
    assert file_path(uri) == local_path(uri) == path


@pytest.mark.parametrize("name", ODD)
def test_a_name_that_is_written_as_it_is_means_that_file(name: str) -> None:
    assert file_path(f"file:///data/{name}") == local_path(f"file:///data/{name}") == Path("/data") / name


def test_a_claims_paths_are_read_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.setenv(PVC_ROOT_VARIABLE, str(tmp_path))
    for uri, name in (("pvc://data/a%231.jsonl", "a#1.jsonl"), ("pvc://data/x/a#1.jsonl", "x/a#1.jsonl")):
        assert claim_and_path(uri) == ("data", name)
        assert local_path(uri) == tmp_path / "data" / name


def test_another_host_is_still_refused() -> None:
    with pytest.raises(UserError, match="host 'there'"):
        local_path("file://there/data.jsonl")
    assert local_path("file://localhost/data.jsonl") == Path("/data.jsonl")


@pytest.mark.parametrize("name", [*ODD, "100%25.jsonl", "with space.jsonl"])
def test_a_first_job_and_a_manifest_name_the_file_that_is_there(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "odd #%20 folder"
    folder.mkdir()
    data = folder / name
    data.write_text((RECORD + "\n") * 4)
    document = first_job.document(str(data), "hf://owner/name", name="odd", spec={"dataset": {"format": "text"}})
    manifest = folder / "job.json"
    manifest.write_text(json.dumps(document))
    (job,) = load_manifest(manifest)
    assert file_path(job.spec.dataset.source) == data
    counted = count_data(job.spec)
    assert counted is not None
    assert counted.records > 0
    document["spec"]["dataset"]["source"] = first_job.file_source(data, folder)
    manifest.write_text(json.dumps(document))
    (again,) = load_manifest(manifest)
    assert file_path(again.spec.dataset.source) == data
