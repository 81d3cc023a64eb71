"""The chart's roles on a real API server: what each account may do, asked of everything that the server knows.

The manifests are the chart's own, rendered for jobs in `team-a`. Accounts are service accounts with real tokens. For
each, every verb on every resource is put to the server's authorizer, and the whole answer is compared with the table
here: a right too many shows as well as one that is missing. Then each does a few things for real.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.page import get
from orchestrator.adapters.kubernetes.api import Forbidden, Json, KubeApi, path_of
from orchestrator.adapters.kubernetes.store import KubernetesStore
from orchestrator.api.base import API_VERSION
from orchestrator.api.job import Condition, ModelSource
from orchestrator.api.reasons import ConditionType, Reason
from orchestrator.cli.exits import ExitStatus
from orchestrator.cli.main import app
from orchestrator.errors import WaitTimedOut
from orchestrator.page.app import make_app
from orchestrator.page.server import client_view, parts
from orchestrator.sdk.client import Client
from orchestrator.sdk.explanation import ON_RECORD
from orchestrator.settings import Settings
from tests.builders import NOW, ON_THE_HUB, prepared_status, submitted_job
from tests.cluster.accounts import (
    HOMES,
    RBAC,
    ROLE,
    account,
    acting_as,
    binding,
    chart_parts,
    create,
    kubeconfig_of,
    roles_and_accounts,
)
from tests.cluster.control_plane import CONTEXT, ControlPlane, control_plane
from tests.cluster.resources import furnish, require
from tests.deploy.render import NAMESPACE, documents
from tests.page.gates import OpenGate
from tests.sdk.paper_service import LLAMA_8B

CLUSTER = "cluster"
"""Stands for what is in no namespace."""
WITH_PAGE = "page.enabled=true,jobs.namespaces={team-a}"
PLACES = ("team-a", "team-b", NAMESPACE, CLUSTER)
VERBS = ("create", "delete", "deletecollection", "get", "list", "patch", "update", "watch")
LOOK = "get list watch"
CHANGE = "create delete get list patch update watch"
ASKED_FOR_ONLY = (("qlora.dev", "qlorajobs/finalizers", True), ("qlora.dev", "qloraqueues/finalizers", False))
"""Not served, but asked for of whoever names an owner that blocks its deletion."""
AGGREGATION_SECONDS = 60.0

Rights = Mapping[tuple[str, str], str]
"""(place, resource) -> verbs."""

RIGHTS: Mapping[str, Rights] = {
    "submitter": {
        ("team-a", "qlorajobs.qlora.dev"): CHANGE,
        ("team-a", "qlorasweeps.qlora.dev"): CHANGE,
        ("team-a", "events"): "list watch",
        ("team-a", "events.events.k8s.io"): "list",
        ("team-a", "pods"): LOOK,
        ("team-a", "pods/log"): "get",
    },
    "viewer": {
        ("team-a", "qlorajobs.qlora.dev"): LOOK,
        ("team-a", "qlorasweeps.qlora.dev"): LOOK,
    },
    "queue-admin": {
        (CLUSTER, "qloraqueues.qlora.dev"): CHANGE,
        **{(place, "qlorajobs.qlora.dev"): LOOK for place in PLACES if place != CLUSTER},
    },
    "controller": {
        (CLUSTER, "nodes"): "list watch",
        (CLUSTER, "qloraqueues.qlora.dev"): "list watch",
        (CLUSTER, "qloraqueues/status.qlora.dev"): "update",
        ("team-a", "qlorajobs.qlora.dev"): "create delete get list patch watch",
        ("team-a", "qlorasweeps.qlora.dev"): "list patch watch",
        ("team-a", "qlorasweeps/status.qlora.dev"): "update",
        ("team-a", "qlorajobs/finalizers.qlora.dev"): "update",
        ("team-a", "qlorajobs/status.qlora.dev"): "update",
        ("team-a", "pods"): "create delete get list watch",
        ("team-a", "events.events.k8s.io"): "create",
        (NAMESPACE, "leases.coordination.k8s.io"): "create",
    },
    "page": {
        (CLUSTER, "nodes"): "list watch",
        (CLUSTER, "qloraqueues.qlora.dev"): "list watch",
        (CLUSTER, "tokenreviews.authentication.k8s.io"): "create",
        (CLUSTER, "subjectaccessreviews.authorization.k8s.io"): "create",
        ("team-a", "qlorajobs.qlora.dev"): "list watch",
        ("team-a", "qlorasweeps.qlora.dev"): "list watch",
    },
}
OURS: Mapping[str, Rights] = {
    "edit": {("team-a", f"{kind}.qlora.dev"): CHANGE for kind in ("qlorajobs", "qlorasweeps")},
    "view": {("team-a", f"{kind}.qlora.dev"): LOOK for kind in ("qlorajobs", "qlorasweeps")},
}
"""What the cluster's own roles may do in our group, with the chart's added."""


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """A control plane that aggregates roles, with the chart's, and somebody in each."""
    require("etcd", "kube-apiserver", "kube-controller-manager", "helm")
    with control_plane(tmp_path_factory.mktemp("rbac"), "kube-controller-manager") as plane:
        api = plane.api()
        furnish(api)
        api.create("/api/v1/namespaces", {"metadata": {"name": NAMESPACE}})
        for document in documents(roles_and_accounts() + chart_parts("rbac/page", values=WITH_PAGE)):
            create(api, document)
        for name in (*RIGHTS, *OURS, "nobody"):
            if name not in HOMES:
                create(api, account(name))
        for name, role in {"submitter": f"{ROLE}-submitter", "viewer": f"{ROLE}-viewer", "edit": "edit"}.items():
            create(api, binding("RoleBinding", name, role))
        create(api, binding("RoleBinding", "view", "view"))
        create(api, binding("ClusterRoleBinding", "queue-admin", f"{ROLE}-queue-admin"))
        yield plane


@pytest.fixture(scope="module")
def everybody(plane: ControlPlane) -> Rights:
    """What any account may, bound to nothing."""
    return rights_of(plane.api(), "nobody")


@pytest.mark.parametrize("name", RIGHTS)
def test_an_account_has_the_rights_that_it_needs_and_no_other(
    plane: ControlPlane, everybody: Rights, name: str
) -> None:
    found = rights_of(plane.api(), name)
    assert {key: verbs for key, verbs in found.items() if everybody.get(key) != verbs} == RIGHTS[name]


def test_who_is_bound_to_nothing_or_not_known_has_no_right_to_anything_of_ours(
    plane: ControlPlane, everybody: Rights
) -> None:
    assert [key for key in everybody if key[1].endswith("qlora.dev")] == []
    anonymous = {"user": "system:anonymous", "groups": ["system:unauthenticated"]}
    for resource in ("qlorajobs", "qloraqueues", "qlorasweeps", "qlorajobs/status"):
        for verb in VERBS:
            main, _, part = resource.partition("/")
            asked = {"verb": verb, "group": "qlora.dev", "resource": main, "subresource": part}
            assert not allowed(plane.api(), {**anonymous, "resourceAttributes": {**asked, "namespace": "team-a"}})


@pytest.mark.parametrize("name", OURS)
def test_the_clusters_own_roles_know_our_resources(plane: ControlPlane, name: str) -> None:
    api = plane.api()
    deadline = time.monotonic() + AGGREGATION_SECONDS
    while not may(api, name, "get", "team-a", "qlora.dev", "qlorajobs", ""):
        assert time.monotonic() < deadline, "roles were not aggregated"
        time.sleep(0.2)
    assert rights_of(api, name, "qlora.dev") == OURS[name]


def test_a_submitter_hands_in_jobs_in_the_own_namespace_alone(plane: ControlPlane) -> None:
    api = acting_as(plane, "submitter")
    api.create(path_of(API_VERSION, "qlorajobs", "team-a"), job("mine"))
    assert api.get(path_of(API_VERSION, "qlorajobs", "team-a", "mine"))["spec"]["queue"] == "default"
    mine = path_of(API_VERSION, "qlorajobs", "team-a", "mine")
    for attempt in (
        lambda: api.create(path_of(API_VERSION, "qlorajobs", "team-b"), job("theirs")),
        lambda: api.patch(f"{mine}/status", {"status": {"summary": "done"}}),
        lambda: api.create(path_of(API_VERSION, "qloraqueues"), queue("mine")),
        lambda: api.get("/api/v1/namespaces/team-a/secrets"),
        lambda: api.create(path_of(RBAC, "rolebindings", "team-a"), binding("RoleBinding", "more", "cluster-admin")),
    ):
        refused(attempt)
    api.delete(mine)


def test_the_page_of_a_submitter_shows_the_jobs_of_the_own_namespace_and_nothing_of_others(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    everybodys = KubernetesStore(plane.api())
    for name, namespace in (("shown", "team-a"), ("hidden", "team-b")):
        everybodys.create_job(submitted_job(name, namespace, **ON_THE_HUB))
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig_of(plane, "submitter")))
    client = Client(Settings(context=CONTEXT, home=tmp_path), namespace="team-a")
    page = make_app(parts(OpenGate(), client_view(client), client.settings, None))
    first, one = (get(page, path).decode() for path in ("/", "/jobs/team-a/shown"))
    assert "team-a/shown" in first
    assert "Cards are not this account" in first
    assert ON_RECORD.partition(":")[0] in one
    assert "hidden" not in first + one
    assert "team-b" not in first + one
    for job in (submitted_job("shown", "team-a"), submitted_job("hidden", "team-b")):
        everybodys.delete_job(job.metadata.namespace, job.metadata.name)


def test_a_submitter_lists_follows_plans_and_is_told_why_without_a_right_beyond_the_own_namespace(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig_of(plane, "submitter")))
    client = Client(Settings(context=CONTEXT, home=tmp_path), namespace="team-a")
    handle = client.submit(submitted_job("asked", **ON_THE_HUB))
    assert [found.metadata.name for found in client.list()] == ["asked"]
    why = Condition(
        type=ConditionType.ADMITTED,
        status="False",
        reason=Reason.WAITING_FOR_GPU,
        message="2 of 2 24Gi GPUs are in use; first in line",
        last_transition_time=NOW,
        observed_generation=1,
    )
    waits = prepared_status(conditions=(why,), evictions={"Preempted": 2}, summary="first in line")
    KubernetesStore(plane.api()).update_status(handle.object(), waits)
    assert handle.explain().sentences == (
        "team-a/asked is queued: WaitingForGpu: 2 of 2 24Gi GPUs are in use; first in line.",
        "It was moved before: 2 x Preempted.",
        ON_RECORD,
    )
    with pytest.raises(WaitTimedOut, match="first in line"):
        handle.wait(timeout_seconds=0.5)
    assert list(handle.events()) == []
    assert list(handle.logs()) == []
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    model = ModelSource(source=tmp_path.as_uri())
    plan = client.plan(submitted_job("planned", **{**ON_THE_HUB, "model": model}))
    assert plan.unseen
    assert plan.chosen is not None
    assert {alternative.capacity for alternative in plan.alternatives} == {None}
    with pytest.raises(Forbidden):
        client.list(all_namespaces=True)
    handle.cancel()
    handle.delete()


def test_a_tenant_can_ask_why_a_job_waits_and_where_its_queue_stands(
    plane: ControlPlane, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By the command line, with rights in the own namespace alone: a submitter may look at no queue and no node."""
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig_of(plane, "submitter")))
    monkeypatch.setenv("QLORA_CONTEXT", CONTEXT)
    monkeypatch.setenv("QLORA_HOME", str(tmp_path))
    jobs = KubernetesStore(plane.api())
    standing = "queue research uses 2 of its 2 24Gi GPUs; third in line"
    why = Condition(
        type=ConditionType.ADMITTED,
        status="False",
        reason=Reason.WAITING_FOR_QUOTA,
        message=standing,
        last_transition_time=NOW,
        observed_generation=1,
    )
    waiting = jobs.create_job(submitted_job("waits", **ON_THE_HUB))
    jobs.update_status(waiting, prepared_status(conditions=(why,), summary=standing))
    for command in ("explain", "describe"):
        told = CliRunner().invoke(app, [command, "waits", "--namespace", "team-a"])
        assert told.exit_code == 0, told.output
        assert standing in " ".join(told.output.split())
    refused = CliRunner().invoke(app, ["simulate", "--gpus", "24Gi=+1", "--namespace", "team-a"])
    assert refused.exit_code == ExitStatus.INVALID, refused.output
    assert "ask whoever looks after the queues" in " ".join(refused.output.split())
    jobs.delete_job("team-a", "waits")


def test_a_viewer_changes_nothing(plane: ControlPlane) -> None:
    plane.api().create(path_of(API_VERSION, "qlorajobs", "team-a"), job("seen"))
    api = acting_as(plane, "viewer")
    seen = path_of(API_VERSION, "qlorajobs", "team-a", "seen")
    assert api.get(seen)["metadata"]["name"] == "seen"
    refused(lambda: api.create(path_of(API_VERSION, "qlorajobs", "team-a"), job("new")))
    refused(lambda: api.patch(seen, {"spec": {"suspend": True}}))
    refused(lambda: api.delete(seen))
    refused(lambda: api.get(path_of(API_VERSION, "qlorajobs", "team-b")))


def test_a_queue_admin_shares_out_and_touches_no_job(plane: ControlPlane) -> None:
    api = acting_as(plane, "queue-admin")
    api.create(path_of(API_VERSION, "qloraqueues"), queue("research"))
    assert api.get(path_of(API_VERSION, "qlorajobs"))["kind"] == "QLoRAJobList"
    refused(lambda: api.create(path_of(API_VERSION, "qlorajobs", "team-a"), job("mine")))
    refused(lambda: api.get("/api/v1/namespaces/team-a/pods"))
    api.delete(path_of(API_VERSION, "qloraqueues", name="research"))


def test_the_controller_makes_pods_where_jobs_live_and_reads_no_secret(plane: ControlPlane) -> None:
    api = acting_as(plane, "controller")
    api.create("/api/v1/namespaces/team-a/pods", pod("stage"))
    api.delete("/api/v1/namespaces/team-a/pods/stage")
    for attempt in (
        lambda: api.create("/api/v1/namespaces/team-b/pods", pod("stage")),
        lambda: api.create(f"/api/v1/namespaces/{NAMESPACE}/pods", pod("stage")),
        lambda: api.get("/api/v1/namespaces/team-a/secrets"),
        lambda: api.get("/api/v1/namespaces/team-a/pods/stage/log"),
        lambda: api.create(path_of(API_VERSION, "qlorajobs", "team-b"), job("own")),
        lambda: api.create(path_of(API_VERSION, "qlorasweeps", "team-a"), {"metadata": {"name": "own"}}),
        lambda: api.create("/api/v1/namespaces/team-a/serviceaccounts/edit/token", {"spec": {}}),
        lambda: api.patch("/api/v1/nodes/any", {"spec": {"unschedulable": True}}),
    ):
        refused(attempt)


def refused(attempt: Any) -> None:
    with pytest.raises(Forbidden, match="cannot"):
        attempt()


def job(name: str) -> Json:
    spec = {"model": {"source": "pvc://data/model"}, "dataset": {"source": "pvc://data/d.jsonl"}}
    return {"apiVersion": API_VERSION, "kind": "QLoRAJob", "metadata": {"name": name}, "spec": spec}


def queue(name: str) -> Json:
    return {"apiVersion": API_VERSION, "kind": "QLoRAQueue", "metadata": {"name": name}, "spec": {}}


def pod(name: str) -> Json:
    return {"metadata": {"name": name}, "spec": {"containers": [{"name": "main", "image": "none"}]}}


def rights_of(api: KubeApi, name: str, only_group: str | None = None) -> Rights:
    """Everything that the authorizer lets an account do."""
    found: dict[tuple[str, str], str] = {}
    for group, resource, namespaced in resources(api):
        if only_group not in (None, group):
            continue
        for place in PLACES:
            if namespaced == (place == CLUSTER):
                continue
            main, _, part = resource.partition("/")
            if verbs := [verb for verb in VERBS if may(api, name, verb, place, group, main, part)]:
                found[place, f"{resource}.{group}" if group else resource] = " ".join(verbs)
    return found


def resources(api: KubeApi) -> list[tuple[str, str, bool]]:
    """All that the server has: (group, resource or resource/part, whether it is in namespaces)."""
    groups = api.get("/apis")["groups"]
    versions = [("", "/api/v1"), *((g["name"], f"/apis/{g['preferredVersion']['groupVersion']}") for g in groups)]
    served = [(group, r["name"], r["namespaced"]) for group, path in versions for r in api.get(path)["resources"]]
    return [*served, *ASKED_FOR_ONLY]


def may(api: KubeApi, name: str, verb: str, place: str, group: str, resource: str, part: str) -> bool:
    """The authorizer's word on one request."""
    namespace, account = HOMES.get(name, ("team-a", name))
    groups = ["system:serviceaccounts", f"system:serviceaccounts:{namespace}", "system:authenticated"]
    asked = {"verb": verb, "group": group, "resource": resource, "subresource": part}
    attributes = {**asked, "namespace": "" if place == CLUSTER else place}
    user = f"system:serviceaccount:{namespace}:{account}"
    return allowed(api, {"user": user, "groups": groups, "resourceAttributes": attributes})


def allowed(api: KubeApi, spec: Json) -> bool:
    """The authorizer's word, as it says it."""
    path = "/apis/authorization.k8s.io/v1/subjectaccessreviews"
    return bool(api.create(path, {"spec": spec})["status"]["allowed"])
