"""What the dataset formats mean: a record becomes a conversation, a prompt with its completion, or a text.

What breaks the format is a ValueError whose message goes on a sentence
that begins with where the record stands.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

Format = Literal["messages", "sharegpt", "alpaca", "prompt-completion", "text"]
CHAT_FORMATS: frozenset[Format] = frozenset({"messages", "sharegpt"})
Message = Mapping[str, Any]

# Taori et al., Stanford Alpaca (2023), train.py, PROMPT_DICT.
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}
MAY_FOLLOW = {
    "system": ("system", "user"),
    "user": ("system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
"""Role -> the roles that may stand before it; a system message begins the conversation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Messages for a chat template, which always end with the assistant's."""

    messages: Sequence[Message]
    tools: Sequence[Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A prompt and what should follow it."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A text to continue pre-training on."""

    text: str


Sample = Conversation | Completion | Text


def read_sample(record: Mapping[str, Any], form: Format) -> Sample:
    """The sample that a record of this format stands for; raises ValueError saying what is wrong with it."""
    return _READERS[form](record)


def _messages(record: Mapping[str, Any]) -> Conversation:
    messages = [_message(message, number) for number, message in enumerate(_list(record, "messages"), start=1)]
    return _conversation(messages, record.get("tools"))


def _message(message: Any, number: int) -> Message:
    if not isinstance(message, Mapping) or "role" not in message:
        raise ValueError(f"has a message {number} that is not an object with `role` and `content`")
    # Tables give every message every column, and chat templates take a null for a value.
    given = {key: value for key, value in cast("Message", message).items() if value is not None}
    return {**given, "content": _content(given, number)}


def _content(message: Message, number: int) -> str:
    content = message.get("content", "")
    if isinstance(content, list):
        content = "".join(_text_part(part, number) for part in cast("list[Any]", content))
    if not isinstance(content, str):
        raise ValueError(f"has a message {number} whose `content` is not a text")
    if not content.strip() and not message.get("tool_calls"):
        raise ValueError(f"has a message {number} with empty `content`")
    return content


def _text_part(part: Any, number: int) -> str:
    given: Message = cast("Message", part) if isinstance(part, Mapping) else {}
    text = given.get("text")
    if not isinstance(text, str) or given.get("type") != "text":
        raise ValueError(f"has a message {number} with a part that is not text; only text can be trained on")
    return text


def _sharegpt(record: Mapping[str, Any]) -> Conversation:
    turns = _list(record, "conversations")
    messages = [_turn(turn, number) for number, turn in enumerate(turns, start=1)]
    return _conversation(messages, record.get("tools"))


def _turn(turn: Any, number: int) -> Message:
    if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
        raise ValueError(f"has a turn {number} that is not an object with `from` and `value`")
    role = SHAREGPT_ROLES.get(turn["from"]) if isinstance(turn["from"], str) else None
    if role is None:
        raise ValueError(f"has a turn {number} from {turn['from']!r}; known are {', '.join(sorted(SHAREGPT_ROLES))}")
    return {"role": role, "content": _content({"content": turn["value"]}, number)}


def _conversation(messages: Sequence[Message], tools: Any) -> Conversation:
    before: str | None = None
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if role not in MAY_FOLLOW:
            raise ValueError(f"has a message {number} of role {role!r}; known are {', '.join(MAY_FOLLOW)}")
        if (before is None and role not in ("system", "user")) or (
            before is not None and (before not in MAY_FOLLOW[role] or role == "system")
        ):
            place = f"after role {before!r}" if before else "at the beginning"
            raise ValueError(
                f"has a message {number} of role {role!r} {place}; roles must alternate user and assistant"
            )
        before = role
    if before != "assistant":
        raise ValueError(f"ends with a message of role {before!r}; the last one must be the assistant's")
    if isinstance(tools, str):
        tools = _parsed(tools, "tools")
    return Conversation(messages=messages, tools=tools or None)


def _alpaca(record: Mapping[str, Any]) -> Completion:
    instruction, output = _text(record, "instruction"), _text(record, "output")
    context = record.get("input") or ""
    if not isinstance(context, str):
        raise ValueError("has a field `input` that is not a text")
    template = ALPACA_WITH_INPUT if context.strip() else ALPACA_WITHOUT_INPUT
    return Completion(prompt=template.format(instruction=instruction, input=context), completion=output)


def _prompt_completion(record: Mapping[str, Any]) -> Completion:
    return Completion(prompt=_text(record, "prompt"), completion=_text(record, "completion"))


def _plain_text(record: Mapping[str, Any]) -> Text:
    return Text(text=_text(record, "text"))


def _field(record: Mapping[str, Any], name: str) -> Any:
    if record.get(name) is None:
        known = ", ".join(f"`{key}`" for key in record) or "none"
        raise ValueError(f"has no field `{name}`, which spec.dataset.format asks for; its fields: {known}")
    return record[name]


def _text(record: Mapping[str, Any], name: str) -> str:
    value = _field(record, name)
    if not isinstance(value, str):
        raise ValueError(f"has a field `{name}` that is not a text")
    if not value.strip():
        raise ValueError(f"has an empty field `{name}`")
    return value


def _list(record: Mapping[str, Any], name: str) -> list[Any]:
    value = _field(record, name)
    if isinstance(value, str):  # a table's cell can hold a conversation only as JSON
        value = _parsed(value, name)
    if not isinstance(value, list):
        raise ValueError(f"has a field `{name}` that is not a list")
    if not value:
        raise ValueError(f"has an empty field `{name}`")
    return cast("list[Any]", value)


def _parsed(value: str, name: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"has a field `{name}` that is neither a list nor valid JSON") from error


_READERS: Mapping[Format, Callable[[Mapping[str, Any]], Sample]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt-completion": _prompt_completion,
    "text": _plain_text,
}
