"""What documents say to install with: the chart takes it, with values that exist and are of their types."""

from __future__ import annotations

import shlex

import pytest

from tests.deploy.tools import run, tool
from tests.documents.blocks import Block, written

INSTALLS = [
    (block, command)
    for block in written()
    if block.detail == "cluster"
    for command in block.commands
    if command.startswith("helm install ")
]


def test_documents_say_how_to_install() -> None:
    assert {block.document for block, _ in INSTALLS} >= {"README.md", "docs/operators/install.md"}


@pytest.mark.parametrize(("block", "command"), INSTALLS, ids=[block.place for block, _ in INSTALLS])
def test_the_chart_renders_as_documents_install_it(block: Block, command: str) -> None:
    _, _, *arguments = shlex.split(command)
    done = run([tool("helm"), "template", *arguments])
    assert done.returncode == 0, f"{block.place}: {done.stderr}"
    assert "image: REGISTRY/controller:" in done.stdout.replace('"', "")
