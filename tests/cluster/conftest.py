"""A control plane for the tests here, one a run; a machine that lacks its programs skips, and with CI=true fails."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.control_plane import ControlPlane, control_plane
from tests.cluster.resources import furnish, require


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """etcd and kube-apiserver, with our resources and two namespaces."""
    require("etcd", "kube-apiserver")
    with control_plane(tmp_path_factory.mktemp("cluster")) as plane:
        furnish(plane.api())
        yield plane
