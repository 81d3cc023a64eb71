"""Renders conversations with a chat template, and tells in characters what the assistant has to write.

Rules:

- An assistant turn is trained as inference meets it: the template's prompt for it, made of the messages before it, then
  what the template writes for the turn. Turns whose text is a prefix of a later context share that context; where a
  template writes earlier turns differently (thoughts left out), a turn has a context of its own.
- A turn ends with the token that stops it. Where a template writes none after the last turn, the one that it writes
  between turns is appended; where it writes none at all, the conversation is refused.
- `{% generation %}` marks narrow down what of a turn is supervised.
- What cannot be told exactly is a ValueError, never a guess; so is a field that the template does not write.
- Templates that write the date get a fixed one: the text depends on the messages and the template alone.
- Rendering costs time in proportion to the turns: what is written around a turn is asked for once per kind of turn, and
  then found again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import accumulate
from typing import Any, Literal

from qlora_trainer.data.formats import REASONING_FIELDS, Conversation, Message
from qlora_trainer.outcome import UserError

TrainOn = Literal["assistant", "completion", "all"]
Span = tuple[int, int]
"""From a character to before another."""
MARK = "\ue0f0\ue0f1"
"""Private-use characters that no text contains, put around a content to find it again."""
EXACT_TURNS = 4
"""So many turns of a conversation are always rendered on their own; later ones may be found by the kind of turn."""
OPEN_TAG = re.compile(r"(<\w+>|\[[A-Z]+\])\s*\Z")
"""What ends a prompt that leaves the model inside a thought."""
END_OF_THOUGHT = re.compile(r"</think>|\[/THINK\]")
CLOCK = datetime(2026, 1, 1, tzinfo=UTC)
"""The time that templates see."""
STRFTIME_NOW = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<form>[^'"\n]*)(?P=quote)\s*\)""")
"""How templates ask transformers for the time."""
TEMPLATE_FIELD = "spec.model.chatTemplate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """A text that the model is trained on, and the parts of it that carry loss."""

    text: str
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A conversation as it is trained."""

    contexts: Sequence[Context]
    complete: bool = True
    """False where later turns lie beyond the room that was given, and were not rendered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Turn:
    """An assistant turn in the context that inference gives it."""

    index: int
    text: str
    start: int
    end: int
    shift: int = 0
    """How many characters further on the turn stands than in what the template writes of these messages."""


class _Untold(ValueError):
    """A turn that cannot be told from what the template writes around it."""

    def __init__(self, index: int) -> None:
        super().__init__(
            f"has an answer (message {index + 1}) that cannot be told exactly from what the chat template writes "
            f"around it; mark answers with {{% generation %}} in {TEMPLATE_FIELD}, or set trainOn: all"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Surroundings:
    """What a template writes between the messages beside a turn and the turn's own words."""

    before: str
    """From the end of the content before it to where the assistant begins to write."""
    after: str
    """From the end of the turn to the content of the message after it."""


class EndlessTurn(ValueError):
    """A turn after which the template writes nothing that is a token of the tokenizer's own."""

    def __init__(self, index: int) -> None:
        self.turn = index
        super().__init__(
            f"has an answer (message {index + 1}) after which the chat template writes no token that ends it, so that "
            f"the model would not learn to stop; write one, such as eos_token, in {TEMPLATE_FIELD}"
        )


class ChatRenderer:
    """Renders conversations with the chat template of one tokenizer."""

    def __init__(
        self, tokenizer: Any, train_on: TrainOn, *, warn: Callable[[str], None], exact_turns: int = EXACT_TURNS
    ) -> None:
        """`warn` gets a sentence for each way in which the template's prompts and turns disagree."""
        self._exact_turns = exact_turns
        self._tokenizer = tokenizer
        self._train_on = train_on
        self._warn = warn
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._special_tokens = _longest_first(special.union(tokenizer.all_special_tokens))
        self._added_tokens = _longest_first({*tokenizer.get_added_vocab(), *self._special_tokens})
        self._added = re.compile(rf"\s*(?:(?:{'|'.join(map(re.escape, self._added_tokens))})\s*)*")
        self._eos: str | None = tokenizer.eos_token
        self._template = _with_fixed_date(tokenizer.chat_template or "", warn)
        self._has_marks = bool(re.search(r"\{%-?\s*generation\b", self._template))
        self._written: set[tuple[tuple[Any, ...], bool]] = set()
        """Kinds of messages, without tools and beside them, all of whose fields the template writes."""

    def text(self, chat: Conversation) -> str:
        """The whole conversation as the template writes it."""
        return self._render(chat, chat.messages)

    def render(self, chat: Conversation, text: str, *, room: int | None = None) -> Rendered:
        """The contexts that a conversation is trained in, given its `text`.

        Turns that begin after the first `room` characters are left out.
        """
        self._check_fields(chat, text)
        if self._train_on == "all":
            return Rendered(contexts=[self._whole(chat, text)])
        indexes = self._trained_turns(chat)
        try:
            turns = list(self._turns(chat, text, indexes, room))
        except _Untold:
            if not self._has_marks:
                raise
            return Rendered(contexts=[self._marked_context(chat, text, indexes)])
        return Rendered(contexts=self._grouped(chat, text, turns), complete=len(turns) == len(indexes))

    def _whole(self, chat: Conversation, text: str) -> Context:
        if chat.untrained:
            number = min(chat.untrained) + 1
            raise ValueError(f"has a message {number} of `weight` 0, which trainOn: all would train")
        whole, _ = self._ended(chat, len(chat.messages) - 1, text, text)
        return Context(text=whole, spans=((0, len(whole)),))

    def _trained_turns(self, chat: Conversation) -> list[int]:
        turns = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
        turns = turns[-1:] if self._train_on == "completion" else turns
        return [index for index in turns if index not in chat.untrained]

    # --- rendering

    def _render(self, chat: Conversation, messages: Sequence[Message], *, prompt: bool = False) -> str:
        import jinja2

        try:
            return self._tokenizer.apply_chat_template(
                list(messages),
                tools=chat.tools,
                tokenize=False,
                add_generation_prompt=prompt,
                chat_template=self._template,
            )
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"the chat template is not valid Jinja: {error.message} (its line {error.lineno}); "
                f"mend {TEMPLATE_FIELD} or the model's own"
            ) from error
        except RecursionError as error:
            raise ValueError("is nested too deeply for the chat template") from error
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"is refused by the chat template: {error}") from error

    def _attempt(self, chat: Conversation, messages: Sequence[Message], *, prompt: bool = False) -> str | None:
        """The same where the template takes these messages; some refuse conversations that end with the user."""
        try:
            return self._render(chat, messages, prompt=prompt)
        except ValueError:
            return None

    def _marks(self, chat: Conversation, count: int) -> list[Span]:
        """What the template marks with `{% generation %}` in the first messages."""
        from transformers.utils import chat_template_utils

        library: Any = chat_template_utils  # its types are narrower than what it takes
        _, spans = library.render_jinja_template(
            conversations=[list(chat.messages[:count])],
            tools=chat.tools,
            chat_template=self._template,
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        return spans[0]

    # --- turns

    def _turns(self, chat: Conversation, text: str, indexes: Sequence[int], room: int | None) -> Iterator[_Turn]:
        layout = self._layout(chat, text) if len(indexes) > self._exact_turns or room is not None else None
        known: dict[_Kind, _Surroundings | None] = {}
        for count, index in enumerate(indexes):
            if room is not None and self._begins_after(chat, index, text, room, layout):
                return
            kind = _kind_of_turn(chat, index)
            found = count >= self._exact_turns and layout and layout.find(text, index, known.get(kind))
            turn = found or self._turn(chat, index, text)
            if layout is not None and kind not in known:
                known[kind] = layout.surroundings(text, turn)
            yield turn

    def _layout(self, chat: Conversation, text: str) -> _Layout | None:
        return _Layout.of(text, chat, lambda messages: self._attempt(chat, messages))

    def _begins_after(self, chat: Conversation, index: int, text: str, room: int, layout: _Layout | None) -> bool:
        if layout is not None:
            return layout.ends[index - 1] > room
        before = self._attempt(chat, chat.messages[:index]) or ""
        return len(before) > room and before[:room] == text[:room]

    def _turn(self, chat: Conversation, index: int, text: str) -> _Turn:
        """A turn as inference meets it."""
        whole = self._render(chat, chat.messages[: index + 1])
        before = self._attempt(chat, chat.messages[:index])
        prompt = self._attempt(chat, chat.messages[:index], prompt=True)
        if prompt is not None and prompt != before:
            written, start, shift = self._after_prompt(chat, index, prompt, before or "", whole)
        else:
            written, start, shift = self._after_messages(chat, index, before, whole)
        complete, end = self._ended(chat, index, whole, written)
        if not start < end:
            raise _Untold(index)
        self._check_thought(chat.messages[index], index, complete[start:end])
        context = text if text.startswith(complete[:end]) else complete
        return _Turn(index=index, text=context, start=start, end=end, shift=shift)

    def _after_prompt(
        self, chat: Conversation, index: int, prompt: str, before: str, whole: str
    ) -> tuple[str, int, int]:
        """The text of a prompt and the turn after it, where the turn begins, and how far it was moved for that."""
        if whole.startswith(prompt):
            return whole, len(prompt), 0
        begins = self._after_previous(chat, index, prompt, whole)
        if begins is not None:
            return prompt + whole[begins:], len(prompt), len(prompt) - begins
        content = chat.messages[index]["content"].strip()
        begins, said = self._after_header(index, prompt, before, whole, content)
        opened = prompt[len(whole[:begins].rstrip()) :].strip()
        if opened and content.startswith(opened):  # the prompt has begun the thought that the content begins with
            thought = content.removeprefix(opened)
            thought = thought.lstrip("\n") if prompt.endswith("\n") else thought
            return prompt + thought + whole[begins + len(said) :], len(prompt), 0
        if OPEN_TAG.search(opened):
            self._warn(
                f"the chat template's prompt for an answer ends with {opened!r}, but it writes turns without; they are "
                f"trained as it writes them. Begin contents with the thought, or set {TEMPLATE_FIELD}"
            )
            return whole, begins, 0
        return prompt + whole[begins:], len(prompt), len(prompt) - begins

    def _after_header(self, index: int, prompt: str, before: str, whole: str, content: str) -> tuple[int, str]:
        """Where a turn's words begin after the header of turn and prompt, and what they say after the thoughts."""
        shared = _shared_prefix(prompt, whole)
        blanks = len(whole[shared:]) - len(whole[shared:].lstrip())
        said = END_OF_THOUGHT.split(content)[-1].strip()
        begins = whole.rfind(said, _shared_prefix(before, whole), shared + blanks + len(said)) if said else shared
        if begins < 0 or not prompt.startswith(whole[:begins].rstrip()):
            raise _Untold(index)
        return begins, said

    def _after_messages(self, chat: Conversation, index: int, before: str | None, whole: str) -> tuple[str, int, int]:
        """The same of a turn that the template writes no prompt for: it begins with its content, or behind the last."""
        written, at_least, shift = whole, None, 0
        if before is not None and whole.startswith(before):
            at_least = len(before)
        elif before is not None and (begins := self._after_previous(chat, index, before, whole)) is not None:
            written, at_least, shift = before + whole[begins:], len(before), len(before) - begins
        elif before is not None and not whole.startswith(before.rstrip()):
            raise _Untold(index)
        message = chat.messages[index]
        says_more = any(message.get(name) for name in ("tool_calls", *REASONING_FIELDS))
        if at_least is not None and (says_more or not message["content"].strip()):
            return written, at_least, shift
        content = self._content_start(chat, index, whole)
        if content is None:
            raise _Untold(index)
        start = max(
            len(written[: content + shift].rstrip(" ")), at_least or 0
        )  # blanks are often part of a first token
        return written, start, shift

    def _after_previous(self, chat: Conversation, index: int, prompt: str, whole: str) -> int | None:
        """Where a turn begins in a text that has the messages before it otherwise than their prompt has them.

        It is as far behind the content before it as the prompt's end is.
        """
        previous = chat.messages[index - 1]
        content = _with_marks(previous["content"])
        # Its equals are marked as well: some templates compare messages to find the last question.
        marked = [{**each, "content": content} if each == previous else each for each in chat.messages[:index]]
        asked = (self._attempt(chat, marked, prompt=True) or "").split(MARK)
        written = (self._attempt(chat, [*marked, chat.messages[index]]) or "").split(MARK)
        if not (1 < len(asked) == len(written) and "".join(asked) == prompt and "".join(written) == whole):
            return None
        return len(whole) - len(written[-1]) + len(asked[-1]) if written[-1].startswith(asked[-1]) else None

    def _content_start(self, chat: Conversation, index: int, whole: str) -> int | None:
        """Where a content begins: put marks around it and see where they come out."""
        message = chat.messages[index]
        marked = {**message, "content": _with_marks(message["content"])}
        parts = (self._attempt(chat, [*chat.messages[:index], marked]) or "").split(MARK)
        return len(parts[0]) if len(parts) == 3 and "".join(parts) == whole else None

    def _ended(self, chat: Conversation, index: int, whole: str, written: str) -> tuple[str, int]:
        """The text of a turn, with the token that ends it, and where that token ends.

        White space that a template writes after it is not supervised. `whole` is the conversation up to the turn as
        the template writes it, `written` is what is trained of it.
        """
        stripped = written.rstrip()
        for tokens in (self._special_tokens, self._added_tokens):
            if stripped.endswith(tokens):
                return written, self._first_end(chat, index, whole, written)
            end = self._end_between_turns(chat, index, whole, tokens)
            if end is not None:
                kept, token = end
                complete = written[: len(written) - (len(whole) - kept)] + token
                return complete, len(complete)
        raise EndlessTurn(index)

    def _first_end(self, chat: Conversation, index: int, whole: str, written: str) -> int:
        """After the token that ends a turn, of which a template may write another where the conversation ends."""
        last = len(written.rstrip())
        if self._eos and self._eos in written:
            eos = written.rindex(self._eos) + len(self._eos)
            if eos < last and self._added.fullmatch(written, eos, last):
                return eos  # what follows is the next turn's header, which some templates write unasked
        token = next(token for token in self._added_tokens if written.endswith(token, 0, last))
        earlier = len(written[: last - len(token)].rstrip())
        if not written.endswith(self._added_tokens, 0, earlier):
            return last
        moved = len(written) - len(whole)
        for follower in self._followers(chat, index):
            longer = self._attempt(chat, [*chat.messages[: index + 1], follower])
            if longer is not None and earlier <= _shared_prefix(whole, longer) + moved < last:
                return earlier
        return last

    def _end_between_turns(
        self, chat: Conversation, index: int, whole: str, tokens: Sequence[str]
    ) -> tuple[int, str] | None:
        """What of the rendered turn stays when another message follows, and the token that is written after it."""
        for follower in self._followers(chat, index):
            longer = self._attempt(chat, [*chat.messages[: index + 1], follower])
            if longer is None or not longer.startswith(whole.rstrip()):
                continue
            kept = _shared_prefix(whole, longer)
            rest = longer[kept:].lstrip()
            for token in tokens:
                if rest.startswith(token):
                    return kept, longer[kept : len(longer) - len(rest)] + token
        return self._end_without_thought(chat, index, whole, tokens)

    def _end_without_thought(
        self, chat: Conversation, index: int, whole: str, tokens: Sequence[str]
    ) -> tuple[int, str] | None:
        """The same of a turn whose thought goes when another message follows: it ends as it would without."""
        message = chat.messages[index]
        bare = {name: value for name, value in message.items() if name not in REASONING_FIELDS}
        bare["content"] = END_OF_THOUGHT.split(message["content"])[-1]
        messages = [*chat.messages[:index], bare, *chat.messages[index + 1 :]]
        shorter = None if bare == message else self._attempt(chat, messages[: index + 1])
        if shorter is None:
            return None
        end = self._end_between_turns(replace(chat, messages=messages), index, shorter, tokens)
        return None if end is None else (len(whole) - (len(shorter) - end[0]), end[1])

    def _followers(self, chat: Conversation, index: int) -> Iterator[Message]:
        """The messages that may come after a turn; how the template goes on tells how it ends the turn."""
        if index + 1 < len(chat.messages):
            yield chat.messages[index + 1]
        elif chat.messages[index].get("tool_calls"):
            yield {"role": "tool", "content": "?"}
        yield {"role": "user", "content": "?"}

    # --- contexts

    def _grouped(self, chat: Conversation, text: str, turns: Sequence[_Turn]) -> list[Context]:
        """The turns in as few contexts as hold them all, in the order of the conversation."""
        groups: list[tuple[str, list[_Turn]]] = [(text, [])]
        for turn in reversed(turns):
            said = text if turn.text is text else turn.text[: turn.end]
            for context, held in (groups[0], groups[-1]):
                if context is turn.text or context.startswith(said):
                    held.insert(0, turn)
                    break
            else:
                groups.insert(0, (turn.text, [turn]))
        spans = self._narrowed if self._has_marks else _whole_turns
        return [Context(text=context, spans=spans(chat, held)) for context, held in groups if held]

    def _narrowed(self, chat: Conversation, turns: Sequence[_Turn]) -> tuple[Span, ...]:
        """What the template marks of the turns, and the tokens that end them: some close their mark before."""
        if turns[-1].shift == 0:  # the context is what the template writes of these messages, with all their marks
            marks = self._marks(chat, turns[-1].index + 1)
            return tuple(span for turn in turns for span in _marked_part(turn, marks))
        return tuple(span for turn in turns for span in _marked_part(turn, self._moved_marks(chat, turn)))

    def _moved_marks(self, chat: Conversation, turn: _Turn) -> list[Span]:
        """The marks up to a turn, as far on as the turn's own."""
        return [(start + turn.shift, end + turn.shift) for start, end in self._marks(chat, turn.index + 1)]

    def _marked_context(self, chat: Conversation, text: str, indexes: Sequence[int]) -> Context:
        """Answers that nothing but the marks tells."""
        marks = self._marks(chat, len(chat.messages))
        turns = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
        if len(marks) != len(turns):
            raise ValueError(f"has {len(turns)} answers, of which the chat template marks {len(marks)}")
        self._warn(
            "the chat template's prompts for answers are not how it writes answers; they are trained as its "
            f"{{% generation %}} marks them. Set {TEMPLATE_FIELD} to one whose prompts and turns agree"
        )
        spans = [(start, self._with_end(text, start, end)) for start, end in marks]
        return Context(text=text, spans=tuple(span for turn, span in zip(turns, spans, strict=True) if turn in indexes))

    def _with_end(self, text: str, start: int, end: int) -> int:
        """Where a marked turn ends: with the token that stops it, within the mark or right behind it."""
        said = text[start:end].rstrip()
        if said.endswith(self._special_tokens):
            return start + len(said)
        token = next((token for token in self._special_tokens if text.startswith(token, end)), "")
        return end + len(token)

    # --- fields

    def _check_fields(self, chat: Conversation, text: str) -> None:
        """Refuse what the template leaves out: a field, said once and lost."""
        if chat.tools and self._attempt(replace(chat, tools=None), chat.messages) == text:
            raise ValueError(
                f"has a field `tools`, which the chat template does not write; remove it or mend {TEMPLATE_FIELD}"
            )
        for index, message in enumerate(chat.messages):
            kind = (_kind_of_message(message), bool(chat.tools))
            if kind in self._written:
                continue
            for name in ("tool_calls", *REASONING_FIELDS, "content", *(("name",) if message["role"] != "tool" else ())):
                if message.get(name, "").strip() if name == "content" else message.get(name):
                    self._check_field(chat, index, name)
            self._written.add(kind)

    def _check_field(self, chat: Conversation, index: int, name: str) -> None:
        message = chat.messages[index]
        without = {**message, name: ""} if name == "content" else _without(message, name)
        before = chat.messages[:index]
        after = (
            chat.messages[1:2] if message["role"] == "system" else ()
        )  # templates may want, or write it into, another
        written = self._attempt(chat, [*before, message, *after])
        if written is not None and written == self._attempt(chat, [*before, without, *after]):
            instead = "remove it" if name == "content" else "write it into `content`"
            beside = f" of role {message['role']!r}" if name == "content" else ""
            beside += " beside `tool_calls`" if name == "content" and message.get("tool_calls") else ""
            raise ValueError(
                f"has a message {index + 1}{beside} with `{name}`, which the chat template does not write; {instead}, "
                f"or mend {TEMPLATE_FIELD}"
            )

    def _check_thought(self, message: Message, index: int, said: str) -> None:
        """Some templates cut thoughts out of contents, even of the last one."""
        thought = END_OF_THOUGHT.split(message["content"])[0] if END_OF_THOUGHT.search(message["content"]) else ""
        words = re.sub(r"^\s*(<think>|\[THINK\])", "", thought).strip()
        if words and words not in said:
            raise ValueError(
                f"has a message {index + 1} with a thought that the chat template does not write; remove the thought, "
                f"or mend {TEMPLATE_FIELD}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """Where the contents of the messages that are not the assistant's lie in a conversation's text, by index."""

    starts: Mapping[int, int]
    ends: Mapping[int, int]

    @classmethod
    def of(cls, text: str, chat: Conversation, render: Callable[[Sequence[Message]], str | None]) -> _Layout | None:
        """Found by marks around the contents; None where the template does more with a content than trimming it."""
        given = [index for index, message in enumerate(chat.messages) if message["role"] in ("user", "tool")]
        marked = list(chat.messages)
        for index in given:
            marked[index] = {**marked[index], "content": _with_marks(marked[index]["content"])}
        parts = (render(marked) or "").split(MARK)
        if len(parts) != 2 * len(given) + 1 or "".join(parts) != text:
            return None
        offsets = list(accumulate(map(len, parts)))
        return cls(
            starts=dict(zip(given, offsets[::2], strict=False)), ends=dict(zip(given, offsets[1::2], strict=False))
        )

    def surroundings(self, text: str, turn: _Turn) -> _Surroundings | None:
        """What stands around a turn, where the whole text has the turn as inference meets it."""
        if turn.text is not text or turn.index + 1 not in self.starts:
            return None
        return _Surroundings(
            before=text[self.ends[turn.index - 1] : turn.start], after=text[turn.end : self.starts[turn.index + 1]]
        )

    def find(self, text: str, index: int, around: _Surroundings | None) -> _Turn | None:
        """A turn of the whole text, told by what was written around an earlier one of its kind."""
        if around is None or index + 1 not in self.starts:
            return None
        previous, following = self.ends[index - 1], self.starts[index + 1]
        start, end = previous + len(around.before), following - len(around.after)
        if not (start < end and text.startswith(around.before, previous) and text.startswith(around.after, end)):
            return None
        return _Turn(index=index, text=text, start=start, end=end)


def _whole_turns(chat: Conversation, turns: Sequence[_Turn]) -> tuple[Span, ...]:  # noqa: ARG001 - as for marks
    return tuple((turn.start, turn.end) for turn in turns)


def _marked_part(turn: _Turn, marks: Sequence[Span]) -> list[Span]:
    spans = [(max(start, turn.start), min(end, turn.end)) for start, end in marks]
    spans = [(start, end) for start, end in spans if start < end]
    if not spans:
        raise ValueError(f"has an answer (message {turn.index + 1}) that the chat template does not mark")
    last = turn.text[spans[-1][1] : turn.end].strip()
    if re.fullmatch(r"\S*", last):
        spans[-1] = (spans[-1][0], turn.end)
    return spans


def _with_fixed_date(template: str, warn: Callable[[str], None]) -> str:
    """The template with the date of `CLOCK` for today's."""
    dated = STRFTIME_NOW.sub(lambda call: json.dumps(CLOCK.strftime(call["form"])), template)
    if dated != template:
        warn(
            f"the chat template writes today's date; all records are written as of {CLOCK:%Y-%m-%d}, so that the same "
            f"data give the same tokens on any day. To write another, set {TEMPLATE_FIELD}"
        )
    return dated


def _without(message: Message, name: str) -> Message:
    return {key: value for key, value in message.items() if key != name}


def _longest_first(tokens: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(tokens, key=lambda token: (-len(token), token)))


def _with_marks(content: str) -> str:
    core = content.strip()
    return content.replace(core, f"{MARK}{core}{MARK}", 1)


_Kind = tuple[tuple[Any, ...], ...]
"""Turns of one kind have the same fields, and neighbours with the same fields."""


def _kind_of_turn(chat: Conversation, index: int) -> _Kind:
    return tuple(map(_kind_of_message, chat.messages[index - 1 : index + 2]))


def _kind_of_message(message: Message) -> tuple[Any, ...]:
    fields = tuple(sorted(name for name, value in message.items() if value))
    return message["role"], fields, bool(END_OF_THOUGHT.search(message["content"]))


def _shared_prefix(one: str, other: str) -> int:
    """How many characters two texts begin with in common."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
