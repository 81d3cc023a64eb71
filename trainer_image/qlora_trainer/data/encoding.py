"""Turns samples into tokens, and says for each token whether it is trained on.

Rules:

- A text is tokenised whole, as it is for inference, and what is supervised is known in characters first: as the chat
  template marks it (`{% generation %}`), or as the part between the prompt for an answer and the end of that answer.
- Where a token straddles such a boundary, the text is cut there and tokenised in pieces, which is what happens when a
  model answers: the prompt is tokenised, then the answer comes. The pieces must spell the same text.
- What cannot be told exactly is a ValueError, never a guess.
- The token that ends an answer is supervised, white space that a template writes after it is not.
- The first token of a record is never supervised: nothing comes before it that could predict it.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qlora_trainer.data.formats import Completion, Conversation, Message, Sample, Text
from qlora_trainer.outcome import UserError

IGNORED_LABEL = -100
"""The label of a token that carries no loss, torch's default for `ignore_index`."""
MARK = "\ue0f0\ue0f1"
"""Private-use characters that no text contains, put around a content to find it again."""
TrainOn = Literal["assistant", "completion", "all"]
Span = tuple[int, int]
"""From a character to before another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedRecord:
    """One record as the model sees it."""

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]

    @property
    def supervised(self) -> int:
        """Tokens that carry loss."""
        return int(np.count_nonzero(self.labels != IGNORED_LABEL))

    def cut(self, length: int) -> EncodedRecord:
        """The first tokens."""
        return EncodedRecord(input_ids=self.input_ids[:length], labels=self.labels[:length])


class Encoder:
    """Encodes samples with one tokenizer."""

    def __init__(self, tokenizer: Any, train_on: TrainOn) -> None:
        self._tokenizer = tokenizer
        self._train_on = train_on
        self._added_tokens = sorted({*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}, key=len)
        self._marks_answers = bool(re.search(r"\{%-?\s*generation\b", tokenizer.chat_template or ""))
        self._begins_with_bos = tokenizer.bos_token_id is not None and self._adds_bos()

    def encode(self, sample: Sample) -> EncodedRecord:
        """The tokens of a sample; raises ValueError saying why there is no exact answer."""
        if isinstance(sample, Conversation):
            return self._conversation(sample)
        return self._framed(sample)

    # --- texts and prompts with completions: what the tokenizer adds at the front, then EOS at the end

    def _framed(self, sample: Completion | Text) -> EncodedRecord:
        eos = self._tokenizer.eos_token_id
        if eos is None:
            raise UserError("the model's tokenizer names no eos_token; set it in tokenizer_config.json")
        text, start = (sample.text, 0) if isinstance(sample, Text) else self._joined(sample)
        ids, supervised = self._tokens(text, [(start, len(text))])
        if self._begins_with_bos and ids[:1] != [self._tokenizer.bos_token_id]:
            ids, supervised = [self._tokenizer.bos_token_id, *ids], [False, *supervised]
        if ids[-1:] != [eos]:
            ids, supervised = [*ids, eos], [*supervised, True]
        return _record(ids, supervised)

    def _joined(self, sample: Completion) -> tuple[str, int]:
        return sample.prompt + sample.completion, 0 if self._train_on == "all" else len(sample.prompt)

    def _adds_bos(self) -> bool:
        return self._tokenizer("a").input_ids[:1] == [self._tokenizer.bos_token_id]

    # --- conversations: the chat template writes everything, BOS included

    def _conversation(self, chat: Conversation) -> EncodedRecord:
        if self._train_on == "all":
            text = self._render(chat, chat.messages)
            ids, _ = self._tokens(text, [])
            return _record(ids, [True] * len(ids))
        text, spans = self._marked_spans(chat) if self._marks_answers else self._found_spans(chat)
        if self._train_on == "completion":
            spans = spans[-1:]
        return _record(*self._tokens(text, spans))

    def _render(self, chat: Conversation, messages: Sequence[Message], *, answer: bool = False) -> str:
        import jinja2

        try:
            return self._tokenizer.apply_chat_template(
                list(messages), tools=chat.tools, tokenize=False, add_generation_prompt=answer
            )
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"the chat template is not valid Jinja: {error.message} (its line {error.lineno}); "
                "mend spec.model.chatTemplate or the model's own"
            ) from error
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise ValueError(f"is refused by the chat template: {error}") from error

    def _marked_spans(self, chat: Conversation) -> tuple[str, list[Span]]:
        from transformers.utils import chat_template_utils

        library: Any = chat_template_utils  # its types are narrower than what it takes
        self._render(chat, chat.messages)  # for its errors
        texts, marked = library.render_jinja_template(
            conversations=[list(chat.messages)],
            tools=chat.tools,
            chat_template=self._tokenizer.chat_template,
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        text, spans = texts[0], [(start, self._with_eos(texts[0], end)) for start, end in marked[0]]
        if not spans:
            raise ValueError("has no answer that the chat template marks with {% generation %}")
        return text, spans

    def _with_eos(self, text: str, end: int) -> int:
        """Some templates close their mark before the token that ends the turn."""
        eos = self._tokenizer.eos_token
        return end + len(eos) if eos and text.startswith(eos, end) else end

    def _found_spans(self, chat: Conversation) -> tuple[str, list[Span]]:
        text = self._render(chat, chat.messages)
        turns = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
        return text, [self._found_span(chat, index, text) for index in turns]

    def _found_span(self, chat: Conversation, index: int, text: str) -> Span:
        """The part of the rendered text that is an answer.

        It begins after the prompt for it and ends with its turn, if rendering fewer messages gives a prefix of the
        whole. Templates that write no such prompt, or write earlier turns differently, are asked where the content
        went.
        """
        prompt = self._prefix(chat, chat.messages[:index], text, answer=True)
        plain = self._prefix(chat, chat.messages[:index], text)
        turn = self._prefix(chat, chat.messages[: index + 1], text)
        asks = prompt is not None and prompt != plain
        content = None if asks and turn is not None else self._content_span(chat, index, text)
        start = prompt if asks else _back_over_blanks(text, content, at_least=plain or 0)
        end = self._end_of_turn(text, content) if turn is None else self._without_space(text, turn)
        if start is None or end is None or start >= end:
            raise ValueError(
                f"has an answer (message {index + 1}) that cannot be told exactly from what the chat template writes "
                "around it; mark answers with {% generation %} in spec.model.chatTemplate, or set trainOn: all"
            )
        return start, end

    def _prefix(
        self, chat: Conversation, messages: Sequence[Message], text: str, *, answer: bool = False
    ) -> int | None:
        """How long these messages are when rendered, if the whole text begins with just that."""
        try:
            prefix = self._render(chat, messages, answer=answer)
        except ValueError:
            return None
        return len(prefix) if text.startswith(prefix) else None

    def _content_span(self, chat: Conversation, index: int, text: str) -> Span | None:
        """Where a message's content went: put marks around it and see where they come out."""
        message = chat.messages[index]
        content = message["content"]
        core = content.strip()
        marked = {**message, "content": content.replace(core, f"{MARK}{core}{MARK}", 1)}
        try:
            parts = self._render(chat, [*chat.messages[:index], marked, *chat.messages[index + 1 :]]).split(MARK)
        except ValueError:
            return None
        if not core or len(parts) != 3 or "".join(parts) != text:
            return None
        return len(parts[0]), len(parts[0]) + len(parts[1])

    def _without_space(self, text: str, end: int) -> int:
        """Before the white space that follows a turn's last token."""
        stripped = len(text[:end].rstrip())
        return stripped if text[:stripped].endswith(tuple(self._added_tokens)) else end

    def _end_of_turn(self, text: str, content: Span | None) -> int | None:
        """After the special token that follows a content."""
        if content is None:
            return None
        rest = text[content[1] :]
        start = content[1] + len(rest) - len(rest.lstrip())
        found = [token for token in self._added_tokens if text.startswith(token, start)]
        return start + len(found[-1]) if found else None

    # --- tokens

    def _tokens(self, text: str, spans: Sequence[Span]) -> tuple[list[int], list[bool]]:
        """The tokens of a text, and which of them lie in the spans."""
        boundaries = sorted({0, len(text), *(boundary for span in spans for boundary in span)})
        whole = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=self._tokenizer.is_fast)
        if self._tokenizer.is_fast:
            cuts = _cuts(whole.offset_mapping, boundaries)
            if cuts is not None:
                return whole.input_ids, _flags(boundaries, cuts, spans)
        ids: list[int] = []
        cuts = [0]
        for start, end in pairwise(boundaries):
            ids += self._tokenizer(text[start:end], add_special_tokens=False).input_ids
            cuts.append(len(ids))
        if self._spelled(ids) != self._spelled(whole.input_ids):
            raise ValueError("has an answer that begins or ends inside a token; begin or end it with another character")
        return ids, _flags(boundaries, cuts, spans)

    def _spelled(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _record(ids: Sequence[int], supervised: Sequence[bool]) -> EncodedRecord:
    input_ids = np.array(ids, dtype=np.int32)
    labels = np.where(np.array(supervised, dtype=bool), input_ids, np.int32(IGNORED_LABEL))
    labels[:1] = IGNORED_LABEL
    return EncodedRecord(input_ids=input_ids, labels=labels.astype(np.int32))


def _back_over_blanks(text: str, content: Span | None, *, at_least: int) -> int | None:
    """Where a content begins, with the blanks before it, which are often part of its first token."""
    if content is None:
        return None
    return max(len(text[: content[0]].rstrip(" ")), at_least)


def _cuts(offsets: Sequence[Span], boundaries: Sequence[int]) -> list[int] | None:
    """How many tokens lie before each boundary; None if one straddles it, or nobody knows on which side it is."""
    ends = [end for _, end in offsets]
    if any(first > second for first, second in pairwise(ends)):
        return None
    cuts = [bisect_right(ends, boundary) for boundary in boundaries]
    for boundary, cut in zip(boundaries, cuts, strict=True):
        covered = ends[cut - 1] if cut else 0
        straddled = cut < len(offsets) and offsets[cut][0] < boundary
        if (
            straddled or covered != boundary
        ):  # what no token covers may belong to the next (offsets without their space)
            return None
    return cuts


def _flags(boundaries: Sequence[int], cuts: Sequence[int], spans: Sequence[Span]) -> list[bool]:
    token_at = dict(zip(boundaries, cuts, strict=True))
    flags = [False] * cuts[-1]
    for start, end in spans:
        flags[token_at[start] : token_at[end]] = [True] * (token_at[end] - token_at[start])
    return flags
