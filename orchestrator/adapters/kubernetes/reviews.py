"""Whose a token is, and what an account may do: asked of the API server, by TokenReview and SubjectAccessReview."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.adapters.kubernetes.api import Json, KubeApi, path_of

SERVICE_ACCOUNT = "system:serviceaccount:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Who has shown a token, as the API server's authenticators say it."""

    name: str
    uid: str = ""
    groups: tuple[str, ...] = ()
    extra: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])

    @property
    def namespace(self) -> str:
        """Where a service account lives; empty of people."""
        return self.name.split(":")[2] if self.name.startswith(SERVICE_ACCOUNT) else ""


class Reviews:
    """Asks about others; its own account must be allowed to create both kinds of review."""

    def __init__(self, api: KubeApi) -> None:
        self._api = api

    def account(self, token: str) -> Account | None:
        """Whose the token is; None where it is nobody's any more. Raises StoreUnavailable, Forbidden."""
        asked = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": token}}
        status: Json = self._api.create(path_of("authentication.k8s.io/v1", "tokenreviews"), asked)["status"]
        user: Json = status.get("user") or {}
        if status.get("authenticated") is not True or not user.get("username"):
            return None
        return Account(
            name=user["username"],
            uid=user.get("uid", ""),
            groups=tuple(user.get("groups") or ()),
            extra=user.get("extra") or {},
        )

    def may_list(self, account: Account, group: str, resource: str, namespace: str = "") -> bool:
        """Whether an account may list a kind of object in a namespace, or wherever there are any."""
        attributes = {"verb": "list", "group": group, "resource": resource, "namespace": namespace}
        spec: Json = {"user": account.name, "groups": list(account.groups), "resourceAttributes": attributes}
        spec |= {"uid": account.uid, "extra": {key: list(values) for key, values in account.extra.items()}}
        asked = {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec}
        status: Json = self._api.create(path_of("authorization.k8s.io/v1", "subjectaccessreviews"), asked)["status"]
        return status.get("allowed") is True and status.get("denied") is not True
