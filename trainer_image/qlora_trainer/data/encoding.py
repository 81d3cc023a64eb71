"""Turns samples into tokens, and says for each token whether it is trained on.

Rules:

- A text is tokenised whole, as it is for inference, and what is supervised is known in characters first.
- Where a token straddles the boundary of what is supervised, the text is cut there and tokenised in pieces, which is
  what happens when a model answers: the prompt is tokenised, then the output comes. The pieces must spell the same.
- What cannot be told exactly is a ValueError, never a guess.
- The first token of a record is never supervised: nothing comes before it that could predict it.
- Of a text that is longer than a sequence, no more is tokenised than it takes to know that.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_trainer.data.chat import Span, TrainOn
from qlora_trainer.data.formats import Completion, Conversation, Preference, Sample, Text
from qlora_trainer.data.rendering import LimitedRenderer

IGNORED_LABEL = -100
"""The label of a token that carries no loss, torch's default for `ignore_index`."""
CHARACTERS_PER_TOKEN = 8
"""So much of a long text is tokenised at first for every token of a sequence; then four times as much."""
UNSETTLED_TOKENS = 64
"""At the end of a part of a text, tokens that the whole text may have otherwise."""
THOUGHT_MARK = re.compile(r"</?think>|\[/?THINK\]")
SEVERAL_CONTEXTS = (
    "the chat template writes earlier turns of the assistant otherwise than the last one, so that they are trained as "
    "records of their own, each with the messages before it; spec.dataset.trainOn: completion trains the last one alone"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedRecord:
    """One record as the model sees it."""

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    starts: tuple[int, ...] = (0,)
    """Where its contexts begin: a conversation may have to be trained in several, each a record of its own. Those of a
    preference are what was chosen and what was rejected."""
    complete: bool = True
    """False where the sample goes on, longer than the encoder's bound."""

    @property
    def supervised(self) -> int:
        """Tokens that carry loss."""
        return int(np.count_nonzero(self.labels != IGNORED_LABEL))

    def cut(self, length: int) -> EncodedRecord:
        """The first tokens of a record of one context."""
        return EncodedRecord(input_ids=self.input_ids[:length], labels=self.labels[:length])

    def split(self) -> list[EncodedRecord]:
        """Its contexts, each as a record."""
        return [
            EncodedRecord(input_ids=self.input_ids[start:end], labels=self.labels[start:end])
            for start, end in pairwise((*self.starts, len(self.input_ids)))
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tokenised:
    """The tokens of the beginning of a text."""

    ids: list[int]
    text: str
    """As far as it was tokenised."""
    offsets: Sequence[Span] | None
    """From where to where each token reaches, if the tokenizer can tell."""
    complete: bool


class Encoder:
    """Encodes samples with one tokenizer."""

    def __init__(self, tokenizer: Any, train_on: TrainOn, *, most_tokens: int | None = None) -> None:
        """Texts of more than `most_tokens` come out longer than that, but not whole."""
        self.warnings: list[str] = []
        """What is to be known about the chat template, once each."""
        self.special_token_said: str | None = None
        """The first special token found in what somebody says: to the model it means what it means in the template."""
        self._tokenizer = tokenizer
        self._train_on = train_on
        self._most_tokens = most_tokens
        self._fast: Any = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        if self._fast is not None:
            self._fast.no_truncation()
            self._fast.no_padding()
        self._marks = _special_tokens(tokenizer)
        self._chats = LimitedRenderer(tokenizer, train_on, warn=self._warn, whole_below=self._first_room)
        self._begins_with_bos = tokenizer.bos_token_id is not None and self._adds_bos()

    @property
    def _first_room(self) -> int | None:
        """Characters of a text that are tokenised at first; None where it is all of them."""
        return None if self._most_tokens is None else CHARACTERS_PER_TOKEN * (self._most_tokens + UNSETTLED_TOKENS)

    def expect(self, samples: Iterable[Sample]) -> None:
        """Have the conversations among these rendered ahead; they are to be encoded next, in this order."""
        parts = (part for sample in samples for part in _parts(sample))
        self._chats.expect([part for part in parts if isinstance(part, Conversation)])

    def encode(self, sample: Sample) -> EncodedRecord:
        """The tokens of a sample; raises ValueError saying why there is no exact answer."""
        if isinstance(sample, Preference):
            return self._preference(sample)
        if isinstance(sample, Conversation):
            return self._conversation(sample)
        return self._framed(sample)

    def _warn(self, warning: str) -> None:
        if warning not in self.warnings:
            self.warnings.append(warning)

    # --- preferences: two records

    def _preference(self, sample: Preference) -> EncodedRecord:
        sides = [self.encode(part) for part in _parts(sample)]
        complete = all(side.complete for side in sides)
        for name, side in zip(("chosen", "rejected"), sides, strict=True):
            if len(side.starts) > 1:
                raise ValueError(
                    f"has a `{name}` that cannot be trained as one text with its prompt: {SEVERAL_CONTEXTS}"
                )
            if complete and side.supervised == 0:
                raise ValueError(f"has a `{name}` with no token to train on")
        if complete and np.array_equal(sides[0].input_ids, sides[1].input_ids):
            raise ValueError("has a `chosen` and a `rejected` that are the same to the model, which prefers nothing")
        return _joined_records(sides, complete=complete)

    # --- texts and prompts with completions: what the tokenizer adds at the front, then EOS at the end

    def _framed(self, sample: Completion | Text) -> EncodedRecord:
        eos = self._tokenizer.eos_token_id
        assert eos is not None, "such a tokenizer is refused before records are read"
        text, start = (sample.text, 0) if isinstance(sample, Text) else self._joined(sample)
        tokenised = self._tokenised(text)
        ids, supervised = self._labelled(tokenised, [(start, len(text))])
        if self._begins_with_bos and ids[:1] != [self._tokenizer.bos_token_id]:
            ids, supervised = [self._tokenizer.bos_token_id, *ids], [False, *supervised]
        if ids[-1:] != [eos]:
            ids, supervised = [*ids, eos], [*supervised, True]
        return _record(ids, supervised, complete=tokenised.complete)

    def _joined(self, sample: Completion) -> tuple[str, int]:
        return sample.prompt + sample.completion, 0 if self._train_on == "all" else len(sample.prompt)

    def _adds_bos(self) -> bool:
        return self._tokenizer("a").input_ids[:1] == [self._tokenizer.bos_token_id]

    # --- conversations: the chat template writes everything, BOS included

    def _conversation(self, chat: Conversation) -> EncodedRecord:
        self._look_for_marks(chat)
        text = self._chats.text(chat)
        whole = self._tokenised(text)
        rendered = self._chats.render(chat, text, room=None if whole.complete else len(whole.text))
        tokenised = [whole if it.text == text else self._tokenised(it.text) for it in rendered.contexts]
        records = [
            _record(*self._labelled(tokens, context.spans))
            for tokens, context in zip(tokenised, rendered.contexts, strict=True)
        ]
        if len(records) > 1:
            self._warn(SEVERAL_CONTEXTS)
        complete = whole.complete and rendered.complete and all(tokens.complete for tokens in tokenised)
        return _joined_records(records or [_record(*self._labelled(whole, []))], complete=complete)

    def _look_for_marks(self, chat: Conversation) -> None:
        if self._marks is None or self.special_token_said is not None:  # one is enough
            return
        found = (self._marks.search(message["content"]) for message in chat.messages)
        self.special_token_said = next((each[0] for each in found if each), None)

    # --- tokens

    def _tokenised(self, text: str) -> _Tokenised:
        """The tokens of a text; of one that is certainly too long, those of its beginning."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"U+{ord(text[error.start]):04X}"
            raise ValueError(f"holds half of a surrogate pair ({half}), which is no character") from error
        most = self._most_tokens
        room = self._first_room or len(text)
        while room < len(text):
            part = self._tokens(text[:room], complete=False)
            if most is not None and len(part.ids) > most + UNSETTLED_TOKENS:
                return part
            room *= 4
        return self._tokens(text, complete=True)

    def _tokens(self, text: str, *, complete: bool) -> _Tokenised:
        if self._fast is None:
            ids = self._tokenizer(text, add_special_tokens=False).input_ids
            return _Tokenised(ids=ids, text=text, offsets=None, complete=complete)
        encoding = self._fast.encode(text, add_special_tokens=False)
        return _Tokenised(ids=encoding.ids, text=text, offsets=encoding.offsets, complete=complete)

    def _labelled(self, tokenised: _Tokenised, spans: Sequence[Span]) -> tuple[list[int], list[bool]]:
        """The tokens of a text, and which of them lie in the spans."""
        text = tokenised.text
        spans = [(start, min(end, len(text))) for start, end in spans if start < len(text)]
        boundaries = sorted({0, len(text), *(boundary for span in spans for boundary in span)})
        if tokenised.offsets is not None:
            cuts = _cuts(tokenised.offsets, boundaries)
            if cuts is not None:
                return tokenised.ids, _flags(boundaries, cuts, spans)
        ids: list[int] = []
        cuts = [0]
        for start, end in pairwise(boundaries):
            ids += self._tokens(text[start:end], complete=True).ids
            cuts.append(len(ids))
        if self._spelled(ids) != self._spelled(tokenised.ids):
            raise ValueError("has an answer that begins or ends inside a token; begin or end it with another character")
        return ids, _flags(boundaries, cuts, spans)

    def _spelled(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _parts(sample: Sample) -> Sequence[Conversation | Completion | Text]:
    return (sample.chosen, sample.rejected) if isinstance(sample, Preference) else (sample,)


def _special_tokens(tokenizer: Any) -> re.Pattern[str] | None:
    """Finds a special token in a text; those around thoughts are meant where they stand in one."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    found = sorted(token for token in special if not THOUGHT_MARK.fullmatch(token))
    return re.compile("|".join(map(re.escape, found))) if found else None


def _record(ids: Sequence[int], supervised: Sequence[bool], *, complete: bool = True) -> EncodedRecord:
    input_ids = np.array(ids, dtype=np.int32)
    labels = np.where(np.array(supervised, dtype=bool), input_ids, np.int32(IGNORED_LABEL))
    labels[:1] = IGNORED_LABEL
    return EncodedRecord(input_ids=input_ids, labels=labels.astype(np.int32), complete=complete)


def _joined_records(records: Sequence[EncodedRecord], *, complete: bool) -> EncodedRecord:
    lengths = [len(record.input_ids) for record in records]
    return EncodedRecord(
        input_ids=np.concatenate([record.input_ids for record in records]),
        labels=np.concatenate([record.labels for record in records]),
        starts=(0, *accumulate(lengths[:-1])),
        complete=complete,
    )


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
