"""Talking to an adapter: answers are the served model's, and what does not fit this machine is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from peft_adapter import save_adapter
from qlora_trainer import chat
from qlora_trainer.model.source import TensorShape, describe_model
from qlora_trainer.outcome import UserError
from qlora_trainer.storage.final_adapter import TOKENIZER_NAMES
from tiny_model import tiny_model
from toy_publish import publish_task, store_with_adapter

from orchestrator.api.results import StageResult
from orchestrator.api.task import task_variables

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow and PEFT speak of their own deprecations


def test_memory_that_is_not_there_is_told_before_anything_is_loaded() -> None:
    billions = {f"layers.{number}.weight": TensorShape(dtype="BF16", shape=(1 << 20, 1 << 14)) for number in range(64)}
    assert 540e9 < chat.needed_bytes(billions) < 660e9
    with pytest.raises(UserError, match=r"the base takes \d+\.\d GiB with its adapter, and \d+\.\d GiB are free on"):
        chat.refuse_without_memory("the base", billions)
    with pytest.raises(UserError, match="has no weights"):
        chat.refuse_without_memory("the base", None)
    small = describe_model(tiny_model().as_uri(), "main").tensors
    assert small is not None
    chat.refuse_without_memory("the base", small)


def test_a_prompt_and_typed_lines_are_answered_as_the_registered_model_would(tmp_path: Path) -> None:
    base = tiny_model()
    adapter = save_adapter(base, tmp_path / "adapter")
    for name in TOKENIZER_NAMES:
        if (base / name).is_file():
            (adapter / name).write_bytes((base / name).read_bytes())
    store = store_with_adapter(tmp_path / "store", base, adapter)
    task = publish_task(store, base, ()).model_copy(update={"stage": "prepare"})
    verdict = tmp_path / "verdict.json"

    def talk(*prompt: str, said: str = "", folder: Path = adapter) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            **task_variables(task.model_dump_json(by_alias=True)),
            "PYTHONPATH": os.pathsep.join(sys.path),
            "QLORA_TERMINATION_LOG": str(verdict),
        }
        command = [sys.executable, "-m", "qlora_trainer", "chat", str(folder), "6", *prompt]
        return subprocess.run(
            command, env=environment, input=said, capture_output=True, text=True, timeout=300, check=False
        )

    served = chat.load(base, adapter)
    messages = [{"role": "user", "content": "hola"}]
    first = served.generate(served.encode({"messages": messages}), max_new_tokens=6)
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "¿y la dosis?"}]
    second = served.generate(served.encode({"messages": messages}), max_new_tokens=6)
    once = talk("hola")
    assert (once.returncode, once.stdout.strip()) == (0, first), once.stderr
    typed = talk(said="hola\n\n¿y la dosis?\n/exit\nnever\n")
    assert typed.returncode == 0, typed.stderr
    assert typed.stdout.split() == [*first.split(), *second.split()]
    failed = talk("hola", folder=tmp_path / "nowhere")
    assert failed.returncode != 0
    assert StageResult.from_termination_message(verdict.read_text()).failure is not None
