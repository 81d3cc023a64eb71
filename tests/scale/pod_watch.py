"""The pods of stages as the API server tells of them: one watch, event after event, in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

from orchestrator.adapters.kubernetes.api import Json, KubeApi, Stream, path_of
from orchestrator.adapters.kubernetes.pod_manifest import MANAGED_BY_LABEL, MANAGER
from orchestrator.errors import StoreUnavailable

SILENCE_SECONDS = 600.0
SELECTOR = f"{MANAGED_BY_LABEL}={MANAGER}"


class PodWatch:
    """Hears what happens from its making on. A context manager."""

    def __init__(self, api: KubeApi, hear: Callable[[str, Json], None]) -> None:
        """`hear` gets an event's kind and its pod."""
        self._api = api
        self._hear = hear
        self._over = False
        version = api.get(path_of("v1", "pods"), labelSelector=SELECTOR, limit=1)["metadata"]["resourceVersion"]
        self._stream = self._watch(version)
        self._thread = threading.Thread(target=self._follow, name="pod watch", daemon=True)

    def __enter__(self) -> PodWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        self._stream.close()
        self._thread.join()

    def is_alive(self) -> bool:
        """Whether there is more to be heard."""
        return self._thread.is_alive()

    def _watch(self, version: str) -> Stream:
        query = {"labelSelector": SELECTOR, "resourceVersion": version, "timeoutSeconds": 3600}
        return self._api.watch(path_of("v1", "pods"), SILENCE_SECONDS, **query)

    def _follow(self) -> None:
        """One event after another; a server that hangs up on a slow reader is asked for what came after the last."""
        while True:
            version = ""
            with suppress(StoreUnavailable):
                for event in self._stream:
                    version = event["object"]["metadata"]["resourceVersion"]
                    self._hear(event["type"], event["object"])
            if self._over or not version:
                return
            self._stream = self._watch(version)
