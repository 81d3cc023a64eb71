"""Answers to held-out prompts: of the adapter, of the base, and of the version that has the alias.

Each is kept in the job's store under the digest of all that it depends on, before the next is generated: whoever is
stopped or killed goes on where he was, and nobody is given the answer of other weights.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.api import trainer_facts
from orchestrator.api.formats import Answer, AnsweredPrompt, AnswerTable
from orchestrator.api.job import GenerationSpec
from qlora_trainer.data.prompts import Prompt
from qlora_trainer.model.answering import Answerer
from qlora_trainer.storage.job_store import JobStore
from qlora_trainer.storage.tensors import Tensors
from qlora_trainer.tracking.holder import HolderAdapter

ANSWER_FORMAT = 1
"""Raise it when the same weights and prompt would give another answer than before."""
SHOWN_CHARACTERS = 2000
"""Of a prompt in the table, from its end."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """What is asked, and how."""

    spec: GenerationSpec
    prompts: Sequence[Prompt]
    tokenizer: Any
    sequence_length: int
    base: str
    """Names the base's weights."""


class Interview:
    """Asks one after the other, and remembers."""

    def __init__(
        self,
        questions: Questions,
        answerer: Answerer,
        store: JobStore,
        attempt: int,
        *,
        stopped: Callable[[], bool],
        stop: Callable[[], None],
        tell: Callable[[str], None],
    ) -> None:
        """`stopped` says whether to stop, and `stop` raises what stopping is; `tell` takes what is going on."""
        self._questions = questions
        self._answerer = answerer
        self._store = store
        self._attempt = attempt
        self._stopped = stopped
        self._stop = stop
        self._tell = tell

    def table(self, adapter: str, holder: HolderAdapter | None) -> AnswerTable:
        """All answers; `adapter` names the trained weights."""
        given = self._answers("the adapter", adapter)
        with self._answerer.without_adapter():
            of_base = self._answers("the base", "none")
        of_holder: Sequence[Answer | None] = [None] * len(given)
        if holder is not None and holder.folder is not None and holder.digest is not None:
            with self._answerer.with_adapter(str(holder.folder)):
                of_holder = self._answers(f"version {holder.holder.version}", holder.digest)
        rows = zip(self._questions.prompts, given, of_base, of_holder, strict=True)
        return AnswerTable(
            prompts=tuple(
                AnsweredPrompt(
                    prompt=self._text(prompt.prompt)[-SHOWN_CHARACTERS:],
                    reference=self._text(prompt.reference),
                    adapter=own,
                    base=plain,
                    holder=other,
                )
                for prompt, own, plain, other in rows
            ),
            holder=holder.holder if holder is not None else None,
        )

    def _answers(self, who: str, adapter: str) -> list[Answer]:
        prompts = self._questions.prompts
        found: list[Answer] = []
        for number, prompt in enumerate(prompts, start=1):
            self._tell(f"answering: {who}, prompt {number} of {len(prompts)}")
            found.append(self._answer(prompt, adapter))
        return found

    def _answer(self, prompt: Prompt, adapter: str) -> Answer:
        longest = min(self._questions.sequence_length, trainer_facts.ANSWER_TOKENS)
        most = min(self._questions.spec.max_new_tokens, longest - len(prompt.prompt))
        digest = self._digest(prompt, adapter, most)
        if (known := self._store.read_answer(digest)) is not None:
            return known
        if self._stopped():
            self._stop()
        tokens = self._answerer.answer(prompt.prompt.tolist(), most, self._stopped)
        if tokens is None:
            self._stop()
        assert tokens is not None, "`stop` raises"
        answer = Answer(text=self._text(tokens), tokens=len(tokens))
        self._store.keep_answer(self._attempt, digest, answer)
        return answer

    def _digest(self, prompt: Prompt, adapter: str, most: int) -> str:
        facts = [ANSWER_FORMAT, self._questions.base, adapter, prompt.prompt.tolist(), most]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _text(self, tokens: Any) -> str:
        return self._questions.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def adapter_digest(adapter: Tensors) -> str:
    """SHA-256 over names, types and bits."""
    import torch

    found = hashlib.sha256()
    for name, tensor in sorted(adapter.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
