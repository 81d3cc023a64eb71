"""Encodes ranges of records as Ray tasks; the only file of the trainer that imports Ray.

The stage is the driver: it reads the records, hands ranges to tasks, and takes what comes of them in the ranges' order.
Rules:

- No more ranges are being encoded at a time than there are workers, and no more are held than AHEAD for each.
- A task that dies with its worker or its node is tried again by Ray; what Ray cannot mend is Transient, and the stage
  is tried again. What is wrong with the records is said as if they were encoded here, one range after the other.
- The Ray is the stage's own, on loopback, behind a token that nobody else has, and ends with it. Where RAY_ADDRESS
  names a Ray cluster, the stage joins that as a node without CPUs, and its nodes do the work.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from qlora_trainer.data.ranges import EncodedRange, Range, RangeEncoder
from qlora_trainer.outcome import Preempted, StageError, Transient, UserError

ADDRESS_VARIABLE = "RAY_ADDRESS"
AHEAD = 4
"""Ranges that are held for each worker: waiting, being encoded, or encoded before an earlier one."""
RETRIES = 3
"""How often Ray tries a task again whose worker or node died."""
OBJECT_STORE_BYTES = 128 << 20
START_SECONDS = 240.0
"""How long Ray may take to start, or to be joined; then once more."""
RETRY_SECONDS = 0.5
RAY_FOLDER = "/tmp"  # noqa: S108 - short, because sockets are in it; what is made there is private
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # nothing is packaged and sent: every node has the same image
    "RAY_worker_niceness": "0",
    "RAY_memory_monitor_refresh_ms": "0",  # the container's limit is the only judge of memory
    "RAY_enable_metrics_collection": "0",
}
LIBRARIES = ("transformers", "tokenizers", "jinja2", "numpy", "pydantic")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Done:
    """What a task gives back."""

    node: str
    outcome: EncodedRange | StageError


class RayTasks:
    """Encodes ranges on a Ray that this process has joined. Usable as `EncodeRanges`."""

    def __init__(self, ray: Any, workers: int) -> None:
        self._ray = ray
        self._workers = workers
        self._task: Any = ray.remote(num_cpus=1, max_retries=RETRIES, scheduling_strategy="SPREAD")(_encode)
        self._ranges_by_node: Counter[str] = Counter()

    def __call__(self, encoder: RangeEncoder, ranges: Iterator[Range]) -> Iterator[EncodedRange]:
        """What comes of the ranges, in their order."""
        shared = [self._ray.put(encoder)]  # in a list, or every task would unpack it anew
        held: deque[Future[_Done]] = deque()
        failure: Exception | None = None
        while failure is None:
            try:
                part = next(ranges, None)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is said after what comes before it
                failure = error
                continue
            if part is None:
                break
            yield from self._make_room(held)
            held.append(self._task.remote(shared, part, _fingerprint()).future())
        while held:
            yield self._result(held.popleft())
        if failure is not None:
            raise failure

    def tell(self) -> None:
        """Log where the ranges were encoded."""
        log.info(
            "%d ranges of records were encoded as Ray tasks on %d nodes",
            self._ranges_by_node.total(),
            len(self._ranges_by_node),
        )

    def _make_room(self, held: deque[Future[_Done]]) -> Iterator[EncodedRange]:
        """Wait until another range may be handed out; meanwhile, take what is there."""
        while True:
            while held and (held[0].done() or len(held) >= AHEAD * self._workers):
                yield self._result(held.popleft())
            unfinished = [future for future in held if not future.done()]
            if len(unfinished) < self._workers:
                return
            wait(unfinished, return_when=FIRST_COMPLETED)  # in Python and not in Ray, which swallows signals' errors

    def _result(self, future: Future[_Done]) -> EncodedRange:
        exceptions: Any = self._ray.exceptions
        try:
            done = future.result()
        except exceptions.RayTaskError as error:
            raise error.cause from error  # a fault of ours, told as it is without Ray
        except exceptions.RayError as error:
            reason = str(error).strip().splitlines()[0] or type(error).__name__
            raise Transient(
                f"a range of records could not be encoded, after {RETRIES} more tries of Ray: {reason}. If its workers "
                "have too little memory, lower spec.prepare.parallelism"
            ) from error
        self._ranges_by_node[done.node] += 1
        if isinstance(done.outcome, StageError):
            raise done.outcome
        return done.outcome


@contextmanager
def ray_tasks(parallelism: int) -> Generator[RayTasks]:
    """Tasks on so many workers: of a Ray of this process's own, or of the cluster that RAY_ADDRESS names."""
    address = os.environ.get(ADDRESS_VARIABLE)
    workers = parallelism if address else min(parallelism, len(os.sched_getaffinity(0)))
    on_sigterm = signal.getsignal(signal.SIGTERM)
    os.environ.update(ENVIRONMENT if address else _environment_of_own())  # before the import, which reads it
    ray: Any = importlib.import_module("ray")  # Any: half of Ray's own types are unknown
    with (
        tempfile.TemporaryDirectory(prefix="ray-", dir=RAY_FOLDER, ignore_cleanup_errors=True) as folder,
        _joined(ray, address, folder) if address else _own(ray, workers, folder),
    ):
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray has put its own in the place
        tasks = RayTasks(ray, workers)
        yield tasks
        tasks.tell()


def _environment_of_own() -> dict[str, str]:
    return ENVIRONMENT | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # its name for: all of this Ray listens on loopback alone
    }


@contextmanager
def _own(ray: Any, workers: int, folder: str) -> Generator[None]:
    try:
        _connect(
            ray,
            f"the stage's Ray of {workers} workers did not start",
            address="local",
            num_cpus=workers,
            num_gpus=0,
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            _temp_dir=folder,
            _plasma_directory=folder,  # /dev/shm of a container may be too small
        )
        yield
    finally:
        ray.shutdown()


@contextmanager
def _joined(ray: Any, address: str, folder: str) -> Generator[None]:
    node = _start_node(address, folder)
    try:
        _connect(
            ray,
            f"the Ray cluster at {address} ({ADDRESS_VARIABLE}) cannot be joined. See that it runs, with the trainer's "
            "versions of Ray and Python, and that pods of jobs may reach it",
            possible=lambda: node.poll() is None,
            address=address,
        )
        yield
    finally:
        ray.shutdown()
        node.terminate()  # it ends what it has started
        node.wait()


def _start_node(address: str, folder: str) -> subprocess.Popen[bytes]:
    """Make this machine a node of the cluster that only drives."""
    arguments = {
        "address": address,
        "num-cpus": 0,
        "num-gpus": 0,
        "object-store-memory": OBJECT_STORE_BYTES,
        "plasma-directory": folder,
        "temp-dir": folder,
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    with (Path(folder) / "start.log").open("wb") as output:
        return subprocess.Popen(
            [*command, *(f"--{name}={value}" for name, value in arguments.items())],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )


def _connect(ray: Any, failed: str, *, possible: Callable[[], bool] = lambda: True, **how: Any) -> None:
    """Connect this process, in several tries: on a busy machine Ray gives up after 30 s. Raises Transient."""
    deadline = monotonic() + START_SECONDS
    while True:
        try:
            ray.init(**how, log_to_driver=False, logging_level=logging.WARNING)
        except SystemExit as error:  # Ray's answer to SIGTERM, until the stage's own is in its place again
            raise Preempted() from error
        except Exception as error:  # of many kinds, plain ones among them
            if not possible() or monotonic() > deadline:
                raise Transient(f"{failed}: {error}") from error
        else:
            return
        ray.shutdown()
        sleep(RETRY_SECONDS)


# --- in a worker ----------------------------------------------------------------------------------------------------


def _encode(shared: list[Any], part: Range, fingerprint: str) -> _Done:
    """The task."""
    node = importlib.import_module("ray").get_runtime_context().get_node_id()
    if fingerprint != _fingerprint():
        return _Done(
            node=node,
            outcome=Transient(
                f"a node of the Ray cluster that {ADDRESS_VARIABLE} names has other code than this stage, and might "
                "write other tokens; give its nodes the image of the trainer"
            ),
        )
    try:
        return _Done(node=node, outcome=_unpacked(shared[0]).encode(part))
    except UserError as error:
        return _Done(node=node, outcome=error)


@lru_cache(maxsize=1)
def _unpacked(reference: Any) -> RangeEncoder:
    """The encoder that a reference stands for; a worker unpacks it once."""
    return importlib.import_module("ray").get(reference)


@cache
def _fingerprint() -> str:
    """Digest of all code that decides what a record's tokens are."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    digest.update(json.dumps({name: version(name) for name in LIBRARIES}).encode())
    return digest.hexdigest()
