"""The LoRA adapter (Hu et al., 2021) on a frozen base, as PEFT makes and names it.

Rules:

- The adapter has the type of the base's other weights, bfloat16. PEFT would make it float32, and again on reload.
- It begins as the base itself: A is drawn from the seed, B is zero.
- Linear layers in NF4 can have one, and routed experts where the job asks for it: not the head. PEFT keeps that of
  experts, whose matrices are parameters (`target_parameters`); `NF4Experts` computes with it.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners import tuners_utils
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel

from orchestrator.api.adapter import AdapterSpec
from orchestrator.api.trainable import NO_EXPERTS
from orchestrator.api.words import on_one_line
from qlora_trainer.kernels.moe_experts import ExpertAdapter, NF4Experts
from qlora_trainer.model.loading import quantized_layers
from qlora_trainer.model.quantization import COMPUTE_DTYPE
from qlora_trainer.model.text_part import is_text_part
from qlora_trainer.outcome import UserError

ADAPTER_NAME = "default"
MAX_REASON_CHARACTERS = 400
"""Of PEFT's own words, which may show whole modules."""


def add_adapter(base: PreTrainedModel, adapter: AdapterSpec, *, seed: int) -> PeftModel:
    """The base with a fresh adapter: A drawn from the seed, B zero, so it begins as the base itself."""
    targets = target_modules(base, adapter)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=float(adapter.dropout),
        target_modules=targets,
        target_parameters=target_parameters(base, adapter),
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
            reason = on_one_line(str(error))[:MAX_REASON_CHARACTERS]
            raise UserError(f"adapter: PEFT refuses it for this model; {reason}") from error
    _hand_over(model)
    own: Any = model.peft_config[ADAPTER_NAME]
    own.target_modules = set(targets)  # PEFT has shortened them to what tells them apart here
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(COMPUTE_DTYPE)
    return model


def target_parameters(base: Any, adapter: AdapterSpec) -> list[str] | None:
    """The matrices of routed experts, by the ends of their names, where the adapter is on them. UserError for none."""
    if not adapter.experts:
        return None
    found = {name: module for name, module in base.named_modules() if isinstance(module, NF4Experts)}
    if not found:
        raise UserError(NO_EXPERTS)
    if odd := next((name for name, module in found.items() if not module.layout.declared), None):
        raise UserError(
            f"spec.adapter.experts: PEFT takes the matrices of this model's experts ({odd}) for others than they are; "
            "leave it out"
        )
    for module in found.values():
        for name in module.matrices:
            parameter: Any = getattr(module, name)
            state = parameter.quant_state
            parameter.ds_shape = parameter.shape if state is None else state.shape  # where PEFT looks for it first
    return sorted({f"{path.rpartition('.')[2]}.{name}" for path, each in found.items() for name in each.matrices})


def _hand_over(model: PeftModel) -> None:
    """Let experts in NF4 compute with what PEFT has put around them, which would add it to dense weights."""
    wrapper: Any
    for wrapper in model.modules():
        if isinstance(wrapper, ParamWrapper):
            experts: Any = wrapper.get_base_layer()
            a: Any = wrapper.lora_A[ADAPTER_NAME]
            b: Any = wrapper.lora_B[ADAPTER_NAME]
            experts.adapters[wrapper.parameter_name] = ExpertAdapter(a=a, b=b, scaling=wrapper.scaling[ADAPTER_NAME])
            wrapper.forward = experts.__call__


def adaptable_layers(base: PreTrainedModel) -> list[str]:
    """The names of layers that can have an adapter: those that are quantized, but for what PEFT takes for others."""
    return [name for name in quantized_layers(base) if peft_takes(base, name.rpartition(".")[2])]


def target_modules(base: PreTrainedModel, adapter: AdapterSpec) -> list[str]:
    """What the adapter is on, as PEFT matches names: a layer's last name, or more of its path.

    A target is a layer that is quantized; `base` may be without memory. UserError for any other. Layers of a text part
    are named in full: in the whole model, others may have the same last names.
    """
    names = adaptable_layers(base)
    if adapter.target_modules == "all-linear":
        return sorted(names) if is_text_part(base) else _shortest(base, names)
    for wanted in adapter.target_modules:
        if not any(name == wanted or name.endswith(f".{wanted}") for name in names):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
            raise UserError(
                f"spec.adapter.targetModules: {wanted!r} is no linear layer of the model that can have an "
                f"adapter; choose of {known}, or all-linear"
            )
    if is_text_part(base):
        ends = tuple(f".{wanted}" for wanted in adapter.target_modules)
        return sorted(name for name in names if f".{name}".endswith(ends))
    return list(adapter.target_modules)


def _shortest(base: PreTrainedModel, names: list[str]) -> list[str]:
    """The layers by their last names, but for those that PEFT would find other modules by as well."""
    others = {name.rpartition(".")[2] for name, _ in base.named_modules() if name not in names}
    last = {name: name.rpartition(".")[2] for name in names}
    return sorted({name if short in others else short for name, short in last.items()})


def peft_takes(base: Any, name: str) -> bool:
    """Whether PEFT lets layers of this name have an adapter: of state-space models and of mixtures, not all.

    In adapters that were trained with older versions of transformers a mixture's `gate_proj`, for one, is its routed
    experts', and PEFT takes every target of that name for these, be it of a shared expert or of a dense layer.
    """
    config = LoraConfig(target_modules=[name])
    # The one place that knows.
    check: Any = tuners_utils._check_lora_target_modules_mamba  # pyright: ignore[reportPrivateUsage]
    try:
        check(config, base, name)
        convert_peft_config_for_transformers(config, base, None)
    except ValueError:
        return False
    return bool(config.target_modules)


def saved_parameters(model: PeftModel) -> dict[str, Parameter]:
    """The adapter's parameters under the keys of PEFT's own adapter_model.safetensors."""
    parameters = {p.data_ptr(): p for p in model.parameters() if p.requires_grad}
    saved: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=ADAPTER_NAME, save_embedding_layers=False)
    named = {name: parameters[tensor.data_ptr()] for name, tensor in saved.items()}
    assert len(named) == len(parameters), "PEFT saves something else than what is trained"
    base: Any = model.get_base_model()
    dtype = base.get_input_embeddings().weight.dtype  # some heads are float32
    wrong = [name for name, parameter in named.items() if parameter.dtype != dtype]
    assert not wrong, f"the adapter must be {dtype} as the base is; {wrong[:3]} are not"
    return named
