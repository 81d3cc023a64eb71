"""Secrets of webhooks on a cluster: keys of one Secret in each namespace, the only one that the controller may read."""

from __future__ import annotations

import base64
import binascii

from orchestrator.adapters.kubernetes.api import KubeApi, path_of
from orchestrator.errors import Forbidden, NotFound, TransientError


class SecretReader:
    """Reads them when they are used: a change is known with the next request, and none is kept."""

    def __init__(self, api: KubeApi, own_namespace: str, secret: str) -> None:
        self._api = api
        self._own_namespace = own_namespace
        self._secret = secret

    def read(self, namespace: str | None, name: str) -> str:
        """The secret of a webhook of a namespace's jobs, or of a queue where that is None. Raises TransientError."""
        where = namespace or self._own_namespace
        if not self._secret:
            raise TransientError("webhooks are turned off here (webhooks.secret of the chart)")
        try:
            data: dict[str, str] = self._api.get(path_of("v1", "secrets", where, self._secret)).get("data") or {}
        except (NotFound, Forbidden) as error:
            may = "is not there" if isinstance(error, NotFound) else "may not be read by the controller"
            raise TransientError(f"the Secret {self._secret} of namespace {where} {may}") from error
        if name not in data:
            raise TransientError(f"the Secret {self._secret} of namespace {where} has no key {name}")
        try:
            return base64.b64decode(data[name], validate=True).decode()
        except (binascii.Error, UnicodeDecodeError) as error:
            raise TransientError(f"key {name} of the Secret {self._secret} of namespace {where} is no text") from error
