"""A control plane for the tests here, one a run; a machine that lacks its programs skips, and with CI=true fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.adapters.mlflow.tracking import MlflowTracking
from orchestrator.settings import Settings
from tests.cluster.control_plane import ControlPlane, control_plane
from tests.cluster.resources import furnish, require


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """etcd and kube-apiserver, with our resources and two namespaces."""
    require("etcd", "kube-apiserver")
    with control_plane(tmp_path_factory.mktemp("cluster")) as plane:
        furnish(plane.api())
        yield plane


@pytest.fixture(scope="session")
def new_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables, which take it long to make."""
    folder = tmp_path_factory.mktemp("mlflow")
    settings = Settings(home=folder, tracking_uri=f"sqlite:///{folder}/mlflow.db", tracking_start_seconds=300)
    MlflowTracking(settings).connect()
    return folder / "mlflow.db"
