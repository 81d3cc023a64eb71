"""Mixtures of experts: which are taken, and how their weights become NF4 on the way in.

transformers keeps a layer's routed experts in parameters of three dimensions, which bitsandbytes leaves in 16 bits:
four times the memory, of nearly all of the model. Rules:

- Their modules become `kernels.moe_experts.NF4Experts` before weights are read; transformers fuses the experts of a
  checkpoint on the card, a layer at a time, and hands the result to be quantized.
- What `NF4Experts` does not compute exactly is refused (`refusal`), and so are types whose memory nobody can predict.
- Weights that are no finite numbers are noticed before they are quantized (`not_finite`): NF4 may hide them.
- Routers stay in bfloat16. Adapters go to linear layers, so the routed experts have none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers import BitsAndBytesConfig
from transformers.activations import SiLUActivation
from transformers.integrations import moe
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from orchestrator.api.model_facts import MIXTURES
from qlora_trainer.kernels.moe_experts import SCALED_TOGETHER, NF4Experts

COMPUTE_DTYPE = torch.bfloat16
METHOD = "nf4_with_experts"
EXPECTED_LAYOUT = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}
EXPECTED_PARAMETERS = {"gate_up_proj", "down_proj"}


class Quantization(BitsAndBytesConfig):
    """NF4 for linear layers and experts."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        self.quant_method: Any = METHOD  # transformers lists its own in an enum


class _Quantize(Bnb4bitQuantize):
    """transformers' own, which also looks whether what it quantizes are numbers."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        for name, value in input_dict.items():
            if not _is_finite(value[0] if isinstance(value, list) else value):
                self.hf_quantizer.not_finite.append(name)
        return super().convert(input_dict, *args, **kwargs)


@register_quantizer(METHOD)
class Quantizer(Bnb4BitHfQuantizer):
    """transformers' own, for experts too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.not_finite: list[str] = []
        """The names of quantized weights that were no numbers."""

    def get_quantize_ops(self) -> _Quantize:
        """What quantizes a weight."""
        return _Quantize(self)

    def _process_model_before_weight_loading(self, model: Any, device_map: Any, **kwargs: Any) -> None:
        # The one place where a quantizer replaces modules.
        super()._process_model_before_weight_loading(  # pyright: ignore[reportPrivateUsage]
            model, device_map, **kwargs
        )
        replace_experts(model)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether it is a weight of a linear layer or of experts."""
        module, _ = get_module_from_name(model, param_name)
        return isinstance(module, NF4Experts) or super().param_needs_quantization(model, param_name, **kwargs)


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
    """Put our module in the place of every module of experts that it computes exactly; see `refusal`."""
    for name, module in list(model.named_modules()):
        if _is_experts(module) and _obstacle(module) is None:
            gate_up, down = module.gate_up_proj.data, module.down_proj.data
            experts, hidden, inner = down.shape
            model.set_submodule(name, NF4Experts(experts, hidden, inner, gate_up=gate_up, down=down))


def refusal(model: Any) -> str | None:
    """Why a mixture cannot be handled; None if it can, or is none."""
    model_type = model.config.model_type
    for name, module in model.named_modules():
        if _is_experts(module) and (obstacle := _obstacle(module)):
            return f"its experts ({name}) {obstacle}, so they cannot be quantized to NF4 and would stay in 16 bits"
        if (_is_experts(module) or isinstance(module, NF4Experts)) and model_type not in MIXTURES:
            return f"how much memory a mixture of type {model_type} takes is not known; known are {', '.join(MIXTURES)}"
    return None


def holds(model: Module, name: str) -> bool:
    """Whether a parameter is one of experts, which are quantized although they have three dimensions."""
    module = model.get_submodule(name.rpartition(".")[0])
    return _is_experts(module) or isinstance(module, NF4Experts)


def _is_experts(module: Module) -> bool:
    """Whether it is one of transformers' modules of experts (`use_experts_implementation`), not yet replaced."""
    return hasattr(module, "has_gate") and hasattr(module, "is_transposed")


def _obstacle(module: Any) -> str | None:
    """What `NF4Experts` would not compute exactly."""
    if any(getattr(module, name) != value for name, value in EXPECTED_LAYOUT.items()):
        return "have biases, no gates, or weights that are laid out in another way"
    has_norm = getattr(module, "has_post_expert_norm", False)  # transformers 5.17 has none
    if {name for name, _ in module.named_parameters()} != EXPECTED_PARAMETERS or has_norm:
        return "have more parameters than two matrices"
    default: Any = moe._default_apply_gate  # pyright: ignore[reportPrivateUsage] - what a class without its own has
    if type(module)._apply_gate is not default:
        return "are gated in a way of their own"
    if not isinstance(module.act_fn, torch.nn.SiLU | SiLUActivation):
        return f"are gated with {type(module.act_fn).__name__} instead of SiLU"
    if (size := module.down_proj[0].numel()) % SCALED_TOGETHER:
        return f"have matrices of {size} weights, which is no multiple of the {SCALED_TOGETHER} that share a scale"
    return None
