"""One vocabulary: a word that the glossary has replaced is left nowhere in code and documents.

The glossary's own table of former words and the changelog, which tells of the past, are exempt.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
FOLDERS = (
    *("benchmarks", "controller_image", "docs", "examples", "helm", "manifests", "orchestrator", "tests"),
    "trainer_image",
)
SUFFIXES = {".md", ".py", ".toml", ".yaml", ".yml", ".tpl", ".txt"}
EXEMPT = {"CHANGELOG.md", "LICENSE", "tests/core/test_vocabulary.py"}
HISTORY = re.compile(r"<!-- history:begin -->.*<!-- history:end -->", re.DOTALL)

EVERYWHERE = ""
COMPUTING = r"trainer_image/|orchestrator/sizing/|benchmarks/|tests/trainer/|tests/sizing/"
"""Where tensors are named or counted; elsewhere the same words are plain English."""
SERVICE = r"orchestrator/|docs/|helm/|tests/(adapters|cli|controller|core|page|scale|sdk)/"
KERNELS = r"trainer_image/qlora_trainer/(kernels|model)/|tests/trainer/test_(attention|kernels|moe_experts)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Former:
    """A word that was replaced."""

    now: str
    found: str
    """What finds it, on a line; in any case of letters."""
    where: str = EVERYWHERE
    """The files, by the beginning of their path."""
    unless: str = r"(?!)"
    """What makes the line another use of the word."""


FORMER = {
    "flash": Former(
        now="attention workspace",
        found=r"flash[_ ](workspace|bytes|scratch)|[\"']flash[\"']|(?<![a-z_])flash(?= [=:]|\.[a-z])|(?-i:\bFLASH\b)",
        where=r"orchestrator/|benchmarks/layer_trace|tests/(sizing|trainer/test_sizing)",
    ),
    "pages": Former(now="cuda_allocator", found=r"\bpages\.py|memory[./]pages|core[./]pages|import pages\b"),
    "pace": Former(now="step time", found=r"(?<![a-z])pace[sd]?(?![a-z])"),
    "reserved": Former(
        now="fragmentation", found=r"\breserved\.py|memory[./]reserved|core[./]reserved|import reserved\b"
    ),
    "squash": Former(now="softcap", found=r"squash|(?<!soft)capped (scores|logits|attention)|\bscores?_caps?\b"),
    "replay": Former(now="CUDA graph", found=r"replay", unless=r"graph|captur"),
    "border": Former(now="boundary", found=r"(?<![a-z])borders?(?![a-z])", unless=r"border_style"),
    "notice": Former(now="grace period", found=r"(?<![a-z])notice(?![a-z])", unless=r"spot notice|not notice"),
    "turned": Former(now="rotated", found=r"\bturned\b(?! (off|on|into|by|out))|\b_turn\b", where=KERNELS),
    "answer": Former(
        now="output", found=r"\banswer\b( =|:|,|\)|\.)", where=KERNELS, unless=r"prompt|answer'?s|list|tokens"
    ),
    "chances": Former(now="probabilities", found=r"\bchances\b", where=COMPUTING),
    "slope": Former(now="grad", found=r"slopes?\b", where=COMPUTING, unless=r"(?i)alibi"),
    "thriftier": Former(now="fallback plan", found=r"thrift"),
    "step up": Former(
        now="OOM escalation",
        found=r"step(s|ped|ping)?[ _-]up",
        unless=r"[\"'`| ]step-up[\"'`| ]|step_ups|stepUps|steps up to",
    ),
    "lanes": Former(
        now="MLflow workers", found=r"lanes?(?![a-z])", where=SERVICE, unless=r"tracking_lanes|16 lanes|plane"
    ),
    "ending": Former(now="verdict", found=r"(?<![a-z])endings?(?= =|: [A-Z]|\.[a-z])"),
    "remedy": Former(now="recovery", found=r"remed(y|ies)"),
    "remembered": Former(now="memoized", found=r"@remembered|_remembered\b|import remembered|\bremembered\("),
    "plain": Former(
        now="traced layer", found=r"(?-i:\bPlain[A-Z])|plain[ _](decoder )?layers?\b|\bplain\.py|memory[./]plain"
    ),
}


def texts() -> Iterator[tuple[str, str]]:
    """(path, text) of every file of code and documents."""
    files = [path for path in REPOSITORY.iterdir() if path.is_file()]
    files += [path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*") if path.is_file()]
    for path in files:
        name = str(path.relative_to(REPOSITORY))
        if path.suffix in SUFFIXES | {""} and name not in EXEMPT and "__pycache__" not in name:
            yield name, HISTORY.sub(lambda found: "\n" * found[0].count("\n"), path.read_text())


TEXTS = list(texts())


def uses(former: Former, path: str, text: str) -> Iterator[str]:
    """The places and lines that have the former word, in the sense that was replaced."""
    if not re.match(former.where, path):
        return
    for found in re.finditer(former.found, text, re.IGNORECASE):
        number = text.count("\n", 0, found.start())
        line = text.splitlines()[number]
        if not re.search(former.unless, line, re.IGNORECASE):
            yield f"{path}:{number + 1}: {line.strip()[:100]}"


@pytest.mark.parametrize("word", FORMER)
def test_a_word_that_was_replaced_is_left_nowhere(word: str) -> None:
    former = FORMER[word]
    left = [use for path, text in TEXTS for use in uses(former, path, text)]

    assert not left, f"{word!r} is {former.now!r} now:\n" + "\n".join(left)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("orchestrator/sizing/footprint.py", "from orchestrator.sizing.memory import pages"),
        ("orchestrator/sizing/step_time.py", "pace = Pace(spec, facts, Work())"),
        ("orchestrator/sizing/footprint.py", "flash_workspace_bytes(facts)"),
        ("trainer_image/qlora_trainer/training/loop.py", "at the next step border"),
        ("trainer_image/qlora_trainer/training/stop.py", "a notice that is too short"),
        ("trainer_image/qlora_trainer/kernels/layer.py", "turned = heads[..., :width]"),
        ("orchestrator/core/job/recovery.py", "the job steps up"),
        ("orchestrator/controller/act.py", "self._lanes.put(call)"),
        ("orchestrator/core/job/verdict.py", "remedy = reason.remedy"),
        ("orchestrator/sizing/memory/traced_layer.py", "class PlainLayer:"),
    ],
)
def test_a_former_word_is_found(path: str, line: str) -> None:
    assert any(list(uses(former, path, line)) for former in FORMER.values())


@pytest.mark.parametrize(
    "line",
    [
        "torch's flash attention keeps a float32 sum; attn_implementation='flash_attention_2', flash_attn",
        "reserved bytes of the allocator, to the page; documentation pages; pages of a list",
        "a spot notice leaves a grace period; training does not notice",
        "NO_COLOR, rich writes plain text; a plain Pod per attempt",
        "has no known ending; known are .jsonl; the answer of the server",
        "CUDA graphs are replayed; border_style=quiet; namespace; workspace",
        "status.step_ups, on the wire `step-up`; QLORA_TRACKING_LANES; PCIe over 16 lanes",
    ],
)
def test_other_uses_of_the_words_stay(line: str) -> None:
    path = "orchestrator/controller/act.py"
    assert not [use for former in FORMER.values() for use in uses(former, path, line)]
