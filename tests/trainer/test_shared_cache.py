"""One cache for all stages of a machine: real processes fetch from real servers, at once, killed, and short of room."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from fake_hub import Repository, serve
from fault_link import Link, Request, fault_link
from qlora_trainer.outcome import Transient
from qlora_trainer.storage.shared_cache import PARTIAL_SUFFIX, READ_BYTES, SharedCache
from s3_server import ACCESS, BUCKET, REGION, SECRET, s3_server

from tests.cluster.resources import require

PIECES = 4
PAUSE_SECONDS = 0.25
WAIT_SECONDS = 60.0
MIB = 2**20

STAGE = """
import hashlib, logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s")
from qlora_trainer.model.source import describe_model, resolve_model
from qlora_trainer.outcome import StageError
try:
    folder = {"describe": describe_model, "resolve": resolve_model}[sys.argv[1]](sys.argv[2], "main")
    print(hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(), flush=True)
except StageError as error:
    print(f"{type(error).__name__}: {error.message}", flush=True)
sys.stdin.read()
"""
"""Its answer is a line; it goes on using what it has fetched until its input ends."""


@dataclass(slots=True)
class Stage:
    """A process that wants a model."""

    process: subprocess.Popen[str]
    log: Path

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip() or self.log.read_text()

    def end(self) -> None:
        self.process.communicate("", timeout=WAIT_SECONDS)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@dataclass(slots=True, kw_only=True)
class Machine:
    """A folder that stages share, and where the models come from."""

    folder: Path
    source: Callable[[str], str]
    pieces: Callable[[], int]
    """How many pieces of weights the server has been asked for."""
    add: Callable[[str, bytes], None]
    """A model of this name, with these weights."""
    environment: dict[str, str]
    stages: list[Stage]

    def start(self, name: str, question: str = "resolve", **variables: str) -> Stage:
        log = self.folder / f"log-{len(self.stages)}"
        environment = {**self.environment, "PYTHONPATH": os.pathsep.join(sys.path), **variables}
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "-c", STAGE, question, self.source(name)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=environment,
            )
        self.stages.append(Stage(process, log))
        return self.stages[-1]

    def places(self) -> list[Path]:
        """All weights that the machine holds, whole or in part."""
        large = (path for path in self.folder.rglob("*") if path.is_file() and not path.is_symlink())
        return [path for path in large if path.stat().st_size >= MIB]


def hub(folder: Path, resources: ExitStack) -> Machine:
    repositories: dict[str, Repository] = {}
    endpoint, requests = resources.enter_context(serve(repositories))

    def add(name: str, weights: bytes) -> None:
        model = write_model(folder / "served" / name, weights)
        repositories[f"acme/{name}"] = Repository(folder=model, pause_seconds=PAUSE_SECONDS)

    home = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(folder / "machine" / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
    return Machine(
        folder=folder / "machine",
        source=lambda name: f"hf://acme/{name}",
        pieces=lambda: sum(map(pieces_asked_for, list(requests))),
        add=add,
        environment={**os.environ, **home, "QLORA_MODEL_CACHE": str(folder / "machine" / "models")},
        stages=[],
    )


def pieces_asked_for(request: str) -> int:
    """Of the weights: a request for no range of them is for all."""
    if not request.startswith("GET") or "model.safetensors" not in request:
        return 0
    return 1 if "bytes=" in request else PIECES


def bucket(folder: Path, resources: ExitStack) -> Machine:
    require("versitygw")
    server = resources.enter_context(s3_server(folder))
    link: Link = resources.enter_context(fault_link("127.0.0.1", server.port))

    def is_piece(request: Request) -> bool:
        return request.method == "GET" and request.path.endswith("model.safetensors")

    def add(name: str, weights: bytes) -> None:
        write_model(server.bucket / name, weights)

    def slowly(request: Request) -> None:
        time.sleep(PAUSE_SECONDS if is_piece(request) else 0)

    link.rule = slowly
    account = {
        "AWS_ENDPOINT_URL": link.url,
        "AWS_ACCESS_KEY_ID": ACCESS,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    return Machine(
        folder=folder / "machine",
        source=lambda name: f"s3://{BUCKET}/{name}",
        pieces=lambda: sum(is_piece(request) for request in list(link.seen)),
        add=add,
        environment={**os.environ, **account, "QLORA_MODEL_CACHE": str(folder / "machine" / "models")},
        stages=[],
    )


def write_model(folder: Path, weights: bytes) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


@pytest.fixture
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Machine]:
    with ExitStack() as resources:
        made: Machine = getattr(request, "param", hub)(tmp_path, resources)
        made.folder.mkdir()
        yield made
        for stage in made.stages:
            stage.kill()


def weights_of(name: str, size: int) -> bytes:
    return random.Random(name).randbytes(size)


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def base(machine: Machine) -> bytes:
    """The weights of a model that comes in four pieces."""
    weights = weights_of("base", PIECES * READ_BYTES)
    machine.add("base", weights)
    return weights


from_both = pytest.mark.parametrize("machine", [hub, bucket], indirect=True)


@from_both
def test_stages_that_want_a_model_at_once_fetch_it_once(machine: Machine, base: bytes) -> None:
    stages = [machine.start("base") for _ in range(2)]
    assert [stage.answer() for stage in stages] == [digest(base)] * 2
    assert machine.pieces() == PIECES
    assert len(machine.places()) == 1
    assert sum("by another stage" in stage.log.read_text() for stage in stages) == 1


@from_both
def test_stages_killed_at_any_instant_leave_what_they_have_to_the_next(machine: Machine, base: bytes) -> None:
    for kill_after in (1, 2, 3):
        stage = machine.start("base")
        until(lambda pieces=kill_after: machine.pieces() >= pieces)
        time.sleep(random.Random(kill_after).uniform(0, PAUSE_SECONDS))
        stage.kill()
    last = machine.start("base")
    assert last.answer() == digest(base)
    assert "by another stage" not in last.log.read_text(), "the locks of the dead are free at once"
    assert machine.pieces() <= PIECES + 3, "each of the killed loses the piece that was on its way"
    assert len(machine.places()) == 1


def test_a_stage_that_hangs_in_the_middle_is_waited_for_no_longer_than_is_set(machine: Machine, base: bytes) -> None:
    hung = machine.start("base")
    until(lambda: machine.pieces() >= 2)
    hung.process.send_signal(signal.SIGSTOP)
    answer = machine.start("base", QLORA_MODEL_CACHE_WAIT_SECONDS="1").answer()
    assert answer.startswith("Transient: ")
    assert f"is being fetched from {machine.source('base')} by another stage, and nothing has come of it" in answer
    hung.kill()
    assert machine.start("base").answer() == digest(base)
    assert machine.pieces() <= PIECES + 2


def test_what_is_used_stays_and_what_is_unused_for_longest_goes(machine: Machine) -> None:
    names = ("held", "old", "newer", "next", "last")
    weights = {name: weights_of(name, 4 * MIB) for name in names}
    for name, content in weights.items():
        machine.add(name, content)
    bound = {"QLORA_MODEL_CACHE_GIB": str(13 * MIB / 2**30)}  # three of them

    def held() -> set[str]:
        found = {digest(path.read_bytes()) for path in machine.places()}
        return {name for name, content in weights.items() if digest(content) in found}

    holder = machine.start("held", **bound)
    assert holder.answer() == digest(weights["held"])
    for name in ("old", "newer"):
        stage = machine.start(name, **bound)
        assert stage.answer() == digest(weights[name])
        stage.end()
    assert held() == {"held", "old", "newer"}
    second = machine.start("next", **bound)
    assert second.answer() == digest(weights["next"])
    assert held() == {"held", "newer", "next"}

    third = machine.start("newer", **bound)  # from now on all three are in use
    assert third.answer() == digest(weights["newer"])
    answer = machine.start("last", **bound).answer()
    assert answer.startswith(f"Transient: {machine.source('last')} needs 0.0 GiB more in {machine.folder / 'models'}")
    assert "QLORA_MODEL_CACHE_GIB=0.0126953" in answer
    assert "what is there is in use" in answer
    holder.kill()
    assert machine.start("last", **bound).answer() == digest(weights["last"])
    assert held() == {"newer", "next", "last"}


def test_a_model_that_no_empty_cache_would_hold_is_refused_before_a_gpu_is_taken(machine: Machine) -> None:
    machine.add("large", weights_of("large", 4 * MIB))
    answer = machine.start("large", question="describe", QLORA_MODEL_CACHE_GIB=str(2 * MIB / 2**30)).answer()
    assert answer.startswith(
        f"UserError: {machine.source('large')} takes 0.0 GiB, and this cluster's model cache holds"
    )
    assert machine.pieces() == 0


def test_what_came_damaged_is_not_used(machine: Machine) -> None:
    base = weights_of("base", 2 * READ_BYTES)
    machine.add("base", base)
    blobs = machine.folder / "home" / "hub" / "models--acme--base" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / (digest(base) + PARTIAL_SUFFIX)).write_bytes(b"not what the hub has" * 1000)
    assert machine.start("base").answer().startswith(f"Transient: {digest(base)} came damaged")
    assert machine.start("base").answer() == digest(base)


def test_a_disk_without_room_is_told_before_anything_is_fetched(tmp_path: Path) -> None:
    cache = SharedCache(folder=tmp_path)
    with pytest.raises(Transient, match=r"s3://b/m needs 1048576\.0 GiB more in .* for its disk, of which .* are free"):
        cache.make_room(tmp_path / "entry", 2**50, "s3://b/m")


def test_room_that_one_stage_counts_on_is_not_given_to_another(tmp_path: Path) -> None:
    cache = SharedCache(folder=tmp_path, limit_bytes=100)
    for name, size in (("a", 60), ("b", 30)):
        cache.use(tmp_path / name)
        cache.make_room(tmp_path / name, size, name)
    cache.use(tmp_path / "c")
    with pytest.raises(Transient, match=r"of which 0\.0 GiB are taken"):
        cache.make_room(tmp_path / "c", 20, "c")
    cache.make_room(tmp_path / "c", 10, "c")


def test_without_a_bound_nothing_is_deleted(tmp_path: Path) -> None:
    strangers = tmp_path / "models--somebody--elses"
    strangers.mkdir()
    (strangers / "weights").write_bytes(bytes(1000))
    lock = tmp_path / "locks" / "of-the-dead.json"
    lock.parent.mkdir()
    lock.write_text(json.dumps({"folder": str(strangers), "bytes": 0}))
    lock.with_suffix(".use").touch()
    unbounded, bounded = SharedCache(folder=tmp_path), SharedCache(folder=tmp_path, limit_bytes=1000)
    unbounded.use(tmp_path / "own")
    unbounded.make_room(tmp_path / "own", 500, "own")
    assert strangers.exists()
    bounded.make_room(tmp_path / "own", 500, "own")
    assert not strangers.exists()
