"""What a chat template tries on the process that renders it: each comes to an end in words, within the limits."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from qlora_trainer.data.chat import Rendered
from qlora_trainer.data.chat_templates import refuse_useless_template
from qlora_trainer.data.dataset import read_dataset
from qlora_trainer.data.formats import Conversation
from qlora_trainer.data.reader import Records
from qlora_trainer.data.rendering import LimitedRenderer, RenderLimit, RenderLimits
from qlora_trainer.outcome import UserError
from tiny_model import save_tokenizer

from orchestrator.api.job import DatasetSource, TrainingSpec

CHATML = (Path(__file__).parent / "chat_templates" / "chatml.jinja").read_text()
SHORT = RenderLimits(cpu_seconds=1, memory_bytes=256 << 20)
WALL_SECONDS = 60.0
"""A busy machine may give the process a small part of a core."""
CHAT = Conversation(messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])

HANGS_WHERE_ASKED = "{% if messages[0]['content'] == 'hang' %}{% set n = 9 %}{{ n ** (n ** n) }}{% endif %}"
NEVER_ENDS = {
    "two nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a power of a power": "{% set n = 9 %}{{ n ** (n ** n) }}",
    "a filter over and over": "{% set ns = namespace(t='ab') %}{% for i in range(99999) %}"
    "{% set ns.t = ns.t | replace('a', 'ba') | urlize %}{% endfor %}",
    "words without end": "{{ lipsum(n=99999999) }}",
}
TAKES_TOO_MUCH = {
    "a thousand million characters": "{{ 'x' * 1000000000 }}",
    "a text that doubles": "{% set ns = namespace(t='x') %}{% for i in range(40) %}{% set ns.t = ns.t + ns.t %}"
    "{% endfor %}{{ ns.t }}",
    "a filter that grows": "{{ 'x' | center(2000000000) }}",
    "a wide format": "{{ '%2000000000d' % 1 }}",
    "an indent of each line": "{{ ('a\n' * 100000) | indent(100000) }}",
    "ten million characters": "{% for i in range(10000) %}{{ 'x' * 1000 }}{% endfor %}",
}
REFUSED = {
    "a macro that calls itself": "{% macro again(n) %}{{ again(n + 1) }}{% endmacro %}{{ again(0) }}",
    "brackets that nest deeply": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "blocks that nest deeply": "{% for a in [1] %}" * 60 + "{% endfor %}" * 60,
    "a way out of the sandbox": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "a division by zero": "{{ 1 // 0 }}",
    "a file": "{% include '/etc/passwd' %}",
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("rendering"))


@pytest.fixture
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def renderer_of(tokenizer: Any, template: str, limits: RenderLimits = SHORT) -> LimitedRenderer:
    tokenizer.chat_template = template
    return LimitedRenderer(tokenizer, "assistant", warn=pytest.fail, limits=limits)


@pytest.mark.parametrize("template", NEVER_ENDS.values(), ids=NEVER_ENDS)
def test_a_template_that_never_ends_is_ended_and_named(tokenizer: Any, template: str) -> None:
    renderer = renderer_of(tokenizer, template)
    began = time.monotonic()
    with pytest.raises(RenderLimit, match=r"the chat template takes .*spec\.model\.chatTemplate"):
        renderer.text(CHAT)
    assert time.monotonic() - began < WALL_SECONDS


@pytest.mark.parametrize("template", TAKES_TOO_MUCH.values(), ids=TAKES_TOO_MUCH)
def test_a_template_that_writes_without_end_is_refused_and_named(tokenizer: Any, template: str) -> None:
    renderer = renderer_of(tokenizer, template)
    with pytest.raises(RenderLimit, match=r"the chat template takes .*spec\.model\.chatTemplate"):
        renderer.text(CHAT)


@pytest.mark.parametrize("template", REFUSED.values(), ids=REFUSED)
def test_a_template_that_goes_wrong_is_refused_in_words(tokenizer: Any, template: str) -> None:
    renderer = renderer_of(tokenizer, template)
    with pytest.raises((ValueError, UserError), match="template"):
        renderer.text(CHAT)


def test_after_a_template_that_was_ended_others_are_rendered(tokenizer: Any) -> None:
    bad = renderer_of(tokenizer, HANGS_WHERE_ASKED + CHATML)
    hang = Conversation(messages=[{"role": "user", "content": "hang"}, CHAT.messages[1]])
    text = bad.text(CHAT)
    with pytest.raises(RenderLimit):
        bad.text(hang)
    assert bad.text(CHAT) == text


def test_a_process_that_dies_is_said_and_not_waited_for(tokenizer: Any) -> None:
    renderer = renderer_of(tokenizer, CHATML)
    renderer.text(CHAT)
    os.kill(renderer._pid, signal.SIGKILL)
    with pytest.raises(RenderLimit, match="ended the process that renders it"):
        renderer.text(CHAT)


def test_the_process_goes_with_its_renderer(tokenizer: Any) -> None:
    renderer = renderer_of(tokenizer, CHATML)
    renderer.text(CHAT)
    pid = renderer._pid
    del renderer
    assert not Path(f"/proc/{pid}").exists()


def test_what_is_rendered_is_what_is_rendered_here(tokenizer: Any) -> None:
    from qlora_trainer.data.chat import ChatRenderer

    limited = renderer_of(tokenizer, CHATML)
    here = ChatRenderer(tokenizer, "assistant", warn=pytest.fail)
    for turns in (1, 7):
        chat = Conversation(messages=[*CHAT.messages] * turns)
        text = limited.text(chat)
        assert text == here.text(chat)
        expected: Rendered = here.render(chat, text)
        assert limited.render(chat, text) == expected


def test_the_record_is_named_that_a_template_never_ends_for(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = HANGS_WHERE_ASKED + CHATML
    data = tmp_path / "data.jsonl"
    said = [[{"role": "user", "content": word}, {"role": "assistant", "content": "b"}] for word in ("a", "hang")]
    data.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in said))
    dataset = DatasetSource(source=f"file://{data}", format="messages")
    records = Records(dataset.source, split="train", scratch=tmp_path, field="spec.dataset.source")
    with pytest.raises(UserError, match=r"data\.jsonl: line 2: the chat template takes longer than 10 s of CPU time"):
        read_dataset(records, tokenizer, dataset, TrainingSpec())


def test_the_check_of_the_template_itself_ends_too(tokenizer: Any) -> None:
    tokenizer.chat_template = NEVER_ENDS["two nested ranges"]
    with pytest.raises(UserError, match="the chat template takes longer"):
        refuse_useless_template(tokenizer)
