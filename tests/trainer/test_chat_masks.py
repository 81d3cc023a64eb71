"""What carries loss is exactly what a model has to write: chats with every known field, templates of many families.

What has to be written is stated here by hand for each family, and never asked of the code under test.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qlora_trainer.data.chat import ChatRenderer
from qlora_trainer.data.encoding import EncodedRecord, Encoder
from qlora_trainer.data.formats import Conversation, read_sample
from tiny_model import save_tokenizer

TEMPLATES = Path(__file__).parent / "chat_templates"
Turn = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What of a family's template a test must know."""

    tokens: tuple[str, ...]
    eos: str
    says: Callable[[Turn, Turn | None], str]
    """What the model writes for a turn, given the message after it."""
    system: bool = True
    tools: bool = False
    one_call: bool = False
    thought: str | None = None
    """The field that holds thoughts; "content" where they stand in the content."""


def call_json(call: Turn, arguments: str = "arguments") -> str:
    function = call["function"]
    return f'{{"name": "{function["name"]}", "{arguments}": {json.dumps(function["arguments"], ensure_ascii=False)}}}'


def functions_json(turn: Turn) -> str:
    return json.dumps([call["function"] for call in turn["tool_calls"]], ensure_ascii=False)


def ended_with(end: str) -> Callable[[Turn, Turn | None], str]:
    return lambda turn, _: turn["content"] + end


def qwen_calls(turn: Turn, *, first: str) -> str:
    calls = [f"<tool_call>\n{call_json(call)}\n</tool_call>" for call in turn.get("tool_calls", ())]
    return "".join((first if number == 0 else "\n") + call for number, call in enumerate(calls))


def qwen2_5(turn: Turn, _: Turn | None) -> str:
    return turn["content"] + qwen_calls(turn, first="\n" if turn["content"] else "") + "<|im_end|>"


def qwen3(turn: Turn, _: Turn | None) -> str:
    content = turn["content"].lstrip("\n")
    thought = turn.get("reasoning_content", "").strip("\n")
    return (
        f"<think>\n{thought}\n</think>\n\n{content}"
        + qwen_calls(turn, first="\n" if turn["content"] else "")
        + ("<|im_end|>")
    )


def llama3(turn: Turn, _: Turn | None) -> str:
    calls = turn.get("tool_calls")
    return (call_json(calls[0], "parameters") if calls else turn["content"].strip()) + "<|eot_id|>"


def mistral(turn: Turn, _: Turn | None) -> str:
    calls = turn.get("tool_calls")
    return f"[TOOL_CALLS] {functions_json(turn)}</s>" if calls else f" {turn['content'].strip()}</s>"


def glm4(turn: Turn, following: Turn | None) -> str:
    calls = turn.get("tool_calls")
    if not calls:
        return f"\n{turn['content']}<|user|>"
    function = calls[0]["function"]
    return f"{function['name']}\n{json.dumps(function['arguments'], ensure_ascii=False)}<|observation|>"


def granite(turn: Turn, _: Turn | None) -> str:
    calls = f"<|tool_call|>{functions_json(turn)}" if turn.get("tool_calls") else ""
    return turn["content"] + calls + "<|end_of_text|>"


def deepseek(turn: Turn, _: Turn | None) -> str:
    return turn["content"].removeprefix("<think>\n") + "<|end_of_sentence|>"


def gpt_oss(turn: Turn, _: Turn | None) -> str:
    thought = turn.get("thinking")
    analysis = f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant" if thought else ""
    return f"{analysis}<|channel|>final<|message|>{turn['content']}<|return|>"


IM = ("<|im_start|>", "<|im_end|>")
HARMONY = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>")
INSTRUCT = ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "</s>")
FAMILIES: Mapping[str, Family] = {
    "chatml": Family(tokens=IM, eos="<|im_end|>", says=ended_with("<|im_end|>")),
    "smollm2": Family(tokens=IM, eos="<|im_end|>", says=ended_with("<|im_end|>")),
    "smollm3": Family(tokens=IM, eos="<|im_end|>", says=lambda turn, _: turn["content"].lstrip("\n") + "<|im_end|>"),
    "llama3": Family(
        tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        eos="<|eot_id|>",
        says=llama3,
        tools=True,
        one_call=True,
    ),
    "qwen2_5": Family(tokens=IM, eos="<|im_end|>", says=qwen2_5, tools=True),
    "qwen3": Family(tokens=IM, eos="<|im_end|>", says=qwen3, tools=True, thought="reasoning_content"),
    "gemma": Family(
        tokens=("<start_of_turn>", "<end_of_turn>"),
        eos="<end_of_turn>",
        says=lambda turn, _: turn["content"].strip() + "<end_of_turn>",
        system=False,
    ),
    "gemma3": Family(
        tokens=("<start_of_turn>", "<end_of_turn>"),
        eos="<end_of_turn>",
        says=lambda turn, _: turn["content"].strip() + "<end_of_turn>",
    ),
    "mistral_v3": Family(tokens=INSTRUCT, eos="</s>", says=mistral, tools=True),
    "phi3": Family(
        tokens=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
        eos="<|endoftext|>",
        says=ended_with("<|end|>"),
    ),
    "phi4": Family(tokens=(*IM, "<|im_sep|>", "<|endoftext|>"), eos="<|endoftext|>", says=ended_with("<|im_end|>")),
    "glm4": Family(
        tokens=("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>"),
        eos="<|endoftext|>",
        says=glm4,
        tools=False,
        one_call=True,
    ),
    "deepseek_r1": Family(
        tokens=("<|User|>", "<|Assistant|>", "<|end_of_sentence|>"),
        eos="<|end_of_sentence|>",
        says=deepseek,
        thought="content",
    ),
    "granite": Family(
        tokens=("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<|tool_call|>"),
        eos="<|end_of_text|>",
        says=granite,
        tools=True,
    ),
    "gpt_oss": Family(tokens=HARMONY, eos="<|return|>", says=gpt_oss, thought="thinking"),
}


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    from transformers import AutoTokenizer

    made: dict[str, Any] = {}
    for name, family in FAMILIES.items():
        folder = save_tokenizer(tmp_path_factory.mktemp(name), chat_template=(TEMPLATES / f"{name}.jinja").read_text())
        made[name] = AutoTokenizer.from_pretrained(folder)
        made[name].add_special_tokens({"additional_special_tokens": list(family.tokens)})
        made[name].add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
        made[name].eos_token = family.eos
    return made


_encoders: dict[int, Encoder] = {}


def encoder_of(tokenizer: Any) -> Encoder:
    """One for all chats of a tokenizer, since each has a process that renders."""
    if id(tokenizer) not in _encoders:
        _encoders[id(tokenizer)] = Encoder(tokenizer, "assistant")
    return _encoders[id(tokenizer)]


# --- chats

texts = st.text(min_size=1, max_size=30).filter(lambda text: text.strip())
words = st.text(st.characters(categories=["Ll"]), min_size=1, max_size=8)
calls = st.builds(
    lambda name, arguments: {"type": "function", "function": {"name": name, "arguments": arguments}},
    words,
    st.dictionaries(words, st.one_of(texts, st.integers(), st.booleans(), st.lists(words, max_size=2)), max_size=3),
)


@st.composite
def chats(draw: st.DrawFn, family: Family) -> dict[str, Any]:
    """A record of the format messages with all that the family's template writes."""
    messages: list[dict[str, Any]] = []
    if family.system and draw(st.booleans()):
        messages.append({"role": "system", "content": draw(texts)})
    tools = family.tools and draw(st.booleans())
    for _ in range(draw(st.integers(1, 7))):
        messages.append({"role": "user", "content": draw(texts)})
        if tools and draw(st.booleans()):
            made = draw(st.lists(calls, min_size=1, max_size=1 if family.one_call else 2))
            messages.append(draw(thinking({"role": "assistant", "content": "", "tool_calls": made}, family)))
            messages += [{"role": "tool", "content": draw(texts), "tool_call_id": "1", "name": "f"} for _ in made]
        messages.append(draw(thinking({"role": "assistant", "content": draw(texts)}, family)))
        if draw(st.integers(0, 3)) == 0:
            messages[-1]["weight"] = draw(st.integers(0, 1))
    record: dict[str, Any] = {"messages": messages}
    if tools:
        schema = {"type": "object", "properties": {draw(words): {"type": "string"}}}
        record["tools"] = [{"type": "function", "function": {"name": draw(words), "parameters": schema}}]
    return record


@st.composite
def thinking(draw: st.DrawFn, turn: dict[str, Any], family: Family) -> dict[str, Any]:
    """The turn, with a thought where the family has them; R1's always think."""
    if family.thought == "content":
        return turn | {"content": f"<think>\n{draw(words)}\n</think>\n\n{turn['content'].strip()}"}
    if family.thought is not None and draw(st.booleans()):
        return turn | {family.thought: draw(words)}
    return turn


def wanted(family: Family, record: dict[str, Any]) -> list[str]:
    return [
        family.says(turn, following)
        for turn, following in pairwise([*record["messages"], None])
        if turn["role"] == "assistant" and turn.get("weight", 1)
    ]


def supervised(tokenizer: Any, record: EncodedRecord) -> list[str]:
    """Each run of tokens that carry loss, decoded, over all contexts."""
    runs: list[list[int]] = []
    for context in record.split():
        runs.append([])
        for token, label in zip(context.input_ids.tolist(), context.labels.tolist(), strict=True):
            if label == -100:
                runs.append([])
            else:
                assert label == token
                runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_what_carries_loss_is_what_the_model_has_to_write(
    tokenizers: Mapping[str, Any], name: str, data: st.DataObject
) -> None:
    family, tokenizer = FAMILIES[name], tokenizers[name]
    record = data.draw(chats(family))
    expected = wanted(family, record)
    if not expected:
        return
    encoded = encoder_of(tokenizer).encode(read_sample(record, "messages"))
    assert sorted(supervised(tokenizer, encoded)) == sorted(expected)  # contexts may hold turns that are not neighbors


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_arguments_as_text_and_sharegpt_give_the_same_tokens(
    tokenizers: Mapping[str, Any], name: str, data: st.DataObject
) -> None:
    family, tokenizer = FAMILIES[name], tokenizers[name]
    record = data.draw(chats(family))
    encoder = encoder_of(tokenizer)
    expected = encoder.encode(read_sample(record, "messages"))
    for message in record["messages"]:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    record["messages"] = json.dumps(record["messages"])
    found = encoder.encode(read_sample(record, "messages"))
    assert found.input_ids.tolist() == expected.input_ids.tolist()
    assert found.labels.tolist() == expected.labels.tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_turns_found_by_their_kind_are_those_that_are_rendered_one_by_one(
    tokenizers: Mapping[str, Any], name: str
) -> None:
    family = FAMILIES[name]
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    messages: list[dict[str, Any]] = []
    for number in range(24):
        messages.append({"role": "user", "content": f"question {number}"})
        if family.tools and number % 3 == 0:
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "content": f"result {number}"})
        thought = "<think>\nwell\n</think>\n\n" if family.thought == "content" else ""
        messages.append({"role": "assistant", "content": f"{thought}answer {number}"})
    tools = (
        [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}] if family.tools else None
    )
    chat = read_sample({"messages": messages, "tools": tools}, "messages")
    assert isinstance(chat, Conversation)
    found, exact = (
        renderer.render(chat, renderer.text(chat))
        for turns in (0, len(messages))
        for renderer in [ChatRenderer(tokenizers[name], "assistant", warn=pytest.fail, exact_turns=turns)]
    )
    assert found == exact
