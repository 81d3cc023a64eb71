"""A replica that only takes part in an election and writes down when it led, for tests that kill it.

`python -m tests.cluster.lease_victim KUBECONFIG IDENTITY FILE`: one line per moment, `<monotonic seconds> <identity>`,
each written after `check` allowed it, as a write to the API server would be.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time

from orchestrator.adapters.kubernetes.api import KubeApi, Timeouts
from orchestrator.adapters.kubernetes.lease import Lease, LeaseTimes
from orchestrator.errors import OrchestratorError, RuntimeLost

TIMES = LeaseTimes(duration_seconds=3, renew_seconds=2.0, retry_seconds=0.3)
MOMENT_SECONDS = 0.01


def main() -> int:
    """Stand by, lead, hand over on SIGTERM."""
    kubeconfig, identity, path = sys.argv[1:]
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda _number, _frame: stop.set())
    patience = Timeouts(connect_seconds=0.5, answer_seconds=1.0)
    lease = Lease(KubeApi(kubeconfig=kubeconfig, timeouts=patience), "default", "election", identity, TIMES)
    while not stop.is_set():
        with contextlib.suppress(OrchestratorError):  # looked at again below
            if lease.acquire():
                break
        stop.wait(TIMES.retry_seconds)
    else:
        return 0
    lease.hold(lambda _reason: os._exit(75))
    with open(path, "a", buffering=1, encoding="utf-8") as file:
        while not stop.is_set():
            try:
                lease.check()
            except RuntimeLost:
                return 75
            file.write(f"{time.monotonic():.6f} {identity}\n")
            time.sleep(MOMENT_SECONDS)
    lease.release()
    return 0


if __name__ == "__main__":
    sys.exit(main())
