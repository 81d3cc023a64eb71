"""Who acts: leader election over a coordination.k8s.io Lease.

Rules, which are client-go's:

- Whoever writes its name into the lease leads, and renews it every `retry_seconds`.
- Nobody takes over before the record has stood still for the lease's duration, by the own clock; clocks are never
  compared.
- A leader that could not renew for `renew_seconds`, counted from when it began the last renewal that came through,
  is one no more: `check` refuses every further write, and `lost` is called. Because that is less than the duration, it
  is still before anybody else begins.
- What it had sent before may arrive later, and does no harm: writes carry the version that they were decided on, and
  pods are made under names that say which attempt they are.

A lease has an API connection of its own, with short timeouts, so that neither a slow call of others nor `check` itself
keeps it from being renewed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from orchestrator.adapters.kubernetes.api import Json, KubeApi, path_of
from orchestrator.errors import AlreadyExists, Conflict, NotFound, OrchestratorError, RuntimeLost

log = logging.getLogger(__name__)

LEASE_VERSION, LEASES = "coordination.k8s.io/v1", "leases"


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseTimes:
    """Bounds of an election."""

    duration_seconds: int = 15
    """Others wait so long after the last sign of life."""
    renew_seconds: float = 10.0
    """A leader that could not renew for so long stops; less than the duration."""
    retry_seconds: float = 2.0
    """Between two looks."""


class Lease:
    """One replica's part in an election. `acquire` and `release` belong to one thread."""

    def __init__(
        self,
        api: KubeApi,
        namespace: str,
        name: str,
        identity: str,
        times: LeaseTimes | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`identity` must not be used by two processes at one time: a pod's name is not."""
        self._api = api
        self._collection = path_of(LEASE_VERSION, LEASES, namespace)
        self._path = path_of(LEASE_VERSION, LEASES, namespace, name)
        self._name = name
        self._identity = identity
        self._times = times or LeaseTimes()
        self._clock = clock
        self._seen: tuple[object, float] = (None, 0.0)
        """The record of another, and since when it has stood still."""
        self._held: Json = {}
        self._renewed_at = float("-inf")
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> bool:
        """Try once; whether this replica leads now."""
        began = self._clock()
        try:
            try:
                lease = self._api.get(self._path)
            except NotFound:
                held = self._api.create(self._collection, {"metadata": {"name": self._name}, "spec": self._record({})})
            else:
                if not self._is_free(lease["spec"]):
                    return False
                held = self._api.replace(self._path, {**lease, "spec": self._record(lease["spec"])})
        except (AlreadyExists, Conflict):
            return False
        self._held, self._renewed_at = held, began
        return True

    def hold(self, lost: Callable[[str], None]) -> None:
        """Renew from a thread of its own from now on; `lost` is told once why it came to an end."""
        self._thread = threading.Thread(target=self._renew_on, args=(lost,), name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises RuntimeLost where this replica must not write any more."""
        if self._clock() - self._renewed_at >= self._times.renew_seconds:
            raise RuntimeLost(f"{self._identity} leads no more: the lease {self._name} was not renewed in time")

    def release(self) -> None:
        """Lead no more, and let others at once; the caller has stopped writing."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        if self._clock() - self._renewed_at >= self._times.renew_seconds:
            return
        self._renewed_at = float("-inf")
        try:
            spec = {**self._held["spec"], "holderIdentity": "", "leaseDurationSeconds": 1}
            self._api.replace(self._path, {**self._held, "spec": spec})
        except OrchestratorError as error:  # it expires
            log.warning("the lease %s was not given back and expires instead: %s", self._name, error)

    def _renew_on(self, lost: Callable[[str], None]) -> None:
        while not self._over.wait(self._times.retry_seconds):
            reason = self._renew()
            if not reason:
                continue
            log.warning("the lease %s was not renewed: %s", self._name, reason)
            if self._clock() - self._renewed_at >= self._times.renew_seconds:
                lost(reason)
                return

    def _renew(self) -> str:
        """Empty, or why not."""
        began = self._clock()
        try:
            held = self._api.replace(self._path, {**self._held, "spec": self._record(self._held["spec"])})
        except Conflict:
            return self._settle()
        except OrchestratorError as error:
            return str(error)
        self._held, self._renewed_at = held, began
        return ""

    def _settle(self) -> str:
        """Somebody wrote it: another leader, or we, and only the answer was lost."""
        try:
            lease = self._api.get(self._path)
        except OrchestratorError as error:
            return str(error)
        holder = str(lease["spec"].get("holderIdentity", ""))
        if holder != self._identity:
            self._renewed_at = float("-inf")
            return f"{holder or 'nobody'} holds it"
        self._held = lease  # renewed by the next try
        return ""

    def _is_free(self, spec: Json) -> bool:
        holder = spec.get("holderIdentity") or ""
        if holder in ("", self._identity):
            return True
        record = (holder, spec.get("renewTime"), spec.get("leaseTransitions"))
        now = self._clock()
        if record != self._seen[0]:
            self._seen = (record, now)
        return now - self._seen[1] >= float(spec.get("leaseDurationSeconds") or self._times.duration_seconds)

    def _record(self, before: Json) -> Json:
        now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        is_ours = before.get("holderIdentity") == self._identity
        return {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": self._times.duration_seconds,
            "acquireTime": before.get("acquireTime", now) if is_ours else now,
            "renewTime": now,
            "leaseTransitions": int(before.get("leaseTransitions") or 0) + (not is_ours and bool(before)),
        }
