"""Which architectures' layers are taken over, and what the layers of one micro-batch share.

Rules: what is taken over is exactly what `layer` computes, transformers' own classes of the Llama family, every linear
layer in NF4, adapters without extras. Everything else stays with transformers and PEFT, and a line in the log says why.
`FusedDecoder.compared` holds every layer against the untouched one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer
from transformers.models.granite.modeling_granite import GraniteDecoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer
from transformers.models.olmo2.modeling_olmo2 import Olmo2DecoderLayer
from transformers.models.olmo3.modeling_olmo3 import Olmo3DecoderLayer
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer
from transformers.models.smollm3.modeling_smollm3 import SmolLM3DecoderLayer

from orchestrator.api import trainer_facts
from orchestrator.api.layer_ways import LayerWays
from orchestrator.api.plan import MemoryPlan
from qlora_trainer.kernels import ops
from qlora_trainer.kernels.host_offload import ActivationStore, InputStore
from qlora_trainer.kernels.layer import (
    FusedLayer,
    Gate,
    HeadShape,
    Norm,
    NormFunction,
    Run,
    gate_and_up,
    query_key_value,
)
from qlora_trainer.kernels.lora_linears import LinearGroup
from qlora_trainer.kernels.moe_experts import SWIGLU, NF4Experts
from qlora_trainer.kernels.moe_layer import MixtureLayer
from qlora_trainer.kernels.packed_attention import NAME, PackedAttention
from qlora_trainer.kernels.streamed_layers import StreamedLayers

WINDOWS: dict[type[Any], Callable[[Any], int | None]] = {
    LlamaDecoderLayer: lambda _: None,
    GraniteDecoderLayer: lambda _: None,
    MistralDecoderLayer: lambda attention: attention.config.sliding_window,
    Qwen2DecoderLayer: lambda attention: attention.sliding_window,
    Qwen3DecoderLayer: lambda attention: attention.sliding_window,
    Phi3DecoderLayer: lambda attention: getattr(attention.config, "sliding_window", None),
    MixtralDecoderLayer: lambda attention: getattr(attention.config, "sliding_window", None),
    Qwen3MoeDecoderLayer: lambda attention: attention.sliding_window,
    SmolLM3DecoderLayer: lambda attention: attention.sliding_window,
    Olmo2DecoderLayer: lambda _: None,
    Olmo3DecoderLayer: lambda attention: attention.sliding_window,
    Gemma3DecoderLayer: lambda attention: attention.sliding_window,
}
"""The registry: layer classes that `FusedLayer` computes, and where each keeps its sliding window."""
GATES: dict[str, Gate] = {
    "silu": (ops.swiglu, ops.swiglu_backward_),
    "gelu_pytorch_tanh": (ops.geglu, ops.geglu_backward_),
}
"""The gated activations that `FusedLayer` computes, by transformers' names."""
MIXTURES = MixtralDecoderLayer, Qwen3MoeDecoderLayer
"""The layer classes that `MixtureLayer` computes."""

LARGEST_DIFFERENCE = 0.05
"""How far a layer may be from the untouched one, relative to what it adds to its input. Rounding makes up to 0.02
on real models; leaving out any part is off by ten times as much. Logits are no measure: SmolLM2 is so ill-conditioned
on a few tokens that the roundings of thirty layers change them by 90 %, whoever computes."""

log = logging.getLogger(__name__)


class FusedDecoder:
    """The layers that were taken over."""

    def __init__(self, heads: HeadShape, *stores: InputStore | ActivationStore | None) -> None:
        """`heads`: of the first layer, of which others differ in windows and positions alone."""
        self.heads = heads
        self._stores = [store for store in stores if store is not None]
        self._seed: Tensor | None = None
        self._bypassed = False
        self._differences: list[float] | None = None
        self._taken_over: list[Module] = []
        self._runs: dict[int, Run] = {}
        """By the table of angles: some families have one for layers with windows, and another for the others."""

    def begin(self, seed: Tensor) -> None:
        """A micro-batch begins; its adapters' dropout is drawn from the seed."""
        self._seed = seed
        self._runs.clear()
        for store in self._stores:
            store.clear()

    @contextmanager
    def bypassed(self) -> Generator[None]:
        """Compute with transformers' and PEFT's own layers in the meantime."""
        self._bypassed = True
        try:
            yield
        finally:
            self._bypassed = False

    @contextmanager
    def compared(self) -> Generator[list[float]]:
        """Like `bypassed`; the list is filled with how far each layer of ours is off, given the same input."""
        self._differences = []
        try:
            with self.bypassed():
                yield self._differences
        finally:
            self._differences = None

    def take_over(self, module: Module, layer: FusedLayer) -> None:
        """Be the module's forward pass."""
        module.forward = partial(self._forward, module, layer)
        self._taken_over.append(module)

    def take_over_norm(self, module: Module) -> None:
        """Be the forward pass of the decoder's last normalization."""
        module.forward = partial(self._forward_norm, module, Norm.of(module))
        self._taken_over.append(module)

    def give_back(self) -> None:
        """Leave all modules to transformers and PEFT."""
        for module in self._taken_over:
            del module.forward

    def _forward(self, module: Module, layer: FusedLayer, hidden_states: Tensor, *args: Any, **inputs: Any) -> Tensor:
        if not self._bypassed:
            return self._computed(module, layer, hidden_states, inputs)
        theirs = type(module).forward(module, hidden_states, *args, **inputs)
        if self._differences is not None:
            ours = self._computed(module, layer, hidden_states, inputs)
            added = (theirs - hidden_states).float().norm()
            self._differences.append(float((ours - theirs).float().norm() / added))
        return theirs

    def _computed(self, module: Module, layer: FusedLayer, hidden_states: Tensor, inputs: dict[str, Any]) -> Tensor:
        cos, sin = inputs["position_embeddings"]
        run = self._runs.get(id(cos))
        if run is None:
            seed = self._seed if module.training else None
            run = self._runs[id(cos)] = Run(cos=cos[0], sin=sin[0], seed=seed, trains=torch.is_grad_enabled())
        return layer(hidden_states, run)

    def _forward_norm(self, module: Module, norm: Norm, hidden_states: Tensor) -> Tensor:
        if self._bypassed:
            return type(module).forward(module, hidden_states)
        return NormFunction.apply(hidden_states[0], norm).unsqueeze(0)


def fuse(
    decoder: Any,
    config: PreTrainedConfig,
    attention: PackedAttention,
    *,
    adapter_name: str,
    plan: MemoryPlan,
    device: torch.device,
    streamed: StreamedLayers | None = None,
) -> FusedDecoder | None:
    """Take over the decoder's layers, as the plan has them; None where that is not exact."""
    layers: list[Any] = list(getattr(decoder, "layers", []))
    obstacle = next(_obstacles(layers, config, adapter_name), None)
    if obstacle is not None:
        log.info("the layers run as transformers and PEFT compute them: %s", obstacle)
        return None
    ways = LayerWays.of(len(layers), plan.recompute_layers, plan.offloaded_layers)
    store = InputStore(device) if "activations" in plan.offload else None
    activations = ActivationStore(device) if ways.offloaded_layers else None
    fused = FusedDecoder(_heads(layers[0], config), store, activations)
    for number, module in enumerate(layers):
        kind = MixtureLayer if isinstance(module, MIXTURES) else FusedLayer
        layer = kind(
            module,
            number=number,
            adapter_name=adapter_name,
            heads=_heads(module, config),
            gate=GATES[_activation(module, config)],
            attention=attention,
            ways=ways,
            keeps_attention=plan.keep_attention,
            store=store,
            activations=activations,
            streamed=streamed,
        )
        fused.take_over(module, layer)
    fused.take_over_norm(decoder.norm)
    return fused


def _heads(module: Any, config: PreTrainedConfig) -> HeadShape:
    own = module.self_attn
    return HeadShape(
        queries=config.num_attention_heads,
        keys=config.num_key_value_heads,
        size=own.head_dim,
        scaling=own.scaling,
        window=WINDOWS[type(module)](own),
        rotates=bool(getattr(own, "use_rope", True)),
    )


def _activation(module: Any, config: Any) -> str:
    """The name of what gates the layer's MLP."""
    return config.hidden_activation if isinstance(module, Gemma3DecoderLayer) else config.hidden_act


def _obstacles(layers: list[Any], config: PreTrainedConfig, adapter_name: str) -> Iterator[str]:
    """What `FusedLayer` would not compute exactly."""
    if not layers or any(type(layer) not in WINDOWS for layer in layers):
        yield f"{type(layers[0]).__name__ if layers else 'the decoder'} is not one of the known layers"
        return
    if config.model_type not in trainer_facts.HANDWRITTEN_TYPES:
        yield f"layers of type {config.model_type} are sized as transformers computes them"
    # transformers has no public name for what it chose.
    attention = config._attn_implementation  # pyright: ignore[reportPrivateUsage]
    if attention != NAME:
        yield f"it attends with {attention}"
    if (activation := _activation(layers[0], config)) not in GATES:
        yield f"its MLP is gated with {activation}"
    if getattr(config, "attn_logit_softcapping", None):
        yield "it softcaps the scores of its attention"
    if getattr(config, "attention_dropout", 0.0):
        yield "it drops attention weights"
    if getattr(config, "resid_pdrop", 0.0):
        yield "it drops what a layer adds"
    if getattr(config, "router_jitter_noise", 0.0):
        yield "its router is shaken"
    for layer in layers:
        modules: list[Any] = [*query_key_value(layer.self_attn), layer.self_attn.o_proj]
        if isinstance(layer, MIXTURES):
            experts = getattr(layer.mlp, "experts", None)
            if not isinstance(experts, NF4Experts) or experts.layout != SWIGLU or experts.biased:
                yield "not every layer has experts in NF4 that are gated with SwiGLU"
                return
        else:
            modules += [*gate_and_up(layer.mlp), layer.mlp.down_proj]
        odd = next((module for module in modules if not LinearGroup.is_known(module, adapter_name)), None)
        if odd is not None:
            yield f"{type(odd).__name__} has extras, such as DoRA's"
            return


def draw_seed() -> int:
    """A seed for a micro-batch's dropout, from torch's generator on the CPU: asking it never waits for the card."""
    return int(torch.randint(1 << 62, ()))
