"""Greedy answers of a trained model: what transformers and PEFT give for the same weights.

Rules:

- Training is over: layers that the trainer computes by hand are given back, so nothing is computed in a second way.
- One prompt at a time: no padding, so an answer depends on nothing but its prompt, and bitsandbytes multiplies a single
  token with NF4 as it lies. No more than a cache of one record is kept.
- The token of the largest logit, whatever the base's own generation_config asks for (sampling, penalties).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import LongTensor, Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from orchestrator.api.words import on_one_line
from qlora_trainer.kernels.moe_experts import silent_experts
from qlora_trainer.model.probe import drawn_probe
from qlora_trainer.model.training_model import LOGITS_TOLERANCE, TrainingModel
from qlora_trainer.outcome import UserError

PROBE_PROMPT, PROBE_ANSWER = 13, 24
"""Tokens of the probe, in which windows and chunks of small copies end."""
MAX_REASON_CHARACTERS = 400


class Answerer:
    """A model that is trained no more and answers prompts."""

    def __init__(self, model: TrainingModel, ends: Sequence[int]) -> None:
        """`ends` are the tokens that an answer ends with; they are no part of it."""
        model.end_training()
        self._peft: Any = model.peft_model
        self.without_adapter = model.without_adapter
        """In the meantime the base itself answers."""
        self._base = model.base
        self._device = model.device
        self._ends = list(ends)
        self._base.generation_config = GenerationConfig(
            do_sample=False, use_cache=True, eos_token_id=self._ends or None, pad_token_id=self._ends[0] if ends else 0
        )

    def answer(self, prompt: Sequence[int], max_new_tokens: int, stopped: Callable[[], bool]) -> list[int] | None:
        """The tokens of an answer, without the one that ends it; None where `stopped`, asked at every token."""
        criteria = StoppingCriteriaList([_Asked(stopped)])
        output = self._generate(prompt, max_new_tokens, stopping_criteria=criteria)
        if stopped():
            return None
        answer: list[int] = output.sequences[0, len(prompt) :].tolist()
        return answer[:-1] if answer and answer[-1] in self._ends else answer

    @contextmanager
    def with_adapter(self, folder: str) -> Generator[None]:
        """In the meantime another adapter, of a folder as PEFT saves it, answers."""
        own = self._peft.active_adapter
        self._peft.load_adapter(folder, OTHER, autocast_adapter_dtype=False)
        self._peft.set_adapter(OTHER, inference_mode=True)
        self._peft.eval()
        try:
            yield
        finally:
            self._peft.set_adapter(own)
            self._peft.delete_adapter(OTHER)

    def step_logits(self, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
        """Float32 logits [answer, vocabulary] that a given answer's tokens were chosen by, had they been chosen."""
        forced = LogitsProcessorList([_Forced(len(prompt), answer)])
        output = self._generate(prompt, len(answer), logits_processor=forced, output_logits=True)
        return torch.stack([logits[0].float() for logits in output.logits])

    @torch.inference_mode()
    def _generate(self, prompt: Sequence[int], max_new_tokens: int, **how: Any) -> Any:
        ids = torch.tensor([list(map(int, prompt))], device=self._device)
        return self._base.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            return_dict_in_generate=True,
            **how,
        )


OTHER = "other"
"""PEFT's name of an adapter beside the trained one."""


class _Asked(StoppingCriteria):
    def __init__(self, stopped: Callable[[], bool]) -> None:
        self._stopped = stopped

    def __call__(self, input_ids: LongTensor, *_: Any, **__: Any) -> Any:
        return torch.full((input_ids.shape[0],), self._stopped(), device=input_ids.device)


class _Forced(LogitsProcessor):
    """Makes an answer the one that is given."""

    def __init__(self, prompt_tokens: int, answer: Sequence[int]) -> None:
        self._prompt_tokens = prompt_tokens
        self._answer = answer

    def __call__(self, input_ids: LongTensor, scores: Any) -> Any:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self._answer[input_ids.shape[1] - self._prompt_tokens]] = 0.0
        return forced


def refuse_other_answers(model: TrainingModel, tokens: range) -> None:
    """UserError where what is generated, a token at a time, is not what was trained: ends the model's training.

    The logits of a record as it is trained are held against those that a cache leads to.
    """
    name = type(model.base).__name__
    record = drawn_probe((PROBE_PROMPT + PROBE_ANSWER,), tokens)
    ids = record.input_ids[0].tolist()
    prompt, answer = ids[:PROBE_PROMPT], ids[PROBE_PROMPT:]
    with silent_experts(model.base), torch.no_grad():  # for a rounding, a token would go to another expert
        model.eval()
        trained = model.logits(record)[PROBE_PROMPT - 1 : -1]
        try:
            generated = Answerer(model, ()).step_logits(prompt, answer)
        except Exception as error:
            reason = on_one_line(f"{type(error).__name__}: {error}")[:MAX_REASON_CHARACTERS]
            raise UserError(
                f"spec.evaluation.generation: {name} generates nothing here ({reason}); leave it out"
            ) from error
    difference = float((generated - trained).norm() / trained.norm())
    if not difference <= LOGITS_TOLERANCE:
        raise UserError(
            f"spec.evaluation.generation: what {name} generates with a cache is {difference:.1%} off from what is "
            "trained, so its answers would say nothing of the adapter; leave it out"
        )
