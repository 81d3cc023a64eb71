"""The trainer with a client that uploads in parts sooner: the trainer command of tests/e2e/test_demo_faults.py.

    python uploads_in_parts.py prepare | train | publish

The client uploads files in parts from 100 MiB on, and the largest of the demo's checkpoints has 11: here it does from
two of S3's smallest parts on.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from qlora_trainer.__main__ import main

PART_BYTES = 5 << 20
"""S3's smallest part."""


def upload_in_small_parts() -> None:
    """Let every upload of a file be in parts of the smallest size."""
    client: Any = importlib.import_module("s3fs").S3FileSystem  # Any: it has no types
    put_file = client._put_file

    async def in_small_parts(self: Any, *arguments: Any, **named: Any) -> None:
        await put_file(self, *arguments, **{**named, "chunksize": PART_BYTES})

    client._put_file = in_small_parts


if __name__ == "__main__":
    upload_in_small_parts()
    sys.exit(main(sys.argv[1:]))
