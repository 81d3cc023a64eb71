"""Who may do what on a control plane: the chart's roles, accounts with real tokens, an audit of their requests."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.adapters.kubernetes.api import Json, KubeApi, path_of
from tests.cluster.control_plane import ControlPlane
from tests.deploy.render import NAMESPACE, RELEASE, rendered

RBAC = "rbac.authorization.k8s.io/v1"
ROLE = f"{NAMESPACE}-{RELEASE}"
HOMES = {
    "controller": (NAMESPACE, RELEASE),
    "page": (NAMESPACE, f"{RELEASE}-page"),
    "collector": ("kube-system", "generic-garbage-collector"),
}
"""Account -> (namespace, name), where it is not one of team-a's."""
AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [{"level": "Metadata"}],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request, as the API server's audit log tells of it."""

    user: str
    verb: str
    group: str
    resource: str
    """`pods`, or `pods/log` with a part."""
    name: str
    code: int


def chart_parts(*parts: str, values: str = "jobs.namespaces={team-a}") -> str:
    """Templates of the chart, rendered for jobs in team-a."""
    chosen = [word for part in parts for word in ("--show-only", f"templates/{part}.yaml")]
    return rendered(None, "--set", values, *chosen)


def roles_and_accounts(values: str = "jobs.namespaces={team-a}") -> str:
    """The chart's roles, their bindings, and the controller's account."""
    return chart_parts("rbac/controller", "rbac/users", "controller/service-account", values=values)


def create(api: KubeApi, document: Mapping[str, Any]) -> None:
    """Create an object of any kind of the chart's."""
    kind = str(document["kind"]).lower()
    plural = f"{kind.removesuffix('y')}ies" if kind.endswith("cy") else f"{kind}s"
    namespace = document["metadata"].get("namespace", "")
    api.create(path_of(str(document["apiVersion"]), plural, namespace), dict(document))


def in_team(name: str) -> Json:
    """Metadata of an object in team-a."""
    return {"name": name, "namespace": "team-a"}


def binding(kind: str, name: str, role: str) -> Json:
    """Binds team-a's account of this name to a ClusterRole."""
    metadata = in_team(name) if kind == "RoleBinding" else {"name": name}
    return {
        "apiVersion": RBAC,
        "kind": kind,
        "metadata": metadata,
        "roleRef": {"apiGroup": RBAC.partition("/")[0], "kind": "ClusterRole", "name": role},
        "subjects": [{"kind": "ServiceAccount", **in_team(name)}],
    }


def account(name: str) -> Json:
    """A service account in team-a."""
    return {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": in_team(name)}


def token_of(plane: ControlPlane, name: str) -> str:
    """A token of the account, as `kubectl create token` makes it."""
    namespace, own_name = HOMES.get(name, ("team-a", name))
    path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{own_name}/token"
    return plane.api().create(path, {"spec": {"expirationSeconds": 3600}})["status"]["token"]


def kubeconfig_of(plane: ControlPlane, name: str, url: str = "") -> Path:
    """A kubeconfig with the account's own token, through another address if one is given."""
    return plane.kubeconfig_for(token_of(plane, name), url=url, name=name)


def acting_as(plane: ControlPlane, name: str) -> KubeApi:
    """A connection with the account's own token."""
    return KubeApi(kubeconfig=str(kubeconfig_of(plane, name)))


def audit_arguments(folder: Path) -> list[str]:
    """What makes a kube-apiserver write down every request, in `audit.log` of the folder."""
    policy = folder / "audit.json"
    policy.write_text(json.dumps(AUDIT_POLICY))
    return [f"--audit-policy-file={policy}", f"--audit-log-path={folder / 'audit.log'}"]


def requests_of(folder: Path, name: str) -> Iterator[Request]:
    """What an account has asked for so far."""
    user = "system:serviceaccount:" + ":".join(HOMES.get(name, ("team-a", name)))
    for line in (folder / "audit.log").read_text().splitlines():
        event = json.loads(line)
        about = event.get("objectRef")
        if event["user"]["username"] != user or about is None:
            continue
        part = about.get("subresource")
        yield Request(
            user=user,
            verb=event["verb"],
            group=about.get("apiGroup", ""),
            resource=f"{about['resource']}/{part}" if part else about["resource"],
            name=about.get("name", ""),
            code=event.get("responseStatus", {}).get("code", 0),
        )
