"""What training answers to a few held-out prompts at its evaluations, to be looked at.

Rules:

- Nothing is kept between tokens: all prompts lie in one row, as records do, with room for the whole of their answers,
  and each pass tells every answer's next token. What stands behind a token changes nothing at it, so the room may hold
  anything; and a row is never longer than a micro-batch, so a pass takes no memory that evaluations do not take.
- Nothing is drawn: training goes on with the same bits, whether it is asked or not.
- The greedy answer of the layers as they are trained. `answering` has transformers' own, once training is over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from orchestrator.api.formats import Sample
from orchestrator.api.job import EvaluationSpec, SamplesSpec
from qlora_trainer.data.encoding import IGNORED_LABEL
from qlora_trainer.data.micro_batch import MicroBatch, Numbers, collate
from qlora_trainer.data.prompts import Prompt
from qlora_trainer.model.training_model import TrainingModel

MOST_EVALUATIONS = 64
"""At so many at most prompts are asked, spread over training: what was answered stays in the journal."""
SHOWN_CHARACTERS = 500
"""Of a prompt, from its end, and of an answer that was wanted, from its start."""
FILLER = 0
"""The token that stands where none has been answered yet."""


def is_sampled(step: int, steps: int, evaluation: EvaluationSpec) -> bool:
    """Whether prompts are asked at the evaluation after a step."""
    evaluations = steps // evaluation.every_steps + 1
    apart = -(-evaluations // (MOST_EVALUATIONS - 1))  # the last one may be beside these
    return step == steps or (step // evaluation.every_steps) % apart == 0


class Sampler:
    """Asks the same prompts again and again."""

    def __init__(
        self,
        spec: SamplesSpec,
        prompts: Sequence[Prompt],
        *,
        tokenizer: Any,
        ends: Sequence[int],
        sequence_length: int,
        row_tokens: int,
    ) -> None:
        """`ends` are the tokens that an answer ends with; a row has at most `row_tokens`, of one sequence or more."""
        self._tokenizer = tokenizer
        self._ends = frozenset(ends)
        self._prompts = prompts
        rooms = [min(len(prompt.prompt) + spec.max_new_tokens, sequence_length) for prompt in prompts]
        self._groups = list(_groups(prompts, rooms, row_tokens))

    def ask(self, model: TrainingModel, between: Callable[[], None]) -> list[Sample]:
        """The model's answers now; `between` is called after every pass."""
        model.eval()
        answers = [answer for group in self._groups for answer in group.answers(model, self._ends, between)]
        return [
            Sample(
                prompt=self._text(prompt.prompt)[-SHOWN_CHARACTERS:],
                reference=self._text(prompt.reference)[:SHOWN_CHARACTERS],
                answer=self._text(answer),
            )
            for prompt, answer in zip(self._prompts, answers, strict=True)
        ]

    def _text(self, tokens: Sequence[int] | Numbers) -> str:
        return self._tokenizer.decode(list(map(int, tokens)), skip_special_tokens=True).strip()


class _Group:
    """The prompts of one row."""

    def __init__(self, prompts: Sequence[Prompt], rooms: Sequence[int]) -> None:
        self._prompts = [prompt.prompt for prompt in prompts]
        self._rooms = rooms

    def answers(self, model: TrainingModel, ends: frozenset[int], between: Callable[[], None]) -> list[list[int]]:
        """The tokens of each answer, without the one that ends it."""
        found: list[list[int]] = [[] for _ in self._prompts]
        open_ones = {number for number, prompt in enumerate(self._prompts) if len(prompt) < self._rooms[number]}
        starts = np.concatenate([[0], np.cumsum(self._rooms)])
        while open_ones:
            places = [int(starts[n]) + len(prompt) + len(found[n]) - 1 for n, prompt in enumerate(self._prompts)]
            tokens = model.likeliest(self._row(found), torch.tensor(places))
            for number in tuple(open_ones):
                token = tokens[number]
                if token not in ends:
                    found[number].append(token)
                if token in ends or len(self._prompts[number]) + len(found[number]) == self._rooms[number]:
                    open_ones.remove(number)
            between()
        return found

    def _row(self, answers: Sequence[Sequence[int]]) -> MicroBatch:
        records: list[tuple[Numbers, Numbers, Numbers]] = []
        for prompt, answer, room in zip(self._prompts, answers, self._rooms, strict=True):
            ids = np.full(room, FILLER, dtype=np.int32)
            ids[: len(prompt)] = prompt
            ids[len(prompt) : len(prompt) + len(answer)] = answer
            records.append((ids, np.full(room, IGNORED_LABEL, dtype=np.int32), np.arange(room, dtype=np.int32)))
        return collate(records)


def _groups(prompts: Sequence[Prompt], rooms: Sequence[int], row_tokens: int) -> Iterator[_Group]:
    """As many prompts in a row as have room there, in their order."""
    first = 0
    for last in range(1, len(prompts) + 1):
        if last == len(prompts) or sum(rooms[first : last + 1]) > row_tokens:
            yield _Group(prompts[first:last], rooms[first:last])
            first = last
