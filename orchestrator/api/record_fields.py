"""The fields of training records in each format, as prepare reads them; docs/data.md says what becomes of every one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

Format = Literal["messages", "sharegpt", "alpaca", "prompt-completion", "text", "preference"]
PREFERENCE_FIELDS = ("chosen", "rejected")
"""How TRL names the better and the worse answer of a preference."""
OPENAI_PREFERENCE_FIELDS = ("preferred_output", "non_preferred_output")
"""How OpenAI does, to what is in `input`."""
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
    "preference": frozenset({"prompt", "chosen", "rejected", "tools"} | {"input", *OPENAI_PREFERENCE_FIELDS}),
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
PREFERENCE_REFUSAL = (
    "preferences are trained with spec.dataset.format: preference and spec.training.objective.type: dpo or orpo; set "
    "both, or remove the field to train on the others"
)


def as_trl_writes_it(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """A preference with TRL's fields: one of OpenAI's has them by other names. Any other record as it is.

    Raises ValueError, for a sentence that begins with where the record stands.
    """
    given = {name: record.get(name) for name in OPENAI_PREFERENCE_FIELDS}
    if all(value is None for value in given.values()):
        return record
    if missing := next((name for name, value in given.items() if value is None), None):
        raise ValueError(f"has no field `{missing}`")
    if both := next((name for name in ("prompt", *PREFERENCE_FIELDS) if record.get(name) is not None), None):
        raise ValueError(f"has `{both}` beside `{OPENAI_PREFERENCE_FIELDS[0]}`; write it as TRL does, or as OpenAI")
    asked = record.get("input")
    if not isinstance(asked, Mapping) or not isinstance(asked.get("messages"), list):  # pyright: ignore[reportUnknownMemberType]  # any mapping
        raise ValueError("has no `input` that is an object with `messages`, which `preferred_output` would answer")
    fields = cast("Mapping[str, Any]", asked)
    others = {name: value for name, value in record.items() if name not in ("input", *OPENAI_PREFERENCE_FIELDS)}
    inside = {f"input.{name}": value for name, value in fields.items() if name not in ("messages", "tools")}
    answers = dict(zip(PREFERENCE_FIELDS, given.values(), strict=True))
    return {**others, **inside, "prompt": fields["messages"], "tools": fields.get("tools"), **answers}
