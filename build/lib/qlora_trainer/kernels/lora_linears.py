"""Linear layers that read one input: frozen NF4 weights, LoRA adapters on some of them, both passes by hand.

Query, key and value are a group, gate and up are one, and so are the output and the down projection alone:
y = x W' + scaling * dropout(x) A' B', where W stacks the members' weights. Rules:

- The weights are dequantized once per use, into one matrix, so that a group is one matrix product whatever it holds.
- The adapters' A are neighbors in memory, so their rank-r products are one product, and so are their gradients. Who
  moves them must keep them neighbors.
- The members' adapters share one dropout mask, as they share the input. Which elements it drops depends on its seed
  alone, so it is made anew wherever it is needed and never kept.
- No autograd in here: the layer decides what is kept between the passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn import Module, Parameter

from qlora_trainer.kernels import ops


@dataclass(frozen=True, slots=True)
class Dropout:
    """Which elements of an adapter's input are dropped."""

    probability: float
    seed: Tensor
    """int64, one for the whole micro-batch."""
    number: int
    """Added to the seed: the place in the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Adapter:
    """One member's adapter: the rows of its layer in the group's output, its ranks, its B."""

    outputs: slice
    ranks: slice
    b: Parameter


class LinearGroup:
    """One or more linear layers with a common input."""

    def __init__(self, modules: Sequence[Module], adapter_name: str, factor: float = 1.0) -> None:
        """`modules` are bitsandbytes' 4-bit layers or PEFT's LoRA layers around them; see `is_known`.

        All outputs are multiplied with `factor` before they are added to a residual stream.
        """
        self._bases = [_base(module) for module in modules]
        # As bare tensors: asking bitsandbytes' class of parameters for anything takes as long as a kernel's launch.
        self._packed: list[Tensor] = [base.weight.data.as_subclass(Tensor) for base in self._bases]
        self._states: list[QuantState] = [base.weight.quant_state for base in self._bases]
        self.inputs: int = self._bases[0].in_features
        self.outputs: int = sum(base.out_features for base in self._bases)
        self._biases = _stacked_biases(self._bases)
        self._wrapped: list[Any] = [module for module in modules if isinstance(module, LoraLayer)]
        self._adapters: list[_Adapter] = []
        self._a: Tensor | None = None
        self.parameters: list[Parameter] = []
        """A of every adapted member, then B of every one: the order of the gradients."""
        self.dropout_probability = 0.0
        self._factor = self._scaling = factor
        if self._wrapped:
            self._take_adapters(modules, adapter_name)

    @staticmethod
    def is_known(module: Module, adapter_name: str) -> bool:
        """Whether this is a layer that the group computes exactly as PEFT does."""
        base = _base(module)
        if not isinstance(base, Linear4bit) or getattr(base.weight, "quant_state", None) is None:
            return False
        if not isinstance(module, LoraLayer) or adapter_name not in module.lora_A:
            return module is base
        extras = module.lora_variant or module.lora_bias[adapter_name] or list(module.lora_A) != [adapter_name]
        dropout = module.lora_dropout[adapter_name]
        return not extras and isinstance(dropout, torch.nn.Identity | torch.nn.Dropout)

    def _take_adapters(self, modules: Sequence[Module], name: str) -> None:
        every_a: list[Parameter] = []
        row = rank = 0
        for module, base in zip(modules, self._bases, strict=True):
            rows = slice(row, row + base.out_features)
            row = rows.stop
            if isinstance(module, LoraLayer):
                a: Any = module.lora_A[name]
                b: Any = module.lora_B[name]
                every_a.append(a.weight)
                ranks = slice(rank, rank + len(every_a[-1]))
                rank = ranks.stop
                self._adapters.append(_Adapter(outputs=rows, ranks=ranks, b=b.weight))
        self._a = torch.cat([a.data for a in every_a])
        for a, adapter in zip(every_a, self._adapters, strict=True):
            a.data = self._a[adapter.ranks]
        self.parameters = [*every_a, *(adapter.b for adapter in self._adapters)]
        (scaling,) = {module.scaling[name] for module in self._wrapped}
        self._scaling = scaling * self._factor
        (self.dropout_probability,) = {getattr(module.lora_dropout[name], "p", 0.0) for module in self._wrapped}

    def weight(self) -> Tensor:
        """The dense weights [outputs, inputs]."""
        dense = torch.empty(self.outputs, self.inputs, dtype=self._states[0].dtype, device=self._packed[0].device)
        row = 0
        for packed, state, base in zip(self._packed, self._states, self._bases, strict=True):
            ops.dequantize(packed, state, dense[row : row + base.out_features])
            row += base.out_features
        return dense

    def forward(
        self, x: Tensor, dropout: Dropout | None, weight: Tensor | None = None, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The outputs, side by side, and the rank-r product, which `adapter_gradients` needs.

        `residual` is added to the outputs inside the matrix product, which spares a pass over both.
        """
        y = ops.affine(x, self.weight() if weight is None else weight, self._biases, residual, self._factor)
        low = self.low(x, dropout)
        if low is not None:
            for adapter in self._adapters:
                ops.add_product_(y[:, adapter.outputs], low[:, adapter.ranks], adapter.b.t(), self._scaling)
        return y, low

    def low(self, x: Tensor, dropout: Dropout | None) -> Tensor | None:
        """The rank-r product of all adapters, [tokens, ranks]."""
        return ops.affine(_dropped(x, dropout), self._stacked_a()) if self._active() else None

    def low_gradient(self, grad: Tensor) -> Tensor | None:
        """The gradient to the rank-r product, [tokens, ranks]: both other gradients need it."""
        if not self._active():
            return None
        low = grad.new_empty(len(grad), self._adapters[-1].ranks.stop)
        for adapter in self._adapters:
            ops.product(grad[:, adapter.outputs], adapter.b, out=low[:, adapter.ranks])
        return low.mul_(self._scaling) if self._scaling != 1.0 else low

    def input_gradient(
        self, grad: Tensor, low_grad: Tensor | None, dropout: Dropout | None, weight: Tensor | None = None
    ) -> Tensor:
        """The gradient to `x`."""
        x_grad = ops.product(grad, self.weight() if weight is None else weight)
        if self._factor != 1.0:
            x_grad.mul_(self._factor)
        if low_grad is not None and dropout is None:
            ops.add_product_(x_grad, low_grad, self._stacked_a())
        elif low_grad is not None and dropout is not None:
            back = ops.product(low_grad, self._stacked_a())
            ops.add_dropout_(x_grad, back, dropout.probability, dropout.seed, dropout.number)
        return x_grad

    def adapter_gradients(
        self, grad: Tensor, x: Tensor, low: Tensor | None, low_grad: Tensor | None, dropout: Dropout | None
    ) -> list[Tensor]:
        """The gradients to A, stacked, and to each B; nothing where there is no adapter. See `split`."""
        if low is None or low_grad is None:
            return []
        to_b = [ops.product(grad[:, adapter.outputs].t(), low[:, adapter.ranks]) for adapter in self._adapters]
        if self._scaling != 1.0:
            torch._foreach_mul_(to_b, self._scaling)  # pyright: ignore[reportPrivateUsage] - torch's optimizers use it
        return [ops.product(low_grad.t(), _dropped(x, dropout)), *to_b]

    def split(self, gradients: list[Tensor]) -> list[Tensor | None]:
        """`adapter_gradients` in the order of `parameters`."""
        if not gradients:
            return [None] * len(self.parameters)
        of_a, *of_b = gradients
        return [*(of_a[adapter.ranks] for adapter in self._adapters), *of_b]

    def _stacked_a(self) -> Tensor:
        """All A, one below the other, [ranks, inputs], wherever they have been moved."""
        assert self._a is not None, "only asked for where there are adapters"
        if self._a.data_ptr() != self.parameters[0].data_ptr():
            every_a = self.parameters[: len(self._adapters)]
            self._a = every_a[0].data.as_strided(self._a.shape, self._a.stride())
            places = [self._a[adapter.ranks].data_ptr() for adapter in self._adapters]
            assert places == [a.data_ptr() for a in every_a], "somebody moved A apart"
        return self._a

    def _active(self) -> bool:
        return self._a is not None and not self._wrapped[0].disable_adapters


def _base(module: Module) -> Any:
    """The linear layer, out of PEFT's wrapper."""
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def _stacked_biases(bases: Sequence[Any]) -> Tensor | None:
    """The biases side by side, zero where a layer has none; None where none has one."""
    if all(base.bias is None for base in bases):
        return None
    like = next(base.bias for base in bases if base.bias is not None)
    return torch.cat([base.bias.data if base.bias is not None else like.new_zeros(base.out_features) for base in bases])


def _dropped(x: Tensor, dropout: Dropout | None) -> Tensor:
    return x if dropout is None else ops.dropout(x, dropout.probability, dropout.seed, dropout.number)
