"""Sweeps on a real API server: what it refuses, in the models' words, what cannot be changed, and whom it deletes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.adapters.kubernetes.api import KubeApi, path_of
from orchestrator.adapters.kubernetes.objects import Parser
from orchestrator.adapters.kubernetes.store import KubernetesStore
from orchestrator.api.base import API_VERSION
from orchestrator.api.crd import RULES
from orchestrator.api.job import RELEASE_FINALIZER
from orchestrator.api.sweep import (
    DecimalRange,
    IntegerRange,
    LogRange,
    QLoRASweep,
    QLoRASweepSpec,
    QLoRASweepStatus,
    SweepDimension,
    TrialStatus,
)
from orchestrator.core.snapshot import UnreadableSweep
from orchestrator.core.sweep.search import trial_job
from orchestrator.errors import Conflict, InvalidObject
from tests.builders import submitted_sweep
from tests.cluster.control_plane import ControlPlane, control_plane
from tests.cluster.resources import clear, furnish, require
from tests.cluster.test_crd_bounds import complaints_about
from tests.core.test_sweeps import BAD

SWEEPS = path_of(API_VERSION, "qlorasweeps", "team-a")
PATIENCE_SECONDS = 30.0
Json = dict[str, Any]


@pytest.fixture
def api(cluster: ControlPlane) -> Iterator[KubeApi]:
    """A cluster without sweeps."""
    api = cluster.api()
    clear(api)
    yield api
    clear(api)
    api.close()


def wire(**spec: Any) -> Json:
    sweep = submitted_sweep().to_wire()
    fields: Any = sweep["spec"]
    return {**sweep, "metadata": {"name": "search"}, "spec": {**fields, **spec}}


def complaints(api: KubeApi, document: Json) -> tuple[str, str]:
    """What the model and the API server have against it."""
    return complaints_about(api, QLoRASweep, SWEEPS, document)


def dimension(**way: Any) -> Json:
    return {"space": [{"field": "training.learningRate", **way}]}


RANKS = {"field": "adapter.rank", "choice": ["8"]}
BREAKERS: list[Json] = [spec for spec, _ in BAD]
BREAKERS += [
    dimension(uniform={"min": "0", "max": "1"}, choice=["1"]),
    dimension(logUniform={"min": "2", "max": "1"}),
    dimension(choice=["1", "1"]),
    dimension(choice=[]),
    dimension(choice=["1 2"]),
    {"space": [{"field": "adapter.rank", "integer": {"min": 8, "max": 8}}]},
    {"space": [RANKS, RANKS]},
    {"job": {**wire()["spec"]["job"], "tracking": {"promote": {"alias": "a", "when": []}}}},
    {"job": {**wire()["spec"]["job"], "training": {"epochs": "0"}}},
    {"trials": 257},
    {"parallel": 0},
    {"maxFailures": -1},
    {"algorithm": "grid"},
]
TAKEN: list[Json] = [
    {},
    dimension(uniform={"min": "0", "max": "1e-3"}),
    dimension(choice=["1e-4", "0.001"]),
    {"space": [{"field": "training.scheduler", "choice": ["cosine", "constant"]}]},
    {"space": [{"field": "training.seed", "integer": {"min": 0, "max": 2**31 - 1}}]},
    {"earlyStop": {"firstStep": 100, "eta": 2}, "promote": "champion", "metric": {"name": "train/loss"}},
]


def test_the_server_and_the_models_take_the_same_sweeps(api: KubeApi) -> None:
    for spec in TAKEN:
        assert complaints(api, wire(**spec)) == ("", ""), spec
    for spec in BREAKERS:
        ours, theirs = complaints(api, wire(**spec))
        assert ours, spec
        assert theirs, spec


def test_every_rule_of_a_sweep_is_told_in_the_models_words(api: KubeApi) -> None:
    models = (DecimalRange, LogRange, IntegerRange, SweepDimension, QLoRASweepSpec)
    own = {rule.message for model in models for rules in RULES[model].values() for rule in rules}
    gate = {"tracking": {"promote": {"alias": "champion", "when": [{"metric": "f1", "atLeast": "0"}]}}}
    generation = {"evaluation": {"generation": {}}}
    gated = {"job": {**wire()["spec"]["job"], **gate, **generation}}
    met = set[str]()
    for spec in [*BREAKERS, gated]:
        ours, theirs = complaints(api, wire(**spec))
        met |= {message for message in own if message in ours and message in theirs}
    assert met == own


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "spec.seed cannot be changed"),
        ({"space": [RANKS]}, "spec.space cannot be changed"),
        ({"metric": {"name": "train/loss"}}, "spec.metric cannot be changed"),
        ({"promote": "champion"}, "spec.promote cannot be changed"),
        ({"earlyStop": {"firstStep": 100}}, "spec.earlyStop cannot be changed"),
        ({"job": {"model": {"source": "hf://owner/other"}}}, "spec.model cannot be changed"),
    ],
)
def test_what_the_trials_so_far_depend_on_cannot_be_changed(api: KubeApi, change: Json, words: str) -> None:
    api.create(SWEEPS, wire())
    with pytest.raises(InvalidObject, match=words):
        api.patch(f"{SWEEPS}/search", {"spec": change})
    api.patch(f"{SWEEPS}/search", {"spec": {"trials": 8, "parallel": 4, "maxFailures": 8}})


def test_a_name_leaves_room_for_those_of_the_trials(api: KubeApi) -> None:
    for length, is_taken in ((44, True), (45, False)):
        ours, theirs = complaints(api, {**wire(), "metadata": {"name": "s" * length}})
        assert (not ours, not theirs) == (is_taken, is_taken), theirs


def test_a_marked_sweep_that_this_version_cannot_read_is_let_go(api: KubeApi) -> None:
    """What others hold stays; a view that is kept up to date and one that asks the server see the same."""
    store, watching = KubernetesStore(api), KubernetesStore(api)
    watching.start()
    sweep = store.create_sweep(submitted_sweep())
    trial = TrialStatus(index=0, job="search-0", parameters={"adapter.rank": "8"})
    store.update_sweep_status(sweep, QLoRASweepStatus(trials=(trial,)))
    api.patch(f"{SWEEPS}/search", {"metadata": {"finalizers": [RELEASE_FINALIZER, "example.com/mine"]}})
    store.delete_sweep("team-a", "search")
    stored = api.get(f"{SWEEPS}/search")
    # A number that the schema takes and no model of this version does.
    newer = {**stored, "status": {**stored["status"], "trials": [{**stored["status"]["trials"][0], "parameters": 1}]}}
    parsed = Parser().sweep(newer)
    assert isinstance(parsed, UnreadableSweep)
    assert parsed.metadata.finalizers == (RELEASE_FINALIZER, "example.com/mine")
    api.patch(f"{SWEEPS}/search", {"metadata": {"annotations": {"example.com/seen": "yes"}}})
    watching.refresh()
    with pytest.raises(Conflict):
        watching.release_sweep(parsed)
    fresh = Parser().sweep({**newer, "metadata": api.get(f"{SWEEPS}/search")["metadata"]})
    assert isinstance(fresh, UnreadableSweep)
    watching.release_sweep(fresh)
    [left] = watching.list_sweeps()
    assert left.metadata.finalizers == ("example.com/mine",)
    api.patch(f"{SWEEPS}/search", {"metadata": {"finalizers": None}})
    watching.refresh()
    assert watching.list_sweeps() == store.list_sweeps() == []
    watching.close()


@pytest.mark.skipif("QLORA_FUZZ" not in os.environ, reason="it hears of new kinds every 30 s: with `make nightly`")
def test_the_garbage_collector_takes_the_trials_with_their_sweep(tmp_path: Path) -> None:
    require("etcd", "kube-apiserver", "kube-controller-manager")
    with control_plane(tmp_path, "kube-controller-manager") as plane:
        api = plane.api()
        furnish(api)
        store = KubernetesStore(api)
        sweep = store.create_sweep(submitted_sweep())
        for index in range(2):
            store.create_job(trial_job(sweep, index))
        store.delete_sweep("team-a", "search")
        deadline = time.monotonic() + PATIENCE_SECONDS
        while store.list_jobs("team-a") and time.monotonic() < deadline:
            time.sleep(0.2)
        assert store.list_jobs("team-a") == []
        api.close()
