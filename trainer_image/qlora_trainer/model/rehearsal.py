"""A step of training on a small random copy of a model, on the CPU: what would fail on the GPU fails in prepare.

Rules:

- The copy has the very config, but for its widths, its number of layers (at least two, and one of each kind), its
  vocabulary, windows and positions. A probe of several records is longer than all of those windows and positions.
- It goes the way of the train stage: load and quantize, adapter, `TrainingModel.check`, one step, save, reload; then it
  generates two tokens.
- How it attends is held against transformers' own eager attention, in float32, one record at a time; what its experts
  compute, against their own modules.
- Where answers are asked for, those that it generates are held against what it was trained to give (`answering`).
- What fails in the model's own code is the user's to know, as a UserError that names the model, and so is a model that
  no copy can be made of. What fails in ours is raised as it is (`blame`).
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from itertools import pairwise
from math import gcd
from pathlib import Path
from typing import Any, TypeGuard

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from orchestrator.api.adapter import AdapterSpec
from orchestrator.api.model_facts import OVERRIDES
from orchestrator.api.plan import MemoryPlan
from qlora_trainer.data.micro_batch import MicroBatch
from qlora_trainer.kernels.moe_experts import NF4Experts
from qlora_trainer.kernels.packed_attention import PackedAttention
from qlora_trainer.model import quantization
from qlora_trainer.model.adapter import ADAPTER_NAME, add_adapter
from qlora_trainer.model.answering import refuse_other_answers
from qlora_trainer.model.arithmetic import arithmetic
from qlora_trainer.model.blame import is_models
from qlora_trainer.model.loading import load_base, quantized_layers
from qlora_trainer.model.probe import drawn_probe
from qlora_trainer.model.source import library_words
from qlora_trainer.model.text_part import from_config, model_class
from qlora_trainer.model.training_model import TrainingModel
from qlora_trainer.outcome import UserError

LENGTHS = (13, 30, 21)
"""Tokens of the probe's records."""
POSITIONS, WINDOW, VOCABULARY, RANK = 48, 8, 256, 4
"""Of the copy: no record has more positions, and the row of all has; records are longer than windows."""
PROBE_TOKENS = range(3, VOCABULARY - 3)
LARGEST_PARAMETERS = 200_000_000
"""A copy that only its number of layers could be made smaller of; more take minutes to quantize on a CPU."""
MOST_LAYERS = 8
TOLERANCE = 1e-3
"""Largest relative difference between two float32 ways to the same logits."""

WIDTHS: Mapping[str, int] = {
    "hidden_size": 64, "word_embed_proj_dim": 64, "intermediate_size": 256, "ffn_dim": 256, "n_inner": 256,
    "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256, "ffn_hidden_size": 256,
    "num_attention_heads": 4, "head_dim": 16, "rotary_dim": 8, "q_lora_rank": 32, "kv_lora_rank": 32,
    "lru_width": 64, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 4,
    "linear_num_value_heads": 4, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_num_heads": 8, "mamba_head_dim": 16,
    "mamba_d_ssm": 128, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "n_group": 1, "topk_group": 1,
    "hidden_size_per_layer_input": 16,
}  # fmt: skip
"""The copy's widths, by the names that transformers has for them."""
BOUNDS: Mapping[str, int] = {
    "sliding_window": WINDOW, "window_size": WINDOW, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2, "first_k_dense_replace": 1,
    "num_dense_layers": 1, "moe_layer_start_index": 1, "index_n_heads": 4, "max_position_embeddings": POSITIONS,
    "vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY, "top_k_experts": 2,
    "mamba_chunk_size": 16, "mamba_d_state": 16,
}  # fmt: skip
"""What the copy has at most."""
SCALED = ("hidden_size", "intermediate_size", "num_attention_heads")
SMALLEST_SCALED = 64
"""The copy's width where all widths are divided by the same number."""
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num")
LAST_LAYERS = ("num_kv_shared_layers",)
"""How many of the last layers are of another kind."""

log = logging.getLogger(__name__)


def rehearse(config: Any, source: str, adapter: AdapterSpec, *, answers: bool = False) -> str | None:
    """Train a small copy for a step, and raise UserError if the model cannot be trained as it is.

    `answers`: nor if what it then generates is not what was trained.

    Returns why its records are trained one by one; None where rows of them are packed.
    """
    name = (getattr(config, "architectures", None) or [config.model_type])[0]
    failures: list[Exception] = []
    for copy in small_copies(config, failures):
        try:
            with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
                warnings.simplefilter("ignore")  # what libraries warn of on a small copy is nobody's concern
                return _rehearse(copy, adapter, answers=answers)
        except UserError as error:
            raise UserError(f"{source}: {error.message}") from error
        except Exception as error:  # a copy that was made too small may fail where a larger one does not
            log.debug("a small copy of %s fails", name, exc_info=True)
            failures.append(error)
    raise _refusal(source, name, failures)


def _refusal(source: str, name: str, failures: list[Exception]) -> Exception:
    """What to tell of a model of which no copy trains."""
    own = next((error for error in failures if not isinstance(error, (_NoCopy, _Unfit)) and not is_models(error)), None)
    if own is not None:
        return own
    failed = [error for error in failures if not isinstance(error, _NoCopy)]
    if failed:
        refusal = UserError(
            f"{source}: {name} cannot be trained here; a step on a small copy of it fails with "
            f"{library_words(failed[-1])}; choose another model"
        )
    else:
        refusal = UserError(
            f"{source}: no small copy of {name} can be made to try a step of training on "
            f"({failures[0]}), so it is not known whether it can be trained; "
            "choose another model"
        )
    refusal.__cause__ = failures[-1]
    return refusal


class _NoCopy(Exception):
    """A way to make a small copy that does not lead to one."""


class _Unfit(Exception):
    """What a copy shows that trains, but not right."""


def _rehearse(config: Any, adapter: AdapterSpec, *, answers: bool) -> str | None:
    torch.manual_seed(0)
    reference = _drawn(config)
    compare_experts(reference)
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as scratch:
        folder = Path(scratch) / "model"
        reference.save_pretrained(folder)
        model = _trained(folder, adapter)
        _reload(folder, model, Path(scratch) / "adapter")
    _compare_attention(reference, model)
    if answers:
        refuse_other_answers(model, PROBE_TOKENS)
    return model.separate_because


# --- the copy


def small_copies(config: Any, failures: list[Exception] | None = None) -> Iterator[Any]:
    """Small copies of a config that can be built, the smallest first; `failures` gets why others cannot."""
    for change in (_shrunk, _shrunk_with_plain_rope, _scaled_down, _with_fewer_layers):
        try:
            yield _built(config, change)
        except _NoCopy as error:
            if failures is not None:
                failures.append(error)


def _built(config: Any, change: Callable[[Any], Mapping[str, Any]]) -> Any:
    try:
        copy = type(config).from_dict(dict(change(config)))
        with torch.device("meta"):
            model = from_config(copy)
    except Exception as error:  # configs check themselves in many ways, and some sizes belong together
        if is_models(error):
            raise _NoCopy(library_words(error)) from error
        raise
    size = sum(each.numel() for each in model.parameters())
    if size > LARGEST_PARAMETERS:
        raise _NoCopy(f"it has {size:,} parameters in its smallest form")
    return copy


def _shrunk(config: Any) -> dict[str, Any]:
    """All widths replaced, those of configs inside too."""
    values = _bounded(config)
    own = config.attribute_map
    heads, key_heads = (values.get(own.get(name, name)) for name in ("num_attention_heads", "num_key_value_heads"))
    for name, size in WIDTHS.items():
        _resize(values, own.get(name, name), lambda _, size=size: size)
    for name in KEY_HEADS:
        _resize(values, name, lambda before: 4 if key_heads == heads else min(before, 2))
    if sections := (values.get("rope_parameters") or {}).get("mrope_section"):
        values["rope_parameters"] = values["rope_parameters"] | {"mrope_section": _fewer(sections, config, values)}
    return values | {name: _shrunk(inner) for name, inner in _inner_configs(config)}


def _resize(values: dict[str, Any], name: str, resized: Callable[[int], int]) -> None:
    """Give a field another size, and to layers with one of their own one that is as much larger or smaller."""
    before = values.get(name)
    if isinstance(before, list) and len(before) == values.get("num_hidden_layers") and all(map(_is_number, before)):
        values[name] = [max(1, resized(max(before)) * each // max(before)) for each in before]
    if not _is_number(before) or before == 0:  # of which there is none
        return
    values[name] = after = resized(before)
    for own in values.get(OVERRIDES, {}).values():
        if _is_number(own.get(name)):
            own[name] = max(1, after * own[name] // before)


def _fewer(sections: list[int], config: Any, values: Mapping[str, Any]) -> list[int]:
    """Parts of a head's frequencies, one for each of three positions, of a copy's smaller head."""
    own = config.to_dict()
    before = own.get("head_dim") or config.hidden_size // config.num_attention_heads
    after = values.get("head_dim") or values["hidden_size"] // values["num_attention_heads"]
    fewer = [size * after // before for size in sections]
    return [sum(sections) * after // before - sum(fewer[1:]), *fewer[1:]]


def _shrunk_with_plain_rope(config: Any) -> dict[str, Any]:
    values = _shrunk(config)
    if values.get("rope_parameters"):
        sections = {name: each for name, each in values["rope_parameters"].items() if name == "mrope_section"}
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, **sections}
    return values


def _scaled_down(config: Any) -> dict[str, Any]:
    """All widths divided by a number, because in some models they depend on each other."""
    values = _bounded(config)
    own = config.attribute_map
    names = [own.get(name, name) for name in (*SCALED, *KEY_HEADS)]
    known = {name: values[name] for name in names if _is_number(values.get(name))}
    divisor = gcd(*known.values())
    while divisor > 1 and values[own.get("hidden_size", "hidden_size")] // divisor < SMALLEST_SCALED:
        divisor //= 2
    for name in known:
        _resize(values, name, lambda before: max(1, before // max(1, divisor)))
    return values | {name: _scaled_down(inner) for name, inner in _inner_configs(config)}


def _with_fewer_layers(config: Any) -> dict[str, Any]:
    """Nothing but fewer layers and tokens."""
    values = config.to_dict() | _fewer_layers(config)
    if _is_number(values.get("vocab_size")):
        values["vocab_size"] = max(VOCABULARY, _tokens(config) + 1)
    return values | {name: _with_fewer_layers(inner) for name, inner in _inner_configs(config)}


def _tokens(config: Any) -> int:
    """The largest of the special tokens that a config names."""
    return max(
        (value for name, value in config.to_dict().items() if _names_token(name) and _is_number(value)), default=0
    )


def _inner_configs(config: Any) -> list[tuple[str, Any]]:
    found = [(name, getattr(config, name, None)) for name in config.sub_configs]
    return [(name, inner) for name, inner in found if isinstance(inner, PreTrainedConfig)]


def _bounded(config: Any) -> dict[str, Any]:
    """Fewer layers, experts, positions and tokens, and short windows."""
    values: dict[str, Any] = config.to_dict() | _fewer_layers(config)
    own = config.attribute_map
    for name, bound in BOUNDS.items():
        for each in (values, *values.get(OVERRIDES, {}).values()):
            if _is_number(value := each.get(own.get(name, name))):
                each[own.get(name, name)] = min(value, bound)
    for name, value in values.items():
        if _names_token(name) and (_is_number(value) or isinstance(value, list)):
            # Several tokens may end a text.
            values[name] = min(value, VOCABULARY - 1) if _is_number(value) else VOCABULARY - 1
    return values


def _is_number(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _names_token(name: str) -> bool:
    return name.endswith(("_token_id", "_token_index"))


def _fewer_layers(config: Any) -> dict[str, Any]:
    """Two layers, or one of each kind; the first layers, where kinds follow from a pattern."""
    values = config.to_dict()
    layers = getattr(config, "num_hidden_layers", 2)
    lists = {name: each for name, each in values.items() if isinstance(each, list) and len(each) == layers > 1}
    overrides = {int(number): own for number, own in (values.get(OVERRIDES) or {}).items()}
    last = {name: values[name] for name in LAST_LAYERS if values.get(name)}
    kinds: list[Any] = list(zip(*lists.values(), strict=True)) or getattr(config, "layer_types", None) or [()] * layers
    seen = [
        str((kind, overrides.get(n), [n >= layers - each for each in last.values()])) for n, kind in enumerate(kinds)
    ]
    first = [number for number, kind in enumerate(seen) if kind not in seen[:number]]
    chosen = sorted({*first, 0, min(1, layers - 1)})[:MOST_LAYERS]
    if not lists:
        chosen = list(range(chosen[-1] + 1))[:MOST_LAYERS]
    own = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    fewer: dict[str, Any] = {
        own: len(chosen),
        **{name: [each[number] for number in chosen] for name, each in lists.items()},
        **{name: sum(number >= layers - each for number in chosen) for name, each in last.items()},
    }
    if overrides:
        fewer[OVERRIDES] = {str(place): overrides[number] for place, number in enumerate(chosen) if number in overrides}
    return fewer


def _drawn(config: Any) -> Any:
    """The copy in float32, with weights that no part of it can hide behind: nothing is zero, nothing is one."""
    model: Any = from_config(config, dtype=torch.float32, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.data.copy_(noise / parameter.shape[-1] ** 0.5)
        else:
            parameter.data.add_(0.5 * noise)
    return model.eval()


# --- the train stage


def _trained(folder: Path, adapter: AdapterSpec) -> TrainingModel:
    attention = PackedAttention()
    base = load_base(folder, torch.device("cpu"), attention)
    recomputes = any(isinstance(module, GradientCheckpointingLayer) for module in base.modules())
    model = TrainingModel(
        add_adapter(base, _small(adapter, list(quantized_layers(base))), seed=0),
        MemoryPlan(micro_batch_size=1, accumulation_steps=1, recompute_layers=int(recomputes), loss_chunk_tokens=16),
        attention,
        0.0,
    )
    model.check()
    arithmetic(model)  # as the loop has it made before the first step
    model.train()
    loss = model.accumulate(drawn_probe(LENGTHS, PROBE_TOKENS), divisor=float(sum(LENGTHS)))
    grads = [parameter.grad for _, parameter in model.trainable() if parameter.grad is not None]
    if not torch.isfinite(loss) or not all(bool(torch.isfinite(grad).all()) for grad in grads):
        raise _Unfit("its loss or its gradients are not finite")
    return model


def _small(adapter: AdapterSpec, names: list[str]) -> AdapterSpec:
    """The adapter with a low rank, on those of its targets that the copy's layers have."""
    targets: Any = adapter.target_modules
    if targets != "all-linear":
        known = tuple(target for target in targets if any(f".{name}".endswith(f".{target}") for name in names))
        targets = known or "all-linear"
    return adapter.model_copy(update={"rank": min(adapter.rank, RANK), "target_modules": targets})


def _reload(folder: Path, model: TrainingModel, saved: Path) -> None:
    """Save the adapter as a checkpoint does, and load it as PEFT and plain transformers do."""
    saved.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in model.adapter().items()}, saved / "adapter_model.safetensors"
    )
    model.peft_model.peft_config[ADAPTER_NAME].save_pretrained(str(saved))
    base = model_class(model.base.config).from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True)
    reloaded: Any = PeftModel.from_pretrained(base, str(saved), is_trainable=True)
    loaded = get_peft_model_state_dict(reloaded, save_embedding_layers=False)
    odd = [name for name, tensor in model.adapter().items() if not torch.equal(loaded[name].to(tensor.dtype), tensor)]
    if odd or len(loaded) != len(model.adapter()):
        raise _Unfit(f"PEFT loads another adapter than was saved; {odd[:3]} differ")
    _refuse_unused(reloaded, model)
    reloaded.eval().generate(
        input_ids=drawn_probe(LENGTHS, PROBE_TOKENS).input_ids[:, : LENGTHS[0]], max_new_tokens=2, do_sample=False
    )


def _refuse_unused(reloaded: Any, model: TrainingModel) -> None:
    """Where a layer computes otherwise once it is quantized, what was trained may be nothing to the model itself."""
    ids = drawn_probe(LENGTHS, PROBE_TOKENS).input_ids[:, : LENGTHS[0]]
    reloaded(input_ids=ids, use_cache=False).logits.float().square().mean().backward()
    used = {name for name, parameter in model.trainable() if parameter.grad is not None}
    plain = {
        name.replace(f".{ADAPTER_NAME}.", "."): parameter
        for name, parameter in reloaded.named_parameters()
        if parameter.requires_grad
    }
    if unused := sorted(name for name, parameter in plain.items() if parameter.grad is None and name in used):
        raise _Unfit(f"without quantization the model does not compute with its adapter {unused[0]}")


# --- experts


def compare_experts(reference: Any) -> None:
    """Hold every module of experts against ours with the same weights: outputs, and gradients to all that goes in."""
    for name, module in reference.named_modules():
        if quantization.is_experts(module) and not (difference := _experts_difference(module)) <= TOLERANCE:
            raise UserError(
                f"{type(reference).__name__} has experts ({name}) that compute in a way that is not known here, "
                f"{difference:.1%} off; choose another model"
            )


def _experts_difference(module: Any) -> float:
    """The largest relative difference."""
    theirs = deepcopy(module).requires_grad_(False)
    if hasattr(theirs, "config"):
        theirs.config._experts_implementation = "eager"
    ours = quantization.nf4_experts(deepcopy(module))
    for name, parameter in theirs.named_parameters():
        if name not in ours.matrices:
            getattr(ours, name).data.copy_(parameter)
    ours.to("cpu")
    for name in ours.matrices:
        getattr(theirs, name).data = ours.dense(name)
    takes_index = quantization.is_declared(module)
    found, expected = (_experts_passes(each, ours, takes_index) for each in (ours, theirs))
    pairs = zip(found, expected, strict=True)
    return max(float((one - other).norm() / other.norm().clamp(min=1e-30)) for one, other in pairs)


def _experts_passes(module: Any, sizes: NF4Experts, takes_index: bool) -> tuple[Tensor, ...]:
    """Output and gradients of experts, for tokens that do not choose all of them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6 * sizes.experts, sizes.hidden, generator=generator).requires_grad_()
    weights, index = torch.rand(len(x), sizes.experts, generator=generator).topk(max(1, sizes.experts // 2))
    inputs = (x, weights.requires_grad_()) if takes_index else (x,)
    output = module(x, index, weights) if takes_index else module(x)
    grad = torch.randn(output.shape, generator=generator)
    return output.detach(), *torch.autograd.grad(output, inputs, grad)


# --- attention


@torch.no_grad()
def _compare_attention(reference: Any, model: TrainingModel) -> None:
    batch = drawn_probe(LENGTHS, PROBE_TOKENS)
    expected = _record_by_record(reference, batch)
    reference.set_attn_implementation(model.attention_implementation)
    if model.separate:
        found = _record_by_record(reference, batch)
    else:
        model.attention.expect(batch, batch.record_starts)
        found = reference(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    difference = float((found - expected).norm() / expected.norm())
    if not difference <= TOLERANCE:
        raise UserError(
            f"{type(reference).__name__} attends in a way that is not known here: a packed row is off by "
            f"{difference:.1%} from the model's own attention; choose another model"
        )


def _record_by_record(model: Any, batch: MicroBatch) -> Tensor:
    starts = pairwise(batch.record_starts.tolist())
    return torch.cat([model(input_ids=batch.input_ids[:, a:b], use_cache=False).logits for a, b in starts], dim=1)
