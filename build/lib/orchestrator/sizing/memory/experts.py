"""Bytes of a layer's routed experts: their weights, and what both passes take by the way.

The passes are those of `qlora_trainer/kernels/moe_experts.py`, method by method, and must be changed with them. Which
experts tokens choose makes no difference to bytes: each token has as many rows as it has experts, sorted by expert.
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.api import trainer_facts
from orchestrator.api.model_facts import Mixture
from orchestrator.sizing.memory.linear_layers import Linear
from orchestrator.sizing.memory.timeline import BF16_BYTES, FP32_BYTES, Timeline, allocated

INDEX_BYTES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """A layer's experts, and the tokens that go through them."""

    tokens: int
    hidden: int
    mixture: Mixture

    def forward_bytes(self) -> int:
        """`NF4Experts.mix` at its highest, its output counted."""
        tile = self._tile()
        return self._stream + tile.forward_bytes()

    def backward_bytes(self) -> int:
        """`NF4Experts.mix_backward` at its highest, its outputs counted."""
        weights = allocated(self.tokens * self.mixture.experts_per_token * FP32_BYTES)
        return self._stream + weights + self._tile().backward_bytes()

    @property
    def _stream(self) -> int:
        return allocated(self.tokens * self.hidden * BF16_BYTES)

    def _tile(self) -> _Tile:
        tokens, inner = min(self.tokens, trainer_facts.EXPERT_TILE_TOKENS), self.mixture.expert_size
        rows = tokens * self.mixture.experts_per_token
        return _Tile(
            order=rows * INDEX_BYTES,
            scalars=rows * FP32_BYTES,
            hidden=rows * self.hidden * BF16_BYTES,
            inner=rows * inner * BF16_BYTES,
            dense_gate_up=self._dense(2 * inner * self.hidden * BF16_BYTES),
            dense_down=self._dense(inner * self.hidden * BF16_BYTES),
        )

    def _dense(self, size: int) -> int:
        """The experts' matrices of so many bytes that are dequantized at a time."""
        return min(self.mixture.experts, max(1, trainer_facts.EXPERT_DENSE_BYTES // size)) * size


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tile:
    """What goes through the experts together; sizes in bytes."""

    order: int
    scalars: int
    """A float32 number for each row."""
    hidden: int
    """The rows, as wide as the model."""
    inner: int
    """The rows, as wide as an expert."""
    dense_gate_up: int
    dense_down: int
    """The experts' matrices that are dequantized at a time."""

    def forward_bytes(self) -> int:
        """`_mix_tile`."""
        t = Timeline()
        self._gate_up(t)
        t.take(inner=self.inner)
        t.drop("gate_up")
        t.take(found=self.hidden)
        t.passing(dense=self.dense_down)
        return t.peak_bytes

    def backward_bytes(self) -> int:
        """`_mix_tile_backward`."""
        t = Timeline()
        self._gate_up(t)
        t.take(to_inner=self.inner)
        t.passing(dense=self.dense_down)
        t.passing(inner=self.inner, product=self.inner)
        t.take(to_weights=self.scalars)
        t.passing(weights=self.scalars)
        t.drop("to_inner")
        t.take(found=self.hidden)
        t.passing(dense=self.dense_gate_up)
        return t.peak_bytes

    def _gate_up(self, t: Timeline) -> None:
        t.take(slots=self.order, chosen=self.order)
        t.take(places=self.order)
        t.passing(sorted=self.order)
        t.take(tokens=self.order)
        t.drop("chosen")
        t.take(gate_up=2 * self.inner)
        t.passing(dense=self.dense_gate_up)


def expert_linears(mixture: Mixture, hidden: int) -> tuple[Linear, Linear]:
    """All experts of a layer as they are kept: gate and up in one parameter, down in another."""
    inner = mixture.experts * mixture.expert_size
    return Linear(name="gate_up", inputs=hidden, outputs=2 * inner), Linear(name="down", inputs=inner, outputs=hidden)


def fusing_bytes(mixture: Mixture, hidden: int) -> int:
    """More than a layer's quantized gates and ups, while transformers fuses them on the card in bfloat16."""
    gate_up, _ = expert_linears(mixture, hidden)
    return 2 * gate_up.parameters * BF16_BYTES - gate_up.weight_bytes
