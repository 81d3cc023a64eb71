"""The cluster itself: what the other tests of this tier take for granted."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from tests.e2e_cluster.daemons import wait_until
from tests.e2e_cluster.images import PAUSE_IMAGE
from tests.e2e_cluster.lab import Lab


def make_pod(name: str, script: str, **spec: Any) -> dict[str, Any]:
    """A pod that the profile `restricted` lets in, running a shell script."""
    container = {
        "name": "main",
        "image": PAUSE_IMAGE,
        "command": ["sh", "-c", script],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            "automountServiceAccountToken": False,
            "containers": [container],
            "restartPolicy": "Never",
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 65532,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            **spec,
        },
    }


WAIT_FOR_TERM = "trap 'echo saved > /dev/termination-log; exit 85' TERM; echo started; while :; do sleep 0.1; done"
ANSWER_HELLO = (
    "from http.server import *\n"
    "class Hello(BaseHTTPRequestHandler):\n"
    "    def do_GET(self): self.send_response(200); self.end_headers(); self.wfile.write(b'hello')\n"
    "HTTPServer(('', 8000), Hello).serve_forever()"
)
ASK = "from urllib.request import urlopen; print(urlopen('http://{host}:8000', timeout=5).read().decode())"


def test_a_stopped_pod_gives_its_exit_code_and_termination_message(lab: Lab, namespace: str) -> None:
    lab.apply(make_pod("stopped", WAIT_FOR_TERM, activeDeadlineSeconds=6), namespace=namespace)
    lab.kubectl("wait", "-n", namespace, "pod/stopped", "--for=jsonpath={.status.phase}=Failed", "--timeout=60s")
    status = lab.get("-n", namespace, "pod", "stopped")["status"]
    terminated = status["containerStatuses"][0]["state"]["terminated"]
    assert (terminated["exitCode"], terminated["message"]) == (85, "saved\n")
    assert lab.kubectl("logs", "-n", namespace, "stopped") == "started\n"


def test_services_work_by_name_across_nodes(lab: Lab, namespace: str) -> None:
    server, near, far = (
        make_pod(name, 'exec python3 -uc "$CODE"', nodeName=node)
        for name, node in (("server", "node-1"), ("near", "node-1"), ("far", "node-2"))
    )
    server["spec"]["containers"][0]["env"] = [{"name": "CODE", "value": ANSWER_HELLO}]
    for pod in (near, far):
        pod["spec"]["containers"][0]["env"] = [{"name": "CODE", "value": "import time; time.sleep(600)"}]
    ports = [{"port": 8000}]
    lab.apply(
        server,
        near,
        far,
        _service("hello", {"selector": {"app": "server"}, "ports": ports}),
        _service("headless", {"selector": {"app": "server"}, "ports": ports, "clusterIP": "None"}),
        namespace=namespace,
    )
    lab.kubectl("wait", "-n", namespace, "pod/server", "pod/near", "pod/far", "--for=condition=Ready", "--timeout=60s")
    for asker in ("near", "far"):
        for host in ("hello", f"headless.{namespace}.svc"):
            # A Service is there some time after its pod is.
            wait_until(f"{host} answers {asker}", lambda a=asker, h=host: _ask(lab, namespace, a, h) == "hello", 30)


def test_a_pod_that_is_not_restricted_is_refused(lab: Lab, namespace: str) -> None:
    pod = make_pod("root", "true", securityContext={})
    with pytest.raises(AssertionError, match=r"violates PodSecurity \"restricted"):
        lab.apply(pod, namespace=namespace)


def test_there_is_no_way_out(lab: Lab) -> None:
    with pytest.raises(OSError, match="unreachable"):
        socket.create_connection(("192.0.2.1", 80), timeout=5)


def _service(name: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec}


def _ask(lab: Lab, namespace: str, asker: str, host: str) -> str | None:
    try:
        return lab.kubectl("exec", "-n", namespace, asker, "--", "python3", "-c", ASK.format(host=host)).strip()
    except AssertionError:
        return None
