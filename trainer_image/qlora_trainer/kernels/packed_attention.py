"""Attention over a packed row: every record sees itself alone, and no mask is ever made.

A `PackedAttention` is registered with transformers and told, before each forward pass, where the records of the row
begin. transformers' own way, a boolean mask of tokens x tokens, costs 4 GiB at 65,536 tokens and forbids the
flash kernels. Here the GPU runs flash attention over all records in one launch (Dao, 2023, variable-length form), which
torch makes deterministic in deterministic mode; elsewhere each record is one causal call, and what neither knows
(windows, Gemma 2's softcapped scores) is computed tile by tile (`tiled_attention`).

Called as transformers calls an attention function, it leaves the backward pass to autograd. `forward` and `backward`,
whose tensors are [tokens, heads, size], are for layers by hand: kernels of our own (`triton_attention`), but for heads
that these are not made for, and where a plan has chosen a package's (`flash_attention`).
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from orchestrator.api import trainer_facts
from qlora_trainer.data.micro_batch import MicroBatch
from qlora_trainer.kernels import flash_attention, ops
from qlora_trainer.kernels.tiled_attention import ScoreOptions, tiled_attention

NAME = "qlora_packed"
"""The name under which transformers finds it."""
LARGEST_COMMON_HEAD = 192
"""Above, flash attention's backward pass takes heads of the largest size alone on most cards."""
FLASH_HEAD_MULTIPLE = 8


HARMLESS_ARGUMENTS = frozenset(
    {"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "return_dict",
     "output_router_logits", "logits_to_keep", "num_items_in_batch", "past_key_values"}
)  # fmt: skip
"""What models hand on to their attention function, and no attention depends on."""


class UnknownAttention(Exception):
    """A model whose attention is another than the one computed here."""


class PackedAttention:
    """An attention function for transformers (`AttentionInterface`), for one row of records."""

    def __init__(self) -> None:
        self.unfit_because: str | None = None
        """Why the model that it was offered keeps its own attention; None where it is packed."""
        self.flash: flash_attention.FlashAttention | None = None
        """A package's kernels for layers by hand; None where our own compute."""
        self._starts = torch.zeros(1, dtype=torch.int32)
        self._boundaries: list[int] = []
        self._longest_record = 0
        self._known_spans: dict[int | None, tuple[Tensor, Tensor]] = {}

    def register(self) -> None:
        """Be what transformers calls under `NAME`: that is one for the whole process."""
        AttentionInterface.register(NAME, self)

    def expect(self, batch: MicroBatch, starts_on_device: Tensor) -> None:
        """Announce the row that the next forward pass (and its recomputation in backward) is about."""
        self.register()
        self._starts = starts_on_device
        self._boundaries = batch.record_starts.tolist()
        self._longest_record = batch.longest_record
        self._known_spans = {}

    def __call__(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """Query, key and value are [1, heads, tokens, size]; the output is [1, tokens, heads, size].

        `s_aux` is transformers' name for the heads' sinks. Raises UnknownAttention if the model asks for more than
        causal attention with a window, and either sinks or softcapped scores.
        """
        _refuse_unknown(module, others)
        if attention_mask is not None:  # the records' boundaries are known, so transformers makes none
            raise UnknownAttention("it gives its attention a mask of its own")
        assert len(query) == 1, "a micro-batch is one packed row"
        assert query.shape[2] == key.shape[2] == self._boundaries[-1], "this is not the row that was announced"
        window = self._narrower(sliding_window)
        if s_aux is not None:
            if dropout > 0 or softcap is not None or not fits_flash(query.shape[-1], value.shape[-1]):
                raise UnknownAttention("its sinks come with dropout, softcaps or heads that no kernel here is made for")
            parts = (part[0].transpose(0, 1) for part in (query, key, value))
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            return _SinkAttention.apply(*parts, s_aux.detach(), self, scale, window).unsqueeze(0), None
        if dropout == 0 and softcap is None and query.is_cuda and fits_flash(query.shape[-1], value.shape[-1]):
            return self._flash(query, key, value, scaling, window), None
        how: dict[str, Any] = {"dropout": dropout, "scaling": scaling, "window": window, "softcap": softcap}
        outputs = [
            _one_record(query[:, :, start:end], key[:, :, start:end], value[:, :, start:end], **how)
            for start, end in pairwise(self._boundaries)
        ]
        return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None

    def _flash(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        # Both window and causality say how far a token sees: `window - 1` tokens back (-1: all), none ahead.
        output = varlen_attn(
            query[0].transpose(0, 1),
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            self._starts,
            self._starts,
            self._longest_record,
            self._longest_record,
            scale=scaling,
            window_size=(-1 if window is None else window - 1, 0),
            **_grouped(varlen_attn, query.shape[1] != key.shape[1]),
        )
        assert isinstance(output, Tensor)
        return output.unsqueeze(0)

    # --- both passes by hand

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> tuple[Tensor, Tensor]:
        """The output, and the log of each query's normalizer [heads, tokens]."""
        if self.flash is not None and self._is_for_flash():
            return self.flash.forward(query, key, value, self._row(window), scaling)
        if ops.attends(query):
            return ops.attention(query, key, value, self.spans(window), scaling)
        starts, longest = self._starts, self._longest_record
        found = torch.ops.aten._flash_attention_forward(
            query, key, value, starts, starts, longest, longest, 0.0, **self._options(scaling, window),
            return_debug_mask=False,
        )  # fmt: skip
        return found[0], found[1]

    def backward(
        self,
        grad: Tensor,
        inputs: tuple[Tensor, Tensor, Tensor],
        output: Tensor,
        logsumexp: Tensor,
        scaling: float,
        window: int | None,
        *,
        out_grads: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        """The gradients to query, key and value, into `out_grads`."""
        if self.flash is not None and self._is_for_flash():
            self.flash.backward(grad, inputs, output, logsumexp, self._row(window), scaling, out_grads)
            return
        if ops.attends(grad):
            ops.attention_backward(grad, inputs, output, logsumexp, self.spans(window), scaling, out_grads)
            return
        starts, longest = self._starts, self._longest_record
        nothing = torch.empty(2, dtype=torch.uint64, device=grad.device)  # the state of a dropout that there is not
        found = torch.ops.aten._flash_attention_backward(
            grad, *inputs, output, logsumexp, starts, starts, longest, longest, 0.0, rng_state=nothing,
            unused=nothing, **self._options(scaling, window),
        )  # fmt: skip
        for part, gradient in zip(out_grads, found, strict=True):
            part.copy_(gradient)

    def spans(self, window: int | None) -> tuple[Tensor, Tensor]:
        """The spans of `ops.attention`, found once a row: layers with the same window share them."""
        if window not in self._known_spans:
            starts, tokens = self._starts, self._boundaries[-1]
            place = torch.arange(tokens, dtype=torch.int32, device=starts.device)
            record = torch.bucketize(place, starts[1:], out_int32=True, right=True)
            first, last = starts[record], starts[record + 1]
            if window is not None:
                first, last = torch.maximum(first, place - (window - 1)), torch.minimum(last, place + window)
            self._known_spans[window] = first, last
        return self._known_spans[window]

    def _is_for_flash(self) -> bool:
        return flash_attention.takes(self._boundaries[-1], len(self._boundaries) - 1)

    def _row(self, window: int | None) -> flash_attention.Row:
        own = self._narrower(window)
        return flash_attention.Row(starts=self._starts, longest=self._longest_record, window=own)

    def _narrower(self, window: int | None) -> int | None:
        """A window that hides anything in this row."""
        return window if window is not None and window < self._longest_record else None

    def _options(self, scaling: float, window: int | None) -> dict[str, Any]:
        own = self._narrower(window)
        left = -1 if own is None else own - 1
        return {"is_causal": own is None, "scale": scaling, "window_size_left": left, "window_size_right": 0}


class _SinkAttention(torch.autograd.Function):
    """Attention of heads that have a sink: a score more in their softmax, of a key without a value (OpenAI, 2025).

    It only makes the normalizer larger, and the kernels' backward passes ask for no more than that and the output. The
    sinks are frozen, as all of the base.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor,
        attention: PackedAttention,
        scaling: float,
        window: int | None,
    ) -> Tensor:
        """Tensors are [tokens, heads, size], sinks [heads]."""
        output, logsumexp = attention.forward(query, key, value, scaling, window)
        with_sinks = logsumexp.logaddexp(sinks.float().flatten()[:, None])
        output.mul_(logsumexp.sub_(with_sinks).exp_().t().unsqueeze(-1))
        ctx.save_for_backward(query, key, value, output, with_sinks)
        ctx.attention, ctx.scaling, ctx.window = attention, scaling, window
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, logsumexp = ctx.saved_tensors
        found = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        ctx.attention.backward(
            grads[0].contiguous(), (query, key, value), output, logsumexp, ctx.scaling, ctx.window, out_grads=found
        )
        return *found, None, None, None, None


def _refuse_unknown(module: torch.nn.Module, others: dict[str, Any]) -> None:
    unknown = {name for name, value in others.items() if value is not None} - HARMLESS_ARGUMENTS - {"is_causal"}
    if unknown:
        raise UnknownAttention(f"its attention takes {', '.join(sorted(unknown))}, which is not known here")
    if others.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise UnknownAttention("its attention sees the text to its right")


def fits_flash(size: int, value_size: int) -> bool:
    """Whether flash attention takes heads of such sizes."""
    known = size == trainer_facts.LARGEST_FLASH_HEAD or size <= LARGEST_COMMON_HEAD
    return size == value_size and known and size % FLASH_HEAD_MULTIPLE == 0


def goes_by_tiles(size: int, softcap: float | None) -> bool:
    """Whether scores are computed tile by tile where nothing is dropped: no other kernel does so in little memory."""
    return softcap is not None or size > trainer_facts.LARGEST_FLASH_HEAD


def _grouped(varlen_attn: Callable[..., Any], grouped: bool) -> dict[str, Any]:
    """From torch 2.12 on, heads that share keys must be announced; before, they were just taken."""
    return {"enable_gqa": grouped} if "enable_gqa" in signature(varlen_attn).parameters else {}


def _one_record(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    dropout: float,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Causal attention over one record [1, heads, tokens, size]."""
    mask = None
    assert dropout == 0 or softcap is None, "attention that softcaps its scores drops nothing"
    own_window = window if window is not None and window < query.shape[2] else None
    if dropout == 0 and (own_window is not None or goes_by_tiles(query.shape[-1], softcap)):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        options = ScoreOptions(scale, own_window, softcap)
        return tiled_attention(query[0], key[0], value[0], options).unsqueeze(0)
    if own_window is not None:
        place = torch.arange(query.shape[2], device=query.device)
        distance = place[:, None] - place
        mask = (distance >= 0) & (distance < own_window)
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
