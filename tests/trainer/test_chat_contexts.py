"""Every assistant turn is trained behind the prompt that inference would give it, and says what the template writes.

The judge renders with transformers alone: the prompt for the messages before a turn, and the conversation up to the
turn. It knows nothing of how turns are found. QLORA_CHAT_TEMPLATES names a folder of further templates (`*.jinja`) to
try; of those, a chat may be refused, but not trained otherwise.
"""

from __future__ import annotations

import copy
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from qlora_trainer.data.chat import CLOCK
from qlora_trainer.data.chat_templates import refuse_useless_template
from qlora_trainer.data.encoding import EncodedRecord, Encoder
from qlora_trainer.data.formats import read_sample
from qlora_trainer.outcome import UserError
from tiny_model import save_tokenizer

OWN = Path(__file__).parent / "chat_templates"
FURTHER = Path(os.environ.get("QLORA_CHAT_TEMPLATES", OWN))
TEMPLATES = sorted({*OWN.glob("*.jinja"), *FURTHER.glob("*.jinja")})
CHATS_OF_A_KIND = 8
SPECIAL = re.compile(
    r"<\|[^|<>\n ]{1,40}\|>|<｜[^｜\n]{1,40}｜>|<(?:start|end)_of_turn>|<turn\|>|<\|turn>|\[/?[A-Z_]{3,25}\]|</?s>|"
    r"<SPECIAL_\d+>|\[gMASK\]|<sop>|<end_of_utterance>|\[\|\w+\|\]|<\|\w+>|<\w+\|>"
)
ENDS = (
    *("<|im_end|>", "<|eot_id|>", "<|return|>", "<end_of_turn>", "<|end_of_text|>", "<|eot|>", "<|end_of_sentence|>"),
    *("<｜end▁of▁sentence｜>", "<|endoftext|>", "<turn|>", "[|endofturn|]", "<|END_OF_TURN_TOKEN|>", "<|end|>"),
)
"""What models stop at; the first that a template knows is its tokenizer's eos."""
KINDS = {"plain": (), "system": ("system",), "tools": ("tools",), "thoughts": ("thoughts",)}
WRITTEN = {
    "system": {path.stem for path in OWN.glob("*.jinja")} - {"gemma"},
    "tools": {"qwen2_5", "qwen3", "mistral_v3", "granite", "llama3", "harmony_marked", "glm4_5"},
    "thoughts": {"qwen3", "glm4_5", "harmony_marked", "nemotron", "gpt_oss"},
}
"""Our templates that write what a kind of chat has; the others refuse it."""
OPEN_PROMPTS = {"deepseek_r1", "nemotron"}
"""Our templates whose prompts begin a thought that plain turns do not have, of which prepare warns."""
FIELDS = {"harmony_marked": "thinking", "gpt_oss": "thinking"}
WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta")


def make_tokenizer(path: Path, folder: Path) -> Any:
    from transformers import AutoTokenizer

    template = path.read_text()
    tokenizer: Any = AutoTokenizer.from_pretrained(save_tokenizer(folder, chat_template=template))
    roles = {f"<|{role}|>" for role in ("system", "user", "assistant", "observation")} if "'<|'" in template else set()
    found = sorted({*SPECIAL.findall(template), *roles, "</s>"})
    tokenizer.add_special_tokens({"additional_special_tokens": found})
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    tokenizer.eos_token = next((end for end in ENDS if end in found), "</s>")
    return tokenizer


def said(rng: random.Random) -> str:
    words = " ".join(rng.choices(WORDS, k=rng.randint(1, 5)))
    shapes = (f"{words}\n", f" {words}", f"{words}\n\n{words}", f"{{{{ {words} }}}}", f"ñandú {words} 日本")
    return rng.choice((*shapes, *[words] * 4))


def make_chat(rng: random.Random, kind: tuple[str, ...], thought: str) -> dict[str, Any]:
    """A record of the format messages."""
    messages = [{"role": "system", "content": said(rng)}] if "system" in kind else []
    for _ in range(rng.randint(1, 6)):
        messages.append({"role": "user", "content": said(rng)})
        if "tools" in kind and rng.random() < 0.6:
            function = {"name": "f", "arguments": {"a": said(rng), "n": 3}}
            call = {"id": "abcdefghi", "type": "function", "function": function}
            messages.append({"role": "assistant", "content": rng.choice(["", said(rng)]), "tool_calls": [call]})
            messages.append({"role": "tool", "content": said(rng), "tool_call_id": "abcdefghi", "name": "f"})
        answer: dict[str, Any] = {"role": "assistant", "content": said(rng)}
        if "thoughts" in kind and rng.random() < 0.6:
            answer[thought] = said(rng).strip()
        if rng.random() < 0.15:
            answer["weight"] = rng.randint(0, 1)
        messages.append(answer)
    return {"messages": messages} | ({"tools": [TOOL]} if "tools" in kind else {})


TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "d",
        "parameters": {"type": "object", "properties": {"a": {"type": "string", "description": "x"}}},
    },
}


def trained(tokenizer: Any, record: EncodedRecord) -> list[tuple[str, str]]:
    """Each run of tokens that carry loss as text, and the text before it."""
    found: list[tuple[str, str]] = []
    for context in record.split():
        ids, flags = context.input_ids.tolist(), (context.labels != -100).tolist()
        at = 0
        while True in flags[at:]:
            start = flags.index(True, at)
            at = flags.index(False, start) if False in flags[start:] else len(flags)
            found.append((tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:at])))
    return found


def faults(tokenizer: Any, record: dict[str, Any], thought: str, runs: list[tuple[str, str]]) -> Iterator[str]:
    """What is wrong with the runs that were trained of a record."""
    messages = [{key: value for key, value in each.items() if key != "weight"} for each in record["messages"]]

    template = re.sub(r"strftime_now\(.(.*?).\)", lambda call: f"'{CLOCK.strftime(call[1])}'", tokenizer.chat_template)

    def render(count: int, *, prompt: bool) -> str:
        return tokenizer.apply_chat_template(
            messages[:count],
            tools=record.get("tools"),
            tokenize=False,
            add_generation_prompt=prompt,
            chat_template=template,
        )

    left = list(runs)
    for index, message in enumerate(record["messages"]):
        if message["role"] != "assistant" or message.get("weight", 1) == 0:
            continue
        prompt, whole = render(index, prompt=True), render(index + 1, prompt=False)
        unasked = prompt == render(index, prompt=False)  # no prompt for answers: a header may stand before them
        run = next((run for run in left if _is_prompted(run[0], prompt, whole, unasked)), None)
        if run is None:
            yield f"message {index + 1} is nowhere trained behind {prompt[-60:]!r}: {left[:1]}"
            continue
        left.remove(run)
        yield from (
            f"message {index + 1} as {run[1]!r}: {what}" for what in _amiss(tokenizer, message, thought, run, whole)
        )
    yield from (f"also trained: {run[1]!r}" for run in left)


def _is_prompted(before: str, prompt: str, whole: str, unasked: bool) -> bool:
    return before == prompt or (unasked and before.startswith(prompt) and whole.startswith(before))


def _amiss(tokenizer: Any, message: dict[str, Any], thought: str, run: tuple[str, str], whole: str) -> Iterator[str]:
    before, text = run
    ends = tuple(tokenizer.get_added_vocab())
    if not text.endswith(ends):
        yield "no token ends it"
    if whole.startswith(before):
        written = whole[len(before) :].rstrip()
        end = next((end for end in ends if text.endswith(end)), "")
        # What a template adds after the end (a next turn's header, an eos as well) is nothing that a model writes.
        if text != written and text.removesuffix(end).rstrip() != written and not (end and written.startswith(text)):
            yield f"the template writes {written!r}"
    for name in ("content", thought):
        if message.get(name, "").strip() not in text:
            yield f"it lacks its {name}"


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_a_turn_is_trained_as_inference_meets_it(tmp_path: Path, path: Path) -> None:
    tokenizer, thought = make_tokenizer(path, tmp_path), FIELDS.get(path.stem, "reasoning_content")
    encoder = Encoder(tokenizer, "assistant")  # one, since each has a process that renders
    try:
        refuse_useless_template(tokenizer)
    except UserError:
        assert path.parent != OWN
        return
    for kind, parts in KINDS.items():
        refusals: list[str] = []
        for number in range(CHATS_OF_A_KIND):
            record = make_chat(random.Random(f"{kind} {number}"), parts, thought)
            encoder.warnings.clear()
            try:
                runs = trained(tokenizer, encoder.encode(read_sample(copy.deepcopy(record), "messages")))
            except (UserError, ValueError) as error:
                refusals.append(str(error))
                continue
            if any("prompt" in warning for warning in encoder.warnings):
                assert path.parent != OWN or path.stem in OPEN_PROMPTS, encoder.warnings
                continue  # the template contradicts itself, which is said
            found = list(faults(tokenizer, record, thought, runs))
            assert not found, f"{kind} chat {number}: {found[:3]}"
        if path.parent == OWN:
            wants = [text for text in refusals if "with `content`" not in text]  # beside a call, few write a content
            assert (not wants) == (kind == "plain" or path.stem in WRITTEN[kind]), (kind, refusals[:2])


@pytest.mark.parametrize("stem", ["dated", "harmony_marked"])
def test_a_template_that_writes_the_date_gets_a_fixed_one_and_says_so(tmp_path: Path, stem: str) -> None:
    tokenizer = make_tokenizer(OWN / f"{stem}.jinja", tmp_path)
    encoder = Encoder(tokenizer, "assistant")
    record = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "bye"}]}
    text = tokenizer.decode(encoder.encode(read_sample(record, "messages")).input_ids)
    assert "01 Jan 2026" in text or "2026-01-01" in text
    assert any("2026-01-01" in warning for warning in encoder.warnings)


def test_what_a_template_writes_nowhere_is_refused_beside_a_tool_call_too(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(OWN / "mistral_v3.jinja", tmp_path)
    record = make_chat(random.Random(0), ("tools",), "thinking")
    called = next(message for message in record["messages"] if "tool_calls" in message)
    called["content"] = "let me see"
    with pytest.raises(ValueError, match="beside `tool_calls` with `content`, which the chat template does not write"):
        Encoder(tokenizer, "assistant").encode(read_sample(record, "messages"))
