"""What kube-linter asks of manifests, by its own names of checks: by the tool where it is installed, and restated here.

The tool cannot be had everywhere, so what it checks by default, and most of what it does not, is stated here as a
rule each, except for what other tests of this folder hold already: the restricted standard, bounds, and whether
selectors find anything. Not among them is `access-to-create-pods`, off by default: to create pods is what the
controller is for. Each rule is tried on a manifest that breaks it. Excused is one: the replicas of the bundled MLflow,
whose annotation says why.
"""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.render import documents, rendered
from tests.deploy.test_chart import PRODUCTION, named, pod_of
from tests.deploy.tools import run

Json = Mapping[str, Any]
Rule = Callable[[Json, Sequence[Json]], bool]
"""Whether an object keeps to it, beside all others."""
WORKLOADS = ("Deployment", "StatefulSet")
IGNORE = "ignore-check.kube-linter.io/"


def containers(document: Json) -> list[Json]:
    pod = pod_of(document)
    return [*pod["containers"], *pod.get("initContainers", [])] if pod else []


def rules_of(document: Json) -> list[Json]:
    return document.get("rules") or [] if document["kind"] in ("Role", "ClusterRole") else []


def allows(document: Json, resource: str) -> bool:
    return any(resource in rule["resources"] or "*" in rule["resources"] for rule in rules_of(document))


def ports(document: Json) -> list[int]:
    return [port["containerPort"] for container in containers(document) for port in container.get("ports", [])]


def probed(document: Json, probe: str) -> bool:
    """Whether its containers that serve have the probe. A sidecar's is the startup probe."""
    return not pod_of(document) or all(probe in container for container in pod_of(document)["containers"])


def probes_known_ports(document: Json) -> bool:
    for container in containers(document):
        names = {port["name"] for port in container.get("ports", [])}
        for probe in ("livenessProbe", "readinessProbe", "startupProbe"):
            asked = container.get(probe, {}).get("httpGet", {}).get("port")
            if asked is not None and asked not in names:
                return False
    return True


def accounts(objects: Sequence[Json]) -> set[tuple[str, str]]:
    return {(o["metadata"]["namespace"], o["metadata"]["name"]) for o in objects if o["kind"] == "ServiceAccount"}


def has_its_account(document: Json, objects: Sequence[Json]) -> bool:
    pod = pod_of(document)
    return not pod or (document["metadata"]["namespace"], pod["serviceAccountName"]) in accounts(objects)


def env_has_no_secret(document: Json) -> bool:
    """Neither in clear nor by reference."""
    variables = [variable for container in containers(document) for variable in container.get("env", [])]
    sources = [source for container in containers(document) for source in container.get("envFrom", [])]
    in_clear = [each for each in variables if re.search("secret", each["name"], re.IGNORECASE) and each.get("value")]
    by_reference = [each for each in variables if "secretKeyRef" in each.get("valueFrom", {})]
    return not in_clear and not by_reference and not any("secretRef" in source for source in sources)


def is_pinned(document: Json) -> bool:
    return all(re.search(r"(:(?!latest$)[^/:]+|@sha256:[0-9a-f]{64})$", each["image"]) for each in containers(document))


def keeps_replicas(document: Json) -> bool:
    return document["kind"] not in WORKLOADS or document["spec"].get("replicas", 1) >= 3


def spreads(document: Json) -> bool:
    pod = pod_of(document)
    return not pod or (bool(pod["affinity"]["podAntiAffinity"]) and bool(pod["affinity"]["nodeAffinity"]))


def has_no_host_paths(document: Json) -> bool:
    return not pod_of(document) or not any("hostPath" in volume for volume in pod_of(document)["volumes"])


def is_owned(document: Json) -> bool:
    meta = document["metadata"]
    email = meta.get("annotations", {}).get("email", "")
    return bool(meta["labels"]["owner"]) and (not pod_of(document) or re.fullmatch(r"\S+@\S+\.\S+", email) is not None)


def updates_in_turn(document: Json) -> bool:
    if document["kind"] not in WORKLOADS:
        return True
    spec = document["spec"]
    return (spec.get("strategy") or spec.get("updateStrategy"))["type"] == "RollingUpdate"


def budget_lets_go(document: Json) -> bool:
    """Room for an eviction, and none held by a pod that is not ready anyway."""
    if document["kind"] != "PodDisruptionBudget":
        return True
    spec = document["spec"]
    return spec.get("maxUnavailable", 0) >= 1 and spec["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


RULES: Mapping[str, Rule] = {
    "access-to-secrets": lambda o, _: not allows(o, "secrets"),
    "cluster-admin-role-binding": lambda o, _: o.get("roleRef", {}).get("name") != "cluster-admin",
    "default-service-account": lambda o, _: not pod_of(o) or pod_of(o)["serviceAccountName"] not in ("", "default"),
    "dnsconfig-options": lambda o, _: not pod_of(o) or bool(pod_of(o)["dnsConfig"]["options"]),
    "env-var-secret": lambda o, _: env_has_no_secret(o),
    "exposed-services": lambda o, _: o["kind"] != "Service" or o["spec"]["type"] == "ClusterIP",
    "job-ttl-seconds-after-finished": lambda o, _: o["kind"] != "Job" or o["spec"]["ttlSecondsAfterFinished"] > 0,
    "latest-tag": lambda o, _: is_pinned(o),
    "minimum-three-replicas": lambda o, _: keeps_replicas(o),
    "no-anti-affinity": lambda o, _: spreads(o),
    "no-liveness-probe": lambda o, _: probed(o, "livenessProbe"),
    "no-readiness-probe": lambda o, _: probed(o, "readinessProbe"),
    "no-rolling-update-strategy": lambda o, _: updates_in_turn(o),
    "non-existent-service-account": has_its_account,
    "pdb-unhealthy-pod-eviction-policy": lambda o, _: budget_lets_go(o),
    "privileged-ports": lambda o, _: all(port > 1024 for port in ports(o)),
    "probe-ports": lambda o, _: probes_known_ports(o),
    "required-annotation-email": lambda o, _: is_owned(o),
    "sensitive-host-mounts": lambda o, _: has_no_host_paths(o),
    "use-namespace": lambda o, _: o["metadata"].get("namespace") != "default",
    "wildcard-in-rules": lambda o, _: all("*" not in (*r["verbs"], *r["resources"]) for r in rules_of(o)),
}
BROKEN: Mapping[str, tuple[str, str, Any]] = {
    "access-to-secrets": ("ClusterRole", "rules.0.resources", ["secrets"]),
    "cluster-admin-role-binding": ("ClusterRoleBinding", "roleRef.name", "cluster-admin"),
    "default-service-account": ("Deployment", "spec.template.spec.serviceAccountName", "default"),
    "dnsconfig-options": ("Deployment", "spec.template.spec.dnsConfig.options", []),
    "env-var-secret": ("Deployment", "spec.template.spec.containers.0.env", [{"name": "A_SECRET", "value": "s"}]),
    "exposed-services": ("Service", "spec.type", "NodePort"),
    "job-ttl-seconds-after-finished": ("Job", "spec.ttlSecondsAfterFinished", 0),
    "latest-tag": ("Deployment", "spec.template.spec.containers.0.image", "registry.example.com:5000/controller"),
    "minimum-three-replicas": ("Deployment", "spec.replicas", 2),
    "no-anti-affinity": ("Deployment", "spec.template.spec.affinity.podAntiAffinity", {}),
    "no-liveness-probe": ("Deployment", "spec.template.spec.containers.0", {"name": "bare"}),
    "no-readiness-probe": ("Deployment", "spec.template.spec.containers.0", {"name": "bare"}),
    "no-rolling-update-strategy": ("Deployment", "spec.strategy.type", "Recreate"),
    "non-existent-service-account": ("Deployment", "spec.template.spec.serviceAccountName", "nobody"),
    "pdb-unhealthy-pod-eviction-policy": ("PodDisruptionBudget", "spec.unhealthyPodEvictionPolicy", "IfHealthyBudget"),
    "privileged-ports": ("Deployment", "spec.template.spec.containers.0.ports.0.containerPort", 80),
    "probe-ports": ("Deployment", "spec.template.spec.containers.0.livenessProbe.httpGet.port", "none"),
    "required-annotation-email": ("Deployment", "metadata.annotations.email", "nobody"),
    "sensitive-host-mounts": ("Deployment", "spec.template.spec.volumes.0", {"hostPath": {"path": "/etc"}}),
    "use-namespace": ("Service", "metadata.namespace", "default"),
    "wildcard-in-rules": ("ClusterRole", "rules.0.verbs", ["*"]),
}
"""Check -> the kind, field and value that break it."""


def breaches(objects: Sequence[Json]) -> Iterator[tuple[str, str, str]]:
    """(check, kind, name) of what does not keep to a rule and does not say why."""
    for document in objects:
        excused = document["metadata"].get("annotations", {})
        for check, rule in RULES.items():
            if f"{IGNORE}{check}" not in excused and not rule(document, objects):
                yield check, str(document["kind"]), document["metadata"]["name"]


@pytest.mark.parametrize("values", [None, PRODUCTION], ids=named)
def test_the_manifests_keep_to_every_check(values: Path | None) -> None:
    assert list(breaches(manifests(values))) == []


EXCUSED = {
    ("qlora-orchestrator-mlflow", "minimum-three-replicas"): "SQLite",
    ("qlora-system-qlora-orchestrator-jobs", "access-to-secrets"): "One Secret, by its name",
    ("qlora-orchestrator-leader", "access-to-secrets"): "One Secret, by its name",
}


def test_what_is_excused_is_known_and_says_why() -> None:
    excuses = {
        (document["metadata"]["name"], key.removeprefix(IGNORE)): str(reason)
        for document in manifests(None)
        for key, reason in document["metadata"].get("annotations", {}).items()
        if key.startswith(IGNORE)
    }
    assert excuses.keys() == EXCUSED.keys()
    assert all(EXCUSED[excused] in reason for excused, reason in excuses.items())


def test_of_secrets_only_those_that_are_named_may_be_read() -> None:
    rules = [rule for document in manifests(None) for rule in document.get("rules") or [] if isinstance(rule, dict)]
    about = [rule for rule in rules if {"secrets", "*"} & set(rule.get("resources", []))]
    assert about
    assert all(rule["resourceNames"] == ["qlora-webhooks"] and rule["verbs"] == ["get"] for rule in about)


@pytest.mark.parametrize("check", RULES)
def test_a_manifest_that_breaks_a_check_is_found(check: str) -> None:
    kind, field, value = BROKEN[check]
    objects = copy.deepcopy(manifests(None))
    target = next(document for document in objects if document["kind"] == kind)
    *parents, last = field.split(".")
    place: Any = target
    for part in parents:
        place = place[int(part) if part.isdigit() else part]
    place[int(last) if last.isdigit() else last] = value
    assert check in {found for found, *_ in breaches_of(check, objects)}


def breaches_of(check: str, objects: Sequence[Json]) -> Iterator[tuple[str, str]]:
    """Of this check alone: a manifest that is broken here may break others beyond what they can read."""
    return ((check, str(document["kind"])) for document in objects if not RULES[check](document, objects))


@pytest.mark.skipif(shutil.which("kube-linter") is None, reason="kube-linter is not installed; its checks are restated")
@pytest.mark.parametrize("values", [None, PRODUCTION], ids=named)
def test_kube_linter_itself_finds_nothing(values: Path | None, tmp_path: Path) -> None:
    (tmp_path / "chart.yaml").write_text(rendered(values))
    done = run(["kube-linter", "lint", tmp_path])
    assert done.returncode == 0, done.stdout


@cache
def manifests(values: Path | None) -> list[dict[str, Any]]:
    """Not to be changed."""
    return documents(rendered(values))
