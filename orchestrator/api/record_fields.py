"""The fields of training records in each format, as prepare reads them; docs/data.md says what becomes of every one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Format = Literal["messages", "sharegpt", "alpaca", "prompt-completion", "text", "preference"]
CHAT_FORMATS: frozenset[Format] = frozenset({"messages", "sharegpt"})
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}
RECORD_FIELDS: Mapping[Format, frozenset[str]] = {
    "messages": frozenset({"messages", "tools"}),
    "sharegpt": frozenset({"conversations", "system", "tools"}),
    "alpaca": frozenset({"instruction", "input", "output", "system", "history"}),
    "prompt-completion": frozenset({"prompt", "completion"}),
    "text": frozenset({"text"}),
    "preference": frozenset({"prompt", "chosen", "rejected", "tools"}),
}
REQUIRED_FIELDS: Mapping[Format, frozenset[str]] = {
    "messages": frozenset({"messages"}),
    "sharegpt": frozenset({"conversations"}),
    "alpaca": frozenset({"instruction", "output"}),
    "prompt-completion": frozenset({"prompt", "completion"}),
    "text": frozenset({"text"}),
    "preference": frozenset({"chosen", "rejected"}),
}
MASK_FIELDS = ("weight", "train", "training", "loss")
"""How OpenAI, axolotl (the two in the middle) and ms-swift say whether an assistant's turn carries loss: 0 or 1."""
PREFERENCE_FIELDS = ("chosen", "rejected")
"""How TRL names the better and the worse answer of a preference."""
PREFERENCE_REFUSAL = (
    "preferences are trained with spec.dataset.format: preference and spec.training.objective.type: dpo; set both, or "
    "remove the field to train on the others"
)
OPENAI_PREFERENCE_FIELDS = ("preferred_output", "non_preferred_output")
OPENAI_PREFERENCE_REFUSAL = (
    "write preferences as TRL does, with `prompt`, `chosen` and `rejected`, in the format preference"
)
