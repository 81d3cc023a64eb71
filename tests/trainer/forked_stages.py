"""Runs stages, each in a process of its own, forked from one that has the libraries loaded: seconds for each are saved.

    python forked_stages.py < requests

A request is a line of JSON: `variables` of the stage's environment, the `stage`, and the file that its `log` goes to;
the answer is a line with its exit code, negative for a signal. The frame runs as `python -m qlora_trainer STAGE` does.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import bitsandbytes  # noqa: F401  # pyright: ignore[reportUnusedImport] - so that forked processes have it
import peft  # noqa: F401  # pyright: ignore[reportUnusedImport]
import transformers  # noqa: F401  # pyright: ignore[reportUnusedImport]
from qlora_trainer import __main__ as frame
from qlora_trainer import prepare  # noqa: F401  # pyright: ignore[reportUnusedImport]
from qlora_trainer.model import architecture  # noqa: F401  # pyright: ignore[reportUnusedImport]


def main() -> None:
    """Answer requests until there are no more."""
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            run(request)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def run(request: dict[str, Any]) -> None:
    """The stage, which ends this process."""
    descriptor = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(request["variables"])
    code = 1
    try:
        code = frame.main([request["stage"]])
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
