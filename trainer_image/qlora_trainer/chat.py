"""`python -m qlora_trainer chat`: talk to a finished adapter on this machine, as MLflow would serve it.

The base in NF4 with the adapter on it, on a GPU if there is one, else on the CPU; answers are greedy and printed as
they come. The code is the registered model's own (`tracking/serving_model`): prompts are written as they were trained.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from orchestrator.api.task import StageTask
from qlora_trainer.model.source import TensorShape, describe_model, resolve_model
from qlora_trainer.outcome import UserError

NF4_BYTES = 0.53
"""A weight in 4 bits, with its part of the scales."""
LIBRARIES_BYTES = 3 << 29
"""What torch and the others take, and an answer on its way."""
CGROUP = Path("/sys/fs/cgroup")
ASK, LEAVE = "> ", ("/exit", "/quit")


def run(task: StageTask, adapter: Path, prompt: str | None, max_new_tokens: int) -> None:
    """Answer one prompt, or what a person types until the input ends. UserError where memory is not there."""
    source = task.spec.model.source
    revision = task.prepared.model.revision if task.prepared is not None else task.spec.model.revision
    refuse_without_memory(source, describe_model(source, revision).tensors)
    served = load(resolve_model(source, revision), adapter)
    said: list[dict[str, str]] = []
    for question in _questions(prompt):
        said.append({"role": "user", "content": question})
        is_chat = bool(served.tokenizer.chat_template)
        row = {"messages": said} if is_chat else {"prompt": question}
        said.append({"role": "assistant", "content": _answer(served, row, max_new_tokens)})


def load(base: Path, adapter: Path) -> Any:
    """The registered model's own code, with this base and adapter."""
    from qlora_trainer.tracking.serving_model import AdapterModel  # here, because MLflow takes seconds

    served: Any = AdapterModel()
    served.load_context(SimpleNamespace(artifacts={"adapter": str(adapter)}, model_config={"base_model": str(base)}))
    return served


def _questions(prompt: str | None) -> Iterator[str]:
    if prompt is not None:
        yield prompt
        return
    while True:
        if sys.stdin.isatty():
            print(ASK, end="", file=sys.stderr, flush=True)  # noqa: T201 - a person is asked
        line = sys.stdin.readline()
        if not line or line.strip() in LEAVE:
            return
        if line.strip():
            yield line.strip()


def _answer(served: Any, row: Mapping[str, Any], max_new_tokens: int) -> str:
    """The answer, which is printed while it is generated."""
    from transformers import TextStreamer

    streamer: Any = TextStreamer(served.tokenizer, skip_prompt=True, skip_special_tokens=True)
    return served.generate(served.encode(row), max_new_tokens=max_new_tokens, streamer=streamer)


# --- memory


def refuse_without_memory(source: str, tensors: Mapping[str, TensorShape] | None) -> None:
    """UserError where the model does not fit what is free here."""
    if tensors is None:
        raise UserError(f"{source} has no weights, so nobody answers; give the whole model")
    needed, (free, where) = needed_bytes(tensors), free_bytes()
    if needed > free:
        raise UserError(
            f"{source} takes {needed / 2**30:.1f} GiB with its adapter, and {free / 2**30:.1f} GiB are free on "
            f"{where}; talk to it on a larger machine, or serve it (examples/serving)"
        )


def needed_bytes(tensors: Mapping[str, TensorShape]) -> int:
    """Of the model in NF4: matrices of layers in 4 bits, tables and vectors in 16, and one matrix on its way."""
    total, largest = 0.0, 0
    for name, tensor in tensors.items():
        count = math.prod(tensor.shape)
        is_table = "embed" in name or "lm_head" in name
        total += count * (2 if is_table or len(tensor.shape) < 2 else NF4_BYTES)
        largest = max(largest, 2 * count)
    return int(total) + largest + LIBRARIES_BYTES


def free_bytes() -> tuple[int, str]:
    """What is free where the model would go, and where that is."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0], torch.cuda.get_device_name()
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    free = next(1024 * int(words[1]) for words in lines if words[0] == "MemAvailable:")
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
    except OSError:
        limit, used = "max", 0
    return (free if limit == "max" else min(free, int(limit) - used)), "this machine's CPU"
