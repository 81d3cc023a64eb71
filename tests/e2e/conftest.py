"""The embedded service in a folder of its own, for tests that run everything for real."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.controller import supervisor
from orchestrator.sdk import Client
from orchestrator.settings import Settings


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings of a fresh home with one slot and short waits, independent of this machine's variables."""
    return Settings(
        home=tmp_path_factory.mktemp("home"),
        gpu_classes="cpu=1",
        backoff_base_seconds=0.2,
        backoff_max_seconds=1.0,
        minimum_run_seconds=0.0,
        preemption_cooldown_seconds=0.0,
        restart_cost_seconds=0.0,
        stop_cost_seconds=0.0,
        grace_seconds=60,
        trainer_threads=1,
    )


@pytest.fixture(scope="module")
def client(settings: Settings) -> Iterator[Client]:
    """A client of a running service, stopped at the end."""
    supervisor.start(settings)
    try:
        yield Client(settings)
    finally:
        supervisor.stop(settings)


@pytest.fixture(scope="session")
def pretrained() -> Path:
    """SmolLM2-135M-Instruct as `make` provides it; without it the test fails in CI and is skipped elsewhere."""
    folder = os.environ.get("QLORA_TEST_MODEL")
    if folder is None or not Path(folder).is_dir():
        message = "set QLORA_TEST_MODEL to the folder that `make demo` made"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    return Path(folder).resolve()
