"""Seeded mutations of objects: the SDK's verdict is a real API server's, but for what is listed with its reason."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from orchestrator.adapters.kubernetes.api import KubeApi, path_of
from orchestrator.api.base import API_VERSION
from orchestrator.errors import OrchestratorError
from tests.cluster.control_plane import ControlPlane
from tests.cluster.resources import clear
from tests.strangers.test_fuzz import JOB, LISTED, QUEUE, ROUNDS, SEED, difference, mutated, sdk_refuses

Json = dict[str, Any]
PATHS = {"QLoRAJob": path_of(API_VERSION, "qlorajobs", "team-a"), "QLoRAQueue": path_of(API_VERSION, "qloraqueues")}


@pytest.fixture(scope="module")
def api(cluster: ControlPlane) -> Iterator[KubeApi]:
    api = cluster.api()
    clear(api)
    yield api
    api.close()


def server_refuses(api: KubeApi, kind: str, item: Json) -> str:
    try:
        api.create(f"{PATHS[kind]}?dryRun=All&fieldValidation=Strict", item)
    except OrchestratorError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("base", [JOB, QUEUE], ids=["QLoRAJob", "QLoRAQueue"])
def test_sdk_and_server_say_the_same_of_any_object(
    api: KubeApi, base: Json, capsys: pytest.CaptureFixture[str]
) -> None:
    dice, seen, unexplained = random.Random(SEED), Counter[str](), list[str]()
    assert server_refuses(api, base["kind"], base) == ""
    for _ in range(ROUNDS):
        item = mutated(dice, base)
        sdk, server = sdk_refuses(item), server_refuses(api, base["kind"], copy.deepcopy(item))
        seen["refused" if server else "taken"] += 1
        if "namespace of the provided object does not match" in server:  # the request names one, which is no verdict
            seen["another namespace"] += 1
        elif bool(sdk) != bool(server):
            why = difference(item, sdk, server)
            seen[why or "unexplained"] += 1
            if why is None:
                unexplained.append(f"sdk: {sdk!r}\nserver: {server!r}\n{item!a}"[:2000])
    with capsys.disabled():
        print(f"\n{ROUNDS} mutations of a {base['kind']} on an API server with seed {SEED}: {dict(seen)}")
    assert set(seen) - {"refused", "taken", "unexplained", "another namespace"} <= set(LISTED)
    assert not unexplained, f"{len(unexplained)} verdicts differ:\n" + "\n\n".join(unexplained[:5])
