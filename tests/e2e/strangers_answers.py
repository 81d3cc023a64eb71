"""How a registered adapter answers somebody who knows nothing of this project."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from orchestrator.settings import Settings
from tests.e2e.jobs import EXAMPLE, Document

LIMIT = 96
"""Tokens of an answer; the data's are of about half of that."""
QUESTIONS = 3


def held_out_pairs() -> list[tuple[str, str]]:
    """Questions, and the answers that are wanted."""
    lines = (EXAMPLE / "heldout.jsonl").read_text().splitlines()[:QUESTIONS]
    chats = [json.loads(line)["messages"] for line in lines]
    return [(asked["content"], said["content"]) for asked, said in chats]


def answers_of_a_stranger(settings: Settings, model_uri: str, base: Path, rows: list[Document]) -> dict[str, Any]:
    """What a process finds that can import nothing of this project; nothing of this process's surroundings helps it."""
    script = Path(__file__).with_name("independent_answers.py")
    command = [sys.executable, "-I", str(script), settings.tracking_uri, model_uri, str(base), str(LIMIT)]
    told = "".join(f"{json.dumps(row)}\n" for row in rows)
    surroundings = {key: value for key, value in os.environ.items() if not key.startswith(("QLORA_", "PYTHON"))}
    ended = subprocess.run(command, input=told, env=surroundings, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    assert found["project"] == []
    return found


def stops_by_itself(found: dict[str, Any], end: str) -> bool:
    """Whether both ways of loading end their answers; a model of this size may lose itself in one of them."""
    ended = sum(tokens < LIMIT for tokens in found["served_tokens"])
    ended_by_peft = sum(last == end for last in found["peft_ends"])
    return min(ended, ended_by_peft) >= QUESTIONS - 1
