"""What decoder layers of transformers and PEFT take on a GPU, found on the CPU: no weight is read, no memory is taken.

A training step runs over fake tensors (`FakeTensorMode`), as the trainer runs it: NF4 layers, PEFT's adapters,
attention, recompute. Every allocation and every release is written down. Rules:

- Each distinct layer of a model is traced once, in the middle: a decoder of the first layer, one of each kind, and a
  last one stands in for the whole.
- What a GPU allocates and a CPU does not is done by hand: bitsandbytes' dense copies, dropout's masks, attention's
  outputs. What the kernels of attention and experts take by the way is known to whoever reads the trace.
- Sizes that depend on the tokens are polynomials in them: the same step with other numbers of tokens tells which.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import bitsandbytes as bnb
import numpy as np
import torch
from bitsandbytes.functional import QuantState
from peft import PeftModel
from peft.tuners.lora import dora
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Module, ModuleList
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, masking_utils
from transformers.modeling_layers import GradientCheckpointingLayer

from orchestrator.api import trainer_facts
from orchestrator.api.adapter import AdapterSpec
from orchestrator.api.layer_tables import ATTENTION, EXPERTS_BACKWARD, EXPERTS_FORWARD
from orchestrator.api.layer_trace import Heads
from qlora_trainer.data.micro_batch import collate
from qlora_trainer.kernels import ops
from qlora_trainer.kernels import packed_attention as packed
from qlora_trainer.kernels.moe_experts import NO_ADAPTERS, AdapterSums, NF4Experts, Part, shares
from qlora_trainer.model.adapter import add_adapter
from qlora_trainer.model.loading import quantized_layers
from qlora_trainer.model.quantization import COMPUTE_DTYPE
from qlora_trainer.model.text_part import decoder_of
from qlora_trainer.model.training_model import set_recompute

SOFTMAX_BACKWARD: Any = torch.ops.aten._softmax_backward_data.default
WITHOUT_WORK = {torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty, torch.ops.aten.empty_strided}
"""Operations that take memory and start nothing on a card."""
DEVICE = "cpu"
"""Where the fake tensors are: autograd refuses a GPU that is not there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """An allocation (`number` is new), a release, or a mark (`number` counts the operations before it)."""

    kind: str
    number: int = -1
    size: int = 0
    name: str = ""
    heads: Heads | None = None
    """Of attention at work."""


Note = Callable[[Event], object]


def _key(storage: Any) -> int:
    """Where a storage is, the same for every view of it."""
    return storage._cdata


class Recorder(TorchDispatchMode):
    """Writes down when storages come to be and when they go."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self._numbers: dict[int, int] = {}
        self._count = 0
        self._operations = 0

    def ignore(self, tensor: Tensor) -> None:
        """It is there already, and so is whatever views it."""
        self._numbers[_key(tensor.untyped_storage())] = -1

    def mark(self, name: str) -> None:
        """A place in the list of events."""
        self.events.append(Event(kind="mark", name=name, number=self._operations))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_the_way = None
        if func is SOFTMAX_BACKWARD:  # of the gradient and the output (aten/src/ATen/native/cuda/SoftMax.cu)
            by_the_way = torch.empty_like(args[1])
            self._see(by_the_way.untyped_storage(), str(func))
        known = self._count
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == DEVICE:
                self._see(tensor.untyped_storage(), str(func))
        computes = func._schema.is_mutable or self._count > known
        self._operations += computes and func.overloadpacket not in WITHOUT_WORK
        del by_the_way  # no sooner than what is computed of it is there
        return found

    def _see(self, storage: Any, name: str) -> None:
        key = _key(storage)
        if key in self._numbers:
            return
        self._numbers[key] = self._count
        self.events.append(Event(kind="take", number=self._count, size=storage.nbytes(), name=name))
        weakref.finalize(storage, self._drop, key)
        self._count += 1

    def _drop(self, key: int) -> None:
        self.events.append(Event(kind="drop", number=self._numbers.pop(key)))


# --- what a GPU takes, by hand


class TracedAttention:
    """`PackedAttention`: what it keeps and gives, and an event where its workspace is."""

    def __init__(self, note: Note) -> None:
        self._note = note

    def __call__(
        self,
        _module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *_: Any,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **__: Any,
    ) -> tuple[Tensor, None]:
        """As transformers calls an attention function."""
        heads = Heads(query=query.shape[1], key=key.shape[1], size=query.shape[-1], sinks=s_aux is not None)
        if softcap is None and packed.fits_flash(query.shape[-1], value.shape[-1]):
            parts = (part[0].transpose(0, 1) for part in (query, key, value))
            return _AttentionFunction.apply(*parts, self._note, True, heads).unsqueeze(0), None
        keeps_output = not packed.goes_by_tiles(query.shape[-1], softcap)
        output = _AttentionFunction.apply(query[0], key[0], value[0], self._note, keeps_output, heads).unsqueeze(0)
        return torch.cat([output], dim=2).transpose(1, 2).contiguous(), None


class _AttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, note: Note, keeps_output: bool, heads: Heads
    ) -> Tensor:
        same = query.shape[-1] == value.shape[-1]
        if heads.sinks and heads.size <= trainer_facts.LARGEST_TRITON_HEAD:
            output = query.new_empty(query.shape)
        else:  # in the layout of the queries, which is why some models copy it
            output = torch.empty_like(query) if same else query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.note, ctx.heads = note, heads
        kept = (output, torch.empty(query.shape[1], len(query), device=DEVICE)) if keeps_output else ()
        ctx.save_for_backward(query, key, value, *kept)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        grad = grads[0].contiguous()
        copies = [part.contiguous() for part in kept]  # flash attention wants its output so, too
        found = tuple(torch.empty_like(part) for part in (query, key, value))
        ctx.note(Event(kind=ATTENTION, heads=ctx.heads))
        del grad, copies
        return *found, None, None, None


def _attention_of_torch(note: Note, own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`scaled_dot_product_attention` for one record: as flash attention takes it where that is the kernel on a GPU."""

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **how: Any) -> Tensor:
        flash = attn_mask is None and not how.get("dropout_p") and len(query) == 1
        if not flash or not packed.fits_flash(query.shape[-1], value.shape[-1]):
            return own(query, key, value, attn_mask=attn_mask, **how)
        heads = Heads(query=query.shape[1], key=key.shape[1], size=query.shape[-1])
        parts = (part[0].transpose(0, 1) for part in (query, key, value))
        return _AttentionFunction.apply(*parts, note, True, heads).transpose(0, 1).unsqueeze(0)

    return attend


class TracedExperts(NF4Experts):
    """Experts whose weights are nowhere: what they give, and events where they are at work."""

    row: tuple[int, int, torch.dtype] | None = None
    """Of what went in: rows, experts of each, and the type of their weights."""
    note: Note

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedExperts:
        """As of a `TracedLinear`."""
        copied = copy(self)
        copied._parameters = {
            name: each if isinstance(each, bnb.nn.Params4bit) else deepcopy(each, memo)
            for name, each in self._parameters.items()
        }
        return copied

    def dense_parts(self, name: str) -> list[Part]:
        """Of nothing, in the shapes that they have."""
        nothing = torch.empty(0, device="meta")
        parts = shares(getattr(self, name).shape, COMPUTE_DTYPE.itemsize, self.dense_bytes)
        return [Part(first, shape, nothing, QuantState(nothing)) for first, shape in parts]

    def mix(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The output; the event comes before it."""
        self.row = len(x), index.shape[1], weights.dtype
        self.note(Event(kind=EXPERTS_FORWARD))
        return torch.empty_like(x)

    def mix_backward(
        self, grad: Tensor, x: Tensor, index: Tensor, weights: Tensor, sums: Mapping[str, AdapterSums] = NO_ADAPTERS
    ) -> tuple[Tensor, Tensor]:
        """The gradients; the event comes before them."""
        del grad, index, sums
        self.note(Event(kind=EXPERTS_BACKWARD))
        return torch.empty_like(x), torch.empty_like(weights)


OUTPUTS = {EXPERTS_FORWARD: 1, EXPERTS_BACKWARD: 2}
"""How many tensors experts at work have made when they begin: what they give."""


def run_experts(experts: TracedExperts, *, rows: int) -> tuple[list[Event], list[Event]]:
    """The events of both passes over one tile of so many rows, what goes in and comes out not counted."""
    assert experts.row is not None, "a step has been traced"
    _, each, dtype = experts.row
    recorders = Recorder(), Recorder()
    with FakeTensorMode(allow_non_fake_inputs=True), _kernels_without_work():
        x, grad, out = (torch.empty(rows, experts.hidden, dtype=COMPUTE_DTYPE, device=DEVICE) for _ in range(3))
        index = torch.empty(rows, each, dtype=torch.int64, device=DEVICE)
        weights = torch.empty(rows, each, dtype=dtype, device=DEVICE)
        sums = experts.adapter_sums()  # there for the whole pass
        for recorder in recorders:
            for tensor in (x, grad, out, index, weights, *tree_leaves(sums), *tree_leaves(experts.adapter_weights())):
                recorder.ignore(tensor)
        with recorders[0]:
            experts.mix_tile(x, index, weights, out=out)
        with recorders[1]:
            experts.mix_tile_backward(grad, x, index, weights, out=out, sums=sums)
    return recorders[0].events, recorders[1].events


@contextmanager
def _kernels_without_work() -> Generator[None]:
    """What experts compute on a GPU, as far as it takes memory."""

    def nothing(*_: Any) -> None:
        pass

    def swiglu(gate_up: Tensor) -> Tensor:
        return gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)

    def affine(x: Tensor, weight: Tensor) -> Tensor:
        return x.new_empty(len(x), len(weight))

    with mock.patch.multiple(
        ops,
        dequantize=nothing,
        expert_products=nothing,
        expert_outer_products=nothing,
        sum_rows=nothing,
        swiglu_backward_=nothing,
        swiglu=swiglu,
        affine=affine,
    ):
        yield


class _Loss(torch.autograd.Function):
    """The loss of `qlora_trainer.model.loss`: the gradient is there from the forward pass on."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, recorder: Recorder) -> Tensor:
        ctx.save_for_backward(torch.empty(hidden.shape, dtype=hidden.dtype, device=DEVICE))
        recorder.mark("loss")
        return torch.zeros((), device=DEVICE)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0], None


class TracedDropout(torch.autograd.Function):
    """Dropout as on a GPU: a mask of a byte for each element."""

    @staticmethod
    def apply_to(x: Tensor, p: float = 0.5, training: bool = True, *_: Any) -> Tensor:
        """`torch.nn.functional.dropout`'s signature."""
        return TracedDropout.apply(x) if training and p > 0 else x

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(torch.empty(x.shape, dtype=torch.bool, device=DEVICE))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # noqa: ARG004 - torch's signature
        return torch.empty_like(grads[0])


class _Product(torch.autograd.Function):
    """What bitsandbytes' `MatMul4Bit` does on a GPU, allocation by allocation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: TracedLinear) -> Tensor:
        ctx.layer = layer
        own: Any = layer.bias
        bias = None if own is None else own.to(x.dtype)
        scales = layer.scales(), layer.scales()  # as they were kept, and with their mean: `_dequant_linear_fallback`
        weights = torch.empty(layer.out_features, layer.in_features, dtype=COMPUTE_DTYPE, device=DEVICE)
        output = torch.nn.functional.linear(x, weights, bias)
        del scales
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return torch.matmul(grads[0], ctx.layer.dense()), None


class TracedLinear(bnb.nn.Linear4bit):
    """A 4-bit layer whose weights are nowhere: they only take room while they are dense."""

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedLinear:
        """Without memory there is nothing to copy, and bitsandbytes' weights do not let it be tried."""
        copied = copy(self)
        copied._parameters = {
            name: deepcopy(each, memo) if name == "bias" else each for name, each in self._parameters.items()
        }
        return copied

    def dense(self) -> Tensor:
        """Scales first, as bitsandbytes' `dequantize_4bit` has it, then the weights."""
        scales = self.scales()
        weights = torch.empty(self.out_features, self.in_features, dtype=COMPUTE_DTYPE, device=DEVICE)
        del scales
        return weights

    def scales(self) -> Tensor:
        """One for each block of weights."""
        return torch.empty(self.in_features * self.out_features // trainer_facts.NF4_BLOCK, device=DEVICE)

    def forward(self, x: Tensor) -> Tensor:
        """The product with weights that are dense for its time alone."""
        return _Product.apply(x, self)


def _add_magnitudes(layer: Any, *, base_layer: TracedLinear, **_: Any) -> None:
    layer.weight = torch.nn.Parameter(torch.empty(base_layer.out_features))


# --- a step


def run_step(base: Any, adapter: AdapterSpec, *, tokens: int, recomputes: bool) -> list[Event]:
    """The events of a training step of `loading.weightless_base`, whose quantized layers become `TracedLinear`s.

    Marks are `forward N` and `backward N` where a layer's pass begins, `end` where the decoder's last norm does,
    `passed` where the decoder has done its part, and `loss`. The base is changed, and good for one step. Where it does
    not attend to packed rows, the tokens are one record, and nothing tells the decoder where they stand, as
    `TrainingModel` hands each record over.
    """
    recorder = Recorder()
    AttentionInterface.register(packed.NAME, TracedAttention(recorder.events.append))
    peft_model = adapted(base, adapter)
    places = np.arange(tokens, dtype=np.int32)
    batch = collate([(places % 5, places % 5, places)])
    with FakeTensorMode(allow_non_fake_inputs=True):
        _move_to_card(base)
        peft_model.train()
        decoder = decoder_of(base)
        layers = decoder_layers(decoder)
        set_recompute(decoder, len(layers) if recomputes else 0)
        _mark_layers(decoder, layers, recorder)
        ids, positions = batch.input_ids.to(DEVICE), batch.position_ids.to(DEVICE)
        for tensor in (*peft_model.parameters(), *peft_model.buffers(), ids, positions):
            recorder.ignore(tensor)
        dense = mock.patch.object(dora, "dequantize_module_weight", TracedLinear.dense)
        dropout = mock.patch("torch.nn.functional.dropout", TracedDropout.apply_to)
        for module in base.modules():
            if isinstance(module, TracedExperts):
                module.note = recorder.events.append
        attend = _attention_of_torch(recorder.events.append, torch.nn.functional.scaled_dot_product_attention)
        attention = mock.patch("torch.nn.functional.scaled_dot_product_attention", attend)
        packs = base.config._attn_implementation == packed.NAME
        where = {"position_ids": positions} if packs else {}
        with _masks_as_of_one_record(), recorder, dense, dropout, attention:
            states = [decoder(input_ids=ids, **where, use_cache=False).last_hidden_state]
            recorder.mark("passed")
            hidden = states[0] if packs else torch.cat(states, dim=1)
            del states
            loss = _Loss.apply(hidden, recorder)
            del hidden
            loss.backward()
    return _with_one_end(recorder.events)


def _with_one_end(events: Sequence[Event]) -> list[Event]:
    """A copy, since events go on for as long as anything of the step is alive, of whose norms the last one counts."""
    last = max((place for place, event in enumerate(events) if event.name == "end"), default=-1)
    return [event for place, event in enumerate(events) if event.name != "end" or place == last]


def _masks_as_of_one_record() -> Any:
    """transformers makes other masks of tensors that it cannot look into, and looks for records in them."""

    def no(*_: object) -> None:
        """Neither are these tensors without values, nor are they several records."""

    def yes(*_: object) -> bool:
        """No token is padding, as a mask of ones that some models make themselves says."""
        return True

    return mock.patch.multiple(masking_utils, is_tracing=no, find_packed_sequence_indices=no, fast_all=yes)


def adapted(base: Any, adapter: AdapterSpec) -> PeftModel:
    """A base without memory with an adapter, of whose weights only names, shapes and types mean anything."""
    take_weights_away(base)
    base.requires_grad_(False)
    base.is_loaded_in_4bit = True
    with warnings.catch_warnings(), mock.patch.object(dora.DoraLinearLayer, "update_layer", _add_magnitudes):
        warnings.simplefilter("ignore")
        return add_adapter(base, adapter, seed=0)


def take_weights_away(base: Module) -> None:
    """Make a model's quantized layers `TracedLinear`s, and its experts `TracedExperts`.

    bitsandbytes makes biases in float32, and a checkpoint's are in 16 bits.
    """
    for layer in quantized_layers(base).values():
        layer.__class__ = TracedLinear
        if layer.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]  # of modules without one it is None
            layer.bias.data = layer.bias.data.to(COMPUTE_DTYPE)
    for module in base.modules():
        if isinstance(module, NF4Experts):
            module.__class__ = TracedExperts


def decoder_layers(decoder: Module) -> ModuleList:
    """The list of a decoder's layers: those that can recompute."""
    for module in decoder.modules():
        if isinstance(module, ModuleList) and len(module) and isinstance(module[0], GradientCheckpointingLayer):
            return module
    raise ValueError(f"{type(decoder).__name__} has no list of layers that can recompute")


def _move_to_card(base: Any) -> None:
    for module in base.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not isinstance(parameter, bnb.nn.Params4bit):
                fresh = torch.empty(parameter.shape, dtype=parameter.dtype, device=DEVICE)
                module._parameters[name] = torch.nn.Parameter(fresh, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=DEVICE)


def _mark_layers(decoder: Any, layers: ModuleList, recorder: Recorder) -> None:
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(partial(_mark, recorder, f"forward {index}"))
        layer.register_forward_hook(partial(_mark_gradient, recorder, f"backward {index}"))
    norms = [module for name, module in decoder.named_children() if "norm" in name or name.startswith("ln_")]
    if not norms:
        raise ValueError(f"{type(decoder).__name__} has no norm after its last layer")
    for norm in norms:
        norm.register_forward_pre_hook(partial(_mark, recorder, "end"))


def _mark(recorder: Recorder, name: str, *_: Any) -> None:
    recorder.mark(name)


def _mark_gradient(recorder: Recorder, name: str, _module: Any, _inputs: Any, out: Any) -> None:
    tensor: Any = out[0] if isinstance(out, tuple) else out
    if not torch.is_grad_enabled():
        return
    if not tensor.requires_grad:
        tensor.requires_grad_()  # a first layer without adapters stands in for one with, that others come behind
    tensor.register_hook(partial(_mark, recorder, name))
