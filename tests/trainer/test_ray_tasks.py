"""Prepare with several Ray workers, each test with a real Ray: what one process writes, to the byte, whoever dies."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from qlora_trainer import prepare
from test_prepare import make_task, write_dataset
from tiny_model import tiny_model
from transformers import AutoTokenizer

from orchestrator.api.reasons import ExitCode
from orchestrator.api.task import TERMINATION_LOG_VARIABLE, StageTask, task_variables

PROGRAM = Path(__file__).parent / "encode_records.py"
RANGE = 1024
"""Records of a range in these tests, which are small."""
RECORDS = 3 * RANGE + 100
WAIT_SECONDS = 500
POLL_SECONDS = 0.1
"""Each look goes through all processes of the machine; a range takes several times as long."""
TASK_TITLE = "ray::_encode"
"""What Ray calls the process of a worker while it encodes a range."""
AGENT_TITLES = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a process ended."""

    code: int
    answers: list[dict[str, Any]]
    """What it encoded, or how it failed, source by source."""
    said: str


class Encoding:
    """A process that encodes records with workers."""

    def __init__(self, command: Sequence[str], folder: Path, **environment: str) -> None:
        folder.mkdir()
        self._folder = folder
        plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        with (folder / "answer").open("wb") as answer, (folder / "log").open("wb") as log:
            self.process = psutil.Popen(
                [sys.executable, *command],
                env={
                    **plain,
                    "TOKENIZERS_PARALLELISM": "false",
                    "PYTHONPATH": os.pathsep.join(sys.path),
                    TERMINATION_LOG_VARIABLE: str(folder / "answer"),
                    **environment,
                },
                stdout=answer,
                stderr=log,
            )

    def encoding(self) -> list[psutil.Process]:
        """The workers that encode a range now."""
        return [process for process in self.descendants() if title(process).startswith(TASK_TITLE)]

    def descendants(self) -> list[psutil.Process]:
        """All that the stage has started."""
        try:
            return self.process.children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def wait_until_encoding(self) -> list[psutil.Process]:
        """The workers, once some encode."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not (found := self.encoding()):
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(POLL_SECONDS)
        return found

    def wait(self) -> Ended:
        """Its end."""
        code = self.process.wait(WAIT_SECONDS)
        lines = (self._folder / "answer").read_text().splitlines()
        answers = [json.loads(line) for line in lines if line.startswith("{")]  # Ray tells there of workers that died
        return Ended(code=code, answers=answers, said=self.said())

    def said(self) -> str:
        """Its log."""
        return (self._folder / "log").read_text()


def title(process: psutil.Process) -> str:
    """The name that a process has given itself; empty where it is gone."""
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def gone(processes: list[psutil.Process]) -> bool:
    """Whether all of these end soon."""
    _, alive = psutil.wait_procs(processes, timeout=60)
    return not [process for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def kill(process: psutil.Process) -> None:
    """Kill a process that may have ended."""
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Chats of which every fourth has two turns, some are too long, and some have a field that means nothing."""
    return write_dataset(tmp_path_factory.mktemp("data") / "chats.jsonl", list(chats()))


def chats() -> Iterator[dict[str, Any]]:
    for number in range(RECORDS):
        words = [f"{number * each % 997}" for each in range(1, 400 if number % 500 == 7 else 12)]
        turns = [("user", f"¿{words[0]}?"), ("assistant", " ".join(words))] * (2 if number % 4 == 0 else 1)
        extra = {f"note{number // RANGE}": 1} if number % 1000 == 3 else {}
        yield {"messages": [{"role": role, "content": content} for role, content in turns], **extra}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "pickled"
    path.write_bytes(pickle.dumps(AutoTokenizer.from_pretrained(tiny_model())))
    return path


@pytest.fixture(scope="module")
def sources(source: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The chats; the same with bad records in every range; the same in a file that breaks off."""
    folder = tmp_path_factory.mktemp("more")
    records: list[Any] = list(chats())
    for number in (RECORDS - 1, RANGE + 5, 2 * RANGE, 40):
        records[number] = {"messages": []}
    whole = gzip.compress(Path(source.removeprefix("file://")).read_bytes())
    (folder / "broken.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    return [source, write_dataset(folder / "bad.jsonl", records), f"file://{folder}/broken.jsonl.gz"]


Encode = Callable[..., Encoding]


@pytest.fixture
def encode(tokenizer: Path, sources: list[str], tmp_path: Path) -> Encode:
    """Starts a process that encodes the first sources."""

    def start(workers: int, count: int = 1, **environment: str) -> Encoding:
        command = [str(PROGRAM), str(tokenizer), str(workers), str(RANGE), *sources[:count]]
        return Encoding(command, tmp_path / f"{workers} workers", **environment)

    return start


@pytest.fixture(scope="module")
def alone(tokenizer: Path, sources: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What one process makes of the sources."""
    command = [str(PROGRAM), str(tokenizer), "1", str(RANGE), *sources]
    return Encoding(command, tmp_path_factory.mktemp("alone") / "run").wait().answers


def test_workers_encode_and_refuse_what_one_process_does_though_one_is_killed(
    encode: Encode, alone: list[dict[str, Any]]
) -> None:
    """The same tokens in the same order, counts, warnings and first names of bad records; nothing of Ray is left."""
    running = encode(2, count=3)
    kill(running.wait_until_encoding()[0])
    started = running.descendants()
    ended = running.wait()
    assert ended.answers == alone, ended.said
    good, bad, broken = alone
    assert good["counts"][0] == sum(number % 500 == 7 for number in range(RECORDS)), "truncated"
    assert any("`note0`, `note1`, `note2`" in warning for warning in good["warnings"])
    assert f"4 of {RECORDS} records cannot be used: line 41 has" in bad["failure"]["message"]
    assert "is not a whole gzip file" in broken["failure"]["message"]
    assert "ranges of records were encoded as Ray tasks on 1 nodes" in ended.said
    assert len(started) > 3
    assert gone(started)


def test_a_range_whose_workers_all_die_is_the_surroundings_fault(encode: Encode) -> None:
    """As when there is too little memory: the stage may be tried again, and says what would help."""
    running = encode(2)
    running.wait_until_encoding()
    while running.process.poll() is None:
        for worker in running.encoding():
            kill(worker)
        time.sleep(POLL_SECONDS)
    ended = running.wait()
    assert ended.code == ExitCode.TRANSIENT_ERROR, ended.said
    assert "lower spec.prepare.parallelism" in ended.answers[0]["failure"]["message"]


def test_nothing_encodes_for_a_process_that_was_killed(encode: Encode) -> None:
    """Ray's agents, idle, outlive it by a minute, in which they try to tell of it."""
    running = encode(2)
    running.wait_until_encoding()
    started = [process for process in running.descendants() if not title(process).startswith(AGENT_TITLES)]
    assert len(started) > 3
    kill(running.process)
    running.wait()
    assert gone(started), [title(process) for process in started]


# --- the whole stage ------------------------------------------------------------------------------------------------


def test_workers_prepare_the_same_files_to_the_byte_after_the_stage_was_stopped(source: str, tmp_path: Path) -> None:
    """Rows, tokenizer, records shown and the digest that names the folder; a stage that is stopped leaves nothing."""
    stopped = stage(source, tmp_path, "stopped")
    stopped.wait_until_encoding()
    started = stopped.descendants()
    stopped.process.send_signal(signal.SIGTERM)
    ended = stopped.wait()
    assert ended.code == ExitCode.PREEMPTED, ended.said
    assert gone(started)
    ended = stage(source, tmp_path, "again").wait()
    assert ended.code == ExitCode.OK, ended.said
    files = written(ended.answers[0]["prepare"]["uri"])
    assert files == written(prepare.run(task_of(source, tmp_path / "alone", 1)).uri)
    assert {path.name for path in files} >= {"train.parquet", "eval.parquet", "tokenizer.json"}


def task_of(source: str, store: Path, workers: int) -> StageTask:
    return make_task(
        store,
        dataset={"source": source, "evalSource": None, "tooLong": "truncate", "evalFraction": "0.1"},
        prepare={"parallelism": workers},
    )


def stage(source: str, folder: Path, name: str) -> Encoding:
    task = task_of(source, folder / "store", 2)
    return Encoding(
        ["-m", "qlora_trainer", "prepare"], folder / name, **task_variables(task.model_dump_json(by_alias=True))
    )


def written(uri: str) -> dict[Path, bytes]:
    """The files of a prepared folder, of which the manifest knows where it is."""
    folder = Path(uri.removeprefix("file://"))
    store = str(folder.parents[1]).encode()
    return {
        path.relative_to(folder.parent): path.read_bytes().replace(store, b"")
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- a cluster of the operator's own --------------------------------------------------------------------------------


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Short, because Ray's sockets are in it."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextmanager
def ray_cluster(folder: Path, nodes: int) -> Iterator[dict[str, str]]:
    """Nodes of one CPU each, behind a token; what a stage's environment needs to join them."""
    host = own_address()
    with socket.socket() as free:
        free.bind((host, 0))
        port = free.getsockname()[1]
    joins = {
        "RAY_ADDRESS": f"{host}:{port}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        **{name: value for name, value in joins.items() if name != "RAY_ADDRESS"},
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    started: list[subprocess.Popen[bytes]] = []
    try:
        for number in range(nodes):
            role = ["--head", f"--port={port}", "--include-dashboard=false"]
            role = role if number == 0 else [f"--address={joins['RAY_ADDRESS']}"]
            command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
            command += [
                "--num-cpus=1",
                "--num-gpus=0",
                "--object-store-memory=100000000",
                f"--temp-dir={folder}",
                *role,
            ]
            with (folder / f"node{number}.log").open("wb") as output:
                started.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
            wait_for_port(host, port)
        yield joins
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            process.wait(60)


def own_address() -> str:
    """The address that Ray gives to a node of this machine: that of the route to others."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
        try:
            route.connect(("8.8.8.8", 80))  # sends nothing
        except OSError:
            return "127.0.0.1"
        return route.getsockname()[0]


def wait_for_port(host: str, port: int) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            socket.create_connection((host, port)).close()
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        else:
            return


def test_a_ray_cluster_encodes_on_all_of_its_nodes_what_one_process_does(
    encode: Encode, alone: list[dict[str, Any]], short_folder: Path
) -> None:
    with ray_cluster(short_folder, nodes=2) as joins:
        ended = encode(2, **joins).wait()
    assert ended.answers == alone[:1], ended.said
    assert "4 ranges of records were encoded as Ray tasks on 2 nodes" in ended.said
