"""The fields of training records in each format, as prepare reads them; docs/data.md says what becomes of every one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Format = Literal["messages", "sharegpt", "alpaca", "prompt-completion", "text"]
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
}
REQUIRED_FIELDS: Mapping[Format, frozenset[str]] = {
    "messages": frozenset({"messages"}),
    "sharegpt": frozenset({"conversations"}),
    "alpaca": frozenset({"instruction", "output"}),
    "prompt-completion": frozenset({"prompt", "completion"}),
    "text": frozenset({"text"}),
}
MASK_FIELDS = ("weight", "train", "training", "loss")
"""How OpenAI, axolotl (the two in the middle) and ms-swift say whether an assistant's turn carries loss: 0 or 1."""
PREFERENCE_FIELDS = ("chosen", "rejected", "preferred_output", "non_preferred_output")
"""How TRL (the first two) and OpenAI name the better and the worse answer of a preference."""
PREFERENCE_REFUSAL = "preferences cannot be trained on"
