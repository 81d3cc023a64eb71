"""What a tenant of a cluster names that is not a job's: files, the service's claims, other jobs' folders and stores."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote, unquote

import pytest

from orchestrator.api.job import DatasetSource, ModelSource, QLoRAJob, StoreSpec
from orchestrator.api.reasons import ConditionType, Reason
from orchestrator.core.commands import EnsureStage, WriteStatus
from orchestrator.core.decide import decide
from orchestrator.core.job.addresses import AddressRules, refused_address
from orchestrator.core.snapshot import Snapshot
from tests.builders import NOW, POLICY, gpu_class, submitted_job

DEFAULT = "pvc://store/jobs"
RULES = AddressRules(
    restricted=True, stores=("s3://results/jobs",), reserved_claims=frozenset({"mlflow", "model-cache"})
)
HUB: dict[str, Any] = {"model": ModelSource(source="hf://a/b"), "dataset": DatasetSource(source="hf://a/b")}


def job(**spec: Any) -> QLoRAJob:
    return submitted_job("medical", "team-a", **{**HUB, **spec})


def with_uri(field: str, uri: str) -> QLoRAJob:
    if field == "model":
        return job(model=ModelSource(source=uri))
    if field == "store":
        return job(store=StoreSpec(uri=uri))
    return job(dataset=DatasetSource.model_validate({"source": "hf://a/b", field: uri}))


FOREIGN = [
    ("model", "file:///var/cache/qlora/huggingface/hub/models--meta--secret", "is a file of one machine"),
    ("source", "file:///etc/shadow.csv", "is a file of one machine"),
    ("evalSource", "file:///etc/shadow.csv", "is a file of one machine"),
    ("store", "file:///var/cache/qlora", "is a file of one machine"),
    ("model", "pvc://mlflow/artifacts/1/models", "a claim of the service's own"),
    ("model", "pvc://mlflow", "a claim of the service's own"),
    ("model", "pvc://model-cache/models", "a claim of the service's own"),
    ("store", "pvc://mlflow/artifacts", "a claim of the service's own"),
    ("store", "pvc://store/jobs/team-b/other-1234", "is no store that jobs may name here"),
    ("store", "pvc://store/jobs/team-a/other-1234", "is no store that jobs may name here"),
    ("store", "pvc://store", "is no store that jobs may name here"),
    ("store", "s3://results", "is no store that jobs may name here"),
    ("store", "s3://results/jobs/x", "is no store that jobs may name here"),
    ("store", "s3://elsewhere/jobs", "is no store that jobs may name here"),
    ("model", "pvc://store/jobs/team-b/other-1234/adapter", "another namespace's jobs; those of team-a lie below"),
    ("source", "s3://results/jobs/team-b/x-1/prepared/1/train.parquet", "another namespace's jobs"),
    ("source", "s3://results//jobs/team-b/x.parquet", "another namespace's jobs"),
    ("model", "pvc://store/jobs/%74eam-b/other", "another namespace's jobs"),
    ("model", "pvc://store/./jobs/./team-b/other", "another namespace's jobs"),
    ("model", "pvc://data/../mlflow", "remove `..`"),
    ("model", "pvc://data/%2e%2e/mlflow", "remove `..`"),
    ("model", "pvc://data/%2E./mlflow", "remove `..`"),
    ("source", "s3://data/x::file:///etc/x.csv", "remove `..` and `::`"),
    ("model", "pvc://user@mlflow/x", "names no claim"),
    ("model", "pvc:///mlflow/x", "names no claim"),
    ("model", "pvc://%6dlflow/x", "names no claim"),
]
OWN = [
    ("model", "hf://owner/name"),
    ("model", "pvc://data/model"),
    ("model", "pvc://mlflow-of-ours/model"),
    ("source", "s3://data/train.jsonl"),
    ("source", "pvc://store/data/train.jsonl"),
    ("model", "pvc://store/jobs/team-a/other-1234/merged"),
    ("store", DEFAULT),
    ("store", f"{DEFAULT}/"),
    ("store", "s3://results/jobs"),
]


@pytest.mark.parametrize(("field", "uri", "words"), FOREIGN, ids=[f"{field} {uri}" for field, uri, _ in FOREIGN])
def test_a_tenant_names_what_is_not_a_jobs(field: str, uri: str, words: str) -> None:
    refusal = refused_address(with_uri(field, uri), DEFAULT, RULES)
    assert refusal is not None
    assert words in refusal
    assert refusal.startswith("spec.")
    assert uri in refusal


@pytest.mark.parametrize(("field", "uri"), OWN, ids=[f"{field} {uri}" for field, uri in OWN])
def test_what_is_a_jobs_own_is_not_refused(field: str, uri: str) -> None:
    assert refused_address(with_uri(field, uri), DEFAULT, RULES) is None


def test_on_ones_own_machine_everything_is_ones_own() -> None:
    for field, uri, _ in FOREIGN:
        assert refused_address(with_uri(field, uri), DEFAULT, AddressRules()) is None


@pytest.mark.parametrize("index", range(0, len(FOREIGN), 5))
def test_it_ends_before_anything_runs_and_moves_nobody(index: int) -> None:
    field, uri, words = FOREIGN[index]
    submitted = with_uri(field, uri)
    policy = replace(POLICY, store_uri=DEFAULT, addresses=RULES)
    other = job().model_copy(update={"metadata": job().metadata.model_copy(update={"name": "innocent", "uid": "2"})})
    commands = decide(Snapshot(now=NOW, jobs=(submitted, other), gpu_classes=(gpu_class("24Gi", 1),), policy=policy))
    written = next(c for c in commands if isinstance(c, WriteStatus) and c.job.metadata.name == "medical")
    finished = written.status.condition(ConditionType.FINISHED)
    assert finished is not None
    assert (finished.status, finished.reason) == ("True", Reason.USER_ERROR)
    assert words in finished.message
    assert [c.task.job for c in commands if isinstance(c, EnsureStage)] == ["innocent"]


def disguised(rng: random.Random, uri: str) -> str:
    """Another spelling of what a trainer reads as the same place."""
    scheme, _, rest = uri.partition("://")
    place, *names = rest.split("/")
    spelled: list[str] = []
    for name in names:
        if rng.random() < 0.3:
            spelled.append(rng.choice(["", "."]))
        if scheme == "pvc" and rng.random() < 0.5:
            spot = rng.randrange(len(name))
            name = f"{quote(name[:spot])}%{ord(name[spot]):02x}{quote(name[spot + 1 :])}"
        spelled.append(name)
    return f"{scheme}://{'/'.join([place, *spelled])}" + rng.choice(["", "/", "//", "/." if scheme == "pvc" else ""])


@pytest.mark.parametrize("seed", range(50))
def test_no_spelling_of_another_teams_folder_is_taken(seed: int) -> None:
    """The judge is how a POSIX path is read: what lies below another namespace's folder is refused, however written."""
    rng = random.Random(seed)
    for _ in range(20):
        target = rng.choice(["pvc://store/jobs/team-b/other-1/adapter", "s3://results/jobs/team-b/x-1/train.jsonl"])
        uri = disguised(rng, target)
        path = PurePosixPath(unquote(uri.partition("://")[2]) if uri.startswith("pvc") else uri.partition("://")[2])
        assert "team-b" in path.parts
        assert refused_address(with_uri("model", uri), DEFAULT, RULES) is not None, uri
        assert refused_address(with_uri("store", uri), DEFAULT, RULES) is not None, uri
