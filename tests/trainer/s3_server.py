"""A server of the S3 protocol on this machine; its buckets are folders, its objects the files in them."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.binaries import program
from tests.cluster.control_plane import free_ports, stop_process

ACCESS, SECRET, REGION = "tester", "a-secret-of-tests", "us-east-1"
BUCKET = "adapters"
START_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Server:
    """Where it is, and where its objects lie."""

    port: int
    bucket: Path


@contextmanager
def s3_server(folder: Path) -> Generator[S3Server]:
    """A server with one bucket, until the context ends."""
    buckets, sidecar = folder / "buckets", folder / "metadata"
    (buckets / BUCKET).mkdir(parents=True)
    sidecar.mkdir()
    [port] = free_ports(1)
    account = [f"--access={ACCESS}", f"--secret={SECRET}", f"--region={REGION}", "--quiet"]
    where = [f"--port=127.0.0.1:{port}", "posix", f"--sidecar={sidecar}", str(buckets)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([str(program("versitygw")), *account, *where], stdout=log, stderr=log, cwd=folder)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _listens(port):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.05)
        yield S3Server(port=port, bucket=buckets / BUCKET)
    finally:
        stop_process(process, 10)


def _listens(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False
