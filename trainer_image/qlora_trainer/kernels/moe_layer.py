"""A decoder layer whose MLP is a mixture of experts: attention is `layer`'s, the rest is here; both passes by hand.

Rules: the block is a router and routed experts and nothing else. Experts have no adapters and compute their insides
again in the backward pass, so a layer keeps nothing of its second half but its input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora_trainer.kernels import ops
from qlora_trainer.kernels.layer import FusedLayer, Gated, Run
from qlora_trainer.kernels.lora_linears import LinearGroup
from qlora_trainer.kernels.moe_experts import NF4Experts


class Router:
    """The frozen router: a softmax over all experts, of which a token's largest are its experts' weights."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._weight: Tensor = module.weight.data
        self._divides = getattr(module, "norm_topk_prob", True)
        """Whether a token's weights are made to add up to one."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of each token [tokens, experts of a token], and their weights."""
        _, weights, index = self._module(x)
        return index, weights

    def backward(self, weights_grad: Tensor, x: Tensor, index: Tensor) -> Tensor:
        """The gradient to `x`."""
        probabilities = ops.affine(x, self._weight).softmax(-1, dtype=torch.float32)
        own, own_grad = probabilities.gather(1, index), weights_grad.float()
        if self._divides:
            total = own.sum(1, keepdim=True)
            own_grad = (own_grad - (own_grad * own).sum(1, keepdim=True) / total) / total
        logits_grad = torch.zeros_like(probabilities).scatter_(1, index, own_grad)
        logits_grad.sub_((own_grad * own).sum(1, keepdim=True)).mul_(probabilities)
        return ops.product(logits_grad.to(x.dtype), self._weight)


class MixtureLayer(FusedLayer):
    """One layer, callable in the place of its module's `forward`."""

    def _take_mlp(self, mlp: Any, adapter_name: str) -> tuple[LinearGroup, ...]:
        del adapter_name  # experts have no adapters
        assert isinstance(mlp.experts, NF4Experts), "other experts are not taken over"
        assert self._middle_norm is not None, "nor are mixtures that do not begin with a norm"
        self._norm = self._middle_norm
        self._router, self._experts = Router(mlp.gate), mlp.experts
        return ()

    def _mlp(self, middle: Tensor, run: Run) -> tuple[Tensor, Gated]:
        del run  # nothing is dropped
        normalized = self._norm(middle)
        out = self._experts(normalized, *self._router(normalized)).add_(middle)
        return out, Gated(gate_up=None, gate_up_low=None, down_low=None, added=None)

    def _mlp_in_tiles(self, middle: Tensor, run: Run) -> Tensor:
        return self._mlp(middle, run)[0]  # experts have tiles of their own

    def _mlp_backward(
        self, grad: Tensor, middle: Tensor, gated: Gated | None, run: Run
    ) -> tuple[Tensor, tuple[list[Tensor], ...]]:
        del gated, run  # nothing is kept, nothing dropped
        normalized = self._norm(middle)
        index, weights = self._router(normalized)
        normalized_grad, weights_grad = self._experts.mix_backward(grad, normalized, index, weights)
        normalized_grad += self._router.backward(weights_grad, normalized, index)
        return self._norm.backward(normalized_grad, middle, residual=grad), ()
