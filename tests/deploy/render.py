"""The chart as it is rendered for a few sets of values; `python -m tests.deploy.render` writes them down anew.

`manifests/install.yaml` is for people without Helm. The golden files are for reviewers: a change of the chart shows
there as the change of the manifests that it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from tests.cluster.binaries import KUBERNETES_VERSION
from tests.deploy.tools import CHART, ROOT, run, tool

HERE = Path(__file__).parent
NAMESPACE = "qlora-system"
RELEASE = "qlora-orchestrator"
INSTALL_HEADER = f"""\
# The chart with its defaults, made by `make manifests`: for `kubectl apply --server-side -f`.
# Before it, once, because a file for everybody holds no secret:
#   kubectl create namespace {NAMESPACE}
#   kubectl -n {NAMESPACE} create secret generic qlora-orchestrator-ray-token \\
#     --from-literal=token="$(openssl rand -hex 32)"
apiVersion: v1
kind: Namespace
metadata:
  labels:
    pod-security.kubernetes.io/enforce: restricted
    pod-security.kubernetes.io/enforce-version: latest
  name: {NAMESPACE}
"""


def rendered(values: Path | None = None, *arguments: str, chart: Path = CHART) -> str:
    """What Helm would send to the API server."""
    command = [tool("helm"), "template", RELEASE, chart, "--namespace", NAMESPACE]
    command += ["--kube-version", KUBERNETES_VERSION, *(["--values", values] if values else []), *arguments]
    done = run(command)
    assert done.returncode == 0, done.stderr
    return done.stdout


def documents(text: str) -> list[dict[str, object]]:
    """The objects in it."""
    return [document for document in yaml.safe_load_all(text) if document]


def generated() -> Mapping[Path, str]:
    """Every rendered file that is kept, by where it is."""
    goldens = {
        HERE / "golden" / f"{values.stem}.yaml": rendered(values, "--set", "crds.install=false")
        for values in sorted((HERE / "values").glob("*.yaml"))
    }
    install = INSTALL_HEADER + rendered(ROOT / "manifests" / "values.yaml", "--skip-tests")
    return {**goldens, ROOT / "manifests" / "install.yaml": install}


def main() -> None:
    """Write them."""
    for path, text in generated().items():
        path.write_text(text)
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
