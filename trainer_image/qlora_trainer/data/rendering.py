"""Renders in a process of its own, so that a chat template that never ends, or writes without end, ends here.

A template is a program that comes with a model or a job. It is sandboxed, but it may loop, recurse, or take a power of
a power, and no signal reaches Python in the midst of that. So a forked process renders, one for each range of records:

- It may take so much CPU time for a conversation, more for a long one; beyond that it is killed. CPU time, because a
  busy machine is nobody's fault.
- It may take so much memory (RLIMIT_AS), and write so many characters.
- What exceeds a limit is a RenderLimit, a UserError: the template would do the same again.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, cast

from qlora_trainer.data.chat import TEMPLATE_FIELD, ChatRenderer, Context, EndlessTurn, Rendered, TrainOn
from qlora_trainer.data.formats import Conversation
from qlora_trainer.outcome import UserError

MIB = 1 << 20
PR_SET_PDEATHSIG = 1  # prctl(2)
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

T = TypeVar("T")


class RenderLimit(UserError):
    """The chat template took more than it may."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderLimits:
    """What the chat template may take for one conversation."""

    cpu_seconds: float = 10.0
    cpu_seconds_per_million: float = 30.0
    """On top, for every million characters that are said."""
    text_characters: int = 4 * MIB
    """Of one text that it writes."""
    text_characters_per_character: int = 64
    """On top, for every character that is said."""
    memory_bytes: int = 1 << 30
    memory_bytes_per_character: int = 256
    """On top, for every character that is said."""
    poll_seconds: float = 0.25
    """How often a process that has not answered is looked at."""

    def cpu_seconds_for(self, characters: int) -> float:
        """For a conversation of so many characters."""
        return self.cpu_seconds + self.cpu_seconds_per_million * characters / 1e6

    def text_for(self, characters: int) -> int:
        """Characters of one text that is written of so many."""
        return self.text_characters + self.text_characters_per_character * characters


DEFAULT_LIMITS = RenderLimits()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Failure:
    """An error that ended a request."""

    kind: Literal["value", "user", "endless", "limit"]
    message: str = ""
    turn: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """Conversations to render, one after the other."""

    chats: Sequence[Conversation]
    room: int | None = None
    """As far as so many characters; None is all."""
    whole_below: int | None = None
    """Of longer texts nothing but the text; None is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """What came of one conversation."""

    text: str | _Failure = ""
    rendered: Rendered | _Failure | None = None
    """None where it was not asked for."""
    warnings: tuple[str, ...] = ()


class LimitedRenderer:
    """A `ChatRenderer` within limits. Its process starts with the first conversation and ends with this object."""

    def __init__(
        self,
        tokenizer: Any,
        train_on: TrainOn,
        *,
        warn: Callable[[str], None],
        limits: RenderLimits = DEFAULT_LIMITS,
        whole_below: int | None = None,
    ) -> None:
        """`warn` gets what the template's prompts and turns disagree about.

        Texts of more than `whole_below` characters are rendered once their room is known.
        """
        self._tokenizer = tokenizer
        self._train_on: TrainOn = train_on
        self._warn = warn
        self._limits = limits
        self._whole_below = whole_below
        self._connection: Connection | None = None
        self._pid = 0
        self._asked: deque[Conversation] = deque()
        self._answers: deque[_Answer] = deque()
        """Of the first of those asked for."""
        self._last: tuple[Conversation, _Answer] | None = None

    def expect(self, chats: Sequence[Conversation]) -> None:
        """Have these rendered while others are still being tokenised; they are to be asked for in this order."""
        if chats and not self._asked:
            self._send(_Request(chats=chats, whole_below=self._whole_below))
            self._asked.extend(chats)

    def text(self, chat: Conversation) -> str:
        """The whole conversation as the template writes it."""
        answer = self._answer_to(chat)
        self._last = (chat, answer)
        return _value(answer.text)

    def render(self, chat: Conversation, text: str, *, room: int | None = None) -> Rendered:
        """`ChatRenderer.render` of a conversation and its text."""
        last = self._last[1] if self._last is not None and self._last[0] is chat else None
        if last is None or last.rendered is None or room is not None:
            last = self._alone(_Request(chats=[chat], room=room))
        assert last.rendered is not None, "it was asked for"
        rendered = _value(last.rendered)
        contexts = [replace(context, text=context.text or text) for context in rendered.contexts]
        return replace(rendered, contexts=contexts)

    def _answer_to(self, chat: Conversation) -> _Answer:
        if not self._asked or self._asked[0] is not chat:
            return self._alone(_Request(chats=[chat], whole_below=self._whole_below))
        self._asked.popleft()
        return self._answers.popleft() if self._answers else self._receive(chat)

    def _alone(self, request: _Request) -> _Answer:
        """The answer about one conversation, after those that are on their way."""
        for expected in list(self._asked)[len(self._answers) :]:
            self._answers.append(self._receive(expected))
        self._send(request)
        return self._receive(request.chats[0])

    def _send(self, request: _Request) -> None:
        connection = self._connection or self._start()
        try:
            connection.send(request)
        except ConnectionError as error:
            raise self._ended() from error

    def _receive(self, chat: Conversation) -> _Answer:
        assert self._connection is not None, "something was asked for"
        try:
            answer = self._await(self._connection, self._limits.cpu_seconds_for(characters_of(chat)))
        except (EOFError, ConnectionError) as error:
            raise self._ended() from error
        for warning in answer.warnings:
            self._warn(warning)
        return answer

    def _ended(self) -> RenderLimit:
        return RenderLimit(
            f"the chat template ended the process that renders it ({self._end()}); mend {TEMPLATE_FIELD} or the "
            "model's own"
        )

    def _await(self, connection: Connection, cpu_seconds: float) -> _Answer:
        began: float | None = None
        while not connection.poll(self._limits.poll_seconds):
            spent = _cpu_seconds(self._pid)
            began = spent if began is None else began
            if spent - began > cpu_seconds:
                self._end()
                raise RenderLimit(
                    f"the chat template takes longer than {cpu_seconds:.0f} s of CPU time for one conversation; mend "
                    f"{TEMPLATE_FIELD} or the model's own, or split the conversation"
                )
        return connection.recv()

    def _start(self) -> Connection:
        ours, theirs = Pipe()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            ours.close()
            _become_renderer(parent)
            _serve(theirs, self._tokenizer, self._train_on, self._limits)
        theirs.close()
        self._connection, self._pid = ours, pid
        self._finalizer = weakref.finalize(self, _kill, parent, ours, pid)
        return ours

    def _end(self) -> str:
        """Kill the process; how it had ended, if it had."""
        self._connection = None
        self._asked.clear()
        self._answers.clear()
        self._finalizer.detach()
        assert self._pid, "only a process that was started can end"
        done, status = os.waitpid(self._pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return f"signal {-code}" if code < 0 else f"exit code {code}"
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        return "it was killed"


def characters_of(value: object) -> int:
    """How many characters are in a conversation, or in any JSON value; other values count as a few."""
    if isinstance(value, Conversation):
        return _characters([*value.messages, *(value.tools or ())])
    return _characters(value)


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(_characters(key) + _characters(item) for key, item in cast("dict[Any, Any]", value).items())
    if isinstance(value, list | tuple):
        return sum(map(_characters, cast("Sequence[Any]", value)))
    return 8


def _value(found: T | _Failure) -> T:
    """What was found; raises what was raised."""
    if not isinstance(found, _Failure):
        return found
    if found.kind == "endless":
        raise EndlessTurn(found.turn)
    raise {"user": UserError, "limit": RenderLimit, "value": ValueError}[found.kind](found.message)


def _kill(parent: int, connection: Connection, pid: int) -> None:
    if os.getpid() != parent:  # another process's copy of the object
        return
    connection.close()
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ChildProcessError, ProcessLookupError):  # it has ended
        return


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND


# --- in the process that renders ------------------------------------------------------------------------------------


def _become_renderer(parent: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _serve(connection: Connection, tokenizer: Any, train_on: TrainOn, limits: RenderLimits) -> NoReturn:
    """Answer until the parent hangs up; nothing of the parent's is cleaned up here."""
    try:
        server = _Server(tokenizer, train_on, limits)
        while True:
            request: _Request = connection.recv()
            for chat in request.chats:
                connection.send(server.answer(chat, request))
    except (EOFError, ConnectionError):
        os._exit(0)
    finally:
        os._exit(1)


class _Server:
    """Renders one conversation at a time, and catches whatever comes of it."""

    def __init__(self, tokenizer: Any, train_on: TrainOn, limits: RenderLimits) -> None:
        self._limits = limits
        self._used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE_BYTES
        self._warnings: list[str] = []
        self._renderer = ChatRenderer(tokenizer, train_on, warn=self._warnings.append)

    def answer(self, chat: Conversation, request: _Request) -> _Answer:
        """The conversation's text, and what it is trained in unless it is too long for that."""
        characters = characters_of(chat)
        self._limit_memory(characters)
        text = self._caught(lambda: self._written(chat, characters))
        rendered: Rendered | _Failure | None = None
        if isinstance(text, str) and (request.whole_below is None or len(text) <= request.whole_below):
            rendered = self._caught(lambda: self._rendered(chat, text, request.room, characters))
        warnings = tuple(self._warnings)
        self._warnings.clear()
        return _Answer(text=text, rendered=rendered, warnings=warnings)

    def _caught(self, render: Callable[[], T]) -> T | _Failure:
        try:
            return render()
        except EndlessTurn as error:
            return _Failure(kind="endless", turn=error.turn)
        except RenderLimit as error:
            return _Failure(kind="limit", message=str(error))
        except UserError as error:
            return _Failure(kind="user", message=str(error))
        except MemoryError:
            return _Failure(kind="limit", message=self._too_much("memory for one conversation"))
        except Exception as error:  # noqa: BLE001 - whatever a template raises is about the conversation
            told = str(error) if isinstance(error, ValueError) else f"is refused by the chat template: {error!r:.300}"
            return _Failure(kind="value", message=told)

    def _written(self, chat: Conversation, characters: int) -> str:
        text = self._renderer.text(chat)
        if len(text) > self._limits.text_for(characters):
            raise RenderLimit(self._too_much(f"text for one conversation, {len(text)} characters"))
        return text

    def _rendered(self, chat: Conversation, text: str, room: int | None, characters: int) -> Rendered:
        rendered = self._renderer.render(chat, text, room=room)
        most = self._limits.text_for(characters) * len(chat.messages)
        if sum(len(context.text) for context in rendered.contexts) > most:
            raise RenderLimit(self._too_much("text for one conversation"))
        return replace(rendered, contexts=[_without(context, text) for context in rendered.contexts])

    def _limit_memory(self, characters: int) -> None:
        more = self._limits.memory_bytes + self._limits.memory_bytes_per_character * characters
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        soft = self._used_bytes + more
        resource.setrlimit(resource.RLIMIT_AS, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))

    def _too_much(self, of_what: str) -> str:
        return f"the chat template takes too much {of_what}; mend {TEMPLATE_FIELD} or the model's own"


def _without(context: Context, text: str) -> Context:
    """The context, whose text the parent has where it is the conversation's own."""
    return replace(context, text="") if context.text == text else context
