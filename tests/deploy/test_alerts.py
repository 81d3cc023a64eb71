"""The chart's alerts and dashboard by Prometheus' own tool: it reads them, and each alert fires when it should.

promtool takes minutes of a processor to build, so this is part of `make nightly` (QLORA_PROMTOOL=1); what CI checks is
that every metric exists (`test_chart`).
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.render import documents, rendered
from tests.deploy.test_chart import PRODUCTION
from tests.deploy.tools import CHART, run, tool

ALERTS = Path(__file__).parent / "alerts.yaml"
VARIABLES = {"$datasource": "prometheus", "$__rate_interval": "5m", "$__interval": "1m", "$__range": "1h"}
pytestmark = pytest.mark.skipif(not os.environ.get("QLORA_PROMTOOL"), reason="it takes minutes: QLORA_PROMTOOL=1")


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rules as Prometheus loads them, and the tests beside them."""
    folder = tmp_path_factory.mktemp("alerts")
    found: list[Any] = documents(rendered(PRODUCTION, "--show-only", "templates/monitoring/rules.yaml"))
    (folder / "rules.yaml").write_text(yaml.safe_dump(found[0]["spec"]))
    (folder / ALERTS.name).write_text(ALERTS.read_text())
    return folder / "rules.yaml"


def test_promtool_reads_every_rule(rules: Path) -> None:
    done = run([tool("promtool"), "check", "rules", "--lint=all", "--lint-fatal", rules])
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"SUCCESS: {len(alerts(rules))} rules found" in done.stdout


def test_each_alert_fires_when_it_should_and_not_before(rules: Path) -> None:
    tested = set(re.findall(r'"(QLoRA\w+)",alertstate="firing",severity', ALERTS.read_text()))
    assert tested == alerts(rules)
    done = run([tool("promtool"), "test", "rules", rules.with_name(ALERTS.name)])
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_reads_every_query_of_the_dashboard(tmp_path: Path) -> None:
    board = json.loads((CHART / "files" / "dashboard.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert len(queries) > 15
    for name, value in VARIABLES.items():
        queries = [query.replace(name, value) for query in queries]
    queries = [re.sub(r'"\$\w+"', '"any"', query) for query in queries]
    found = [{"record": f"panel:{number}", "expr": query} for number, query in enumerate(queries)]
    (tmp_path / "board.yaml").write_text(yaml.safe_dump({"groups": [{"name": "board", "rules": found}]}))
    done = run([tool("promtool"), "check", "rules", tmp_path / "board.yaml"])
    assert done.returncode == 0, done.stdout + done.stderr


def alerts(rules: Path) -> set[str]:
    """The names of all."""
    return {rule["alert"] for group in yaml.safe_load(rules.read_text())["groups"] for rule in group["rules"]}
