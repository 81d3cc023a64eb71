"""The cluster that every test of this tier shares, and its namespaces."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e_cluster import CACHE_VARIABLE
from tests.e2e_cluster.lab import Lab, open_lab

CACHE = os.environ.get(CACHE_VARIABLE)


def pytest_ignore_collect() -> bool | None:
    """Outside the namespaces of `python -m tests.e2e_cluster` there is nothing to run."""
    return None if CACHE else True


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """The running cluster."""
    assert CACHE is not None
    with open_lab(Path(CACHE)) as lab:
        yield lab


@pytest.fixture(scope="module")
def namespace(lab: Lab, request: pytest.FixtureRequest) -> Iterator[str]:
    """A namespace of the module's own, with Pod Security `restricted` enforced."""
    module = str(request.module.__name__)  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType] - pytest's
    name = module.rpartition(".")[2].removeprefix("test_").replace("_", "-")
    lab.make_namespace(name)
    yield name
    lab.kubectl("delete", "namespace", name, "--wait=false")
