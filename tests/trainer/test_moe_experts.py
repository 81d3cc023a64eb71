"""Mixtures of experts: NF4 weights, both passes against transformers' own modules, and what is refused."""

from __future__ import annotations

from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import PeftModel
from qlora_trainer.data.micro_batch import collate
from qlora_trainer.kernels.moe_experts import NF4Experts
from qlora_trainer.kernels.packed_attention import PackedAttention
from qlora_trainer.model.loading import load_base
from qlora_trainer.model.quantization import nf4_experts, refusal, replace_experts
from qlora_trainer.model.rehearsal import compare_experts
from qlora_trainer.model.training_model import TrainingModel
from qlora_trainer.outcome import UserError
from safetensors import safe_open
from safetensors.torch import save_file
from test_model import gradients, make_model, make_records, wake_adapter
from tiny_model import EXPERTS, build_tiny_model, tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

CPU = torch.device("cpu")
FAMILIES = tuple(EXPERTS)
TAKEN_OVER = {"mixtral", "qwen3_moe"}
"""Whose layers the trainer computes by hand."""


def make_experts(seed: int = 0) -> tuple[NF4Experts, MixtralExperts]:
    """Ours, and transformers' with the same weights, both in float32."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model("mixtral", hidden_size=64, **EXPERTS["mixtral"])
    theirs = MixtralExperts(config)
    theirs.config._experts_implementation = "eager"
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    ours = NF4Experts((theirs.gate_up_proj.data.clone(), theirs.down_proj.data.clone())).to(CPU)
    for name, parameter in theirs.named_parameters():
        parameter.data = dense(getattr(ours, name)).requires_grad_(False)
    return ours, theirs


def dense(parameter: Params4bit) -> Tensor:
    """As bitsandbytes has it, whose blocks lie along the whole matrix, but on the CPU along a row of its shape."""
    state = copy(parameter.quant_state)
    state.shape = torch.Size((parameter.quant_state.shape.numel(),))
    return dequantize_4bit(parameter.data, state).view(parameter.quant_state.shape)


def make_tokens(tokens: int, experts: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, 64, generator=generator).requires_grad_()
    weights, index = torch.rand(tokens, experts, generator=generator).topk(2)
    return x, index, weights.requires_grad_()


@pytest.mark.parametrize("tile_tokens", [4096, 8])
def test_both_passes_are_those_of_transformers_in_one_tile_or_several(tile_tokens: int) -> None:
    ours, theirs = make_experts()
    ours.tile_tokens = tile_tokens
    found = []
    for module in (ours, theirs):
        x, index, weights = make_tokens(21, experts=3)  # nobody chooses the fourth
        output = module(x, index, weights)
        output.square().sum().backward()
        found.append((output, x.grad, weights.grad))
    for our, their in zip(*found, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dense_bytes", "at_a_time"), [(1 << 30, 4), (1, 1)])
def test_a_few_experts_are_dense_at_a_time_and_no_dense_weight_is_kept(dense_bytes: int, at_a_time: int) -> None:
    ours, _ = make_experts()
    ours.dense_bytes = dense_bytes
    x, index, weights = make_tokens(9, experts=2)
    kept: list[Tensor] = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t),
        DenseWeights() as forward,
    ):
        output = ours(x, index, weights)
    both = {(at_a_time, 512, 64), (at_a_time, 64, 256)}
    assert set(forward.shapes) == both
    assert len(forward.shapes) == 2 * 4 / at_a_time
    assert sum(t.numel() for t in kept) == x.numel() + index.numel() + weights.numel()
    with DenseWeights() as backward:
        output.sum().backward()
    assert set(backward.shapes) == both
    assert len(backward.shapes) == 3 * 4 / at_a_time


class DenseWeights(TorchDispatchMode):
    """The shapes of experts' matrices that memory is taken for in the meantime."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.new_empty.default and made.dim() == 3:
            self.shapes.append(tuple(made.shape))
        return made


# --- of any structure

STRUCTURES: dict[str, tuple[type[Any], Any]] = {
    "biases, matrices that lie the other way, a gate of its own": (
        GptOssExperts,
        AutoConfig.for_model("gpt_oss", hidden_size=64, intermediate_size=96, num_local_experts=6),
    ),
    "no gate": (
        NemotronHExperts,
        AutoConfig.for_model("nemotron_h", hidden_size=64, moe_intermediate_size=160, n_routed_experts=6),
    ),
    "another activation": (
        MixtralExperts,
        AutoConfig.for_model("mixtral", hidden_size=64, intermediate_size=128, num_local_experts=6, hidden_act="gelu"),
    ),
    "a gate that is clamped": (
        DeepseekV4Experts,
        AutoConfig.for_model("deepseek_v4", hidden_size=64, moe_intermediate_size=128, n_routed_experts=6),
    ),
    "no choice": (
        Llama4TextExperts,
        AutoConfig.for_model("llama4_text", hidden_size=64, intermediate_size=128, num_local_experts=6),
    ),
}


@pytest.mark.parametrize(("kind", "config"), STRUCTURES.values(), ids=STRUCTURES)
def test_experts_of_any_structure_compute_what_transformers_own_do(kind: type[Any], config: Any) -> None:
    torch.manual_seed(0)
    theirs = kind(config)
    config._experts_implementation = "eager"
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = nf4_experts(deepcopy(theirs))
    for name, parameter in theirs.requires_grad_(False).named_parameters():
        if name not in ours.matrices:
            getattr(ours, name).data.copy_(parameter)
    ours.to(CPU)
    for name in ours.matrices:
        getattr(theirs, name).data = dense(getattr(ours, name))
    ours.tile_tokens = 8
    chooses = kind is not Llama4TextExperts
    found = []
    for module in (ours, theirs):
        x, index, weights = make_tokens(24, experts=6)
        output = module(x, index, weights) if chooses else module(x)
        output.square().sum().backward()
        found.append((output, x.grad, *([weights.grad] if chooses else [])))
    for our, their in zip(*found, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-3, atol=1e-3 * float(their.detach().abs().max()))


@pytest.mark.parametrize(("inner", "at_a_time"), [(256, 1), (96, 8), (40, 32)])
def test_a_part_of_experts_begins_where_a_scale_does(inner: int, at_a_time: int) -> None:
    torch.manual_seed(0)
    ours = NF4Experts((torch.randn(40, 2 * inner, 64), torch.randn(40, 64, inner))).to(CPU)
    ours.dense_bytes = 1
    parts = ours.dense_parts("down_proj")
    assert [part.first for part in parts] == list(range(0, 40, at_a_time))
    joined = torch.cat([dequantize_4bit(part.packed, part.state).view(part.shape) for part in parts])
    assert torch.equal(joined, dense(ours.down_proj))
    assert torch.equal(joined, ours.dense("down_proj"))


def test_experts_that_compute_otherwise_than_their_module_says_are_refused_on_a_small_copy() -> None:
    class Odd(MixtralExperts):
        def forward(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            return super().forward(hidden_states, index, weights) + 0.1 * hidden_states

    config = AutoConfig.for_model("mixtral", hidden_size=64, **EXPERTS["mixtral"])
    for kind in (MixtralExperts, Odd):
        experts = kind(config)
        for parameter in experts.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        model = torch.nn.ModuleDict({"experts": experts})
        if kind is MixtralExperts:
            compare_experts(model)
        else:
            with pytest.raises(
                UserError, match=r"has experts \(experts\) that compute in a way that is not known here"
            ):
                compare_experts(model)


# --- in a model


def load(folder: Path) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in load_base(folder, CPU, PackedAttention()).named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_nf4_with_double_quantization_routers_are_not_and_adapters_are_on_linear_layers(
    family: str,
) -> None:
    model = make_model(tiny_model(family))
    experts = [module for module in model.base.modules() if isinstance(module, NF4Experts)]
    assert len(experts) == 2
    for parameter in (parameter for module in experts for parameter in module.parameters()):
        state = parameter.quant_state
        assert (parameter.dtype, state.quant_type, state.nested) == (torch.uint8, "nf4", True)
    assert {p.dtype for name, p in model.base.named_parameters() if name.endswith("mlp.gate.weight")} == {
        torch.bfloat16
    }
    trained = {name.split(".lora_")[0].rpartition(".")[2] for name, _ in model.trainable()}
    shared = {"gate_proj", "up_proj", "down_proj", "shared_expert_gate"} if family == "qwen2_moe" else set()
    assert trained == {"q_proj", "k_proj", "v_proj", "o_proj"} | shared


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_fused_experts_gives_the_same_bits_as_one_of_single_experts(
    tmp_path: Path, family: str
) -> None:
    single = tiny_model(family)
    with safe_open(single / "model.safetensors", "pt") as file:
        assert any(".experts.0." in name for name in file.keys())  # noqa: SIM118 - not a mapping
    fused = tmp_path / "fused"
    fused.mkdir()
    plain = AutoModelForCausalLM.from_pretrained(single, dtype=torch.bfloat16)
    save_file({k: v.contiguous() for k, v in plain.state_dict().items()}, fused / "model.safetensors", {"format": "pt"})
    (fused / "config.json").write_text((single / "config.json").read_text())
    one, other = load(single), load(fused)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def dequantized_reference(model: Any, folder: Path) -> Any:
    """transformers' own model in float32 with the weights that ours has."""
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    quantized = {
        f"{name.replace('.base_layer', '')}.{leaf}": dense(parameter)
        for name, module in model.base.named_modules()
        if isinstance(module, Linear4bit | NF4Experts)
        for leaf, parameter in module.named_parameters(recurse=False)
        if isinstance(parameter, Params4bit)
    }
    for name, parameter in theirs.named_parameters():
        if name in quantized:
            parameter.data = quantized[name].float()
    return theirs


def in_float32(model: TrainingModel) -> TrainingModel:
    """The model in float32, so that no token goes to another expert for a rounding; layers are taken over anew."""
    for parameter in model.peft_model.parameters():
        if isinstance(parameter, Params4bit):
            parameter.quant_state.dtype = torch.float32
        else:
            parameter.data = parameter.data.float()
    for module in model.base.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = torch.float32
    return TrainingModel(model.peft_model, model._plan, model.attention, 0.0)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recompute", [0, 1])
def test_loss_and_every_gradient_are_those_of_plain_peft_on_plain_transformers(
    tmp_path: Path, family: str, recompute: int
) -> None:
    folder = build_tiny_model(tmp_path / family, family, initializer_range=0.1)
    model = in_float32(make_model(folder, recompute_layers=recompute))
    assert (model.fused is not None) == (family in TAKEN_OVER)
    model.check()
    assert (model.fused is not None) == (family in TAKEN_OVER)
    wake_adapter(model)
    model.peft_model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    theirs = PeftModel.from_pretrained(
        dequantized_reference(model, folder), tmp_path / "adapter", is_trainable=True
    ).train()
    records = make_records()
    divisor = float(sum(len(ids) - 1 for ids, _, _ in records))
    expected = torch.zeros(())
    for ids, _, _ in records:
        row = torch.from_numpy(ids).long().unsqueeze(0)
        expected = expected + theirs(input_ids=row, labels=row).loss * (len(ids) - 1) / divisor
    expected.backward()
    model.train()
    loss = model.loss(collate(records), divisor=divisor)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    reference = {name.replace(".default", ""): p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    for name, parameter in model.trainable():
        distance = (parameter.grad.float() - reference[name]).norm() / reference[name].norm()
        assert distance < 1e-4, name


def test_recomputing_layers_of_experts_changes_no_bit() -> None:
    batch = collate(make_records())
    kept, again, recomputed = (
        make_model(tiny_model("qwen3_moe"), dropout="0.2", recompute_layers=layers) for layers in (0, 0, 2)
    )
    for model in (kept, again, recomputed):
        wake_adapter(model)
    first = gradients(kept, [batch])
    for model in (again, recomputed):
        assert all(torch.equal(a, b) for a, b in zip(gradients(model, [batch]), first, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_random_experts_take_the_memory_of_real_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setenv("QLORA_ALLOW_RANDOM_WEIGHTS", "1")
    (tmp_path / "config.json").write_text((tiny_model(family) / "config.json").read_text())
    (tmp_path / "random_weights.json").write_text('{"seed": 3}')
    random, real = load(tmp_path), load(tiny_model(family))
    assert {n: (t.shape, t.dtype) for n, t in random.items()} == {n: (t.shape, t.dtype) for n, t in real.items()}
    assert not torch.equal(random["model.embed_tokens.weight"], real["model.embed_tokens.weight"])


# --- what is refused


def weightless(family: str, **fields: Any) -> Any:
    shape = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**shape, "head_dim": 16, **fields}))


REFUSED = {
    "a size that scales do not divide": (
        "qwen3_moe",
        {**EXPERTS["qwen3_moe"], "moe_intermediate_size": 36, "hidden_size": 36},
        "have matrices of 1296 weights, which is no multiple of the 64 that share a scale",
    ),
    "an activation that learns": (
        "qwen3_moe",
        {**EXPERTS["qwen3_moe"], "hidden_act": "xielu"},
        "have more parameters than two matrices and their biases",
    ),
}


@pytest.mark.parametrize(("family", "fields", "reason"), REFUSED.values(), ids=REFUSED)
def test_experts_that_cannot_be_handled_are_refused_with_the_reason(
    family: str, fields: dict[str, Any], reason: str
) -> None:
    model = weightless(family, **fields)
    found = refusal(model)
    assert found is not None
    assert reason in found
    replace_experts(model)
    assert refusal(model) == found


def test_a_base_with_such_experts_is_not_loaded(tmp_path: Path) -> None:
    folder = build_tiny_model(
        tmp_path / "model", "mixtral", hidden_size=40, **{**EXPERTS["mixtral"], "intermediate_size": 36}
    )
    with pytest.raises(UserError, match=r"its experts .* would stay in 16 bits"):
        load_base(folder, CPU, PackedAttention())
