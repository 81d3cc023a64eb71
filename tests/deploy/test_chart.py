"""The chart under every linter that reads it, with no check switched off, and against what it is rendered to."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from orchestrator.adapters.kubernetes.settings import ClusterSettings
from orchestrator.adapters.ray_fabric.settings import PORTS_PER_NODE
from orchestrator.api.job import QLoRAJob
from orchestrator.api.queue import QLoRAQueue
from orchestrator.api.reasons import Reason
from orchestrator.controller.metrics import Metrics
from tests.cluster.binaries import KUBERNETES_VERSION
from tests.deploy.render import NAMESPACE, RELEASE, documents, generated, rendered
from tests.deploy.schemas import write_schemas
from tests.deploy.tools import CHART, ROOT, checkov, packaged_chart, run, tool

HERE = Path(__file__).parent
VALUES = sorted((HERE / "values").glob("*.yaml"))
ALL_VALUES = [None, *VALUES]
PRODUCTION = HERE / "values" / "production.yaml"
EXAMPLES = sorted((ROOT / "manifests" / "examples").glob("*.yaml"))
OPTIONAL_CHECKS = ("container-seccomp-profile", "container-ports-check")
"""All of kube-score's but those that want limits to equal requests, which leave no room for a burst."""
METADATA = {"169.254.0.0/16", "fe80::/10"}
TRAINER_LABELS = {"app.kubernetes.io/component": "trainer", "app.kubernetes.io/part-of": "qlora-orchestrator"}
# What Prometheus adds to a name for the kinds of metrics that have several series.
SERIES_SUFFIX = re.compile(r"_(total|bucket|sum|count)$")


def named(values: Path | None) -> str:
    return values.stem if values else "defaults"


@pytest.fixture(scope="session")
def schemas(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_schemas(tmp_path_factory.mktemp("schemas"))


@pytest.mark.parametrize("values", ALL_VALUES, ids=named)
def test_helm_lint_has_nothing_to_say(values: Path | None) -> None:
    chosen = ["--values", values] if values else []
    done = run([tool("helm"), "lint", "--strict", CHART, "--namespace", NAMESPACE, *chosen])
    assert done.returncode == 0, done.stdout
    assert not re.search(r"\[(WARNING|ERROR)\]", done.stdout), done.stdout


@pytest.mark.parametrize("values", ALL_VALUES, ids=named)
def test_every_object_has_the_shape_that_the_api_server_asks_for(values: Path | None, schemas: str) -> None:
    text = rendered(values)
    done = run([tool("kubeconform"), "-strict", "-output", "json", "-summary", "-schema-location", schemas], text=text)
    said = json.loads(done.stdout)
    assert (done.returncode, said.get("resources", [])) == (0, [])
    crds = [d for d in documents(text) if d["kind"] == "CustomResourceDefinition"]
    assert said["summary"]["valid"] == len(documents(text)) >= 15 + len(crds)


def test_a_misspelled_field_would_be_found(schemas: str) -> None:
    text = rendered().replace("terminationGracePeriodSeconds:", "terminationGraceSeconds:", 1)
    done = run([tool("kubeconform"), "-strict", "-schema-location", schemas], text=text)
    assert done.returncode == 1
    assert "terminationGraceSeconds" in done.stdout


@pytest.mark.parametrize("values", [None, PRODUCTION], ids=named)
def test_kube_score_finds_nothing(values: Path | None) -> None:
    more = [word for check in OPTIONAL_CHECKS for word in ("--enable-optional-test", check)]
    command = [tool("kube-score"), "score", "-", "--output-format", "json", *more, "--kubernetes-version"]
    done = run([*command, f"v{KUBERNETES_VERSION.rpartition('.')[0]}"], text=rendered(values))
    grades = [
        (item["object_name"], check["check"]["name"], check["comments"])
        for item in json.loads(done.stdout)
        for check in item["checks"]
        if not check["skipped"] and check["grade"] < 10
    ]
    assert grades == []
    assert done.returncode == 0


def test_checkov_finds_nothing_in_an_installation_by_digest(tmp_path: Path) -> None:
    program = checkov()
    (tmp_path / "production.yaml").write_text(rendered(PRODUCTION))
    (tmp_path / "bundled.yaml").write_text(
        rendered(ROOT / "manifests" / "values.yaml", "--set", f"image.controller.digest=sha256:{'0' * 64}")
    )
    done = run([program, "--directory", tmp_path, "--skip-download", "--output", "json", "--framework", "kubernetes"])
    said = json.loads(done.stdout)
    failed = [(check["check_id"], check["resource"]) for check in said["results"]["failed_checks"]]
    assert failed == []
    assert said["summary"]["skipped"] == said["summary"]["parsing_errors"] == 0
    assert said["summary"]["passed"] > 300


def test_the_unit_tests_pass() -> None:
    done = run([tool("helm-unittest"), "--strict", "--file", "../../tests/deploy/unit/*_test.yaml", CHART])
    assert done.returncode == 0, done.stdout + done.stderr
    assert (found := re.search(r"Tests: +(\d+) passed", done.stdout))
    assert int(found[1]) >= 25


def test_what_was_rendered_is_up_to_date() -> None:
    stale = [path.name for path, text in generated().items() if not path.exists() or path.read_text() != text]
    assert stale == [], "run `make manifests` and look at the difference"


def test_the_packaged_chart_renders_what_the_folder_does(tmp_path: Path) -> None:
    """`helm package` leaves out what .helmignore names, and nothing that templates or the schema read."""
    assert rendered(PRODUCTION, chart=packaged_chart(tmp_path)) == rendered(PRODUCTION)


def test_every_value_is_in_the_schema_and_every_default_keeps_to_it() -> None:
    """Helm checks the second when it lints; the first it would not miss."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    missing = sorted(set(paths(values)) - set(schema_paths(schema, schema)))
    unknown = sorted(set(schema_paths(schema, schema)) - set(paths(values)) - {"global"})
    assert (missing, unknown) == ([], [])


@pytest.mark.parametrize("values", ALL_VALUES, ids=named)
def test_every_container_keeps_to_the_restricted_standard_and_has_bounds(values: Path | None) -> None:
    pods = [pod for document in documents(rendered(values)) if (pod := pod_of(document))]
    assert pods
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 65532
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        for container in (*pod["containers"], *pod.get("initContainers", [])):
            context = container["securityContext"]
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            for bound in ("requests", "limits"):
                assert set(container["resources"][bound]) == {"cpu", "memory", "ephemeral-storage"}
            secrets = [
                variable for variable in container.get("env", []) if "secretKeyRef" in variable.get("valueFrom", {})
            ]
            assert secrets == []


@pytest.mark.parametrize("values", [None, PRODUCTION], ids=named)
def test_every_pod_is_under_a_policy_and_jobs_keep_from_metadata(values: Path | None) -> None:
    """Every way out names a port or a place, and none leads to where a cloud hands out a node's credentials."""
    objects: list[dict[str, Any]] = documents(rendered(values))
    policies = [item for item in objects if item["kind"] == "NetworkPolicy"]
    for policy in policies:
        assert policy["spec"]["policyTypes"] == ["Egress", "Ingress"]
        for rule in policy["spec"]["egress"]:
            assert rule.get("ports") or rule.get("to")
            for peer in rule.get("to", []):
                assert "ipBlock" not in peer or METADATA & set(peer["ipBlock"]["except"])
    for workload in objects:
        if pod_of(workload):
            labels, place = workload["spec"]["template"]["metadata"]["labels"], workload["metadata"]["namespace"]
            over = [p for p in policies if p["metadata"]["namespace"] == place and selects(p, labels)]
            assert over, f"{workload['kind']} {workload['metadata']['name']}"
    jobs = [item for item in policies if item["spec"]["podSelector"]["matchLabels"] == TRAINER_LABELS]
    assert {item["metadata"]["namespace"] for item in jobs} == ({"team-a", "team-b"} if values else {NAMESPACE})


def selects(policy: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Whether a policy is over pods with these labels."""
    return policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items()


def test_no_two_namespaces_share_a_token_a_port_or_a_volume_of_a_head() -> None:
    rendered_for_three = documents(rendered(None, "--set", "jobs.namespaces={team-a,team-b,team-c}"))
    [pod] = [
        pod_of(document)
        for document in rendered_for_three
        if document["kind"] == "Deployment"  # the controller's
    ]
    heads = pod["initContainers"]
    assert len(heads) == 3
    mounted = [mount["name"] for head in heads for mount in head["volumeMounts"]]
    assert len(set(mounted)) == len(mounted) == 9
    secrets = {volume["name"]: volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume}
    assert len(set(secrets.values())) == 3
    ports = [port for head in heads for port in ports_of(head)]
    assert len(set(ports)) == len(ports) == 3 * 21
    made: dict[str, Any] = {
        f"{meta['namespace']}/{meta['name']}": document["data"]
        for document in rendered_for_three
        if document["kind"] == "Secret"
        for meta in [cast(Any, document["metadata"])]
    }
    tokens = [made[f"{NAMESPACE}/{name}"]["token"] for name in secrets.values()]
    assert len(set(tokens)) == 3
    assert [made[f"{team}/{RELEASE}-ray-token"]["token"] for team in ("team-a", "team-b", "team-c")] == tokens


def test_the_controller_finds_each_head_where_the_chart_puts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the settings that the controller reads: address, socket, and the ports that agents are told."""
    objects: list[dict[str, Any]] = documents(
        rendered(None, "--set", "jobs.namespaces={team-b,team-a},ray.nodePort=7380,ray.port=7379")
    )
    [configured] = [o for o in objects if o["kind"] == "ConfigMap" and o["metadata"]["name"].endswith("-settings")]
    for name, value in {**configured["data"], "QLORA_POD_NAME": "controller-0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("QLORA_POD_TEMPLATE_FILE")
    settings = ClusterSettings()  # pyright: ignore[reportCallIssue]  # the environment has the required fields
    [pod] = [pod_of(document) for document in objects if document["kind"] == "Deployment"]
    heads = {volume_at(head, "/var/run/qlora"): ports_of(head) for head in pod["initContainers"]}
    assert list(settings.heads) == ["team-b", "team-a"]
    for namespace, address in settings.heads.items():
        folder = settings.ray_fabric_socket.parent / namespace
        assert heads[volume_at(pod["containers"][0], str(folder))][0] == int(address.rpartition(":")[2])
    policies = [o for o in objects if o["kind"] == "NetworkPolicy" and o["metadata"]["name"].endswith("-trainer")]
    opened = {rule["ports"][0]["port"] for policy in policies for rule in policy["spec"]["ingress"]}
    assert opened == {settings.pod_policy().ray_node_port} == {7380}


def volume_at(container: Mapping[str, Any], path: str) -> str:
    """What is mounted there."""
    return next(str(mount["name"]) for mount in container["volumeMounts"] if mount["mountPath"] == path)


def ports_of(head: Mapping[str, Any]) -> list[int]:
    """All that a head listens on."""
    known = {variable["name"]: variable.get("value") for variable in head["env"]}
    first = int(known["QLORA_RAY_NODE_PORT"])
    return [int(known["QLORA_RAY_PORT"]), *range(first, first + PORTS_PER_NODE)]


def test_alerts_and_dashboard_ask_for_metrics_that_exist() -> None:
    metrics = Metrics()
    known = {metric.name for metric in metrics.registry.collect()} | jobs_metrics()
    asked = set(re.findall(r"\bqlora_[a-z_]+", rendered(PRODUCTION, "--show-only", "templates/monitoring/rules.yaml")))
    board = json.loads((CHART / "files" / "dashboard.json").read_text())
    asked |= {
        name for panel in board["panels"] for t in panel["targets"] for name in re.findall(r"qlora_[a-z_]+", t["expr"])
    }
    assert len(asked) > 15
    assert {name for name in asked if name not in known and SERIES_SUFFIX.sub("", name) not in known} == set()


def test_the_guide_tells_of_every_reason_alert_and_metric() -> None:
    guide = (ROOT / "docs" / "operators" / "troubleshooting.md").read_text()
    told = set(re.findall(r"`([A-Za-z_]+)`", guide))
    assert {reason.value for reason in Reason} - told == set()
    rules = rendered(PRODUCTION, "--show-only", "templates/monitoring/rules.yaml")
    assert set(re.findall(r"alert: (\w+)", rules)) - told == set()
    assert jobs_metrics() - {SERIES_SUFFIX.sub("", name) for name in told} == set()


def test_values_that_the_guide_names_exist() -> None:
    known = set(paths(yaml.safe_load((CHART / "values.yaml").read_text())))
    folders = {path.rpartition(".")[0] for path in known}
    tops = {path.split(".")[0] for path in known}
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "operators").glob("*.md"))
    named_here = set(re.findall(r"`([a-zA-Z0-9]+(?:\.[a-zA-Z0-9]+)+)(?:=[^`]*|: [^`]*)?`", pages))
    asked = {name for name in named_here if name.split(".")[0] in tops}
    assert len(asked) > 15
    assert {name for name in asked if name not in known | folders and name.rpartition(".")[0] not in known} == set()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_what_the_service_takes(path: Path) -> None:
    kinds = {"QLoRAJob": QLoRAJob, "QLoRAQueue": QLoRAQueue}
    found = documents(path.read_text())
    assert found
    for document in found:
        kinds[str(document["kind"])].model_validate(document)


def jobs_metrics() -> set[str]:
    """Gauges that are only there once there is a round."""
    source = (ROOT / "tests" / "controller" / "test_metrics.py").read_text()
    return set(re.findall(r'^        "(qlora_[a-z_]+)",$', source, re.MULTILINE))


def pod_of(document: Mapping[str, Any]) -> Any:
    return document.get("spec", {}).get("template", {}).get("spec")


def paths(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The chart's own values; maps that are the user's to fill count as one."""
    for name, value in values.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict) and value and not is_free(path):
            yield from paths(value, f"{path}.")
        else:
            yield path


def schema_paths(document: Any, node: Any, prefix: str = "") -> Iterator[str]:
    for name, raw in node.get("properties", {}).items():
        path = f"{prefix}{name}"
        field = document["definitions"][raw["$ref"].rsplit("/", 1)[1]] if "$ref" in raw else raw
        if field.get("properties") and not is_free(path):
            yield from schema_paths(document, field, f"{path}.")
        else:
            yield path


def is_free(path: str) -> bool:
    return path.endswith(("nodeAffinity", ".labels"))
