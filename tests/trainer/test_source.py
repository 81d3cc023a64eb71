"""What is said of a base model before a GPU is taken: its shape, its files, and every reason to refuse it.

Shapes are compared with transformers' own config classes, headers with safetensors' own reader, downloads with the
files that were served.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fake_hub import COMMIT, EXPIRED, Repository, serve
from qlora_trainer.model import rehearsal
from qlora_trainer.model.architecture import check_architecture
from qlora_trainer.model.rehearsal import rehearse
from qlora_trainer.model.source import (
    describe_model,
    load_tokenizer,
    read_facts,
    resolve_model,
    tokenizer_digest,
)
from qlora_trainer.outcome import Transient, UserError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_model import build_tiny_model, tiny_model
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from orchestrator.adapters.job_store import model_config
from orchestrator.api.job import AdapterSpec, ModelSource
from orchestrator.api.model_facts import Mixture, ModelFacts
from orchestrator.errors import InvalidObject

FAMILIES = (
    *("bloom", "cohere", "falcon", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_bigcode", "gpt_neox", "gptj"),
    *("granite", "llama", "ministral", "mistral", "mpt", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen3", "smollm3"),
    *("stablelm", "starcoder2"),
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of one's own, to be damaged."""
    return Path(shutil.copytree(tiny_model(), tmp_path / "model"))


def source_of(folder: Path) -> str:
    return f"file://{folder}"


def check(folder: Path, *, adapter: AdapterSpec | None = None) -> ModelFacts:
    """All that prepare asks of a model."""
    source = source_of(folder)
    description = describe_model(source, "main")
    facts = read_facts(description, source)
    check_architecture(description, source, adapter or AdapterSpec())
    load_tokenizer(description.folder, source, None)
    return facts


def check_architecture_alone(folder: Path) -> None:
    check_architecture(describe_model(source_of(folder), "main"), source_of(folder), AdapterSpec())


def edit_config(folder: Path, **fields: Any) -> None:
    """Set fields of config.json; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


# --- its shape


@pytest.mark.parametrize("family", FAMILIES)
def test_facts_agree_with_transformers_about_every_family(family: str, tmp_path: Path) -> None:
    config = CONFIG_MAPPING[family]()
    config.architectures = ["AnyForCausalLM"]
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    facts = ModelFacts.from_config(saved, "abc")
    assert (facts.hidden_size, facts.num_layers) == (config.hidden_size, config.num_hidden_layers)
    assert (facts.num_attention_heads, facts.vocab_size) == (config.num_attention_heads, config.vocab_size)
    assert facts.tied_embeddings == config.tie_word_embeddings
    assert facts.intermediate_size == (getattr(config, "intermediate_size", None) or feed_forward_size(config))
    assert facts.model_type == family
    assert facts.revision == "abc"


def feed_forward_size(config: Any) -> int:
    """The width of the MLP, measured on the weights of the smallest model of its kind."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = ("dense_h_to_4h", "fc1", "fc_in", "c_fc", "up_proj")
    layer = next(module for name, module in model.named_modules() if name.rsplit(".", 1)[-1] in names)
    return layer.nf if hasattr(layer, "nf") else layer.out_features


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_that_does_not_say_whether_embeddings_are_tied_means_its_familys_default(family: str) -> None:
    config = CONFIG_MAPPING[family]()
    silent = {key: value for key, value in config.to_dict().items() if key != "tie_word_embeddings"}
    assert (
        ModelFacts.from_config({**silent, "architectures": ["A"]}, "abc").tied_embeddings == config.tie_word_embeddings
    )


@pytest.mark.parametrize(
    ("fields", "heads"),
    [
        ({"multi_query": True}, 1),
        ({"multi_query": False}, 8),
        ({"multi_query": True, "new_decoder_architecture": True, "num_kv_heads": 2}, 2),
    ],
)
def test_falcon_keeps_one_some_or_all_key_value_heads(fields: Mapping[str, Any], heads: int) -> None:
    config = CONFIG_MAPPING["falcon"](num_attention_heads=8, hidden_size=64, **fields)
    facts = ModelFacts.from_config({**config.to_dict(), "architectures": ["FalconForCausalLM"]}, "abc")
    assert facts.num_key_value_heads == heads


def test_the_text_model_of_a_nested_config_is_described() -> None:
    config = CONFIG_MAPPING["gemma3"]()
    facts = ModelFacts.from_config({**config.to_dict(), "architectures": ["Gemma3ForConditionalGeneration"]}, "abc")
    assert (facts.model_type, facts.part_of) == ("gemma3_text", "gemma3")
    assert facts.hidden_size == config.text_config.hidden_size
    assert facts.head_dim == config.text_config.head_dim
    assert facts.num_layers == config.text_config.num_hidden_layers
    assert facts.tied_embeddings


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_size", None, "hidden_size is missing"),
        ("intermediate_size", None, "intermediate_size is missing"),
        ("num_hidden_layers", None, "num_hidden_layers is missing"),
        ("num_attention_heads", None, "num_attention_heads is missing"),
        ("vocab_size", None, "vocab_size is missing"),
        ("model_type", None, "model_type is missing"),
        ("architectures", None, "architectures is missing"),
        ("architectures", [], "architectures must be a list of class names"),
        ("hidden_size", "64", "hidden_size must be a positive integer, not '64'"),
        ("num_hidden_layers", 0, "num_hidden_layers must be a positive integer, not 0"),
        ("vocab_size", True, "vocab_size must be a positive integer, not True"),
    ],
)
def test_a_field_that_is_missing_or_wrong_is_named(field: str, value: Any, message: str) -> None:
    config = {**json.loads((tiny_model() / "config.json").read_text()), field: value}
    with pytest.raises(ValueError, match=f"^{message}"):
        ModelFacts.from_config(config, "abc")


# --- its files


@pytest.mark.parametrize("shards", ["1GB", "60KB"])
def test_a_description_counts_the_parameters_of_all_files(tmp_path: Path, shards: str) -> None:
    folder = build_tiny_model(tmp_path / "model", max_shard_size=shards)
    files = sorted(folder.glob("*.safetensors"))
    assert (len(files) > 1) == (shards == "60KB")
    parameters = sum(tensor.numel() for file in files for tensor in load_file(file).values())
    description = describe_model(source_of(folder), "main")
    assert description.tensors is not None
    assert sum(math.prod(tensor.shape) for tensor in description.tensors.values()) == parameters
    assert (description.folder / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    whole = resolve_model(source_of(folder), "main")
    assert [(whole / path.name).resolve() for path in files] == files


def test_revisions_of_folders_tell_content_not_place(model: Path, tmp_path: Path) -> None:
    def revision(folder: Path) -> str:
        return describe_model(source_of(folder), "main").revision

    before = revision(model)
    assert before == revision(tiny_model())
    edit_config(model, rms_norm_eps=1e-3)
    assert revision(model) != before
    other = build_tiny_model(tmp_path / "other", layers=3)
    shutil.copy(tiny_model() / "config.json", other)
    assert revision(other) != before


def damage(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickle_weights(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    remove_weights(folder)


def leave_gguf(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.gguf")


def drop_layer(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if "layers.1" not in name}, folder / "model.safetensors"
    )


def store_as_float8(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    float8 = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}
    save_file(float8, folder / "model.safetensors")


def remove_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def half_a_tokenizer(folder: Path) -> None:
    vocabulary = json.loads((folder / "tokenizer.json").read_bytes())["model"]["vocab"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))


def configure(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, **fields)


def tokenizer_config(**fields: Any) -> Callable[[Path], None]:
    return damage("tokenizer_config.json", lambda data: json.dumps(json.loads(data) | fields).encode())


def generation_config(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: (folder / "generation_config.json").write_text(json.dumps(fields)) and None


def index_of(weight_map: dict[str, str]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return write


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (damage("model.safetensors", lambda data: data[:-1]), r"model.safetensors is damaged.*bytes long instead of"),
        (damage("model.safetensors", lambda data: data[:100]), "model.safetensors is damaged"),
        (damage("model.safetensors", lambda data: b""), "model.safetensors is damaged"),
        (damage("model.safetensors", lambda data: data[:8] + b"x" + data[9:]), "model.safetensors is damaged"),
        (damage("config.json", lambda data: data[:-5]), "config.json is not valid JSON"),
        (damage("tokenizer.json", lambda data: data[:-5]), "the tokenizer of .* cannot be used"),
        (remove_weights, "holds neither model.safetensors nor model.safetensors.index.json"),
        (pickle_weights, r"holds its weights pickled \(pytorch_model.bin\).*convert the model to safetensors"),
        (leave_gguf, "holds a GGUF file"),
        (
            drop_layer,
            r"lack 9 of the model's tensors .*: model.layers.1.input_layernorm.weight, .*copy the whole model",
        ),
        (store_as_float8, "holds weights in F8_E4M3"),
        (remove_tokenizer, "has no tokenizer: there is neither tokenizer.json nor"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer: there is neither tokenizer.json nor"),
        (half_a_tokenizer, "half of a tokenizer, vocab.json without its merges.txt"),
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
        (shutil.rmtree, "there is no model folder at"),
        (configure(model_type=None), "config.json names no model_type"),
        (configure(model_type="llama99"), "transformers .* does not know the model type 'llama99'"),
        (
            configure(model_type="own", auto_map={"AutoConfig": "a.B"}),
            r"needs the code in its own .* \(auto_map\)",
        ),
        (configure(quantization_config={"quant_method": "gptq", "bits": 4}), r"is already quantized \(gptq\)"),
        (configure(architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification, not a causal"),
        (configure(architectures=None), "architectures is missing"),
        (configure(num_attention_heads=7), "config"),
        (tokenizer_config(model_max_length={}), "the tokenizer of .* cannot be used: TypeError"),
        (generation_config(pad_token_id=[1, 2]), r"generation_config.json is not valid: TypeError.*mend the file"),
        (generation_config(eos_token_id={}), r"generation_config.json is not valid: TypeError: eos_token_id is"),
        (generation_config(eos_token_id={"a": 1}), r"generation_config.json is not valid: TypeError: eos_token_id is"),
        (index_of({}), "model.safetensors.index.json lists no files; copy the whole model"),
        (configure(hidden_size=128), r"hold \d+ tensors of other shapes than config.json says"),
    ],
)
def test_a_model_that_cannot_be_tuned_is_refused(model: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(model)
    with pytest.raises(UserError, match=message) as caught:
        check(model)
    assert source_of(model) in caught.value.message


# --- weights: every parameter is a named tensor of the checkpoint, or tied to one


def rename(change: Callable[[str], str]) -> Callable[[Path], None]:
    def renamed(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        renamed = {change(name): tensor for name, tensor in tensors.items()}
        save_file(renamed, folder / "model.safetensors", {"format": "pt"})

    return renamed


def add(**shapes: tuple[int, ...]) -> Callable[[Path], None]:
    def added(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        more = {name.replace("__", "."): torch.zeros(shape) for name, shape in shapes.items()}
        save_file({**tensors, **more}, folder / "model.safetensors", {"format": "pt"})

    return added


def store_as(dtype: torch.dtype, part: str = "proj") -> Callable[[Path], None]:
    def stored(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        changed = {name: t.to(dtype) if part in name else t for name, t in tensors.items()}
        save_file(changed, folder / "model.safetensors", {"format": "pt"})

    return stored


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (rename(lambda name: f"_orig_mod.{name}"), r"lack 21 of the model's tensors \(LlamaForCausalLM\): lm_head"),
        (rename(lambda name: f"module.{name}"), r"lack 21 of the model's tensors"),
        (
            rename(lambda name: name.replace("1.mlp.up_proj", "1.mlp.w3")),
            r"lack 1 .*: model.layers.1.mlp.up_proj.weight;",
        ),
        (add(model__layers__7__mlp__up_proj__weight=(2, 2)), r"hold 1 tensors that the model does not have .*layers.7"),
        (add(model__layers__0__mlp__up_proj__weight_scale=(128,)), r"does not have .*: .*weight_scale; give the"),
        (
            add(model__norm__weight=(63,)),
            r"hold 1 tensors of other shapes .* model.norm.weight \[63\] instead of \[64\]",
        ),
        (store_as(torch.int8), r"holds weights in I8, 14 tensors, the first is model.layers.0.mlp.down_proj.weight"),
        (store_as(torch.uint8, "embed"), r"holds weights in U8, 1 tensors, the first is model.embed_tokens.weight"),
        (store_as(torch.float8_e4m3fn), r"holds weights in F8_E4M3, 14 tensors"),
    ],
)
def test_a_checkpoint_of_other_tensors_is_refused_by_name(
    model: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(model)
    with pytest.raises(UserError, match=message):
        check(model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "phi3", "mixtral", "qwen2_moe", "olmoe", "opt", "glm4"])
def test_a_checkpoint_that_transformers_converts_on_loading_is_whole(family: str) -> None:
    check_architecture_alone(tiny_model(family))


@pytest.mark.parametrize(
    "harmless",
    [
        rename(lambda name: name.removeprefix("model.")),
        add(model__layers__0__self_attn__rotary_emb__inv_freq=(8,)),
        store_as(torch.float32),
        store_as(torch.float16),
        store_as(torch.float64),
    ],
    ids=["no prefix", "rotary frequencies", "float32", "float16", "float64"],
)
def test_what_every_loader_understands_is_accepted(model: Path, harmless: Callable[[Path], None]) -> None:
    harmless(model)
    check(model)


def test_a_tied_head_needs_no_tensor_and_an_untied_one_does(tmp_path: Path) -> None:
    tied = build_tiny_model(tmp_path / "model", tied=True)
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    check(tied)
    edit_config(tied, tie_word_embeddings=False)
    with pytest.raises(UserError, match=r"lack 1 of the model's tensors .*: lm_head.weight;"):
        check(tied)


def test_weights_that_are_tied_and_stored_twice_are_taken(tmp_path: Path) -> None:
    tied = build_tiny_model(tmp_path / "model", tied=True)
    source = source_of(tied)
    assert not check_architecture(describe_model(source, "main"), source, AdapterSpec()).stores_tied_twice
    add(lm_head__weight=(512, 64))(tied)
    assert check_architecture(describe_model(source, "main"), source, AdapterSpec()).stores_tied_twice


def copied(name: str, other: str) -> Callable[[Path], None]:
    def copy(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        save_file({**tensors, other: tensors[name].clone()}, folder / "model.safetensors", {"format": "pt"})

    return copy


@pytest.mark.parametrize(
    ("family", "name", "other"),
    [
        ("llama", "model.layers.1.mlp.up_proj.weight", "layers.1.mlp.up_proj.weight"),
        ("gpt2", "transformer.h.0.ln_1.bias", "h.0.ln_1.bias"),
        ("qwen3_moe", "model.layers.0.mlp.experts.2.up_proj.weight", "layers.0.mlp.experts.2.up_proj.weight"),
    ],
)
def test_two_tensors_that_are_loaded_as_one_are_refused_by_name(
    family: str, name: str, other: str, tmp_path: Path
) -> None:
    folder = build_tiny_model(tmp_path / "model", family)
    copied(name, other)(folder)
    with pytest.raises(
        UserError, match=rf"its weights hold .* twice, as (?:{name} and as {other}|{other} and as {name}),"
    ):
        check(folder)


def test_experts_that_are_stored_as_one_and_one_by_one_are_refused(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "model", "qwen3_moe")
    add(model__layers__0__mlp__experts__down_proj=(4, 64, 256))(folder)
    with pytest.raises(UserError, match=r"hold model\.layers\.0\.mlp\.experts\.down_proj twice, as .* and as "):
        check(folder)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "model", max_shard_size="60KB")
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    doubled = dict(list(load_file(first).items())[:1])
    save_file({**load_file(second), **doubled}, second, {"format": "pt"})
    with pytest.raises(UserError, match=f"{first.name} and {second.name} both hold {next(iter(doubled))}"):
        check(folder)


def test_a_file_beside_an_index_is_refused_and_an_index_of_that_file_is_not(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "model")
    index = folder / "model.safetensors.index.json"
    names = list(load_file(folder / "model.safetensors"))
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    check(folder)
    shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00001.safetensors")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}))
    for ask in (check, lambda folder: resolve_model(source_of(folder), "main")):
        with pytest.raises(UserError, match=r"two sets of weights, model.safetensors and the 1 files of .*index.json"):
            ask(folder)


def test_links_are_the_files_that_they_point_at(model: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "c0ffee"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(model.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    check(snapshot)
    whole = resolve_model(source_of(snapshot), "main")
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == {
        path.name: path.read_bytes() for path in snapshot.iterdir()
    }
    (snapshot / "model.safetensors").resolve().unlink()
    with pytest.raises(UserError, match=r"model.safetensors is a link to ../../blobs/\d+, which is not there"):
        check(snapshot)


def test_links_out_of_a_claim_are_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_PVC_ROOT", str(tmp_path / "claims"))
    inside = tmp_path / "claims" / "models" / "tiny"
    shutil.copytree(model, inside)
    (inside / "inner.json").symlink_to("config.json")
    describe_model("pvc://models/tiny", "main")
    (inside / "outer.json").symlink_to(model / "config.json")
    with pytest.raises(UserError, match=r"outer.json is a link that leaves its claim"):
        describe_model("pvc://models/tiny", "main")


ADAPTER = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "acme/base"})


def test_an_adapter_is_not_a_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(ADAPTER)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds an adapter .*; give its base model, acme/base, as spec.model.source"):
        check(tmp_path)


def test_an_adapters_config_beside_a_model_is_refused_before_transformers_follows_it(model: Path) -> None:
    (model / "adapter_config.json").write_text(ADAPTER)
    for ask in (check, lambda folder: resolve_model(source_of(folder), "main")):
        with pytest.raises(UserError, match=r"adapter_config.json lies beside the model's config.json"):
            ask(model)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_git_lfs_pointer_is_named_as_one(model: Path, name: str) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 1048576\n"
    (model / name).write_text(pointer)
    with pytest.raises(UserError, match=f"{name} is a Git LFS pointer.*git lfs pull"):
        check(model)


@pytest.mark.parametrize("targets", [("lm_head",), ("q_proj", "lm_head"), ("embed_tokens",)])
def test_a_target_that_training_could_not_take_is_refused_with_those_it_can(targets: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=r"'(lm_head|embed_tokens)' is no linear layer .* choose of down_proj, "):
        check(tiny_model(), adapter=AdapterSpec(target_modules=targets))


def test_a_model_that_looks_ahead_is_not_causal(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Gemma3ForCausalLM that sees the text on both sides"):
        check(build_tiny_model(tmp_path / "model", "gemma3_text", use_bidirectional_attention=True))


# --- a step of training on a small copy


@pytest.mark.parametrize(
    "family",
    [
        *("llama", "gemma2", "gemma3_text", "phi3", "granite", "granite_swa", "smollm3", "olmo2", "olmo3", "gpt2"),
        *("opt", "gpt_neox", "qwen3_moe"),
    ],
)
def test_known_families_train_packed(family: str, caplog: pytest.LogCaptureFixture) -> None:
    rehearse(config_of(family), family, AdapterSpec())
    assert "record by record" not in caplog.text


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("bloom", "not all of its layers have an attention that can be exchanged"),
        ("mpt", "not all of its layers have an attention that can be exchanged"),
        ("biogpt", "not all of its layers have an attention that can be exchanged"),
        ("gptj", "not all of its layers have an attention that can be exchanged"),
        ("gpt_neo", "not all of its layers have an attention that can be exchanged"),
    ],
)
def test_what_cannot_be_packed_is_trained_record_by_record_and_said(
    family: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    rehearse(config_of(family), family, AdapterSpec())
    assert "is trained record by record, with transformers' own attention: " in caplog.text
    assert reason in caplog.text


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("falcon", "FalconForCausalLM has no linear layer that can be quantized to NF4"),
        ("modernbert-decoder", "ModernBertDecoderForCausalLM has no decoder that transformers can name"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_prepare(family: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"^{family}: {reason}"):
        rehearse(config_of(family), family, AdapterSpec())


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, r"already quantized \(gptq\)"),
        ({"use_bidirectional_attention": True}, "sees the text on both sides"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "not a causal language model"),
        ({"model_type": "falcon", "architectures": ["FalconForCausalLM"]}, "no linear layer that can be quantized"),
    ],
    ids=str,
)
def test_a_plan_refuses_what_the_config_alone_tells(model: Path, fields: dict[str, Any], reason: str) -> None:
    edit_config(model, **fields)
    with pytest.raises(InvalidObject, match=reason):
        model_config.read_facts(ModelSource(source=source_of(model)))


def test_a_bug_of_ours_is_told_as_one_and_a_models_error_as_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("a bug of ours")

    for name in ("_shrunk", "_reload", "_compare_attention"):
        with monkeypatch.context() as patch:
            patch.setattr(rehearsal, name, broken)
            with pytest.raises(KeyError, match="a bug of ours"):
                rehearse(config_of("llama"), "llama", AdapterSpec())
    with pytest.raises(
        UserError, match=r"Zamba2ForCausalLM cannot be trained here; a step on a small copy .* RuntimeError"
    ):
        rehearse(config_of("zamba2"), "zamba2", AdapterSpec())


def test_a_machine_without_room_is_no_fault_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(rehearsal, "_reload", full)
    with pytest.raises(OSError, match="no space left"):
        rehearse(config_of("llama"), "llama", AdapterSpec())


def test_a_large_model_is_tried_in_seconds_by_a_small_copy() -> None:
    config = config_of(
        "llama", hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072,
        rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    )  # fmt: skip
    began = time.perf_counter()
    rehearse(config, "large", AdapterSpec(rank=64, target_modules=("model.layers.79.mlp.down_proj", "q_proj")))
    assert time.perf_counter() - began < 60


def test_an_adapter_that_peft_refuses_is_refused_in_prepare(model: Path) -> None:
    with pytest.raises(
        UserError, match="'out_proj' is no linear layer of the model that can have an adapter; choose of dt_proj"
    ):
        rehearse(config_of("mamba"), "mamba", AdapterSpec(target_modules=("out_proj",)))


def config_of(family: str, **fields: Any) -> Any:
    config = CONFIG_MAPPING[family](**fields)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]]
    return config


# --- its positions


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        ({"rope_type": "default"}, 64),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ({"rope_type": "linear", "factor": 2.0}, 128),
        ({"rope_type": "dynamic", "factor": 3.0}, 192),
    ],
    ids=str,
)
def test_a_stretched_context_is_believed(tmp_path: Path, rope: dict[str, Any], length: int) -> None:
    parameters = {"rope_theta": 10000.0, **rope}
    folder = build_tiny_model(tmp_path / "model", "qwen2", max_position_embeddings=64, rope_parameters=parameters)
    assert read_facts(describe_model(source_of(folder), "main"), source_of(folder)).context_length == length
    assert model_config.read_facts(ModelSource(source=source_of(folder))).context_length == length


def test_a_context_that_differs_by_layer_type_is_the_longest(tmp_path: Path) -> None:
    parameters = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
    }
    folder = build_tiny_model(tmp_path / "model", "gemma3_text", max_position_embeddings=64, rope_parameters=parameters)
    assert read_facts(describe_model(source_of(folder), "main"), source_of(folder)).context_length == 512


# --- its files, damaged


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "model", max_shard_size="60KB")
    last = sorted(folder.glob("*.safetensors"))[-1]
    last.unlink()
    with pytest.raises(UserError, match=f"lists 1 files that are not there, the first is {last.name}"):
        describe_model(source_of(folder), "main")


def test_a_tensor_that_the_index_promises_and_no_file_holds_is_named(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "model", max_shard_size="60KB")
    last = sorted(folder.glob("*.safetensors"))[-1]
    with safe_open(last, "pt") as file:
        names = sorted(file.keys())
        save_file({name: file.get_tensor(name).clone() for name in names[1:]}, last)
    with pytest.raises(UserError, match=f"lists 1 tensors that its files do not hold, the first is {names[0]}"):
        describe_model(source_of(folder), "main")


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": 3}'])
def test_a_damaged_index_is_refused(tmp_path: Path, content: str) -> None:
    folder = build_tiny_model(tmp_path / "model", max_shard_size="60KB")
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=r"model.safetensors.index.json is damaged"):
        describe_model(source_of(folder), "main")


def test_random_weights_stand_in_only_where_they_are_allowed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove_weights(model)
    (model / "random_weights.json").write_text('{"seed": 0}')
    with pytest.raises(UserError, match="holds neither"):
        check(model)
    monkeypatch.setenv("QLORA_ALLOW_RANDOM_WEIGHTS", "1")
    assert check(model).architecture == "LlamaForCausalLM"


# --- its architecture


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "gpt2"])
def test_dense_families_are_accepted(family: str) -> None:
    check(tiny_model(family))


def test_code_that_a_known_model_type_does_not_need_is_not_run(model: Path) -> None:
    edit_config(model, auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    (model / "modeling_own.py").write_text("raise SystemExit('was run')")
    check(model)


@pytest.mark.parametrize(("family", "experts", "size"), [("mixtral", 4, 256), ("qwen2_moe", 4, 256)])
def test_mixtures_are_accepted_with_the_sizes_of_their_experts(family: str, experts: int, size: int) -> None:
    mixture = check(tiny_model(family)).mixture
    assert mixture is not None
    assert (mixture.experts, mixture.experts_per_token, mixture.expert_size) == (experts, 2, size)
    assert mixture.shared_size == (128 if family == "qwen2_moe" else 0)


def test_a_mixture_that_cannot_be_quantized_is_refused_with_the_reason(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "model", "qwen3_moe", hidden_size=40, moe_intermediate_size=36)
    with pytest.raises(UserError, match=r"Qwen3MoeForCausalLM cannot be trained here: its experts .* share a scale"):
        check(folder)


def test_the_experts_of_any_config_are_known_before_its_layers_are_traced() -> None:
    config = {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "n_routed_experts": 256}
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes = {"num_experts_per_tok": 8, "moe_intermediate_size": 32, "n_shared_experts": 2, "vocab_size": 512}
    facts = ModelFacts.from_config({**config, **shape, **sizes}, "main")
    assert facts.mixture == Mixture(experts=256, experts_per_token=8, expert_size=32, shared_size=64)
    with pytest.raises(ValueError, match="num_experts_per_tok is missing"):
        ModelFacts.from_config({**config, **shape, "vocab_size": 512}, "main")


def test_a_mixture_some_of_whose_layers_have_no_experts_is_refused(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "model", "qwen3_moe", mlp_only_layers=[0])
    with pytest.raises(UserError, match=r"some layers have experts and others none \(mlp_only_layers"):
        check(folder)


def test_an_encoder_is_refused() -> None:
    with pytest.raises(UserError, match="BertLMHeadModel of a type that fills in masks"):
        check(tiny_model("bert"))


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("mamba", "MambaForCausalLM cannot be trained here; a step on a small copy of it fails"),
        ("bamba", "BambaForCausalLM cannot be trained here; a step on a small copy of it fails"),  # it has no attention
    ],
)
def test_models_of_state_layers_alone_are_refused_in_words(family: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        check(tiny_model(family))


def test_a_target_module_that_the_model_lacks_is_named_with_those_that_it_has() -> None:
    check(tiny_model(), adapter=AdapterSpec(target_modules=("q_proj", "self_attn.v_proj")))
    with pytest.raises(
        UserError,
        match=r"'query' is no linear layer .*; choose of .*gate_proj, .*q_proj.*or all-linear",
    ):
        check(tiny_model(), adapter=AdapterSpec(target_modules=("q_proj", "query")))


# --- its tokenizer


def test_a_jobs_chat_template_replaces_the_models() -> None:
    source = source_of(tiny_model())
    own = (tiny_model() / "chat_template.jinja").read_text()
    assert load_tokenizer(tiny_model(), source, None).chat_template == own
    assert load_tokenizer(tiny_model(), source, "{{ messages }}").chat_template == "{{ messages }}"


def test_the_tokenizers_digest_tells_tokenizers_apart_and_ignores_weights_and_templates(tmp_path: Path) -> None:
    plain = tokenizer_digest(tiny_model())
    assert plain == tokenizer_digest(build_tiny_model(tmp_path / "seed", seed=5))
    assert plain == tokenizer_digest(build_tiny_model(tmp_path / "template", chat_template=None))
    assert plain != tokenizer_digest(tiny_model(tokenizer_kind="byte-fallback"))
    assert plain != tokenizer_digest(tiny_model("qwen2")), "the model type decides the class of some tokenizers"


# --- buckets


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A model in fsspec's object store in memory."""
    monkeypatch.setenv("QLORA_MODEL_CACHE", str(tmp_path / "cache"))
    root = f"memory://{uuid.uuid4().hex}/model"
    file_system, path = fsspec.core.url_to_fs(root)
    for file in tiny_model().iterdir():
        file_system.pipe_file(f"{path}/{file.name}", file.read_bytes())
    file_system.pipe_file(f"{path}/model.gguf", b"not needed")
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_model_in_a_bucket_is_copied_whole(bucket: str) -> None:
    assert contents(resolve_model(bucket, "main")) == contents(tiny_model())


def test_describing_a_model_in_a_bucket_copies_no_weights(bucket: str) -> None:
    description = describe_model(bucket, "main")
    expected = contents(tiny_model())
    del expected["model.safetensors"]
    assert contents(description.folder) == expected
    assert description.revision == describe_model(source_of(tiny_model()), "main").revision


def test_another_version_in_the_bucket_is_another_folder(bucket: str) -> None:
    before = resolve_model(bucket, "main")
    kept = [(folder / "model.safetensors").resolve().parent for folder in (before, resolve_model(bucket, "main"))]
    assert kept[0] == kept[1]
    file_system, path = fsspec.core.url_to_fs(bucket)
    file_system.pipe_file(f"{path}/config.json", file_system.cat_file(f"{path}/config.json") + b"\n")
    after = resolve_model(bucket, "main")
    place = (after / "model.safetensors").resolve().parent
    assert place != kept[0]
    assert (after / "config.json").read_bytes() == (before / "config.json").read_bytes() + b"\n"
    assert sorted(path.name for path in place.parent.iterdir()) == sorted({kept[0].name, place.name, "locks"})


def test_a_bucket_that_does_not_answer_is_transient(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(Transient, match=r"s3://bucket/model does not answer"):
        describe_model("s3://bucket/model", "main")


# --- the hub

HUB_QUESTIONS = """
import hashlib, json, sys
from pathlib import Path
from qlora_trainer.model.source import describe_model, resolve_model
from qlora_trainer.outcome import StageError
from qlora_trainer.data.reader import Records

def model(source, revision):
    description = describe_model(source, revision)
    described = sorted(path.name for path in description.folder.iterdir())
    folder = resolve_model(source, revision)
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    return [description.revision, described, digests]

def dataset(source, split):
    records = Records(source, split=split, scratch=Path("."), field="spec.dataset.source")
    return [records.digest(), [record.value for record in records.read()]]

def answer(question, *arguments):
    try:
        return {"model": model, "dataset": dataset}[question](*arguments)
    except StageError as error:
        return f"{type(error).__name__}: {error.message}"

print(json.dumps([answer(*question) for question in json.loads(sys.argv[1])]))
"""


def ask_hub(
    questions: list[list[str]], repositories: Mapping[str, Repository], home: Path, token: str = ""
) -> tuple[list[Any], list[str]]:
    """Answers from a process of its own, because huggingface_hub reads its endpoint when it is imported."""
    with serve(repositories) as (endpoint, requests):
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        environment["QLORA_MODEL_CACHE"] = str(home / "models")
        environment["HF_TOKEN"] = token
        environment.pop("HF_HUB_OFFLINE", None)
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        command = [sys.executable, "-c", HUB_QUESTIONS, json.dumps(questions)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), requests


def test_a_hub_model_is_pinned_to_its_commit_and_only_what_is_needed_is_fetched(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "model", max_shard_size="60KB")
    (folder / "consolidated.safetensors").write_bytes(b"the same weights again")
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    repositories = {"acme/tiny": Repository(folder=folder)}
    [answer], requests = ask_hub([["model", "hf://acme/tiny", "main"]], repositories, tmp_path / "home")
    revision, described, resolved = answer
    assert revision == COMMIT
    unwanted = {"consolidated.safetensors", "pytorch_model.bin"}
    expected = {name: data for name, data in contents(folder).items() if name not in unwanted}
    assert resolved == {name: hashlib.sha256(data).hexdigest() for name, data in expected.items()}
    assert described == sorted(name for name in expected if not name.endswith(".safetensors"))
    assert not [request for request in requests if any(name in request for name in unwanted)]


def test_hub_refusals_say_what_to_do(tmp_path: Path) -> None:
    repositories = {
        "acme/tiny": Repository(folder=tiny_model()),
        "acme/gated": Repository(folder=tiny_model(), gated=True),
    }
    questions = [
        ["model", "hf://acme/gated", "main"],
        ["model", "hf://acme/none", "main"],
        ["model", "hf://acme/tiny", "v9"],
        ["dataset", "hf://acme/none", "train"],
    ]
    answers, _ = ask_hub(questions, repositories, tmp_path)
    absent = "hf://acme/none is not on the hub, or is private; check its name, or give a token through HF_TOKEN"
    assert answers == [
        "UserError: hf://acme/gated is gated: accept its terms on the hub, and give a token of that account through "
        "HF_TOKEN",
        f"UserError: {absent}",
        "UserError: hf://acme/tiny has no such revision; check spec.model.revision",
        f"UserError: {absent}",
    ]


@pytest.mark.parametrize("token", EXPIRED)
def test_a_token_of_the_hub_that_has_expired_is_waited_for_whatever_it_is_asked_for(tmp_path: Path, token: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text('{"text": "a"}\n')
    repositories = {
        "acme/tiny": Repository(folder=tiny_model()),
        "acme/gated": Repository(folder=tiny_model(), gated=True),
        "acme/private": Repository(folder=tiny_model(), private=True),
        "acme/data": Repository(folder=data, kind="datasets"),
    }
    questions = [["model", f"hf://acme/{name}", "main"] for name in ("tiny", "gated", "private")]
    questions.append(["dataset", "hf://acme/data", "train"])
    answers, _ = ask_hub(questions, repositories, tmp_path / "home", token=token)
    for (_, source, _), answer in zip(questions, answers, strict=True):
        assert answer.startswith(f"Transient: {source} takes its credentials no longer")
        assert answer.endswith("a new attempt reads them anew")


def test_what_a_valid_token_or_none_may_not_read_is_the_users(tmp_path: Path) -> None:
    repositories = {
        "acme/gated": Repository(folder=tiny_model(), gated=True),
        "acme/private": Repository(folder=tiny_model(), private=True),
    }
    questions = [["model", f"hf://acme/{name}", "main"] for name in ("gated", "none")]
    for answer in ask_hub(questions, repositories, tmp_path / "with", token="valid")[0]:
        assert answer.startswith("UserError: ")
    [private], _ = ask_hub([["model", "hf://acme/private", "main"]], repositories, tmp_path / "without")
    assert private.startswith("UserError: hf://acme/private is not on the hub, or is private; check its name, or give")


def test_a_hub_dataset_gives_the_records_of_its_split(tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    records = [{"text": f"number {number}"} for number in range(5)]
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "test.jsonl").write_text(json.dumps({"text": "held out"}) + "\n")
    repositories = {"acme/data": Repository(folder=folder, kind="datasets")}
    questions = [["dataset", "hf://acme/data", split] for split in ("train", "test", "validation")]
    (train, test, validation), _ = ask_hub(questions, repositories, tmp_path / "home")
    assert train[1] == records
    assert test[1] == [{"text": "held out"}]
    assert train[0] != test[0]
    assert validation.startswith("UserError: hf://acme/data: ")
    assert "check spec.dataset.source and spec.dataset.split" in validation
