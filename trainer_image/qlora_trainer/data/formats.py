"""What the dataset formats mean: a record becomes a conversation, a prompt with its completion, a text or a preference.

Every field that its ecosystem knows is used as it is used there, or refused by name; `docs/data.md` has the table.
`unknown_fields` names the others. What breaks the format is a ValueError whose message goes on a sentence that begins
with where the record stands.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from orchestrator.api.record_fields import (
    MASK_FIELDS,
    OPENAI_PREFERENCE_FIELDS,
    PREFERENCE_FIELDS,
    PREFERENCE_REFUSAL,
    RECORD_FIELDS,
    REQUIRED_FIELDS,
    SHAREGPT_ROLES,
    Format,
    as_trl_writes_it,
)
from orchestrator.api.words import on_one_line

Fields = Mapping[str, Any]
Message = Fields

# Taori et al., Stanford Alpaca (2023), train.py, PROMPT_DICT.
ALPACA_PREAMBLE = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
)
ALPACA_PAIRED = ", paired with an input that provides further context"
# As axolotl's `alpaca_w_system`: the system prompt stands where the preamble was.
ALPACA_SYSTEM = "### System:\n{}\n\n"
MAY_FOLLOW = {
    "system": ("system", "user"),
    "user": ("system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
"""Role -> the roles that may stand before it; a system message begins the conversation."""
NOTHING: tuple[Any, ...] = (None, [], {}, "")
"""Values of a field that is there because other records have it."""
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""What servers and templates call an assistant's thoughts."""
MESSAGE_FIELDS = frozenset(
    {"role", "content", "tool_calls", "tool_call_id", "name", *MASK_FIELDS, *REASONING_FIELDS},
)
TURN_FIELDS = frozenset({"from", "value", *MASK_FIELDS})
INSIDE: Mapping[Format, Mapping[str, frozenset[str]]] = {
    "messages": {"messages": MESSAGE_FIELDS},
    "sharegpt": {"conversations": TURN_FIELDS},
    "preference": dict.fromkeys(("prompt", *PREFERENCE_FIELDS), MESSAGE_FIELDS),
}
"""Fields that hold messages, and what is known in those, by format."""
OTHER_ROLES = {
    **{name: role for name, role in SHAREGPT_ROLES.items() if name != role and name != "function_call"},
    "developer": "system",
    "function": "tool",
}
"""What others call the roles of messages -> what they are called here."""
REFUSED_FIELDS = {
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "only text can be trained on"),
    "train_detail": "turns are trained whole; give `train`",
    "functions": "give them as `tools`",
    "function_call": "give it as `tool_calls`",
    "refusal": "write it into `content`",
    "documents": "write them into a message's `content`",
    "chat_template_kwargs": "write what they change into spec.model.chatTemplate",
}
"""Fields with a meaning that nothing here gives them -> what to do instead."""
VERDICT_FIELDS = ("label", "kto_tag")
"""Where KTO's data say, as a boolean, whether the completion is one to learn."""
MAX_NAME_CHARACTERS = 64
"""Of a field, in a sentence."""
NAMED_FIELDS = 8
"""How many fields a sentence names."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """Two answers to one prompt: what was chosen, and what was rejected for it."""

    chosen: Conversation | Completion
    rejected: Conversation | Completion
    """Of the same kind, with the same prompt."""


Sample = Conversation | Completion | Text | Preference


def read_sample(record: Fields, form: Format) -> Sample:
    """The sample that a record of this format stands for; raises ValueError saying what is wrong with it."""
    _refuse_fields(record, "")
    if form != "preference":
        _refuse_preferences(record)
    if form != "text":
        _refuse_unwanted(record)
    return _READERS[form](record)


def unknown_fields(record: Fields, form: Format) -> Iterator[str]:
    """Names of fields that mean nothing in this format, those of messages as `messages[].id`."""
    known = RECORD_FIELDS[form]
    record = as_trl_writes_it(record) if form == "preference" else record
    yield from (name for name, value in record.items() if name not in known and value not in NOTHING)
    for place, inside in INSIDE.get(form, {}).items():
        messages = record.get(place)
        for message in cast("list[Any]", messages) if isinstance(messages, list) else []:
            if isinstance(message, Mapping):
                fields = cast("Fields", message).items()
                yield from (
                    f"{place}[].{name}" for name, value in fields if name not in inside and value not in NOTHING
                )


def named_fields(names: Iterable[str]) -> str:
    """The first of these fields, fit for a sentence."""
    found = list(names)
    shown = (f"`{on_one_line(name[:MAX_NAME_CHARACTERS])}`" for name in found[:NAMED_FIELDS])
    more = f" and {len(found) - NAMED_FIELDS} more" if len(found) > NAMED_FIELDS else ""
    return ", ".join(shown) + more


def _refuse_fields(fields: Fields, place: str) -> None:
    for name in REFUSED_FIELDS:
        if fields.get(name) not in NOTHING:
            raise ValueError(f"has a {place}field `{name}`: {REFUSED_FIELDS[name]}")


def _refuse_preferences(record: Fields) -> None:
    for name in (*PREFERENCE_FIELDS, *OPENAI_PREFERENCE_FIELDS):
        if record.get(name) not in NOTHING:
            raise ValueError(f"has a field `{name}`: {PREFERENCE_REFUSAL}")


def _refuse_unwanted(record: Fields) -> None:
    for name in VERDICT_FIELDS:
        if record.get(name) is False or record.get(name) in ("false", "False"):
            raise ValueError(f"has a field `{name}` that is false; what is not wanted cannot be trained on: remove it")


# --- conversations


def _messages(record: Fields) -> Conversation:
    given = [_object(message, number) for number, message in enumerate(_list(record, "messages"), start=1)]
    return _conversation(given, record.get("tools"))


def _object(message: Any, number: int) -> Fields:
    if not isinstance(message, Mapping) or "role" not in message:
        other = "; `from` and `value` are the format sharegpt's, in `conversations`" if _has(message, "from") else ""
        raise ValueError(f"has a message {number} that is not an object with `role` and `content`{other}")
    return cast("Fields", message)


def _has(value: Any, name: str) -> bool:
    return isinstance(value, Mapping) and name in value


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
        other = "; `role` and `content` are the format messages', in `messages`" if _has(turn, "role") else ""
        raise ValueError(f"has a turn {number} that is not an object with `from` and `value`{other}")
    fields = cast("Fields", turn)
    _refuse_fields(fields, f"turn {number} with a ")
    sender = fields["from"]
    role = SHAREGPT_ROLES.get(sender) if isinstance(sender, str) else None
    if role is None:
        raise ValueError(f"has a turn {number} from {sender!r}; known are {', '.join(sorted(SHAREGPT_ROLES))}")
    masked = {name: fields[name] for name in MASK_FIELDS if name in fields}
    if sender == "function_call":
        return {"role": role, "content": "", "tool_calls": _functions(fields["value"], number)} | masked
    return {"role": role, "content": fields["value"]} | masked


def _functions(value: Any, number: int) -> list[Fields]:
    """The calls of a turn: one, or a list of them, as JSON text or as it is."""
    called = _parsed(value, f"a turn {number} from 'function_call'") if isinstance(value, str) else value
    functions: list[Any] = cast("list[Any]", called) if isinstance(called, list) else [called]
    return [{"type": "function", "function": function} for function in functions]


def _conversation(given: Sequence[Fields], tools: Any) -> Conversation:
    messages = [_message(fields, number) for number, fields in enumerate(given, start=1)]
    _check_roles(messages)
    untrained = (index for index, fields in enumerate(given) if _weight(fields, index + 1) == 0)
    return Conversation(messages=messages, tools=_tools(tools), untrained=frozenset(untrained))


def _message(fields: Fields, number: int) -> Message:
    """The message that the chat template gets: nulls are absent, the content is a text, tool arguments are objects."""
    _refuse_fields(fields, f"message {number} with a ")
    # Tables give every message every column, and chat templates take a null for a value.
    message = {key: value for key, value in fields.items() if value is not None and key not in MASK_FIELDS}
    for name in (*REASONING_FIELDS, "name", "tool_call_id"):
        if not isinstance(message.get(name, ""), str):
            raise ValueError(f"has a message {number} whose `{name}` is not a text")
        if not message.get(name, "-").strip():
            del message[name]
    if (calls := message.pop("tool_calls", None)) and not isinstance(calls, str):
        message["tool_calls"] = _tool_calls(calls, number)
    elif calls:
        message["tool_calls"] = _tool_calls(_parsed(calls, "a field `tool_calls`"), number)
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
        arguments = _parsed(arguments, "a field `arguments`") if arguments.strip() else {}
    if not isinstance(arguments, Mapping):
        raise ValueError(f"has a message {number} whose tool call has `arguments` that are not an object")
    whole = {**named, "arguments": dict(cast("Fields", arguments))}
    return {**fields, "function": whole} if "function" in fields else {"type": "function", "function": whole}


def _tools(tools: Any) -> list[Any] | None:
    if isinstance(tools, str):
        tools = _parsed(tools, "a field `tools`") if tools.strip() else None
    if not tools:
        return None
    if not isinstance(tools, list):
        raise ValueError("has a field `tools` that is not a list")
    parsed = [_parsed(tool, "a field `tools`") if isinstance(tool, str) else tool for tool in cast("list[Any]", tools)]
    if not all(isinstance(tool, dict) for tool in parsed):
        raise ValueError("has a field `tools` with an entry that is not an object")
    return parsed


def _weight(fields: Fields, number: int) -> int:
    """Whether a message carries loss: 0 or 1."""
    given = {name: fields[name] for name in MASK_FIELDS if fields.get(name) is not None}
    for name, weight in given.items():
        if weight not in (0, 1):
            raise ValueError(f"has a message {number} whose `{name}` is {weight!r}; it must be 0 or 1")
        if weight and fields["role"] != "assistant":
            raise ValueError(
                f"has a message {number} of role {fields['role']!r} with `{name}`; only the assistant is trained"
            )
    if len(set(given.values())) > 1:
        raise ValueError(f"has a message {number} of which {named_fields(given)} do not agree; keep one")
    return int(next(iter(given.values()), 1))


def _check_roles(messages: Sequence[Message]) -> None:
    before: str | None = None
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if not isinstance(role, str) or role not in MAY_FOLLOW:
            other = OTHER_ROLES.get(role.lower(), role.lower()) if isinstance(role, str) else None
            meant = f"; write it as {other!r}" if other in MAY_FOLLOW else ""
            raise ValueError(f"has a message {number} of role {role!r}; known are {', '.join(MAY_FOLLOW)}{meant}")
        if (before is None and role not in ("system", "user")) or (
            before is not None and (before not in MAY_FOLLOW[role] or role == "system")
        ):
            place = f"after role {before!r}" if before else "at the beginning"
            raise ValueError(f"has a message {number} of role {role!r} {place}; {_how_roles_go(role, before)}")
        before = role
    if before != "assistant":
        raise ValueError(f"ends with a message of role {before!r}; the last one must be the assistant's: remove it")


def _how_roles_go(role: str, before: str | None) -> str:
    """What to do about a message that must not stand where it does."""
    if role == before:
        return "join the two into one message"
    if role == "system":
        return "it must be the first message"
    return "roles must alternate user and assistant" + (", and begin with the user" if before != "user" else "")


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
    history = _parsed(history, "a field `history`") if isinstance(history, str) else history
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


# --- preferences, as TRL reads them, and OpenAI's


def _preference(record: Fields) -> Preference:
    """With its prompt beside the answers, or in both of them (TRL's explicit and implicit prompts)."""
    record = as_trl_writes_it(record)
    sides = [_turns(_field(record, name)) for name in PREFERENCE_FIELDS]
    chosen, rejected = sides
    prompt = _turns(record.get("prompt"))
    if isinstance(chosen, list) and isinstance(rejected, list):
        answers = cast("list[Any]", chosen), cast("list[Any]", rejected)
        found = _preferred_turns(prompt, *answers, record.get("tools"))
    elif isinstance(chosen, list) or isinstance(rejected, list):
        raise ValueError(
            "has a `chosen` and a `rejected` of which one is messages and one is not; give both as one kind"
        )
    else:
        found = _preferred_texts(prompt, _text(record, "chosen"), _text(record, "rejected"), record.get("tools"))
    if found.chosen == found.rejected:
        raise ValueError("has a `chosen` and a `rejected` that are the same, which prefers nothing; remove the record")
    return found


def _turns(value: Any) -> Any:
    """A list of messages that a table's cell holds as JSON; any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("[{"):
        return value
    try:
        found = parse_json(value)
    except (ValueError, RecursionError):
        return value
    return cast("list[Any]", found) if all(_has(each, "role") for each in found) else value


def _preferred_turns(prompt: Any, chosen: list[Any], rejected: list[Any], tools: Any) -> Preference:
    before: list[Any] = cast("list[Any]", prompt) if isinstance(prompt, list) else []
    if not isinstance(prompt, list):
        shared = _shared(chosen, rejected)
        before, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if prompt not in NOTHING and not (before and _has(before[-1], "content") and before[-1]["content"] == prompt):
            raise ValueError(
                "has a `prompt` that is not what `chosen` and `rejected` answer; give it as messages, or not"
            )
    found = [
        _answered(before, answer, name, tools)
        for name, answer in zip(PREFERENCE_FIELDS, (chosen, rejected), strict=True)
    ]
    return Preference(chosen=found[0], rejected=found[1])


def _shared(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """How many items two sequences have in common at their beginning."""
    pairs = zip(chosen, rejected, strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(chosen), len(rejected)))


def _answered(prompt: Sequence[Any], answer: Sequence[Any], name: str, tools: Any) -> Conversation:
    """The prompt with one of its answers."""
    if len(answer) != 1:
        what = "the same as the other" if not answer else f"{len(answer)} messages after the prompt"
        raise ValueError(
            f"has a `{name}` that is {what}; it must be one message of the assistant, and what comes before it `prompt`"
        )
    try:
        given = [_object(message, number) for number, message in enumerate([*prompt, *answer], start=1)]
        return _conversation(given, tools)
    except ValueError as error:
        raise ValueError(f"{error} (counted from `prompt` on to `{name}`)") from error


def _preferred_texts(prompt: Any, chosen: str, rejected: str, tools: Any) -> Preference:
    if tools not in NOTHING:
        raise ValueError("has a field `tools` beside answers that are texts; give the answers as messages")
    if prompt in NOTHING:
        shared = _shared(chosen, rejected)
        shared -= shared > 0 and chosen[shared - 1] == " "  # as TRL: a blank is the answer's
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if not prompt.strip():
            raise ValueError("has no `prompt`, and `chosen` and `rejected` do not begin with one; give it as `prompt`")
    if not isinstance(prompt, str):
        raise ValueError("has a `prompt` that is no text beside answers that are; give all of them as one kind")
    if not prompt.strip():
        raise ValueError("has an empty field `prompt`")
    for name, answer in zip(PREFERENCE_FIELDS, (chosen, rejected), strict=True):
        if not answer.strip() and chosen != rejected:
            raise ValueError(f"has a `{name}` that is the prompt alone; both answers must say something")
    return Preference(
        chosen=Completion(prompt=prompt, completion=chosen), rejected=Completion(prompt=prompt, completion=rejected)
    )


# --- fields


def _field(record: Fields, name: str) -> Any:
    if record.get(name) is None:
        lacking = f"has a field `{name}` that is null" if name in record else f"has no field `{name}`"
        fields = [key for key in record if key != name]
        fitting = next((form for form, required in REQUIRED_FIELDS.items() if required <= set(fields)), None)
        what = f", as of the format {fitting}" if fitting else "; rename the one that is meant" if fields else ""
        known = f"its {'other ' if name in record else ''}fields: {named_fields(fields) or 'none'}"
        raise ValueError(f"{lacking}, which spec.dataset.format asks for; {known}{what}")
    return record[name]


def _text(record: Fields, name: str) -> str:
    value = _field(record, name)
    if not isinstance(value, str):
        chat = "; messages are the format messages', all of them in `messages`" if isinstance(value, list) else ""
        raise ValueError(f"has a field `{name}` that is not a text{chat}")
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
        value = _parsed(value, f"a field `{name}`")
    if not isinstance(value, list):
        raise ValueError(f"has a field `{name}` that is not a list")
    if not value:
        raise ValueError(f"has an empty field `{name}`")
    return cast("list[Any]", value)


def parse_json(text: str) -> Any:
    """The value of a JSON text, read strictly; raises ValueError where Python's own reader would guess."""
    return json.loads(text, **STRICT)


def json_problem(error: ValueError) -> str:
    """What is wrong with a JSON text, and at which character if that is known."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos + 1}"
    return "a number of thousands of digits" if "integer string conversion" in str(error) else str(error)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no value of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:MAX_NAME_CHARACTERS]} is larger than any number")
    return value


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((name, times),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"an object has the field {named_fields([name])} {times} times")
    return found


STRICT: Mapping[str, Any] = {
    "parse_constant": _refuse_constant,
    "parse_float": _finite,
    "object_pairs_hook": _each_once,
}
"""Arguments of Python's JSON reader, which by itself takes NaN and keeps the last of several values of a field."""


def _parsed(text: str, what: str) -> Any:
    try:
        return parse_json(text)
    except RecursionError as error:
        raise ValueError(f"has {what} that is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"has {what} that is not valid JSON: {json_problem(error)}") from error


_READERS: Mapping[Format, Callable[[Fields], Sample]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt-completion": _prompt_completion,
    "text": _plain_text,
    "preference": _preference,
}
