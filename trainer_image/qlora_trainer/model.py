"""The model that is trained: a frozen base in NF4, a bfloat16 LoRA adapter, and the way from tokens to loss.

Built by `train` at the start of an attempt. Rules, each the answer to a trap:

- The base stays as it is loaded: 4-bit linear layers and experts with double quantization (Dettmers et al., 2023),
  everything else in bfloat16. `prepare_model_for_kbit_training` would make embeddings and head float32 (+3.9 GiB at
  70B).
- The adapter is bfloat16, and stays so on resume: saved tensors are copied into the existing parameters.
- On CPUs with AVX512-BF16, bitsandbytes repacks a layer's weight the first time it is evaluated, and from then on
  bypasses the autograd path in training. It is told not to.
- Only decoder layers up to `plan.recompute_layers` recompute their activations.
- Layers that `kernels` knows are computed there; the others by transformers and PEFT.
- What this module assumes of an architecture (how logits come from hidden states, that records in one row do not see
  each other) is checked on a few tokens before training (`check`), because a wrong loss looks like a bad dataset.
"""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import torch
from accelerate import init_empty_weights
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils import GENERATION_CONFIG_NAME

from orchestrator.api.job import AdapterSpec
from orchestrator.api.plan import MemoryPlan
from qlora_trainer import attention, experts
from qlora_trainer.batches import MicroBatch, StepInputs, collate
from qlora_trainer.kernels import ops
from qlora_trainer.kernels.decoder import LARGEST_DIFFERENCE, FusedDecoder, draw_seed, fuse
from qlora_trainer.kernels.experts import NF4Experts, nf4
from qlora_trainer.kernels.hostmemory import HostEmbedding, InputStore
from qlora_trainer.loss import Head, cross_entropy
from qlora_trainer.model_source import RANDOM_WEIGHTS_NAME, RANDOM_WEIGHTS_VARIABLE
from qlora_trainer.outcome import UserError
from qlora_trainer.quantized import QUANTIZATION, QuantizedCache, ReadAhead, UnfitEntry, entry_key, fill, tensors_of
from qlora_trainer.replay import Replay

COMPUTE_DTYPE = torch.bfloat16
ADAPTER_NAME = "default"
CHECKED_LAYER_TYPES = {"full_attention", "sliding_attention"}
LOGITS_TOLERANCE = 0.05
"""Largest relative difference between two bfloat16 ways to the same logits; a wrong way is off by far more."""

log = logging.getLogger(__name__)


def load_base(
    folder: Path,
    device: torch.device,
    packed_attention: attention.PackedAttention,
    cached: ReadAhead | None = None,
) -> PreTrainedModel:
    """The base of a Hugging Face model folder, frozen and quantized on the device."""
    began = time.perf_counter()
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    packed_attention.register()
    implementation = _attention_implementation(config)
    if (folder / RANDOM_WEIGHTS_NAME).is_file():
        base, origin = _random_base(config, implementation, device, seed=_random_seed(folder)), "drawn at random"
    else:
        base, origin = _checkpoint_base(folder, config, implementation, device, cached or ReadAhead(folder, device))
    base.requires_grad_(False)
    base.config.use_cache = False
    _keep_cpu_weights_unpacked(base)
    _refuse_unquantized(base)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of the pages that dense weights have left; see `core/reserved`
    gib = sum(parameter.nbytes for parameter in base.parameters()) / 2**30
    log.info("loaded %.1f GiB in %.1f s, %s", gib, time.perf_counter() - began, origin)
    return base


def _checkpoint_base(
    folder: Path, config: PreTrainedConfig, implementation: str, device: torch.device, cached: ReadAhead
) -> tuple[PreTrainedModel, str]:
    """The base and how it was had. What had to be quantized is kept at once, while nothing else needs card or disk."""
    base = _cached_base(cached, folder, config, implementation, device)
    if base is not None:
        return base, "from the cache of quantized weights"
    base = _quantized_base(folder, config, implementation, device)
    if (cache := QuantizedCache.from_environment()) is not None:
        _keep_cpu_weights_unpacked(base)
        cache.write(entry_key(folder, device), tensors_of(base))
    return base, "quantized"


def _quantized_base(
    folder: Path, config: PreTrainedConfig, implementation: str, device: torch.device
) -> PreTrainedModel:
    """Read through a memory map and quantized on the device, one tensor after the other."""
    return AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        quantization_config=_quantization(),
        dtype=COMPUTE_DTYPE,
        device_map={"": str(device)},
        attn_implementation=implementation,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
    )


def _cached_base(
    cached: ReadAhead, folder: Path, config: PreTrainedConfig, implementation: str, device: torch.device
) -> PreTrainedModel | None:
    tensors = cached.take()
    if tensors is None:
        return None
    base, quantizer = _weightless_base(folder, config, implementation, device)
    try:
        fill(base, tensors)
        if any(parameter.is_meta for parameter in base.parameters()):
            base.tie_weights()  # an entry holds tied weights once
        unfilled = [name for name, parameter in base.named_parameters() if parameter.is_meta]
        unfilled += [name for name, _ in base.named_buffers() if name not in tensors]
        if unfilled:
            raise UnfitEntry(f"it lacks {unfilled[0]}")
    except UnfitEntry as error:
        log.warning("the cached quantized weights do not fit, and are not used: %s", error)
        return None
    quantizer.postprocess_model(base)
    return base


def _weightless_base(
    folder: Path, config: PreTrainedConfig, implementation: str, device: torch.device
) -> tuple[PreTrainedModel, HfQuantizer]:
    """What `from_pretrained` builds before it reads weights, and the rest of what it leaves on a model."""
    # Not `torch.device("meta")`: to compute on tensors without memory, as for buffers and first weights, imports sympy.
    with init_empty_weights(include_buffers=False), no_init_weights():
        base = AutoModelForCausalLM.from_config(config, dtype=COMPUTE_DTYPE, attn_implementation=implementation)
        quantizer = experts.Quantizer(_quantization())
        quantizer.preprocess_model(base, device_map={"": str(device)})
    base.config.quantization_config = quantizer.quantization_config
    base.config.name_or_path = str(folder)
    base.hf_quantizer = quantizer
    if (folder / GENERATION_CONFIG_NAME).is_file():
        base.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return base.eval(), quantizer


def _quantization() -> experts.Quantization:
    return experts.Quantization(**QUANTIZATION)


def _attention_implementation(config: PreTrainedConfig) -> str:
    """Packed attention, where the architecture asks for nothing but causal attention with or without a window."""
    text = config.get_text_config()
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    layer_types = set(getattr(text, "layer_types", None) or CHECKED_LAYER_TYPES)
    if architecture._supports_attention_backend and layer_types <= CHECKED_LAYER_TYPES:
        return attention.NAME
    return "sdpa" if architecture._supports_sdpa else "eager"  # it may look its attention up in a table of its own


def _keep_cpu_weights_unpacked(base: PreTrainedModel) -> None:
    for layer in _quantized_layers(base).values():
        layer.support_avx512bf16_for_cpu = False


def _refuse_unquantized(base: PreTrainedModel) -> None:
    """What is left in 16 bits is why a model would not fit where it should."""
    if reason := experts.refusal(base):
        raise UserError(f"{type(base).__name__} cannot be trained here: {reason}; choose another model")
    matrix = base.config.get_text_config().hidden_size ** 2  # smaller ones, such as convolutions, do not matter
    for name, parameter in base.named_parameters():
        if parameter.dim() >= 3 and parameter.is_floating_point() and parameter.numel() >= matrix:
            raise UserError(
                f"{type(base).__name__} keeps weights in {name}, a {parameter.dim()}-dimensional parameter that cannot "
                "be quantized to NF4; choose a model of linear layers"
            )
    if not _quantized_layers(base):
        raise UserError(f"{type(base).__name__} has no linear layer that can be quantized to NF4; choose another model")


def _quantized_layers(model: torch.nn.Module) -> dict[str, bnb.nn.Linear4bit]:
    return {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}


# --- random weights: sizing and benchmarks without a checkpoint


def _random_seed(folder: Path) -> int:
    if os.environ.get(RANDOM_WEIGHTS_VARIABLE) != "1":
        raise UserError(
            f"{folder} holds {RANDOM_WEIGHTS_NAME} in place of weights, which is for sizing and benchmarks; "
            f"give a model with safetensors, or set {RANDOM_WEIGHTS_VARIABLE}=1"
        )
    return int(json.loads((folder / RANDOM_WEIGHTS_NAME).read_text())["seed"])


def _random_base(config: PreTrainedConfig, implementation: str, device: torch.device, *, seed: int) -> PreTrainedModel:
    """N(0, 0.02) drawn and quantized layer by layer: the memory layout of a real checkpoint, with no file read."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=COMPUTE_DTYPE, attn_implementation=implementation)
    experts.replace_experts(base)
    generator = torch.Generator(device).manual_seed(seed)
    head = base.get_output_embeddings()
    for name, module in list(base.named_modules()):
        if isinstance(module, NF4Experts):
            _draw_experts(module, device, generator)
        elif isinstance(module, torch.nn.Linear) and module is not head:
            base.set_submodule(name, _random_layer(module, device, generator))
        elif type(module).__name__.endswith("RotaryEmbedding"):
            base.set_submodule(name, type(module)(config).to(device))
        elif any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            _fill_buffers(base, module, device)
    for name, parameter in list(base.named_parameters()):
        if parameter.is_meta:
            values = torch.ones(parameter.shape, dtype=COMPUTE_DTYPE, device=device)
            if parameter.dim() > 1:
                values.normal_(0, 0.02, generator=generator)
            owner, _, leaf = name.rpartition(".")
            setattr(base.get_submodule(owner), leaf, Parameter(values, requires_grad=False))
    base.tie_weights()
    base.is_loaded_in_4bit = True  # as transformers' own loading marks it, for PEFT
    return base


def _fill_buffers(base: PreTrainedModel, module: torch.nn.Module, device: torch.device) -> None:
    """Constants such as Gemma's scale of embeddings, which no checkpoint holds: transformers fills them itself."""
    for name, buffer in list(module.named_buffers(recurse=False)):
        setattr(module, name, torch.empty_like(buffer, device=device))
    base._init_weights(module)


def _random_layer(linear: torch.nn.Linear, device: torch.device, generator: torch.Generator) -> bnb.nn.Linear4bit:
    shape = (linear.out_features, linear.in_features)
    weight = torch.empty(shape, dtype=COMPUTE_DTYPE, device=device).normal_(0, 0.02, generator=generator)
    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=COMPUTE_DTYPE,
        quant_type="nf4",
        device="meta",
    )
    layer.weight = bnb.nn.Params4bit(weight, quant_type="nf4", compress_statistics=True, module=layer).to(device)
    return layer


def _draw_experts(module: NF4Experts, device: torch.device, generator: torch.Generator) -> None:
    """Put together from parts, as transformers fuses the experts of a checkpoint: that takes memory too."""

    def drawn() -> Tensor:
        shape = (module.experts, module.inner, module.hidden)
        return torch.empty(shape, dtype=COMPUTE_DTYPE, device=device).normal_(0, 0.02, generator=generator)

    module.gate_up_proj = nf4(torch.cat([drawn(), drawn()], dim=1)).to(device)
    module.down_proj = nf4(drawn().view(module.down_proj.shape)).to(device)


# --- the adapter


def add_adapter(base: PreTrainedModel, adapter: AdapterSpec, *, seed: int) -> PeftModel:
    """The base with a fresh adapter: A drawn from the seed, B zero, so it begins as the base itself."""
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=float(adapter.dropout),
        target_modules=_target_modules(base, adapter),
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
        bias="none",
    )
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        # PEFT still asks for `is_gradient_checkpointing`, which transformers has renamed.
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        try:
            model = get_peft_model(base, config, adapter_name=ADAPTER_NAME, autocast_adapter_dtype=False)
        except ValueError as error:  # modules of an architecture that PEFT knows to be unfit
            raise UserError(f"adapter: PEFT refuses it for this model; {error}") from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(COMPUTE_DTYPE)
    return model


def _target_modules(base: PreTrainedModel, adapter: AdapterSpec) -> list[str]:
    """Module names as PEFT matches them: a layer's last name, or more of its path."""
    names = list(_quantized_layers(base))
    if adapter.target_modules == "all-linear":
        return sorted({name.rpartition(".")[2] for name in names})
    for wanted in adapter.target_modules:
        if not any(name == wanted or name.endswith(f".{wanted}") for name in names):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
            raise UserError(
                f"adapter.targetModules: {wanted!r} is none of the model's quantized linear layers; there are: {known}"
            )
    return list(adapter.target_modules)


# --- what the loop works with


class TrainingModel:
    """Base and adapter as the training loop sees them: micro-batch in, loss out."""

    def __init__(
        self, peft_model: PeftModel, plan: MemoryPlan, packed_attention: attention.PackedAttention, neftune_alpha: float
    ) -> None:
        self.peft_model = peft_model
        self.base: PreTrainedModel = peft_model.get_base_model()
        self._decoder = self.base.get_decoder()
        self._head = _head(self.base)
        self.device = self._head.weight.device  # the embeddings may be on the host
        self._attention = packed_attention
        self._plan = plan
        self._neftune_alpha = neftune_alpha
        self._saved = _saved_parameters(peft_model)
        self._fused = fuse(
            self._decoder,
            self.base.config.get_text_config(),
            packed_attention,
            adapter_name=ADAPTER_NAME,
            recompute_layers=plan.recompute_layers,
            store=InputStore(self.device) if "activations" in plan.offload else None,
        )
        if self._fused is None:
            self._go_without_fused_layers()
        self._host_embedding = self._offloaded_embedding() if "embeddings" in plan.offload else None
        self._replay = self._make_replay()

    def train(self) -> None:
        """Dropout and noise on."""
        self.peft_model.train()

    def eval(self) -> None:
        """Dropout and noise off."""
        self.peft_model.eval()

    def trainable(self) -> Iterator[tuple[str, Parameter]]:
        """The adapter's parameters under the names that they are saved by, in the model's order."""
        return iter(self._saved.items())

    def adapter(self) -> dict[str, Tensor]:
        """The live adapter as PEFT saves it."""
        return {name: parameter.detach() for name, parameter in self._saved.items()}

    def load_adapter(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy saved tensors into the adapter; they must be of exactly this adapter."""
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        own = {name: (parameter.shape, parameter.dtype) for name, parameter in self._saved.items()}
        if shapes != own:
            odd = sorted(name for name in shapes.keys() | own.keys() if shapes.get(name) != own.get(name))
            raise ValueError(f"the saved adapter is not of this model and spec; they differ in {odd[:3]}")
        for name, parameter in self._saved.items():
            parameter.data.copy_(tensors[name])

    def loss(self, batch: MicroBatch, *, divisor: float) -> Tensor:
        """Summed cross-entropy of the micro-batch's targets, over `divisor`."""
        inputs = StepInputs.of(batch, draw_seed(), divisor, self.device)
        if self._replay is None:
            return self._loss(inputs)
        return self._replay.make_room(lambda: self._loss(inputs))

    def accumulate(self, batch: MicroBatch, *, divisor: float, between: Callable[[], None] = lambda: None) -> Tensor:
        """`loss`, whose gradients are added to the adapter's; `between` is called between both passes.

        The answer is good until the next call.
        """
        if self._replay is not None and self._replay.takes(batch):
            return self._replay.run(batch, divisor, between)
        loss = self.loss(batch, divisor=divisor)
        between()
        loss.backward()
        return loss.detach()

    def linear_weights(self) -> int:
        """Weights that every token is multiplied with: the quantized layers, its experts and the head."""
        layers = sum(layer.in_features * layer.out_features for layer in _quantized_layers(self.base).values())
        chosen = getattr(self.base.config.get_text_config(), "num_experts_per_tok", 0)
        return layers + chosen * sum(each.expert_weights for each in self._experts()) + self._head.weight.numel()

    def _experts(self) -> list[NF4Experts]:
        return [module for module in self.base.modules() if isinstance(module, NF4Experts)]

    @contextmanager
    def _silent_experts(self) -> Iterator[None]:
        """Without routed experts: they look at each token alone, but round by how many have chosen them."""
        modules = self._experts()
        for module in modules:
            module.silent = True
        try:
            yield
        finally:
            for module in modules:
                module.silent = False

    def _loss(self, inputs: StepInputs) -> Tensor:
        return cross_entropy(
            self._hidden(inputs).flatten(0, 1),
            inputs.batch.targets.flatten(),
            self._head,
            chunk_tokens=self._plan.loss_chunk_tokens,
            scale=inputs.scale,
            positions=inputs.batch.supervised,
        )

    def _hidden(self, inputs: StepInputs) -> Tensor:
        batch, on_device = inputs.host, inputs.batch
        self._attention.expect(batch, on_device.record_starts)
        if self._fused is not None:
            self._fused.begin(inputs.seed)
        noisy = self._neftune_alpha > 0 and self.peft_model.training
        if noisy or self._host_embedding is not None:
            embedded = self._embedded(batch, on_device)
            tokens = {"inputs_embeds": self._with_noise(embedded, on_device) if noisy else embedded}
        else:
            tokens = {"input_ids": on_device.input_ids}
        answer = self._decoder(**tokens, position_ids=on_device.position_ids, use_cache=False)
        return answer.last_hidden_state.to(self._head.weight.dtype)  # some architectures end in float32

    def _embedded(self, batch: MicroBatch, on_device: MicroBatch) -> Tensor:
        if self._host_embedding is not None:
            return self._host_embedding(batch.input_ids)
        return self.base.get_input_embeddings()(on_device.input_ids)

    def _with_noise(self, embedded: Tensor, batch: MicroBatch) -> Tensor:
        """NEFTune (Jain et al., 2023, algorithm 1): uniform noise of alpha / sqrt(record length x width)."""
        lengths = batch.record_starts.diff().repeat_interleave(batch.record_starts.diff(), output_size=batch.tokens)
        size = self._neftune_alpha / (lengths * embedded.shape[-1]).sqrt()
        return embedded + torch.empty_like(embedded).uniform_(-1, 1) * size[None, :, None].to(embedded.dtype)

    def _go_without_fused_layers(self) -> None:
        self._fused = self._replay = None
        if "activations" in self._plan.offload:
            log.warning("the activations stay on the card: only layers that are computed by hand can do without them")
        set_recompute(self._decoder, self._plan.recompute_layers)

    def _make_replay(self) -> Replay | None:
        """CUDA graphs, where everything between tokens and gradients runs on the card and draws nothing there."""
        if self._fused is None or self._plan.offload or self._neftune_alpha > 0 or not ops.can_be_captured(self.device):
            return None
        return Replay(list(self._saved.values()), self._loss, draw_seed)

    def _offloaded_embedding(self) -> HostEmbedding | None:
        table = self.base.get_input_embeddings()
        if table.weight.data_ptr() == self._head.weight.data_ptr():
            log.info("the embeddings stay on the card: the head shares them")
            return None
        if type(table) is not torch.nn.Embedding:  # some architectures scale what they look up
            log.warning("the embeddings stay on the card: %s may do more than look up", type(table).__name__)
            return None
        return HostEmbedding(table, self.device)

    # --- does the architecture work the way that this module assumes?

    @torch.no_grad()
    def check(self) -> None:
        """Compare loss path and packing with the model's own logits on a few tokens; raise UserError if they differ."""
        self.eval()
        first, other, second = (_probe(tokens) for tokens in (range(1, 6), range(21, 26), range(6, 13)))
        with self._silent_experts():
            after_first, after_other = (self._logits(collate([record, second]))[5:] for record in (first, other))
        name = type(self.base).__name__
        if not torch.equal(after_first, after_other):  # the same shapes, so the same sums: not a bit may differ
            raise UserError(f"{name} lets records of one packed row see each other, so it cannot be trained here")
        if self._fused is not None:
            with self._silent_experts():  # for a rounding, a token would go to another expert
                self._check_fused_layers(self._fused, collate([first, second]))
        batch = collate([first])
        with self._fused.bypassed() if self._fused is not None else nullcontext():
            ours, embedded = self._logits(batch), self._embedded(batch, batch.to(self.device))
            theirs = self.base(inputs_embeds=embedded, use_cache=False).logits[0].float()
        if not _same(ours, theirs):
            raise UserError(
                f"{name} makes its logits in a way that the trainer does not know, so its loss would be wrong"
            )

    def _check_fused_layers(self, fused: FusedDecoder, batch: MicroBatch) -> None:
        """Hold each layer against the untouched one; go back to those if one is off."""
        with fused.compared() as differences:
            self._hidden(StepInputs.of(batch, 0, 1.0, self.device))
        odd = [layer for layer, difference in enumerate(differences) if not difference <= LARGEST_DIFFERENCE]
        if odd:
            log.warning(
                "the layers run as transformers and PEFT compute them: layer %d is off by %.2g in ours, which is more "
                "than rounding; please report the model",
                odd[0],
                differences[odd[0]],
            )
            fused.give_back()
            self._go_without_fused_layers()

    def _logits(self, batch: MicroBatch) -> Tensor:
        return self._head.logits(self._hidden(StepInputs.of(batch, 0, 1.0, self.device))[0])


def _probe(tokens: range) -> tuple[Any, Any, Any]:
    ids = np.fromiter(tokens, dtype=np.int32)
    return ids, ids, np.arange(len(ids), dtype=np.int32)


def _same(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).norm() <= LOGITS_TOLERANCE * other.norm())


def _head(base: PreTrainedModel) -> Head:
    """The head, with what some architectures do to its logits; `TrainingModel.check` finds the ones that do more."""
    head = base.get_output_embeddings()
    config = base.config.get_text_config()
    divisor = getattr(config, "logits_scaling", None)
    factor = getattr(config, "logit_scale", None)
    return Head(
        weight=head.weight,
        bias=getattr(head, "bias", None),
        scale=1 / divisor if divisor else factor or 1.0,
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def _saved_parameters(model: PeftModel) -> dict[str, Parameter]:
    """The adapter's parameters under the keys of PEFT's own adapter_model.safetensors."""
    parameters = {p.data_ptr(): p for p in model.parameters() if p.requires_grad}
    saved = get_peft_model_state_dict(model, adapter_name=ADAPTER_NAME, save_embedding_layers=False)
    named = {name: parameters[tensor.data_ptr()] for name, tensor in saved.items()}
    assert len(named) == len(parameters), "PEFT saves something else than what is trained"
    wrong = [name for name, parameter in named.items() if parameter.dtype != COMPUTE_DTYPE]
    assert not wrong, f"the adapter must be {COMPUTE_DTYPE}; {wrong[:3]} are not"
    return named


def set_recompute(decoder: torch.nn.Module, layers: int) -> None:
    """Make the first so many decoder layers recompute their activations in the backward pass."""
    own = [layer for layer in decoder.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if layers > 0 and not own:
        raise UserError(f"{type(decoder).__name__} has no layers that can recompute; set recomputeLayers to 0")
    for index, layer in enumerate(own):
        layer.gradient_checkpointing = index < layers
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # its own interface, per layer
