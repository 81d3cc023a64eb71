"""What the dataset formats mean: a record becomes a conversation, a prompt with its completion, or a text.

Every field that its ecosystem knows is used as it is used there, or refused by name; `docs/data.md` has the table.
`unknown_fields` names the others. What breaks the format is a ValueError whose message goes on a sentence that begins
with where the record stands.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

Format = Literal["messages", "sharegpt", "alpaca", "prompt-completion", "text"]
CHAT_FORMATS: frozenset[Format] = frozenset({"messages", "sharegpt"})
Fields = Mapping[str, Any]
Message = Fields

# Taori et al., Stanford Alpaca (2023), train.py, PROMPT_DICT.
ALPACA_PREAMBLE = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
)
ALPACA_PAIRED = ", paired with an input that provides further context"
# As axolotl's `alpaca_w_system`: the system prompt stands where the preamble was.
ALPACA_SYSTEM = "### System:\n{}\n\n"
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
MAY_FOLLOW = {
    "system": ("system", "user"),
    "user": ("system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
"""Role -> the roles that may stand before it; a system message begins the conversation."""
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""What servers and templates call an assistant's thoughts."""
RECORD_FIELDS: Mapping[Format, frozenset[str]] = {
    "messages": frozenset({"messages", "tools"}),
    "sharegpt": frozenset({"conversations", "system", "tools"}),
    "alpaca": frozenset({"instruction", "input", "output", "system", "history"}),
    "prompt-completion": frozenset({"prompt", "completion"}),
    "text": frozenset({"text"}),
}
MESSAGE_FIELDS = frozenset(
    {"role", "content", "tool_calls", "tool_call_id", "name", "weight", *REASONING_FIELDS},
)
TURN_FIELDS = frozenset({"from", "value", "weight"})
REFUSED_FIELDS = {
    "images": "only text can be trained on",
    "videos": "only text can be trained on",
    "audios": "only text can be trained on",
    "audio": "only text can be trained on",
    "functions": "give them as `tools`",
    "function_call": "give it as `tool_calls`",
    "refusal": "write it into `content`",
    "documents": "write them into a message's `content`",
    "chat_template_kwargs": "write what they change into spec.model.chatTemplate",
    "chosen": "preferences cannot be trained on",
    "rejected": "preferences cannot be trained on",
}
"""Fields with a meaning that nothing here gives them -> what to do instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Messages for a chat template, which always end with the assistant's."""

    messages: Sequence[Message]
    tools: Sequence[Any] | None = None
    untrained: frozenset[int] = frozenset()
    """Indexes of assistant messages of weight 0."""


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


def read_sample(record: Fields, form: Format) -> Sample:
    """The sample that a record of this format stands for; raises ValueError saying what is wrong with it."""
    _refuse_fields(record, "")
    return _READERS[form](record)


def unknown_fields(record: Fields, form: Format) -> Iterator[str]:
    """Names of fields that mean nothing in this format, those of messages as `messages[].id`."""
    known = RECORD_FIELDS[form]
    yield from (name for name, value in record.items() if name not in known and value is not None)
    if form not in CHAT_FORMATS:
        return
    place, inside = ("messages", MESSAGE_FIELDS) if form == "messages" else ("conversations", TURN_FIELDS)
    messages = record.get(place)
    for message in cast("list[Any]", messages) if isinstance(messages, list) else []:
        if isinstance(message, Mapping):
            yield from (f"{place}[].{name}" for name in cast("Fields", message) if name not in inside)


def _refuse_fields(fields: Fields, place: str) -> None:
    for name in REFUSED_FIELDS.keys() & fields.keys():
        if fields[name] not in (None, [], {}, ""):
            raise ValueError(f"has a {place}field `{name}`: {REFUSED_FIELDS[name]}")


# --- conversations


def _messages(record: Fields) -> Conversation:
    given = [_object(message, number) for number, message in enumerate(_list(record, "messages"), start=1)]
    return _conversation(given, record.get("tools"))


def _object(message: Any, number: int) -> Fields:
    if not isinstance(message, Mapping) or "role" not in message:
        raise ValueError(f"has a message {number} that is not an object with `role` and `content`")
    return cast("Fields", message)


def _sharegpt(record: Fields) -> Conversation:
    turns = [_turn(turn, number) for number, turn in enumerate(_list(record, "conversations"), start=1)]
    system = record.get("system")
    if system is not None and not isinstance(system, str):
        raise ValueError("has a field `system` that is not a text")
    if system and system.strip():
        if turns[0]["role"] == "system":
            raise ValueError("has a field `system` and a turn 1 of the system as well; keep one of them")
        turns = [{"role": "system", "content": system}, *turns]
    return _conversation(turns, record.get("tools"))


def _turn(turn: Any, number: int) -> Fields:
    """A turn of ShareGPT as a message."""
    if not isinstance(turn, Mapping) or "from" not in turn or "value" not in turn:
        raise ValueError(f"has a turn {number} that is not an object with `from` and `value`")
    fields = cast("Fields", turn)
    sender = fields["from"]
    role = SHAREGPT_ROLES.get(sender) if isinstance(sender, str) else None
    if role is None:
        raise ValueError(f"has a turn {number} from {sender!r}; known are {', '.join(sorted(SHAREGPT_ROLES))}")
    weight = {"weight": fields["weight"]} if "weight" in fields else {}
    if sender == "function_call":
        parsed = _parsed(fields["value"], f"turn {number}")
        functions: list[Any] = [parsed] if isinstance(parsed, dict) else parsed
        calls = [{"type": "function", "function": function} for function in functions]
        return {"role": role, "content": "", "tool_calls": calls} | weight
    return {"role": role, "content": fields["value"]} | weight


def _conversation(given: Sequence[Fields], tools: Any) -> Conversation:
    messages = [_message(fields, number) for number, fields in enumerate(given, start=1)]
    _check_roles(messages)
    untrained = (index for index, fields in enumerate(given) if _weight(fields, index + 1) == 0)
    return Conversation(messages=messages, tools=_tools(tools), untrained=frozenset(untrained))


def _message(fields: Fields, number: int) -> Message:
    """The message that the chat template gets: nulls are absent, the content is a text, tool arguments are objects."""
    _refuse_fields(fields, f"message {number} with a ")
    # Tables give every message every column, and chat templates take a null for a value.
    message = {key: value for key, value in fields.items() if value is not None and key != "weight"}
    for name in (*REASONING_FIELDS, "name", "tool_call_id"):
        if not isinstance(message.get(name, ""), str):
            raise ValueError(f"has a message {number} whose `{name}` is not a text")
        if not message.get(name, "-").strip():
            del message[name]
    if (calls := message.pop("tool_calls", None)) and not isinstance(calls, str):
        message["tool_calls"] = _tool_calls(calls, number)
    elif calls:
        message["tool_calls"] = _tool_calls(_parsed(calls, "tool_calls"), number)
    role = message["role"] = message.get("role")
    for name in ("tool_calls", *REASONING_FIELDS):
        if name in message and role != "assistant":
            raise ValueError(f"has a message {number} of role {role!r} with `{name}`, which only the assistant has")
    return {**message, "content": _content(message, number)}


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
    given: Fields = cast("Fields", part) if isinstance(part, Mapping) else {}
    text = given.get("text")
    if not isinstance(text, str) or given.get("type") != "text":
        raise ValueError(f"has a message {number} with a part that is not text; only text can be trained on")
    return text


def _tool_calls(calls: Any, number: int) -> list[Fields]:
    if not isinstance(calls, list):
        raise ValueError(f"has a message {number} whose `tool_calls` is not a list")
    return [_tool_call(call, number) for call in cast("list[Any]", calls)]


def _tool_call(call: Any, number: int) -> Fields:
    fields: Fields = cast("Fields", call) if isinstance(call, Mapping) else {}
    function = fields.get("function", fields)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):  # pyright: ignore[reportUnknownMemberType]  # any mapping
        raise ValueError(f"has a message {number} with a tool call that names no function")
    named = cast("Fields", function)
    arguments: Any = named.get("arguments", {})
    if isinstance(arguments, str):  # as the chat completions API writes them
        arguments = _parsed(arguments, "arguments") if arguments.strip() else {}
    if not isinstance(arguments, Mapping):
        raise ValueError(f"has a message {number} whose tool call has `arguments` that are not an object")
    whole = {**named, "arguments": dict(cast("Fields", arguments))}
    return {**fields, "function": whole} if "function" in fields else {"type": "function", "function": whole}


def _tools(tools: Any) -> list[Any] | None:
    if isinstance(tools, str):
        tools = _parsed(tools, "tools") if tools.strip() else None
    if not tools:
        return None
    if not isinstance(tools, list):
        raise ValueError("has a field `tools` that is not a list")
    parsed = [_parsed(tool, "tools") if isinstance(tool, str) else tool for tool in cast("list[Any]", tools)]
    if not all(isinstance(tool, dict) for tool in parsed):
        raise ValueError("has a field `tools` with an entry that is not an object")
    return parsed


def _weight(fields: Fields, number: int) -> int:
    """Whether a message carries loss, as in OpenAI's fine-tuning format: 0 or 1."""
    weight = fields.get("weight")
    if weight is None:
        return 1
    if isinstance(weight, bool) or weight not in (0, 1):
        raise ValueError(f"has a message {number} whose `weight` is {weight!r}; it must be 0 or 1")
    if weight and fields["role"] != "assistant":
        raise ValueError(
            f"has a message {number} of role {fields['role']!r} with `weight`; only the assistant is trained"
        )
    return int(weight)


def _check_roles(messages: Sequence[Message]) -> None:
    before: str | None = None
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if not isinstance(role, str) or role not in MAY_FOLLOW:
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


# --- prompts with completions, and texts


def _alpaca(record: Fields) -> Completion:
    """Stanford's prompt; earlier rounds of `history` stand before the instruction, and carry no loss."""
    instruction, output = _text(record, "instruction"), _text(record, "output")
    context, system = _optional_text(record, "input"), _optional_text(record, "system")
    paired = f"\n\n### Input:\n{context}" if context.strip() else ""
    preamble = ALPACA_PREAMBLE.format(ALPACA_PAIRED if paired else "")
    start = ALPACA_SYSTEM.format(system) if system.strip() else preamble
    earlier = "".join(f"### Instruction:\n{asked}\n\n### Response:{said}\n\n" for asked, said in _history(record))
    prompt = f"{start}{earlier}### Instruction:\n{instruction}{paired}\n\n### Response:"
    return Completion(prompt=prompt, completion=output)


def _history(record: Fields) -> Iterator[tuple[str, str]]:
    history: Any = record.get("history") or []
    history = _parsed(history, "history") if isinstance(history, str) else history
    pairs: list[Any] = cast("list[Any]", history) if isinstance(history, list) else [history]
    for number, pair in enumerate(pairs, start=1):
        texts = cast("list[Any]", pair) if isinstance(pair, list) else []
        if len(texts) != 2 or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"has a field `history` whose entry {number} is not a pair of instruction and response")
        yield texts[0], texts[1]


def _prompt_completion(record: Fields) -> Completion:
    return Completion(prompt=_text(record, "prompt"), completion=_text(record, "completion"))


def _plain_text(record: Fields) -> Text:
    return Text(text=_text(record, "text"))


# --- fields


def _field(record: Fields, name: str) -> Any:
    if record.get(name) is None:
        known = ", ".join(f"`{key}`" for key in record) or "none"
        raise ValueError(f"has no field `{name}`, which spec.dataset.format asks for; its fields: {known}")
    return record[name]


def _text(record: Fields, name: str) -> str:
    value = _field(record, name)
    if not isinstance(value, str):
        raise ValueError(f"has a field `{name}` that is not a text")
    if not value.strip():
        raise ValueError(f"has an empty field `{name}`")
    return value


def _optional_text(record: Fields, name: str) -> str:
    value = record.get(name) or ""
    if not isinstance(value, str):
        raise ValueError(f"has a field `{name}` that is not a text")
    return value


def _list(record: Fields, name: str) -> list[Any]:
    value = _field(record, name)
    if isinstance(value, str):  # a table's cell can hold a conversation only as JSON
        value = _parsed(value, name)
    if not isinstance(value, list):
        raise ValueError(f"has a field `{name}` that is not a list")
    if not value:
        raise ValueError(f"has an empty field `{name}`")
    return cast("list[Any]", value)


def parse_json(text: str) -> Any:
    """The value of a JSON text; NaN and the infinities, which Python's own reader takes, are none."""
    return json.loads(text, parse_constant=refuse_constant)


def refuse_constant(name: str) -> None:
    """Python's reader gives NaN and the infinities to it, which JSON does not have."""
    raise ValueError(f"{name} is no value of JSON")


def _parsed(value: Any, name: str) -> Any:
    try:
        return parse_json(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"has a field `{name}` that is neither a list nor valid JSON") from error


_READERS: Mapping[Format, Callable[[Fields], Sample]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt-completion": _prompt_completion,
    "text": _plain_text,
}
