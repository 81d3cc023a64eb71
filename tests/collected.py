"""Check that every process collects the same tests: two workers that differ stop a tier before its first test."""

from __future__ import annotations

import difflib
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

# Apart by more than a second, and with other hashes: what holds an address, a time or a set's order shows.
DELAYS_SECONDS = (0.0, 1.5)


def collect(delay_seconds: float) -> list[str]:
    """The tests' ids as a process that starts after the delay finds them."""
    time.sleep(delay_seconds)
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests"]
    environment = os.environ | {"PYTHONHASHSEED": str(int(delay_seconds * 10) + 1)}
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        raise SystemExit(result.stdout)
    return [line for line in result.stdout.splitlines() if "::" in line]


def main() -> None:
    """Collect twice at the same time, and tell the ids that differ."""
    with ThreadPoolExecutor() as pool:
        first, second = pool.map(collect, DELAYS_SECONDS)
    if differing := [line for line in difflib.unified_diff(first, second, lineterm="", n=0) if line[:1] in "+-"]:
        raise SystemExit("These tests' ids differ from process to process; name them:\n" + "\n".join(differing))
    print(f"{len(first)} tests, each with the same id in every process.")


if __name__ == "__main__":
    main()
