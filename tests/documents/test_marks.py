"""Nothing that a document tells people to paste is left out of the tests unnoticed: it runs, or says why not."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import pytest
import yaml

from orchestrator.cli.main import COMMANDS
from orchestrator.sdk.manifest import parse_manifest
from tests.documents.blocks import PASTED, REPOSITORY, RUN, RUN_NIGHTLY, Block, blocks_of, parse, written

CHART = REPOSITORY / "helm" / "qlora-orchestrator"
PROGRAMS = ("helm", "kubectl", "qlora")
BLOCKS = written()


def cluster(block: Block) -> Iterator[str]:
    """It needs a cluster: its programs, paths, values and commands exist."""
    for command in block.commands:
        words = shlex.split(command.partition("|")[0])
        if words[0] not in PROGRAMS:
            yield f"{words[0]} is none of {', '.join(PROGRAMS)}"
        yield from (f"there is no {word}" for word in words if is_path(word) and not (REPOSITORY / word).exists())
        if words[0] == "helm":
            given = [word.partition("=")[0] for before, word in pairwise(words) if before == "--set"]
            yield from (f"the chart has no value {name}" for name in given if not has_value(name.split(".")))
        if words[0] == "qlora":
            name = words[3] if words[1] == "--context" else words[1]
            yield from () if name in QLORA else (f"there is no qlora {name}",)


def images(block: Block) -> Iterator[str]:
    """It builds images, which the cluster tier does in its own way: the Dockerfiles exist."""
    for command in block.commands:
        words = shlex.split(command)
        file = words[words.index("--file") + 1]
        if words[0] != "buildah" or not (REPOSITORY / file).is_file():
            yield command


def make(block: Block) -> Iterator[str]:
    """It makes a target, a tier by itself: the target exists."""
    targets = set(re.findall(r"^([a-z0-9-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    for command in block.commands:
        words = command.split()
        yield from (f"make has no {word}" for word in words[1:] if "=" not in word and word not in targets)
        if words[0] != "make":
            yield command


def logins(block: Block) -> Iterator[str]:
    """It needs servers with logins, with which `test_logins` runs that page: it exports variables."""
    if block.document != "docs/logins.md":
        yield "test_logins runs another page"
    yield from (command for command in block.commands if not command.startswith("export "))


REASONS: Mapping[str, Callable[[Block], Iterator[str]]] = {
    function.__name__: function for function in (cluster, images, logins, make)
}
QLORA = {function.__name__ for functions in COMMANDS.values() for function in functions}


def is_path(word: str) -> bool:
    """Whether a word is a path in the repository."""
    return bool(re.match(r"^(helm|manifests|examples|docs|benchmarks)/", word))


def has_value(path: list[str]) -> bool:
    """Whether the chart has the value; below an open mapping anything may stand."""
    node: Any = yaml.safe_load((CHART / "values.yaml").read_text())
    for key in path:
        if node == {}:
            return True
        if not isinstance(node, Mapping) or key not in node:
            return False
        node = node[key]
    return True


def paths_of(values: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[list[str]]:
    """The path of every leaf."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from paths_of(value, (*prefix, key))
        else:
            yield [*prefix, key]


def fault(block: Block) -> str:
    """Why a block is not fit to be shown; empty where it is."""
    if block.language not in PASTED:
        return f"{block.language or 'no language'} is none of {', '.join(PASTED)}"
    if block.mark == "not run":
        return "; ".join(REASONS[block.detail](block)) if block.detail in REASONS else f"{block.detail} is no reason"
    if block.mark == "spec":
        base = {"model": {"source": "hf://a/b"}, "dataset": {"source": "hf://a/b"}}
        spec = {
            key: {**base.get(key, {}), **value} if isinstance(value, dict) else value
            for key, value in yaml.safe_load(block.text).items()
        }
        job = {
            "apiVersion": "qlora.dev/v1alpha1",
            "kind": "QLoRAJob",
            "metadata": {"name": "a"},
            "spec": {**base, **spec},
        }
        parse_manifest(yaml.safe_dump(job), name=block.place, folder=REPOSITORY)
        return ""
    if block.mark == "values":
        unknown = [path for path in paths_of(yaml.safe_load(block.text)) if not has_value(path)]
        return f"the chart has no {unknown}" if unknown else ""
    if block.language == "yaml" and block.mark != "file" and "apiVersion: qlora.dev/" not in block.text:
        return "yaml that is no object of ours says what it is: file, spec or values"
    if block.language != "yaml" and block.document not in (*RUN, *RUN_NIGHTLY):
        return f"nothing runs {block.document}: mark the block, or add the document to RUN"
    return ""


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.place)
def test_a_block_runs_or_says_why_not(block: Block) -> None:
    assert fault(block) == ""


def test_what_is_run_is_there() -> None:
    assert all(
        any(block.language in ("sh", "python") for block in blocks_of(document)) for document in (*RUN, *RUN_NIGHTLY)
    )


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("```\nls\n```\n", "no language"),
        ("```sh\nls\n```\n", "nothing runs page.md"),
        ("<!-- not run: weather -->\n```sh\nls\n```\n", "weather is no reason"),
        ("<!-- not run: cluster -->\n```sh\nls\n```\n", "ls is none of"),
        (
            "<!-- not run: cluster -->\n```sh\nhelm install a helm/none --set image.pull=1\n```\n",
            "there is no helm/none",
        ),
        ("<!-- not run: cluster -->\n```sh\nhelm install a \\\n  --set image.pull=1\n```\n", "no value image.pull"),
        ("<!-- not run: cluster -->\n```sh\nqlora fly\n```\n", "no qlora fly"),
        ("<!-- not run: make -->\n```sh\nmake demo nothing\n```\n", "make has no nothing"),
        ("<!-- values -->\n```yaml\nstore: {typ: s3}\n```\n", "no [['store', 'typ']]"),
        ("```yaml\nstore: {type: s3}\n```\n", "says what it is"),
    ],
)
def test_what_cannot_be_run_is_found(text: str, found: str) -> None:
    (block,) = parse("page.md", text)

    assert found in fault(block)


def test_a_part_of_a_spec_is_held_against_the_contract() -> None:
    (good,) = parse("page.md", "<!-- spec -->\n```yaml\ndataset: {format: alpaca}\n```\n")
    (bad,) = parse("page.md", "<!-- spec -->\n```yaml\ndataset: {fromat: alpaca}\n```\n")

    assert fault(good) == ""
    with pytest.raises(Exception, match="did you mean format"):
        fault(bad)
