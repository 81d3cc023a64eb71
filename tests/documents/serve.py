"""Run a script that serves until Ctrl-C: wait for the address that it prints, open it, interrupt it.

    python serve.py SCRIPT

Knows nothing of the project, for it runs beside what a user has installed.
"""

from __future__ import annotations

import base64
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from contextlib import suppress

ADDRESS = re.compile(r"http://(?P<login>\w+:\S+)@(?P<host>127\.0\.0\.1:\d+)")
LIMIT_SECONDS = 240.0
STOP_SECONDS = 60.0


def main(script: str) -> int:
    """The exit status: 0 where an address was told, the page was there, and Ctrl-C ended everything well."""
    server = subprocess.Popen(
        ["bash", "-e", script], stdout=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=_take_interrupts
    )
    limit = threading.Timer(LIMIT_SECONDS, os.killpg, (server.pid, signal.SIGKILL))
    limit.start()
    try:
        return _visit(server)
    finally:
        limit.cancel()
        with suppress(ProcessLookupError):  # what ignores Ctrl-C would outlive everybody who waits for its output
            os.killpg(server.pid, signal.SIGKILL)


def _visit(server: subprocess.Popen[str]) -> int:
    assert server.stdout is not None, "it is a pipe"
    found = next(filter(None, map(ADDRESS.search, server.stdout)), None)
    if found is None:
        print(f"no address was told; exit status {server.wait()}")
        return 1
    login = base64.b64encode(found["login"].encode()).decode()
    request = urllib.request.Request(f"http://{found['host']}", headers={"Authorization": f"Basic {login}"})
    with urllib.request.urlopen(request, timeout=STOP_SECONDS) as page:
        print(f"{page.status} {len(page.read())} bytes")
    os.killpg(server.pid, signal.SIGINT)  # as a terminal does
    status = server.wait(timeout=STOP_SECONDS)
    print(f"interrupted: exit status {status}")
    return status


def _take_interrupts() -> None:
    """A process that was started in the background ignores them, and so would all below it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
