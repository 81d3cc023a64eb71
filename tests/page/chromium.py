"""Chromium, driven over two pipes by its own DevTools protocol, without a library in between."""

from __future__ import annotations

import itertools
import json
import os
import select
import shutil
import subprocess
import time
from base64 import b64decode
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ANSWER_SECONDS = 60.0
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")


def find_browser() -> str | None:
    """The program, if it is installed."""
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


class Tab:
    """One page, and whatever goes wrong on it."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = to_browser, from_browser
        self._numbers = itertools.count(1)
        self._read = b""
        self._session = ""
        self.faults: list[str] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def show(self, url: str, width: int, scheme: str = "light") -> None:
        """Go to a page, as a screen of this width shows it."""
        phone = width < 600
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=phone)
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.ask("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    def evaluate(self, script: str) -> Any:
        """What JavaScript makes of an expression."""
        found = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, script: str, seconds: float = 20.0) -> None:
        """Until the expression is true."""
        deadline = time.monotonic() + seconds
        while not self.evaluate(script):
            assert time.monotonic() < deadline, f"{script} is not true after {seconds} s"
            time.sleep(0.05)

    def picture(self, path: Path) -> None:
        """The whole page, as PNG."""
        path.write_bytes(b64decode(self.ask("Page.captureScreenshot", captureBeyondViewport=True)["data"]))

    def ask(self, method: str, **parameters: Any) -> Any:
        """One command and its answer."""
        number = next(self._numbers)
        wanted: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        wanted |= {"sessionId": self._session} if self._session else {}
        os.write(self._to, json.dumps(wanted).encode() + b"\0")
        deadline = time.monotonic() + ANSWER_SECONDS
        while True:
            message = self._next(deadline)
            if message.get("id") == number:
                assert "error" not in message, (method, message)
                return message["result"]
            self._hear(message)

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._read:
            ready, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"the browser says nothing for {ANSWER_SECONDS} s"
            more = os.read(self._from, 1 << 16)
            assert more, "the browser has ended"
            self._read += more
        first, _, self._read = self._read.partition(b"\0")
        return json.loads(first)

    def _hear(self, message: dict[str, Any]) -> None:
        name, said = message.get("method"), message.get("params", {})
        is_fault = (
            name == "Runtime.exceptionThrown"
            or (name == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert"))
            or (name == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"))
            or name == "Network.loadingFailed"
        )
        if is_fault:
            self.faults.append(json.dumps(said)[:1000])


@contextmanager
def tab(folder: Path) -> Generator[Tab]:
    """A browser of its own, with nothing remembered."""
    browser = find_browser()
    assert browser is not None, "Chromium is not installed"
    hears, to_browser = os.pipe()
    from_browser, says = os.pipe()
    # It reads from descriptor 3 and writes to 4; the shell puts ours there.
    script = f'exec "$0" "$@" 3<&{hears} 4>&{says}'
    command = ["bash", "-c", script, browser, *OPTIONS, f"--user-data-dir={folder}", "--remote-debugging-pipe"]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, pass_fds=(hears, says), stderr=quiet, stdout=quiet) as process:
        os.close(hears)
        os.close(says)
        try:
            yield Tab(to_browser, from_browser)
        finally:
            os.close(to_browser)
            process.terminate()
            process.wait(30)
            os.close(from_browser)
