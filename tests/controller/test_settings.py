"""The settings table: where values come from, and that another process reads the same ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from orchestrator.settings import Settings


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("QLORA_") or name == "MLFLOW_TRACKING_URI":
            monkeypatch.delenv(name)


def test_everything_is_in_the_home_folder_by_default(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    assert settings.store_uri == f"file://{tmp_path}/store"
    assert settings.tracking_uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert settings.artifact_root == tmp_path / "mlartifacts"


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_HOME", "~/elsewhere")
    monkeypatch.setenv("QLORA_GRACE_SECONDS", "7")
    settings = Settings()
    assert settings.home == Path.home() / "elsewhere"
    assert settings.policy().grace_seconds == 7


def test_mlflows_own_variable_is_heard_and_ours_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert Settings().tracking_uri == "http://mlflow:5000"
    monkeypatch.setenv("QLORA_TRACKING_URI", "http://other:5000")
    assert Settings().tracking_uri == "http://other:5000"


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("sqlite:///runs.db", "sqlite:///{cwd}/runs.db"),
        ("sqlite:////srv/runs.db", "sqlite:////srv/runs.db"),
        ("./mlruns", "file://{cwd}/mlruns"),
        ("postgresql://host/mlflow", "postgresql://host/mlflow"),
    ],
)
def test_a_relative_tracking_store_is_that_of_this_folder(given: str, read: str) -> None:
    assert Settings(tracking_uri=given).tracking_uri == read.format(cwd=Path.cwd())


def test_another_process_reads_the_very_same_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(home=tmp_path, gpu_classes="24Gi=2,cpu=1", grace_seconds=3, tick_seconds=0.25)
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    assert Settings() == settings


@pytest.mark.parametrize(
    ("name", "value"),
    [("GPU_CLASSES", "24Gi"), ("GPU_CLASSES", "24=1"), ("STORE_URI", "/no/scheme"), ("TICK_SECONDS", "0")],
)
def test_a_value_that_breaks_a_rule_is_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"QLORA_{name}", value)
    with pytest.raises(ValidationError, match="(?i)" + name):
        Settings()


def test_every_setting_is_described() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []
