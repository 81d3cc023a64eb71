"""Mixtures of experts: which are taken, and how their weights become NF4 on the way in.

transformers keeps a layer's routed experts in parameters of three dimensions, which bitsandbytes leaves in 16 bits:
four times the memory, of nearly all of the model. Rules:

- Their modules become `kernels.moe_experts.NF4Experts` before weights are read; transformers fuses the experts of a
  checkpoint on the card, a layer at a time, and hands the result to be quantized.
- Such modules are known by their structure, not by the model's type: what transformers' decorator says of them
  (`use_experts_implementation`), or two matrices of Llama 4's names. What `NF4Experts` does not compute is refused
  (`refusal`); whether it computes what the module does, is tried on a small copy of the model (`rehearsal`).
- Weights that are no finite numbers are noticed before they are quantized (`not_finite`): NF4 may hide them.
- Routers stay in bfloat16. Adapters go to linear layers, so the routed experts have none.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers import BitsAndBytesConfig
from transformers.activations import SiLUActivation
from transformers.core_model_loading import WeightConverter
from transformers.integrations import moe
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from orchestrator.api import trainer_facts
from qlora_trainer.kernels.moe_experts import SECOND, ExpertLayout, NF4Experts
from qlora_trainer.kernels.streamed_layers import NOTHING_ON_HOST, OnHost
from qlora_trainer.model import mxfp4

COMPUTE_DTYPE = torch.bfloat16
METHOD = "nf4_with_experts"
LLAMA4_MATRICES = {"gate_up_proj", "down_proj"}


class Quantization(BitsAndBytesConfig):
    """NF4 for linear layers and experts."""

    def __init__(self, on_host: OnHost = NOTHING_ON_HOST, **fields: Any) -> None:
        """`on_host`: weights that go back to the host as soon as they are quantized."""
        super().__init__(**fields)
        self.layers_on_host = sorted(on_host.numbers)  # transformers writes its fields as JSON
        self.quant_method: Any = METHOD  # transformers lists its own in an enum


class _Quantize(Bnb4bitQuantize):
    """transformers' own, which also looks whether what it quantizes are numbers."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        for name, value in input_dict.items():
            if not _is_finite(value[0] if isinstance(value, list) else value):
                self.hf_quantizer.not_finite.append(name)
        found = super().convert(input_dict, *args, **kwargs)
        on_host = self.hf_quantizer.on_host
        return {name: value.to("cpu") if on_host.holds(name) else value for name, value in found.items()}


@register_quantizer(METHOD)
class Quantizer(Bnb4BitHfQuantizer):
    """transformers' own, for experts too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.not_finite: list[str] = []
        """The names of quantized weights that were no numbers."""
        self.on_host = OnHost(frozenset(getattr(self.quantization_config, "layers_on_host", ())))

    def get_quantize_ops(self) -> _Quantize:
        """What quantizes a weight."""
        return _Quantize(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """How tensors become those of the model, beside the rules of its type."""
        return mxfp4.conversions()

    def _process_model_before_weight_loading(self, model: Any, device_map: Any, **kwargs: Any) -> None:
        # The one place where a quantizer replaces modules.
        super()._process_model_before_weight_loading(  # pyright: ignore[reportPrivateUsage]
            model, device_map, **kwargs
        )
        replace_experts(model)

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes of a weight on the card, which transformers makes room for before it reads."""
        return 0.0 if self.on_host.holds(param_name) else super().param_element_size(model, param_name, param)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether it is a weight of a linear layer or of experts."""
        module, name = get_module_from_name(model, param_name)
        if isinstance(module, NF4Experts):
            return name in module.matrices
        return super().param_needs_quantization(model, param_name, **kwargs)


def not_finite(model: Any) -> list[str]:
    """The names of weights of a model just loaded that hold what is no finite number."""
    kept = [
        name
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and not _is_finite(parameter)
    ]
    return sorted({*model.hf_quantizer.not_finite, *kept})


def _is_finite(weights: Tensor) -> bool:
    """Whether all are; takes no memory of their size."""
    return weights.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(weights))).all())


def replace_experts(model: Any) -> None:
    """Put our module in the place of every module of experts that it can compute; see `refusal`."""
    for name, module in list(model.named_modules()):
        if is_experts(module) and _obstacle(module) is None:
            model.set_submodule(name, nf4_experts(module))


def nf4_experts(module: Any) -> NF4Experts:
    """Ours in the place of one of transformers' modules, with its matrices, which may be on meta; biases are empty."""
    layout = _layout(module)
    matrices = getattr(module, layout.first).data, getattr(module, SECOND).data
    for name in [name for name, _ in module.named_parameters()]:
        delattr(module, name)  # its activation function may hold on to the module
    return NF4Experts(matrices, layout, biased=getattr(module, "has_bias", False))


def refusal(model: Any) -> str | None:
    """Why a mixture cannot be handled; None if it can, or is none."""
    for name, module in model.named_modules():
        if is_experts(module) and (obstacle := _obstacle(module)):
            return f"its experts ({name}) {obstacle}, so they cannot be quantized to NF4 and would stay in 16 bits"
    return None


def holds(model: Module, name: str) -> bool:
    """Whether a parameter is one of experts, which are quantized although they have three dimensions."""
    module = model.get_submodule(name.rpartition(".")[0])
    return is_experts(module) or isinstance(module, NF4Experts)


def is_experts(module: Module) -> bool:
    """Whether it is one of transformers' modules of experts, not yet replaced."""
    if isinstance(module, NF4Experts):
        return False
    return is_declared(module) or _is_llama4(module)


def is_declared(module: Module) -> bool:
    """Whether transformers says of it how its experts lie, which tokens choose."""
    return hasattr(module, "has_gate") and hasattr(module, "is_transposed")  # `use_experts_implementation` sets them


def _is_llama4(module: Module) -> bool:
    """Llama 4's: the only ones without that decorator that are gated; they lie as [experts, inputs, outputs]."""
    parameters = dict(module.named_parameters(recurse=False))
    if parameters.keys() != LLAMA4_MATRICES or not all(each.dim() == 3 for each in parameters.values()):
        return False
    experts, inputs, outputs = parameters["gate_up_proj"].shape
    return parameters["down_proj"].shape == (experts, outputs // 2, inputs) and "act_fn" in dict(
        module.named_children()
    )


def _layout(module: Any) -> ExpertLayout:
    if not is_declared(module):
        return ExpertLayout(
            transposed=True, declared=False, activation=None if _is_silu(module) else partial(_llama4_gate, module)
        )
    if not module.has_gate:
        return ExpertLayout(gated=False, transposed=module.is_transposed, activation=module.act_fn)
    default: Any = moe._default_apply_gate  # pyright: ignore[reportPrivateUsage] - what a class without its own has
    own = type(module)._apply_gate is not default or not _is_silu(module)
    return ExpertLayout(transposed=module.is_transposed, activation=module._apply_gate if own else None)


def _llama4_gate(module: Any, first: Tensor) -> Tensor:
    gate, up = first.chunk(2, dim=-1)
    return up * module.act_fn(gate)


def _is_silu(module: Any) -> bool:
    return module.act_fn is torch.nn.functional.silu or isinstance(module.act_fn, torch.nn.SiLU | SiLUActivation)


def _obstacle(module: Any) -> str | None:
    """What `NF4Experts` would not compute exactly."""
    layout = _layout(module)
    expected = {layout.first, SECOND}
    if getattr(module, "has_bias", False):
        expected |= {f"{name}_bias" for name in expected}
    # transformers 5.17 has no norm
    if {name for name, _ in module.named_parameters()} != expected or getattr(module, "has_post_expert_norm", False):
        return "have more parameters than two matrices and their biases"
    if (size := getattr(module, SECOND)[0].numel()) % trainer_facts.NF4_BLOCK:
        return (
            f"have matrices of {size} weights, which is no multiple of the {trainer_facts.NF4_BLOCK} that share a scale"
        )
    return None
