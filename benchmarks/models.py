"""Every type of causal language model that transformers has, tried: trained right, or refused in prepare.

`python -m benchmarks.models` makes a tiny random model of each type and sends it through what prepare and train do. An
outside judge, plain transformers and PEFT, computes the same records one by one with the model's own eager attention:
once in float32 from the dequantized weights, which is the truth, and once as QLoRA does, in bfloat16 over bitsandbytes.
The trainer's loss, per-token logits and adapter gradients may be as far from the truth as the latter are, and little
more. The adapter must load in PEFT as it was, and generate. The outcome of a type is one of:

- trained: equal to the judge's;
- refused: by prepare, in words;
- wrong: accepted by prepare, but off, or refused once a GPU would have been taken;
- crashed: any error that is not the user's to mend, a hang, or a process that dies.

Each type has a process of its own, bounded in time. Rows go to `benchmarks/results/models.json`, from where `make docs`
takes the tables of docs/models.md, and `--write` the one that a plan reads, `orchestrator/api/model_types.json`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import resource
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterable, Mapping
from inspect import getsource
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from bitsandbytes.functional import dequantize_4bit
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from qlora_trainer.data.micro_batch import MicroBatch, collate
from qlora_trainer.kernels.moe_experts import NF4Experts
from qlora_trainer.kernels.packed_attention import PackedAttention
from qlora_trainer.model.adapter import ADAPTER_NAME, add_adapter, peft_takes
from qlora_trainer.model.architecture import check_architecture
from qlora_trainer.model.loading import load_base, quantized_layers
from qlora_trainer.model.rehearsal import small_copies
from qlora_trainer.model.source import ModelDescription, describe_model, holds_text_model, read_facts
from qlora_trainer.model.training_model import TrainingModel
from qlora_trainer.outcome import UserError
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PreTrainedConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils.logging import disable_progress_bar

from orchestrator.api.job import AdapterSpec
from orchestrator.api.model_facts import ALIKE, CHOSEN, EXPERT_COUNTS, TEXT_CONFIG
from orchestrator.api.package_data import MODEL_TYPES_NAME
from orchestrator.api.plan import MemoryPlan
from orchestrator.api.trainable import INNER_MODELS, assumed

RESULTS = Path(__file__).parent / "results" / "models.json"
SHIPPED = RESULTS.parents[2] / "orchestrator" / "api" / MODEL_TYPES_NAME
WRAPPERS = frozenset(filter(holds_text_model, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES))
"""Types of models of images and text, whose text part is trained."""
TYPES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() | WRAPPERS))
LENGTHS = (9, 27, 2, 19)
"""Tokens of the records, which are one row: longer than windows, and together than positions."""
SECONDS, LONGEST_SECONDS = 240, 3600
"""A type that takes a processor for longer hangs, and so does one that waits for longer."""
ROUNDINGS, SLACK = 3.0, 0.02
"""How many times as far from the truth the trainer may be as plain QLoRA, and how far besides."""
SMALLEST_GRADIENT = 1e-2
"""Of the largest gradient's norm: smaller ones are nothing but rounding, and only compared all together."""
GENERATED = 4
NO_DEFAULT = "cannot be built from its config"
"""What is said of a type whose own defaults are no model, and need not be true of others of the type."""
SIZES = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "tie_word_embeddings"),
)
HEADS = {"lm_head", "embed_out", "output_projection", "classifier", "score", "qa_outputs", "summary"}
"""Linear layers that are none for an adapter."""

Verdict = Literal["trained", "refused", "wrong", "crashed"]
Row = dict[str, Any]


def main() -> None:
    """Try types, print their rows, and keep them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--types", nargs="*", default=list(TYPES))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write", action="store_true", help="try nothing; write a plan's table from the results")
    options = parser.parse_args()
    if options.write:
        SHIPPED.write_text(shipped(known_rows(options.results)))
        return
    disable_progress_bar()
    known: dict[str, Row] = known_rows(options.results)["types"] if options.results.exists() else {}
    for model_type in options.types:
        known[model_type] = row = try_apart(model_type)
        print(f"{model_type:28} {row['verdict']:8} {row.get('mode', ''):18} {row.get('reason', '')[:200]}", flush=True)
        content = {"versions": versions(), "types": {name: _kept(known[name]) for name in sorted(known)}}
        options.results.write_text(json.dumps(content, indent=1) + "\n")
    verdicts = [row["verdict"] for row in known.values()]
    print({verdict: verdicts.count(verdict) for verdict in ("trained", "refused", "wrong", "crashed")})
    sys.exit(1 if {"wrong", "crashed"} & set(verdicts) else 0)


def _kept(row: Row) -> Row:
    """A row without what differs from run to run."""
    rounded = {name: [float(f"{each:.2g}") for each in both] for name, both in row.get("off", {}).items()}
    return {**row, "off": rounded} if rounded else row


def known_rows(path: Path = RESULTS) -> dict[str, Any]:
    """The outcomes that are kept, and of which libraries they are."""
    return json.loads(path.read_text())


def shipped(known: Mapping[str, Any]) -> str:
    """The table that a plan reads, as it should be."""
    types = {name: shipped_row(name, row) for name, row in known["types"].items()}
    return json.dumps({"transformers": known["versions"]["transformers"], "types": types}, indent=1) + "\n"


def shipped_row(model_type: str, row: Row) -> Row:
    """What a plan must know of a type."""
    known = {name: row[name] for name in ("classes", "wraps", "sees_both_sides", "assumes") if name in row}
    if row["verdict"] == "refused" and row["found_by"] == "trial" and NO_DEFAULT not in row["reason"]:
        known["refused"] = row["reason"]
    if row["verdict"] == "trained" and model_type not in WRAPPERS:  # which may hold any text model
        known["layers"] = _layers(model_type, row["targets"])
    if "because" in row:
        known["separate_because"] = row["because"]
    return known


def _layers(model_type: str, targets: Iterable[str]) -> list[str]:
    """The linear layers that some model of a type has: those of the tiny one, and what its source makes otherwise."""
    if model_type in ALIKE:  # whose source makes layers without experts, which are refused
        return sorted(targets)
    architecture: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]
    made = re.findall(r"self\.(\w+) = (?:nn\.Linear|Conv1D)\(", getsource(sys.modules[architecture.__module__]))
    kind: Any = SimpleNamespace(config=SimpleNamespace(model_type=model_type))
    return sorted(name for name in {*targets, *made} - HEADS if peft_takes(kind, name))


def versions() -> dict[str, str]:
    """Of what the outcome depends on."""
    import peft
    import transformers

    return {"transformers": transformers.__version__, "peft": peft.__version__, "torch": torch.__version__}


def tenth(seed: int) -> list[str]:
    """A tenth of all types, drawn by a seed."""
    return sorted(random.Random(seed).sample(TYPES, len(TYPES) // 10))


def try_apart(model_type: str) -> Row:
    """The row of a type, tried in a process of its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_try_and_send, args=(model_type, sender))
    process.start()
    sender.close()
    row: Row = _row("crashed", f"no outcome within {LONGEST_SECONDS} s")
    try:
        if receiver.poll(LONGEST_SECONDS):
            row = receiver.recv()
    except EOFError:
        process.join()
        row = _row("crashed", f"its process ended with {process.exitcode}")
    process.kill()
    process.join()
    return row


def _try_and_send(model_type: str, sender: Any) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="models-") as scratch:
        os.environ.update(TMPDIR=scratch)
        sender.send(try_type(model_type, Path(scratch)))


def try_type(model_type: str, scratch: Path) -> Row:
    """Make a tiny model of a type, and say how it fares."""
    folder = scratch / "model"
    source = f"file://{folder}"
    try:
        config = default_config(model_type)
    except Exception as error:  # noqa: BLE001 - transformers' own class refuses its own defaults
        return _row(
            "refused", f"transformers makes no config of its own defaults: {_line(error)}", **_facts(model_type)
        )
    facts = _facts(model_type, config)
    try:
        description = _description(config, folder)
        read_facts(description, source)
        facts["found_by"] = "trial"
        check_architecture(description, source, AdapterSpec())
    except UserError as error:
        return _row("refused", error.message.removeprefix(f"{source}: ").replace(source, "the model"), **facts)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the outcome
        return _row("crashed", f"in prepare: {_line(error)}", traceback=traceback.format_exc(), **facts)
    try:
        row = {**_trained(folder, scratch), **facts}
        if row.pop("mixture"):
            row["expert_adapters"] = takes_expert_adapters(description, source)
        return row
    except UserError as error:
        return _row("wrong", f"accepted by prepare, and then refused: {error.message}", **facts)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the outcome
        return _row("crashed", f"in train: {_line(error)}", traceback=traceback.format_exc(), **facts)


def takes_expert_adapters(description: ModelDescription, source: str) -> bool:
    """Whether prepare takes an adapter on a mixture's routed experts."""
    try:
        check_architecture(description, source, AdapterSpec(experts=True, dropout="0"))
    except UserError:
        return False
    return True


def _facts(model_type: str, config: Any = None) -> Row:
    """What the table that ships with the package says of a type, whatever the outcome."""
    row: Row = {"classes": _classes(model_type), "found_by": "config"}
    if model_type in WRAPPERS:
        row["wraps"] = True
    if model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        row["sees_both_sides"] = True
    assumes: Row = assumed(config.to_dict()) if config is not None else {}
    if config is not None and model_type in WRAPPERS:
        assumes[TEXT_CONFIG] = {**assumes[TEXT_CONFIG], **_sizes(config.get_text_config())}
    if assumes:
        row["assumes"] = assumes
    return row


def _sizes(config: Any) -> Row:
    """What a class has for sizes that published models of images and text leave out of their text model's config."""
    found = {name: getattr(type(config), name, None) for name in config.to_dict().keys() & set(SIZES)}
    return {name: found[name] for name in SIZES if isinstance(found.get(name), int | str)}


def _description(config: Any, folder: Path) -> ModelDescription:
    """A tiny model as prepare finds it; only the config where there is none that is like those of the type."""
    inside = any(isinstance(getattr(config, name, None), PreTrainedConfig) for name in INNER_MODELS)
    if (config.model_type in WRAPPERS or not inside) and config.model_type not in REUSING and make(config, folder):
        return describe_model(f"file://{folder}", "main")
    folder.mkdir()
    config.save_pretrained(folder)
    return ModelDescription(folder=folder, revision="", tensors=None)


def _row(verdict: Verdict, reason: str = "", **fields: Any) -> Row:
    return {"verdict": verdict, **({"reason": reason} if reason else {}), **fields}


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


# --- the model


def _mrope(share: float, *sections: int, **others: int) -> Mapping[str, Any]:
    """How much of a head is rotated, with frequencies for the three positions of a patch, which are one in a text."""
    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": share,
        "mrope_section": list(sections),
    }
    return {"text_config": {"rope_parameters": rope, **others}}


_LFM2 = {"layer_types": ["conv", "full_attention"] * 16}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "lfm2": _LFM2,
    "lfm2_vl": {"text_config": {"model_type": "lfm2", **_LFM2}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 8, "num_hidden_layers": 16},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 16, "num_local_experts": 0},
    "bamba": {"attn_layer_indices": [1]},
    "gemma4_text": {
        "num_hidden_layers": 35,
        "layer_types": [*["sliding_attention"] * 4, "full_attention"] * 7,
        "num_kv_shared_layers": 20,
        "use_double_wide_mlp": True,
        "num_key_value_heads": 1,
    },
    "gemma4": {
        "text_config": {
            "hidden_size_per_layer_input": 0,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "use_bidirectional_attention": "vision",
            "final_logit_softcapping": 30.0,
        },
    },
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    "nemotron": {"num_key_value_heads": 8},
    "dots1": {"n_shared_experts": 2, "n_routed_experts": 128, "num_experts_per_tok": 6, "first_k_dense_replace": 1},
    "deepseek_v2": {"num_experts_per_tok": 6, "moe_intermediate_size": 1408},
    "granitemoeshared": {"shared_intermediate_size": 1024},
    "hunyuan_v1_moe": {"num_experts": 64, "moe_topk": 8},
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "paddleocr_vl"), _mrope(1.0, 16, 24, 24)),
    "glm4v_moe": _mrope(0.5, 8, 12, 12, head_dim=128),
    "glm_ocr": _mrope(1.0, 8, 12, 12),
    **dict.fromkeys(("glm4v", "glm46v", "glmga"), _mrope(0.5, 8, 12, 12)),
}
"""What published models have, where transformers' defaults leave it open or are no such model."""
REUSING = ("hrm_text", "zamba2")
"""Types whose layers are used more than once, in which a tiny model of theirs need not be like them."""


def default_config(model_type: str) -> Any:
    """The config of a type as transformers makes it, but for `DEFAULTS`."""
    config = CONFIG_MAPPING[model_type](**DEFAULTS.get(model_type, {}))
    if vars(config).get("head_dim", 0) is None:
        config.head_dim = config.hidden_size // config.num_attention_heads
    config.architectures = [_architecture(model_type)]
    return config


def make(config: Any, folder: Path) -> bool:
    """Save a tiny model of a config; whether one can be made."""
    copy = next(small_copies(config), None)
    if copy is None:
        return False
    _still(copy.get_text_config())
    copy.architectures = config.architectures
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model: Any = _auto(config.model_type).from_config(copy, dtype=torch.float32)
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            if parameter.dim() > 1:
                parameter.data.copy_(noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.data.add_(0.3 * noise)
    model.to(torch.bfloat16).save_pretrained(folder)
    return True


def _architecture(model_type: str) -> str:
    return _classes(model_type)[0]


def _classes(model_type: str) -> list[str]:
    names = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if model_type in WRAPPERS else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    found = names[model_type]
    return [found] if isinstance(found, str) else list(found)


def _auto(model_type: str) -> Any:
    """What loads a whole model of a type, images' part included."""
    return AutoModelForImageTextToText if model_type in WRAPPERS else AutoModelForCausalLM


def _still(config: Any) -> None:
    """Nothing is dropped at random, and every expert is chosen: a rounding must not send a token elsewhere."""
    for name, value in list(vars(config).items()):
        if isinstance(value, float) and ("drop" in name or "jitter" in name):
            setattr(config, name, 0.0)
    experts = next((n for name in EXPERT_COUNTS if type(n := getattr(config, name, None)) is int), 0)
    chosen = next((name for name in CHOSEN if getattr(config, name, None)), None)
    if experts > 1 and chosen is not None:
        before = getattr(config, chosen)
        setattr(config, chosen, experts)
        try:
            config.validate()
        except StrictDataclassError:  # some choose one, whatever happens
            setattr(config, chosen, before)


# --- the trainer, and the judge


def _trained(folder: Path, scratch: Path) -> Row:
    batch = records()
    attention = PackedAttention()
    base = load_base(folder, torch.device("cpu"), attention)
    model = TrainingModel(
        add_adapter(base, AdapterSpec(rank=4, alpha=8, dropout="0"), seed=0),
        MemoryPlan(micro_batch_size=1, accumulation_steps=1, recompute_layers=0, loss_chunk_tokens=16),
        attention,
        0.0,
    )
    model.check()
    _wake(model)
    model.train()
    loss = float(model.accumulate(batch, divisor=float(batch.supervised.numel())))
    gradients = {name: each.grad.float() for name, each in model.trainable() if each.grad is not None}
    with torch.no_grad():
        logits = model.logits(batch)
    targets = sorted(_targets(model))
    truth = _judged(dense(folder, model, torch.float32), targets, model, batch)
    qlora = _judged(_quantized(folder, model), targets, model, batch)
    inner = model.base.config.get_text_config()
    row: Row = {
        "mode": "packed" if model.separate_because is None else "record by record",
        "hand_written": model.fused is not None,
        **({"text_type": text} if (text := inner.model_type) != model.base.config.model_type else {}),
        "mixture": any(isinstance(module, NF4Experts) for module in model.base.modules()),
        **({"because": model.separate_because} if model.separate_because else {}),
        "targets": sorted({name.rpartition(".")[2] for name in targets}),
        "off": differences(truth, qlora, (loss, logits, gradients)),
    }
    found = [*faults(row["off"]), *_reloaded(folder, model, scratch / "adapter")]
    return _row("wrong", "; ".join(found), **row) if found else _row("trained", **row)


def faults(off: Mapping[str, tuple[float, float]]) -> list[str]:
    """What of the trainer is further from the truth than rounding explains."""
    return [
        f"{name} is off by {ours:.3g}, plain QLoRA by {theirs:.3g}"
        for name, (ours, theirs) in off.items()
        if not ours <= ROUNDINGS * theirs + SLACK
    ]


def records() -> MicroBatch:
    """The tokens that every type is tried with."""
    draw = np.random.RandomState(7)
    records = [draw.randint(3, 200, size=length).astype(np.int32) for length in LENGTHS]
    return collate([(ids, ids, np.arange(len(ids), dtype=np.int32)) for ids in records])


def _wake(model: TrainingModel) -> None:
    """Give the adapter a B that is not zero, or A would have no gradient."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.trainable():
        if "lora_B" in name:
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))


def _targets(model: TrainingModel) -> set[str]:
    """The full names of the layers that have an adapter."""
    return {name.removeprefix("base_model.model.").partition(".lora_")[0] for name, _ in model.trainable()}


def _judged(
    base: Any, targets: list[str], model: TrainingModel, batch: MicroBatch
) -> tuple[float, Tensor, Mapping[str, Tensor]]:
    """Loss, logits and gradients by plain transformers and PEFT, one record after the other."""
    base.requires_grad_(False)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=0.0, target_modules=targets)
    peft_model = get_peft_model(base, config, autocast_adapter_dtype=False)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(base.dtype)
    found = set_peft_model_state_dict(peft_model, model.adapter())
    assert not found.unexpected_keys, found.unexpected_keys[:3]
    peft_model.train()
    logits = [peft_model(input_ids=batch.input_ids[:, a:b], use_cache=False).logits[0].float() for a, b in
              pairwise(batch.record_starts.tolist())]  # fmt: skip
    losses = [cross_entropy(each[:-1], batch.input_ids[0, a + 1 : b], reduction="sum")
              for each, (a, b) in zip(logits, pairwise(batch.record_starts.tolist()), strict=True)]  # fmt: skip
    loss = torch.stack(losses).sum() / batch.supervised.numel()
    loss.backward()
    gradients = {
        name.replace(f".{ADAPTER_NAME}.", "."): parameter.grad.float()
        for name, parameter in peft_model.named_parameters()
        if parameter.grad is not None
    }
    return float(loss.detach()), torch.cat(logits).detach(), gradients


def dense(folder: Path, model: TrainingModel, dtype: torch.dtype) -> Any:
    """The model in 16 or 32 bits, with the weights that the trainer's NF4 layers stand for."""
    base: Any = _auto(model.base.config.model_type).from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )
    for name, layer in quantized_layers(model.base).items():
        weight: Any = layer.weight
        values = dequantize_4bit(weight.data, weight.quant_state).reshape(layer.out_features, -1).to(dtype)
        own = base.get_submodule(name.replace(".base_layer", ""))
        own.weight.data = values.T if isinstance(own, Conv1D) else values
    fill_experts(base, model)
    return base


def _quantized(folder: Path, model: TrainingModel) -> Any:
    """The model as plain QLoRA has it, for the size of the roundings."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    base: Any = _auto(model.base.config.model_type).from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager", experts_implementation="eager",
        quantization_config=quantization,
    )  # fmt: skip
    fill_experts(base, model)
    return as_trained(base)


def as_trained(base: Any) -> Any:
    """A model that bitsandbytes quantized, kept from another way to compute that knows no gradients."""
    for layer in quantized_layers(base).values():
        layer.support_avx512bf16_for_cpu = False
    return base


def fill_experts(base: Any, model: TrainingModel) -> None:
    """What the trainer's experts stand for; plain bitsandbytes leaves these in 16 bits."""
    for name, module in model.base.named_modules():
        if isinstance(module, NF4Experts):
            theirs = base.get_submodule(name.replace(".base_layer", ""))  # an adapter's
            for part in module.matrices:
                own = getattr(theirs, part)
                own.data = module.dense(part).to(own.dtype)


Outcome = tuple[float, Tensor, Mapping[str, Tensor]]


def differences(truth: Outcome, qlora: Outcome, ours: Outcome) -> dict[str, tuple[float, float]]:
    """How far the trainer and plain QLoRA are from the truth, relative to it."""
    loss, logits, gradients = truth
    assert gradients.keys() == ours[2].keys(), sorted(gradients.keys() ^ ours[2].keys())[:3]

    def tokens(found: Tensor) -> Tensor:
        return (found.float() - logits).norm(dim=-1) / logits.norm(dim=-1)

    firsts = [sum(LENGTHS[:n]) for n in range(len(LENGTHS))]
    return {
        "loss": (abs(ours[0] - loss) / abs(loss), abs(qlora[0] - loss) / abs(loss)),
        "logits": (float(tokens(ours[1]).max()), float(tokens(qlora[1]).max())),
        "first tokens": (float(tokens(ours[1])[firsts].max()), float(tokens(qlora[1])[firsts].max())),
        "gradients": (_worst(gradients, ours[2]), _worst(gradients, qlora[2])),
    }


def _worst(truth: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> float:
    """The largest relative difference of a gradient that is more than rounding."""
    least = SMALLEST_GRADIENT * max(float(each.norm()) for each in truth.values())
    return max(
        float((found[name] - each).norm() / each.norm()) for name, each in truth.items() if float(each.norm()) >= least
    )


def _reloaded(folder: Path, model: TrainingModel, saved: Path) -> Iterable[str]:
    """What is wrong with the adapter as plain PEFT loads it: its tensors, or that it does not generate."""
    saved.mkdir()
    own = {name: tensor.contiguous() for name, tensor in model.adapter().items()}
    save_file(own, saved / "adapter_model.safetensors")
    model.peft_model.peft_config[ADAPTER_NAME].save_pretrained(str(saved))
    plain: Any = _auto(model.base.config.model_type).from_pretrained(folder, dtype=torch.bfloat16)
    loaded: Any = PeftModel.from_pretrained(plain, str(saved), autocast_adapter_dtype=False).eval()
    parameters = {name.replace(f".{ADAPTER_NAME}.", "."): each for name, each in loaded.named_parameters()}
    odd = [name for name, each in own.items() if name not in parameters or not torch.equal(parameters[name], each)]
    odd += [name for name in parameters if ".lora_" in name and name not in own]
    if odd:
        yield f"PEFT loads another adapter than was saved: {odd[0]}"
    ids = torch.arange(5, 12).unsqueeze(0)
    text = loaded.generate(input_ids=ids, max_new_tokens=GENERATED, do_sample=False, pad_token_id=0)
    if text.shape[1] <= ids.shape[1]:
        yield "it generates nothing"


if __name__ == "__main__":
    main()
