"""The frozen base in NF4: read from a checkpoint, from the cache of quantized weights, or drawn at random.

Rules, each the answer to a trap:

- The base stays as it is loaded: 4-bit linear layers with double quantization (Dettmers et al., 2023), everything else
  in bfloat16. `prepare_model_for_kbit_training` would make embeddings and head float32 (+3.9 GiB at 70B).
- What would stay in 16 bits is refused: it is why a model would not fit where it should.
- On CPUs with AVX512-BF16, bitsandbytes repacks a layer's weight the first time it is evaluated, and from then on
  bypasses the autograd path in training. It is told not to.
- Layers that are streamed from the host are there from the beginning: never is all of the base on the card, nor twice
  on the host.
- Attention is packed where that is the model's own (`attention`), else transformers computes it, record by record.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from accelerate import init_empty_weights
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import GENERATION_CONFIG_NAME

from orchestrator.api import trainer_facts
from qlora_trainer.kernels import state_kernels
from qlora_trainer.kernels.packed_attention import PackedAttention
from qlora_trainer.kernels.streamed_layers import NOTHING_ON_HOST, OnHost, StreamedLayers
from qlora_trainer.model import quantization
from qlora_trainer.model.attention import attention_implementation, settle_attention
from qlora_trainer.model.layer_inputs import keep_layer_inputs_on_host
from qlora_trainer.model.probe import probe
from qlora_trainer.model.quantization import COMPUTE_DTYPE
from qlora_trainer.model.quantized_cache import (
    QUANTIZATION,
    QuantizedCache,
    ReadAhead,
    UnfitEntry,
    entry_key,
    fill,
    tensors_of,
)
from qlora_trainer.model.random_weights import random_base, random_seed
from qlora_trainer.model.source import RANDOM_WEIGHTS_NAME, config_of_weights_as_read
from qlora_trainer.model.text_part import decoder_of, from_config, model_class
from qlora_trainer.outcome import UserError

KERNEL_TOKENS = 80
"""More than a chunk of what goes from chunk to chunk."""

log = logging.getLogger(__name__)


def load_base(
    folder: Path,
    device: torch.device,
    packed_attention: PackedAttention,
    cached: ReadAhead | None = None,
    *,
    streamed_layers: int = 0,
) -> PreTrainedModel:
    """The base of a Hugging Face model folder, frozen and quantized on the device.

    Its attention is the packed one only where that is the model's own; `base.config` names it. Of so many layers the
    weights stay on the host (`streamed`).
    """
    began = time.perf_counter()
    config = config_of_weights_as_read(folder)
    on_host = _on_host(config, streamed_layers)
    packed_attention.register()
    implementation = attention_implementation(config)
    if (folder / RANDOM_WEIGHTS_NAME).is_file():
        seed = random_seed(folder)
        base, origin = random_base(config, implementation, device, seed=seed, on_host=on_host), "drawn at random"
    else:
        cached = cached or ReadAhead(folder, device, streamed_layers=streamed_layers)
        base, origin = _checkpoint_base(folder, config, implementation, device, cached, on_host)
    base.requires_grad_(False)
    base.config.use_cache = False
    _keep_cpu_weights_unpacked(base)
    refuse_unquantized(base)
    if on_host.numbers:
        _stream(base, on_host, device)
    keep_layer_inputs_on_host(base, device)
    _settle_state_kernels(base, device, packed_attention)
    settle_attention(base, packed_attention)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # dense weights have left pages behind; see `sizing/memory/fragmentation`
    gib = sum(parameter.nbytes for parameter in base.parameters()) / 2**30
    log.info("loaded %.1f GiB in %.1f s, %s", gib, time.perf_counter() - began, origin)
    return base


def streamed(base: Any) -> StreamedLayers | None:
    """The layers of a base whose weights are on the host; None where all are on the card."""
    return getattr(base, "streamed_layers", None)


def _on_host(config: PreTrainedConfig, streamed_layers: int) -> OnHost:
    text = config.get_text_config()
    if streamed_layers and text.model_type not in trainer_facts.HANDWRITTEN_TYPES:
        raise UserError(
            f"the plan's streamedLayers is {streamed_layers}, and layers of {text.model_type} cannot be streamed from "
            "the host: only those that the trainer computes itself; use a larger card"
        )
    return OnHost.of(streamed_layers, text.num_hidden_layers)


def _stream(base: Any, on_host: OnHost, device: torch.device) -> None:
    layers = decoder_of(base).layers
    base.streamed_layers = StreamedLayers({number: layers[number] for number in on_host.numbers}, device)
    gib = base.streamed_layers.host_bytes / 2**30
    log.info("%d layers are streamed from host memory, where they take %.1f GiB", len(on_host.numbers), gib)


def _checkpoint_base(
    folder: Path,
    config: PreTrainedConfig,
    implementation: str,
    device: torch.device,
    cached: ReadAhead,
    on_host: OnHost,
) -> tuple[PreTrainedModel, str]:
    """The base and how it was had. What had to be quantized is kept at once, while nothing else needs card or disk."""
    base = _cached_base(cached, folder, config, device)
    if base is not None:
        return base, "from the cache of quantized weights"
    base = _quantized_base(folder, config, implementation, device, on_host)
    if names := quantization.not_finite(base):
        raise UserError(
            f"{type(base).__name__} has weights that are not finite numbers, in {len(names)} tensors, the first is "
            f"{names[0]}; copy the model anew, or choose another"
        )
    if (cache := QuantizedCache.from_environment()) is not None:
        _keep_cpu_weights_unpacked(base)
        cache.write(entry_key(folder, device), tensors_of(base))
    return base, "quantized"


def _quantized_base(
    folder: Path, config: PreTrainedConfig, implementation: str, device: torch.device, on_host: OnHost
) -> PreTrainedModel:
    """Read through a memory map and quantized on the device, one tensor after the other."""
    return model_class(config).from_pretrained(
        folder,
        config=config,
        quantization_config=_quantization(on_host),
        dtype=COMPUTE_DTYPE,
        device_map={"": str(device)},
        attn_implementation=implementation,
        use_safetensors=True,
        local_files_only=True,
    )


def _cached_base(
    cached: ReadAhead, folder: Path, config: PreTrainedConfig, device: torch.device
) -> PreTrainedModel | None:
    tensors = cached.take()
    if tensors is None:
        return None
    base, quantizer = weightless_base(config, device)
    base.config.name_or_path = str(folder)
    if (folder / GENERATION_CONFIG_NAME).is_file():
        base.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    try:
        fill(base, tensors)
        missing = {name for name, parameter in base.named_parameters(remove_duplicate=False) if parameter.is_meta}
        base.tie_weights(missing_keys=missing, recompute_mapping=False)  # an entry holds tied weights once
        unfilled = [name for name, parameter in base.named_parameters() if parameter.is_meta]
        unfilled += [name for name, _ in base.named_buffers() if name not in tensors]
        if unfilled:
            raise UnfitEntry(f"it lacks {unfilled[0]}")
    except UnfitEntry as error:
        log.warning("the cached quantized weights do not fit, and are not used: %s", error)
        return None
    quantizer.postprocess_model(base)
    return base


def weightless_base(config: PreTrainedConfig, device: torch.device) -> tuple[Any, HfQuantizer]:
    """What `from_pretrained` builds before it reads weights: the linear layers are replaced, nothing takes memory."""
    # Not `torch.device("meta")`: to compute on tensors without memory, as for buffers and first weights, imports sympy.
    with init_empty_weights(include_buffers=False), no_init_weights():
        base = from_config(config, dtype=COMPUTE_DTYPE, attn_implementation=attention_implementation(config))
        quantizer = quantization.Quantizer(_quantization())
        quantizer.preprocess_model(base, device_map={"": str(device)})
    state_kernels.settle(base, by_packages=False)  # which know neither a CPU nor tensors without memory
    base.config.quantization_config = quantizer.quantization_config
    base.hf_quantizer = quantizer
    return base.eval(), quantizer


def _settle_state_kernels(base: PreTrainedModel, device: torch.device, packed_attention: PackedAttention) -> None:
    exact = torch.get_deterministic_debug_mode() != 0
    state_kernels.settle(base, by_packages=device.type == "cuda" and not exact)
    if any(state_kernels.in_use(base).values()) and (reason := _refusal_of_kernels(base, packed_attention)) is not None:
        log.warning("the packages' kernels do not run here, so torch computes instead: %s", reason)
        state_kernels.settle(base, by_packages=False)
    for name, by_package in state_kernels.in_use(base).items():
        log.info("%s is computed by %s", name, "a package's kernel" if by_package else "torch")


def _refusal_of_kernels(base: Any, packed_attention: PackedAttention) -> str | None:
    """What packages' kernels say to a few tokens: some refuse a card or a compiler in the backward pass alone."""
    embeddings, batch = base.get_input_embeddings(), probe(range(3, 3 + KERNEL_TOKENS))
    on_device = batch.to(embeddings.weight.device)
    packed_attention.expect(batch, on_device.record_starts)
    states = embeddings(on_device.input_ids).detach().requires_grad_()
    try:
        logits = base(inputs_embeds=states, use_cache=False).logits
        torch.autograd.grad(logits.float().square().mean(), states)
    except Exception as error:  # noqa: BLE001 - whatever a package, a compiler or a driver may raise
        return f"{type(error).__name__}: {error}"
    return None


def _quantization(on_host: OnHost = NOTHING_ON_HOST) -> quantization.Quantization:
    return quantization.Quantization(on_host, **QUANTIZATION)


def _keep_cpu_weights_unpacked(base: PreTrainedModel) -> None:
    for layer in quantized_layers(base).values():
        layer.support_avx512bf16_for_cpu = False


def refuse_unquantized(base: PreTrainedModel) -> None:
    """UserError if much of the base would stay in 16 bits, which is why it would not fit where it should."""
    if reason := quantization.refusal(base):
        raise UserError(f"{type(base).__name__} cannot be trained here: {reason}; choose another model")
    if not quantized_layers(base):
        raise UserError(f"{type(base).__name__} has no linear layer that can be quantized to NF4; choose another model")
    width = base.config.get_text_config().hidden_size
    tables = _tables(base)
    for name, parameter in base.named_parameters():
        if isinstance(base.get_submodule(name.rpartition(".")[0]), torch.nn.Conv1d):
            continue  # a few weights for each channel
        # Smaller ones do not matter.
        many = parameter.numel() >= width**2 if parameter.dim() > 2 else min(parameter.shape, default=0) >= width
        large = parameter.dim() >= 2 and parameter.is_floating_point() and many
        quantized = isinstance(parameter, bnb.nn.Params4bit) or quantization.holds(base, name)
        if large and not quantized and id(parameter) not in tables:
            raise UserError(
                f"{type(base).__name__} keeps weights in {name}, a {parameter.dim()}-dimensional parameter that is "
                "not quantized to NF4; choose a model of linear layers"
            )


def _tables(base: PreTrainedModel) -> set[int]:
    """The embeddings of tokens and positions, and the head: their parameters' ids."""
    in_layers = {
        id(module)
        for layer in base.modules()
        if isinstance(layer, GradientCheckpointingLayer)
        for module in layer.modules()
    }
    modules = [each for each in base.modules() if isinstance(each, torch.nn.Embedding) and id(each) not in in_layers]
    head = base.get_output_embeddings()
    return {id(each) for module in (*modules, *([] if head is None else [head])) for each in module.parameters()}


def quantized_layers(model: torch.nn.Module) -> dict[str, bnb.nn.Linear4bit]:
    """The linear layers in NF4, by the names of their modules."""
    return {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
