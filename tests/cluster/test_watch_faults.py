"""Views behind a connection that loses, repeats, delays and lies end up as what the API server has."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest

from orchestrator.adapters.kubernetes.api import KubeApi
from orchestrator.adapters.kubernetes.store import KubernetesStore
from orchestrator.adapters.kubernetes.watch import Changes
from orchestrator.api.job import QLoRAJob, QLoRAJobStatus
from orchestrator.errors import Conflict, NotFound, OrchestratorError, TransientError
from tests.builders import submitted_job
from tests.cluster.control_plane import ControlPlane
from tests.cluster.fault_proxy import Faults, Proxy, fault_proxy
from tests.cluster.resources import clear

RELIST_SECONDS = 2.0
SETTLE_SECONDS = 15.0
TRIES = 200

FAULTS = {
    "events are lost": Faults(drop_events=0.3),
    "events come twice": Faults(repeat_events=0.5),
    "events come late": Faults(delay_events=0.3, delay_seconds=0.2),
    "watches break off": Faults(end_watches=0.2),
    "reads are old": Faults(stale_reads=0.5, end_watches=0.1),
    "requests are refused": Faults(errors=0.3),
    "answers are lost": Faults(lost_answers=0.3),
    "everything at once": Faults(
        drop_events=0.1,
        repeat_events=0.1,
        delay_events=0.1,
        delay_seconds=0.1,
        end_watches=0.05,
        stale_reads=0.1,
        errors=0.1,
        lost_answers=0.1,
    ),
}


@pytest.fixture(params=FAULTS.values(), ids=list(FAULTS))
def proxy(cluster: ControlPlane, request: pytest.FixtureRequest) -> Iterator[Proxy]:
    """One that behaves until the test is ready."""
    clear(cluster.api())
    with fault_proxy(cluster.url, seed=7) as proxy:
        yield proxy


def test_a_view_ends_up_as_what_the_server_has_and_never_goes_back(
    cluster: ControlPlane, proxy: Proxy, request: pytest.FixtureRequest
) -> None:
    """One client behind the faults writes and watches; another, without any, writes to the same jobs."""
    through = cluster.kubeconfig_for(cluster.token, url=proxy.url, name="faults")
    api = KubeApi(kubeconfig=str(through))
    store = KubernetesStore(api, changes=Changes(RELIST_SECONDS, backoff_seconds=(0.05, 0.2)))
    direct = KubernetesStore(cluster.api())
    store.start()
    proxy.faults = request.node.callspec.params["proxy"]
    chance, seen = random.Random(3), dict[str, int]()
    try:
        for number in range(10):
            create(store, f"job-{number}")
        for turn in range(80):
            writer = chance.choice((store, direct))
            write(writer, f"job-{chance.randrange(10)}", turn)
            look(store, seen)
        direct.delete_job("team-a", "job-9")
        proxy.faults = Faults(drop_events=proxy.faults.drop_events)
        wanted = direct.list_jobs()
        deadline = time.monotonic() + SETTLE_SECONDS
        while look(store, seen) != list(wanted):
            assert time.monotonic() < deadline, "the view never became what the server has"
            time.sleep(0.05)
    finally:
        proxy.faults = Faults()
        store.close()
        api.close()


def create(store: KubernetesStore, name: str) -> None:
    """Create it as a user does who tries again until the job is there."""
    for _ in range(TRIES):
        try:
            store.create_job(submitted_job(name))
        except TransientError:
            continue
        except OrchestratorError:  # AlreadyExists: only the answer was lost; a conflict was made up
            try:
                store.read_job("team-a", name)
            except OrchestratorError:
                continue
        return
    raise AssertionError(f"{name} could not be created")


def write(store: KubernetesStore, name: str, turn: int) -> None:
    """Write as the controller does: look again on a conflict, try again on a transient error."""
    for _ in range(TRIES):
        try:
            store.update_status(store.get_job("team-a", name), QLoRAJobStatus(attempts_total=turn))
        except (Conflict, NotFound, TransientError):
            time.sleep(0.01)
            continue
        return
    raise AssertionError(f"{name} could not be written")


def look(store: KubernetesStore, seen: dict[str, int]) -> list[QLoRAJob]:
    """The view; no job in it may be older than before."""
    jobs = list(store.list_jobs())
    for job in jobs:
        version = int(job.metadata.resource_version)
        assert version >= seen.get(job.key, 0), f"{job.key} went back from {seen[job.key]} to {version}"
        seen[job.key] = version
    return jobs
