"""The comparison with Kueue, in its parts: what is run is the same on both sides, and figures are of what was run.

The generator's configuration is written out here as Kueue's documentation describes it; the benchmark itself reads the
original.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.kueue_ours import arrivals_of, run_ours
from benchmarks.kueue_peer import Limit, with_limit
from benchmarks.kueue_shape import Life, Shape, figures
from tests.cluster.resources import require

CONFIGURATION = """
cohorts:
- className: cohort
  count: 2
  queuesSets:
  - className: cq
    count: 3
    nominalQuota: 20
    borrowingLimit: 100
    reclaimWithinCohort: Any
    withinClusterQueue: LowerPriority
    workloadsSets:
    - count: 350
      creationIntervalMs: 100
      workloads: [{className: small, runtimeMs: 200, priority: 50, request: 1}]
    - count: 50
      creationIntervalMs: 1200
      workloads: [{className: large, runtimeMs: 1000, priority: 200, request: 20}]
"""
SHAPE = Shape.read(yaml.safe_load(CONFIGURATION))
START = datetime(2026, 1, 1, tzinfo=UTC)


def life(kind: str, *, created: float = 0, admitted: float, finished: float) -> Life:
    def at(seconds: float) -> datetime:
        return START + timedelta(seconds=seconds)

    return Life(kind=kind, created=at(created), admitted=at(admitted), finished=at(finished))


def test_a_configuration_that_is_written_is_the_one_that_was_read() -> None:
    assert Shape.read(yaml.safe_load(yaml.safe_dump(SHAPE.document()))) == SHAPE
    assert (SHAPE.workloads, SHAPE.quota) == (2 * 3 * 400, 2 * 3 * 20)
    assert SHAPE.work == pytest.approx(2 * 3 * (350 * 0.2 + 50 * 20))


def test_a_share_has_fewer_workloads_that_come_as_fast_to_the_same_queues() -> None:
    scaled = SHAPE.scaled(0.1)
    assert [each.count for each in scaled.classes] == [35, 5]
    assert replace(scaled, classes=SHAPE.classes) == SHAPE
    assert [each.interval_seconds for each in scaled.classes] == [0.1, 1.2]


def test_with_one_unit_for_everybody_quotas_are_as_scarce_as_before() -> None:
    one = SHAPE.one_gpu()
    assert {each.request for each in one.classes} == {1}
    assert (one.nominal, one.borrowing_limit) == (3, 15)  # 20 units for 1,070 unit seconds; 120 are left of those
    assert one.work / one.quota <= SHAPE.work / SHAPE.quota


def test_every_job_comes_once_to_its_queue_at_its_interval() -> None:
    arrivals = list(arrivals_of(SHAPE))
    assert arrivals == sorted(arrivals)
    assert len({arrival.key for arrival in arrivals}) == SHAPE.workloads
    assert Counter(arrival.namespace for arrival in arrivals) == dict.fromkeys(
        [f"cq-0-{queue}-cohort-{cohort}" for cohort in range(2) for queue in range(3)], 400
    )
    large = [each.seconds for each in arrivals if each.kind == "large" and each.namespace == "cq-0-1-cohort-1"]
    assert large == [pytest.approx(1.2 * (number + 1)) for number in range(50)]


def test_rates_waits_and_use_of_quota_are_of_the_times_that_objects_tell() -> None:
    found = figures(
        SHAPE,
        [
            life("small", created=10, admitted=12, finished=13),
            life("small", created=10, admitted=16, finished=17),
            life("large", created=11, admitted=18, finished=20),
            life("large", created=11, admitted=14, finished=20),
        ],
    )
    waits: Any = found.pop("wait_seconds")
    assert found == {
        "workloads": 4,
        "seconds": 10.0,
        "workloads_per_second": 0.4,
        "admission_seconds": 8.0,
        "quota_held": round((1 + 1 + 20 * 2 + 20 * 6) / (120 * 10), 3),
        "quota_worked": round(SHAPE.work / (120 * 10), 3),
    }
    assert {kind: each["mean"] for kind, each in waits.items()} == {"small": 4, "large": 5}


@pytest.mark.parametrize(
    ("text", "name", "qps", "burst"),
    [
        ("50/100", "limit_50_100", "50", "100"),
        ("300/500", "limit_300_500", "300", "500"),
        ("none", "no_limit", "-1", "-1"),
    ],
)
def test_limits_get_into_the_source_in_place_of_what_is_there(text: str, name: str, qps: str, burst: str) -> None:
    limit = Limit.parse(text)
    assert limit.name == name
    source = "\tkubeConfig.QPS = 50\n\tkubeConfig.Burst = 100\n\tlog(kubeConfig.QPS, kubeConfig.Burst)\n"
    assert with_limit(source, limit) == source.replace("= 50\n", f"= {qps}\n").replace("= 100\n", f"= {burst}\n")


def test_a_source_that_sets_its_limits_elsewhere_is_not_taken_for_one_with_other_limits() -> None:
    with pytest.raises(ValueError, match="QPS in 0 places"):
        with_limit("kubeConfig.QPS = 40", Limit.parse("none"))


@pytest.mark.timeout(600)
def test_our_side_takes_every_job_from_a_suspended_one_to_a_published_one(tmp_path: Path) -> None:
    require("etcd", "kube-apiserver")
    shape = SHAPE.scaled(0.01).one_gpu()
    found: Any = run_ours(tmp_path / "run", shape, Limit.parse("50/100"))
    assert found["workloads"] == shape.workloads == 2 * 3 * 5
    assert found["requests"]["create pods"] == 2 * shape.workloads, "a train pod and a publish pod each"
    assert 0 < found["quota_worked"] <= found["quota_held"] <= 1
    assert {kind: each["mean"] > 0 for kind, each in found["wait_seconds"].items()} == {"small": True, "large": True}
