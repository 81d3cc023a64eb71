"""Kueue's side of `benchmarks.kueue`: built from its source, driven by its own performance runner.

Nothing of Kueue is in this repository. Its source comes from a git repository, the original or a copy, at a pinned
commit, and is built into a folder of the cache. `minimalkueue`, its controllers and scheduler without web hooks and
integrations, has its client's limits in its source, so it is built once for each of them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from io import BytesIO
from pathlib import Path

import yaml

from benchmarks.kueue_shape import Document, Life, Shape, figures
from orchestrator.adapters.kubernetes.api import Json, KubeApi, path_of
from tests.cluster.binaries import program
from tests.cluster.control_plane import control_plane
from tests.cluster.resources import apply_crd
from tests.scale.program import ACCOUNT, audit_arguments, audited_requests, cpu_seconds, peak_mib, process

REPOSITORY = "https://github.com/kubernetes-sigs/kueue"
COMMIT = "ff69552e79ad21652c36caa97038382e55625cf7"
VERSION = "v0.20.0-devel-377-gff69552e79"
"""What `git describe` says of the commit."""
PERFORMANCE = "test/performance/scheduler"
GENERATOR = f"{PERFORMANCE}/configs/baseline/generator.yaml"
LIMITS_IN_SOURCE = {"QPS": "50", "Burst": "100"}
WORKLOADS = path_of("kueue.x-k8s.io/v1beta2", "workloads")
PAGE_WORKLOADS = 500
RUNNER_LIMITS = ("--qps=1000", "--burst=2000")
"""Of the runner's own client, which creates the workloads and ends them: it shall not be what is measured."""
MORE_INFLIGHT = ("--max-requests-inflight=5000", "--max-mutating-requests-inflight=2500")
"""As Kueue's runner sets them where it starts the API server itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """What a controller's client may ask of the API server; 0 is no bound."""

    per_second: int
    burst: int

    @classmethod
    def parse(cls, text: str) -> Limit:
        """`50/100`, or `none`."""
        if text == "none":
            return cls(per_second=0, burst=0)
        per_second, burst = map(int, text.split("/"))
        return cls(per_second=per_second, burst=burst)

    @property
    def name(self) -> str:
        """A key in the results."""
        return f"limit_{self.per_second}_{self.burst}" if self.per_second else "no_limit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kueue:
    """Its source, unpacked."""

    folder: Path

    @classmethod
    def fetch(cls, repository: str) -> Kueue:
        """From a git repository's address or folder, unless it is in the cache."""
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora-orchestrator"
        folder = cache / f"kueue-{COMMIT[:12]}"
        if not (folder / GENERATOR).is_file():
            bare = cache / f"kueue-{COMMIT[:12]}.git"
            shutil.rmtree(bare, ignore_errors=True)
            subprocess.run(["git", "init", "--quiet", "--bare", str(bare)], check=True)
            subprocess.run(["git", "-C", str(bare), "fetch", "--quiet", "--depth=1", repository, COMMIT], check=True)
            packed = subprocess.run(["git", "-C", str(bare), "archive", COMMIT], check=True, capture_output=True).stdout
            with tarfile.open(fileobj=BytesIO(packed)) as archive:
                archive.extractall(folder, filter="data")
            shutil.rmtree(bare)
        return cls(folder=folder)

    def shape(self) -> Shape:
        """Its baseline."""
        return Shape.read(yaml.safe_load((self.folder / GENERATOR).read_text()))

    def resources(self) -> Iterator[Document]:
        """Its resource definitions."""
        for file in sorted((self.folder / "config/components/crd/bases").glob("*.yaml")):
            yield yaml.safe_load(file.read_text())

    def runner(self) -> Path:
        """The program that creates workloads, ends them after their time, and keeps count."""
        return self._built("runner", self.folder / "bin/runner")

    def controller(self, limit: Limit) -> Path:
        """minimalkueue with these limits."""
        built = self.folder / f"bin/minimalkueue-{limit.name}"
        if not built.is_file():
            main = self.folder / PERFORMANCE / "minimalkueue/main.go"
            original = main.read_text()
            try:
                main.write_text(with_limit(original, limit))
                self._built("minimalkueue", built)
            finally:
                main.write_text(original)
        return built

    def _built(self, name: str, target: Path) -> Path:
        if not target.is_file():
            package = f"./{PERFORMANCE}/{name}"
            command = ["go", "build", "-mod=vendor", "-trimpath", "-p", "2", "-o", str(target), package]
            environment = {**os.environ, "CGO_ENABLED": "0", "GOWORK": "off"}
            subprocess.run(["nice", *command], cwd=self.folder, env=environment, check=True)
        return target


def with_limit(source: str, limit: Limit) -> str:
    """minimalkueue's source with other limits of its client."""
    wanted = {"QPS": str(limit.per_second or -1), "Burst": str(limit.burst or -1)}  # below zero is no bound there
    for field, value in wanted.items():
        source, found = re.subn(rf"(kubeConfig\.{field} = ){LIMITS_IN_SOURCE[field]}\b", rf"\g<1>{value}", source)
        if found != 1:
            raise ValueError(f"minimalkueue sets its client's {field} in {found} places, not in one")
    return source


def run_kueue(folder: Path, kueue: Kueue, shape: Shape, limit: Limit) -> dict[str, object]:
    """One run with an API server of its own."""
    commands = kueue.controller(limit), kueue.runner()
    folder.mkdir(parents=True)
    file = folder / "generator.yaml"
    file.write_text(yaml.safe_dump(shape.document()))
    arguments = {"kube-apiserver": [*audit_arguments(folder), *MORE_INFLIGHT]}
    with control_plane(folder, accounts=[ACCOUNT], arguments=arguments) as plane:
        api = plane.api()
        for document in kueue.resources():
            apply_crd(api, document)
        account = plane.kubeconfig_for(plane.accounts[ACCOUNT], name=ACCOUNT)
        command = [str(commands[0]), "--kubeconfig", str(account)]
        with process(command, folder / "minimalkueue.log", os.environ) as started:
            server = plane.processes["kube-apiserver"].pid
            load_before, began, server_before = os.getloadavg(), time.monotonic(), cpu_seconds(server)
            run = [str(commands[1]), f"--kubeconfig={plane.kubeconfig}", f"--generatorConfig={file}", f"-o={folder}"]
            with (folder / "runner.log").open("wb") as log:
                subprocess.run([*run, "--timeout=2h", *RUNNER_LIMITS], check=True, stdout=log, stderr=log)
            wall_seconds = time.monotonic() - began
            requests = audited_requests(folder)
            used = {
                "cpu_seconds": round(cpu_seconds(started.pid), 1),
                "api_server_cpu_seconds": round(cpu_seconds(server) - server_before, 1),
                "peak_mib": round(peak_mib(started.pid), 1),
            }
        summary = yaml.safe_load((folder / "summary.yaml").read_text())
        lives = list(_lives(api))
    assert len(lives) == shape.workloads, f"{len(lives)} of {shape.workloads} workloads finished"
    by_kind = {what: 0 for _, what in requests}
    for (_, what), count in requests.items():
        by_kind[what] += count
    classes = summary["workloadClasses"]
    [queues] = summary["clusterQueueClasses"].values()
    return {
        **figures(shape, lives),
        **used,
        "requests_per_workload": round(requests.total() / len(lives), 2),
        "requests": dict(sorted(by_kind.items(), key=lambda item: -item[1])),
        "evictions": sum(each["totalEvictions"] for each in classes.values()),
        "runner": {
            "wait_seconds": {name: each["averageTimeToAdmissionMs"] / 1000 for name, each in classes.items()},
            "quota_held": round(queues["cpuAverageUsage"] / queues["nominalQuota"], 3),
        },
        "wall_seconds": round(wall_seconds, 1),
        "load_average_before": round(load_before[0], 2),
        "load_average_after": round(os.getloadavg()[0], 2),
    }


def _lives(api: KubeApi) -> Iterator[Life]:
    query = dict[str, str | int](limit=PAGE_WORKLOADS)
    while True:
        page = api.get(WORKLOADS, **query)
        for item in page["items"]:
            if (life := _life(item)) is not None:
                yield life
        if not (token := page["metadata"].get("continue")):
            return
        query["continue"] = token


def _life(item: Json) -> Life | None:
    """One that has finished."""
    conditions: dict[str, Json] = {each["type"]: each for each in item["status"].get("conditions", [])}
    if not {"Admitted", "Finished"} <= conditions.keys():
        return None
    return Life(
        kind=item["metadata"]["labels"]["kueue.x-k8s.io/performance-scheduler-class"],
        created=datetime.fromisoformat(item["metadata"]["creationTimestamp"]),
        admitted=datetime.fromisoformat(conditions["Admitted"]["lastTransitionTime"]),
        finished=datetime.fromisoformat(conditions["Finished"]["lastTransitionTime"]),
    )


def versions() -> dict[str, str]:
    """What was built, and with what."""
    go = subprocess.run(["go", "env", "GOVERSION"], check=True, capture_output=True, text=True).stdout.strip()
    etcd = subprocess.run([str(program("etcd")), "--version"], check=True, capture_output=True, text=True).stdout
    return {"kueue": VERSION, "kueue_commit": COMMIT, "go": go, "etcd": etcd.split()[2]}
