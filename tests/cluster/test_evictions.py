"""Other people's controllers: what they read on stages' pods, and what the eviction API makes of their wishes.

It leaves a pod its grace period, or is refused where a budget is wanted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.adapters.kubernetes.api import KubeApi, path_of
from orchestrator.api.reasons import Reason
from orchestrator.core.snapshot import StagePhase
from orchestrator.errors import OrchestratorError
from tests.cluster.accounts import chart_parts, create
from tests.cluster.control_plane import ControlPlane, control_plane
from tests.cluster.resources import furnish, require
from tests.cluster.runtimes import started_runtimes
from tests.cluster.test_pods import BOUNDS, NAME, NAMESPACE, PATH, POLICY, eventually, run_on_node, until
from tests.deploy.render import documents

BUDGET = path_of("policy/v1", "poddisruptionbudgets", NAMESPACE, "qlora-orchestrator-jobs")


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[ControlPlane]:
    """A cluster that keeps count of what may be disrupted."""
    require("etcd", "kube-apiserver", "kube-controller-manager", "helm")
    with control_plane(tmp_path / "plane", "kube-controller-manager") as plane:
        furnish(plane.api())
        yield plane


def test_an_eviction_leaves_the_grace_period_and_is_refused_where_a_budget_is_wanted(plane: ControlPlane) -> None:
    api = plane.api()
    with started_runtimes(plane, POLICY, BOUNDS) as start:
        pods = start()
        run_on_node(api, pods)
        values = f"jobs.namespaces={{{NAMESPACE}}},jobs.podDisruptionBudget=true"
        for document in documents(chart_parts("jobs/pdb", values=values)):
            create(api, document)
        eventually(lambda: api.get(BUDGET).get("status", {}).get("observedGeneration") == 1)
        with pytest.raises(OrchestratorError, match="disruption budget"):
            evict(api)
        api.delete(BUDGET)
        evict(api)
        fact = until(pods, lambda fact: fact.disruption)
        assert (fact.phase, fact.disruption) == (StagePhase.RUNNING, Reason.DISRUPTED)
        assert api.get(PATH)["metadata"]["deletionGracePeriodSeconds"] == 120


LEAVE_ALONE = {
    "karpenter.sh/do-not-disrupt": "true",
    "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
    "descheduler.alpha.kubernetes.io/prefer-no-eviction": "true",
}
"""What each of them documents as the wish of a pod that is not to be moved for a controller's own convenience."""


def test_other_peoples_controllers_read_on_each_pod_that_it_is_to_be_left_alone(plane: ControlPlane) -> None:
    api = plane.api()
    with started_runtimes(plane, POLICY, BOUNDS) as start:
        run_on_node(api, start())
        (pod,) = api.get(path_of("v1", "pods", NAMESPACE))["items"]
        found = pod["metadata"].get("annotations", {})
        assert {name: found.get(name) for name in LEAVE_ALONE} == LEAVE_ALONE


def evict(api: KubeApi) -> None:
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": NAME, "namespace": NAMESPACE}}
    api.create(f"{PATH}/eviction", body)
