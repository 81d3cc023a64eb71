"""A decoder layer whose MLP is a mixture of experts: attention is `layer`'s, the rest is here; both passes by hand.

`decoder` takes it for blocks that are a router and routed experts and nothing else. Experts have no adapters and make
their insides again on the way back, so a layer keeps nothing of its second half but what goes in.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Module

from qlora_trainer.kernels import ops
from qlora_trainer.kernels.layer import FusedLayer, Gated, Run
from qlora_trainer.kernels.lora_linears import LinearGroup
from qlora_trainer.kernels.moe_experts import NF4Experts


class Router:
    """The frozen router: a softmax over all experts, of which a token's largest are its weights."""

    def __init__(self, module: Module) -> None:
        self._module = module
        self._weight = module.weight.data
        self._divides = getattr(module, "norm_topk_prob", True)
        """Whether a token's weights are made to add up to one."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of each token [tokens, experts of a token], and their weights."""
        _, weights, index = self._module(x)
        return index, weights

    def backward(self, to_weights: Tensor, x: Tensor, index: Tensor) -> Tensor:
        """The gradient to `x`."""
        chances = ops.affine(x, self._weight).softmax(-1, dtype=torch.float32)
        own, slope = chances.gather(1, index), to_weights.float()
        if self._divides:
            total = own.sum(1, keepdim=True)
            slope = (slope - (slope * own).sum(1, keepdim=True) / total) / total
        to_logits = torch.zeros_like(chances).scatter_(1, index, slope)
        to_logits.sub_((slope * own).sum(1, keepdim=True)).mul_(chances)
        return ops.product(to_logits.to(x.dtype), self._weight)


class MixtureLayer(FusedLayer):
    """One layer, callable in the place of its module's `forward`."""

    def _take_mlp(self, mlp: Module, _adapter_name: str) -> tuple[LinearGroup, ...]:
        self._router, self._experts = Router(mlp.gate), mlp.experts
        assert isinstance(self._experts, NF4Experts), "other experts are not taken over"
        return ()

    def _mlp(self, middle: Tensor, _run: Run) -> tuple[Tensor, Gated]:
        normalized = self._middle_norm(middle)
        out = self._experts(normalized, *self._router(normalized)).add_(middle)
        return out, Gated(gate_up=None, gate_up_low=None, down_low=None)

    def _mlp_in_tiles(self, middle: Tensor, run: Run) -> Tensor:
        return self._mlp(middle, run)[0]  # experts have tiles of their own

    def _mlp_backward(
        self, grad: Tensor, middle: Tensor, _gated: Gated | None, _run: Run
    ) -> tuple[Tensor, tuple[list[Tensor], ...]]:
        normalized = self._middle_norm(middle)
        index, weights = self._router(normalized)
        normalized_grad, to_weights = self._experts.mix_backward(grad, normalized, index, weights)
        normalized_grad += self._router.backward(to_weights, normalized, index)
        return self._middle_norm.backward(normalized_grad, middle, residual=grad), ()
