"""Help and completion: every command is walked, so that none is added without examples and names for its values."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from orchestrator.api.promotion import stays
from orchestrator.api.reasons import Reason
from orchestrator.cli.examples import EXAMPLES
from orchestrator.cli.exits import ExitStatus
from orchestrator.cli.main import COMMANDS, GROUPS, app
from tests.sdk.paper_service import PaperService, job_document, service_that_is_up

QLORA: Any = typer.main.get_command(app)
GROUP_NAMES = {function.__name__ for function in GROUPS}
CHANGES = ("run", "submit", "up", "down", "cancel", "suspend", "resume", "promote", "delete")
CHANGES_OF_QUEUES = ("queue create", "queue hold", "queue release", "queue delete")


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PaperService:
    return service_that_is_up(tmp_path, monkeypatch)


def names() -> Iterator[str]:
    """Every command, as it is typed."""
    for functions in COMMANDS.values():
        for function in functions:
            members = GROUPS.get(function)
            yield from (f"{function.__name__} {member.__name__}" for member in members or ())
            if members is None:
                yield function.__name__


def help_of(command: str) -> str:
    result = CliRunner().invoke(app, [*command.split(), "--help"], prog_name="qlora")
    assert result.exit_code == ExitStatus.OK, result.output
    return result.stdout


def complete(typed: str) -> list[str]:
    """What Tab offers after what was typed, as bash asks for it."""
    environment = {"COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" ")), "_QLORA_COMPLETE": "complete_bash"}
    environment["QLORA_CONTEXT"] = ""  # which --context sets, and the runner takes back
    result = CliRunner().invoke(app, [], prog_name="qlora", env=environment)
    assert result.exit_code == 0, result.output
    return result.stdout.split()


def test_help_names_every_command_and_every_exit_status() -> None:
    text = help_of("")
    for functions in COMMANDS.values():
        for function in functions:
            assert re.search(rf"^  {function.__name__} ", text, re.MULTILINE)
    for status in ExitStatus:
        assert re.search(rf"^  {status.value} +{re.escape(status.meaning.split(',')[0])}", text, re.MULTILINE)
    group = help_of("queue")
    assert all(
        re.search(rf"^  {member.__name__} ", group, re.MULTILINE) for member in GROUPS[COMMANDS["Jobs and queues"][-1]]
    )


@pytest.mark.parametrize("command", list(names()))
def test_every_command_has_examples_and_names_its_values_as_people_do(command: str) -> None:
    text = help_of(command)
    usage, *_ = text.splitlines()
    assert usage.startswith(f"Usage: qlora {command} [OPTIONS]")
    assert not re.search(r"[<{][a-z_]+[\w |\[\]]*[>}]|<\w+\||Path|\(default\)", text), "Python's types, or braces"
    assert EXAMPLES[command], "an example says more than all options"
    assert all(f"\n  {line}" in text for line in EXAMPLES[command])
    assert "--context CONTEXT" in text


@pytest.mark.parametrize("line", [line for lines in EXAMPLES.values() for line in lines])
def test_every_example_can_be_typed(line: str) -> None:
    _, *words = shlex.split(re.sub(r'^eval "\$\((.*)\)"$', r"\1", line).partition(" < ")[0])
    command = max((name for name in names() if " ".join(words).startswith(name)), key=len)
    assert line in EXAMPLES[command]
    root = QLORA.make_context("qlora", words)
    name, member, rest = QLORA.resolve_command(root, [*root._protected_args, *root.args])
    with member.make_context(name, rest, parent=root) as inner:
        if name in GROUP_NAMES:
            name, member, rest = member.resolve_command(inner, [*inner._protected_args, *inner.args])
            member.make_context(name, rest, parent=inner)


def test_no_example_is_of_a_command_that_is_gone() -> None:
    assert set(EXAMPLES) == set(names())


@pytest.mark.parametrize("command", [*CHANGES, *CHANGES_OF_QUEUES])
def test_every_command_that_changes_something_has_a_dry_run(command: str) -> None:
    assert "--dry-run" in help_of(command)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from orchestrator.cli.main import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: print([m for m in sys.argv[1:] if m in sys.modules], file=sys.stderr)"
    )
    heavy = ("torch", "ray", "mlflow", "pydantic", "yaml", "fsspec", "rich.console")
    told = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True)
    assert told.stderr.strip() == "[]"


def test_tab_offers_what_the_command_can_do_something_with(service: PaperService) -> None:
    for name in ("ended", "held", "hungry"):
        service.client.submit(job_document(name, suspend=name == "held"))
    service.prepare("ended")
    service.train("ended")
    service.succeed("ended")
    service.client.submit(job_document("elsewhere") | {"metadata": {"name": "elsewhere", "namespace": "team-a"}})
    assert complete("qlora describe ") == ["ended", "held", "hungry"]
    assert complete("qlora describe h") == ["held", "hungry"]
    assert complete("qlora cancel ") == ["held", "hungry"]
    assert complete("qlora suspend ") == ["hungry"]
    assert complete("qlora resume ") == ["held"]
    assert complete("qlora download ") == ["ended"]
    assert complete("qlora chat ") == ["ended"]
    assert complete("qlora promote ") == []
    service.judge(stays("champion", None, Reason.AWAITING_APPROVAL, "f1 is 0.6"), "ended")
    assert complete("qlora promote ") == ["ended"]
    assert complete("qlora get jobs e") == ["ended"]
    assert complete("qlora describe -n team-a ") == ["elsewhere"]
    assert complete("qlora get -n ") == ["default", "team-a"]


def test_tab_offers_queues_where_queues_are_asked_for(service: PaperService) -> None:
    service.client.submit(job_document("job"))
    for name, hold in (("open", False), ("shut", True)):
        queue = {"apiVersion": "qlora.dev/v1alpha1", "kind": "QLoRAQueue", "metadata": {"name": name}}
        service.client.apply_queue({**queue, "spec": {"hold": hold}})
    assert complete("qlora get queues ") == ["open", "shut"]
    assert complete("qlora queue hold ") == ["open"]
    assert complete("qlora queue release ") == ["shut"]
    assert complete("qlora queue de") == ["delete", "describe"] or complete("qlora queue de") == ["describe", "delete"]


def test_tab_offers_the_contexts_of_the_kubeconfig_and_never_an_error(
    service: PaperService, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("config").write_text("contexts: [{name: kind-lab}, {name: prod}]")
    Path("broken").write_text("contexts: [{nam")
    monkeypatch.setenv("KUBECONFIG", os.pathsep.join(["config", "broken", "missing"]))
    assert complete("qlora --context ") == ["current", "kind-lab", "prod"]
    assert complete("qlora get --context k") == ["kind-lab"]
    assert complete("qlora --context nowhere describe ") == []
