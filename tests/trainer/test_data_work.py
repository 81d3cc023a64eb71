"""How much is rendered and tokenised for a record, in characters: what time comes from, whatever the machine."""

from __future__ import annotations

from typing import Any

import pytest
from qlora_trainer.data.chat import ChatRenderer
from qlora_trainer.data.encoding import CHARACTERS_PER_TOKEN, UNSETTLED_TOKENS, Encoder
from qlora_trainer.data.formats import Conversation, Text
from tiny_model import tiny_model
from transformers import AutoTokenizer

SEQUENCE_LENGTH = 256


class Counted:
    """A tokenizer that counts the characters that it is given, and those that its template writes in this process."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.tokenised = 0
        self.rendered = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    @property
    def backend_tokenizer(self) -> Counted:
        return self

    def no_truncation(self) -> None:
        self._tokenizer.backend_tokenizer.no_truncation()

    def no_padding(self) -> None:
        self._tokenizer.backend_tokenizer.no_padding()

    def encode(self, text: str, **options: Any) -> Any:
        self.tokenised += len(text)
        return self._tokenizer.backend_tokenizer.encode(text, **options)

    def __call__(self, text: str) -> Any:
        return self._tokenizer(text)

    def apply_chat_template(self, *given: Any, **options: Any) -> str:
        written = self._tokenizer.apply_chat_template(*given, **options)
        self.rendered += len(written)
        return written


@pytest.fixture
def counted() -> Counted:
    return Counted(AutoTokenizer.from_pretrained(tiny_model()))


def chat(turns: int, words: str = "¿qué tal?") -> Conversation:
    said = [("user", words), ("assistant", "muy bien, gracias")] * turns
    return Conversation(messages=[{"role": role, "content": content} for role, content in said])


def rendered(counted: Counted, turns: int) -> int:
    """Characters that the template writes for a chat of so many turns."""
    renderer = ChatRenderer(counted, "assistant", warn=lambda _: None)
    before = counted.rendered
    text = renderer.text(chat(turns))
    renderer.render(chat(turns), text)
    return counted.rendered - before


def test_what_is_rendered_grows_in_proportion_to_the_turns(counted: Counted) -> None:
    few, many = rendered(counted, 200), rendered(counted, 2_000)
    assert many < 12 * few


def test_a_chat_like_those_before_it_is_rendered_a_few_times_over(counted: Counted) -> None:
    """The whole, and for each of its turns what comes before it, with the prompt and with the turn."""
    renderer = ChatRenderer(counted, "assistant", warn=lambda _: None)
    for number in range(3):
        before = counted.rendered
        text = renderer.text(chat(2))
        renderer.render(chat(2), text)
        assert number == 0 or counted.rendered - before <= 5 * len(text)


def test_a_chat_is_tokenised_once(counted: Counted) -> None:
    encoder = Encoder(counted, "assistant", most_tokens=SEQUENCE_LENGTH)
    for count in (1, 2, 4):
        before = counted.tokenised
        encoded = encoder.encode(chat(count))
        written = counted._tokenizer.decode(encoded.input_ids)
        assert counted.tokenised - before <= len(written) + 1


def test_of_a_text_longer_than_a_sequence_no_more_is_tokenised_than_it_takes_to_know(counted: Counted) -> None:
    encoder = Encoder(counted, "assistant", most_tokens=SEQUENCE_LENGTH)
    room = CHARACTERS_PER_TOKEN * (SEQUENCE_LENGTH + UNSETTLED_TOKENS)
    for sample in (Text(text="good morning " * 100_000), chat(1, "good morning " * 100_000)):
        before = counted.tokenised
        assert not encoder.encode(sample).complete
        assert counted.tokenised - before <= room
