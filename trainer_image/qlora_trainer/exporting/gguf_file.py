"""GGUF of the merged model, and of the adapter alone, as llama.cpp reads them.

Rules:

- Metadata and names are gguf's, llama.cpp's own package. Tensors are written a few rows at a time, which its writer
  does not do: it wants each whole.
- Vectors are float32, matrices float16 or Q8_0 (blocks of 32 values with one scale), made of the merged values in
  float32, which are rounded once. A matrix whose rows are no whole blocks stays in float16.
- Where llama.cpp rotates neighbours (`Family.pairs_neighbours`), rows of queries and keys are put in its order.
- Of an adapter A and B are float32. llama.cpp scales them by alpha / rank: for rsLoRA the alpha written is what gives
  its scale.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import gguf
import numpy as np
import torch
from gguf.quants import quantize
from torch import Tensor

from qlora_trainer.exporting.gguf_families import Family, family_of, pre_tokenizer_of, rope_type
from qlora_trainer.exporting.merging import MergedTensor, WeightFile
from qlora_trainer.exporting.sources import Sources
from qlora_trainer.model.source import known_config, load_tokenizer
from qlora_trainer.outcome import UserError
from qlora_trainer.storage.final_adapter import GENERATION_CONFIG_NAME

Kind = Literal["f16", "q8_0"]
TYPES: Mapping[Kind, tuple[gguf.GGMLQuantizationType, gguf.LlamaFileType]] = {
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
TENSOR_ENDS = (".weight", ".bias")
ROTATED = ("attn_q", "attn_k")
"""llama.cpp's names of what makes queries and keys."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tensor:
    """One tensor of a file."""

    name: str
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    rows: Callable[[], Iterable[Tensor]]


def write_model(sources: Sources, path: Path, kind: Kind) -> None:
    """The merged model with its tokenizer. UserError for what GGUF or llama.cpp has no words for."""
    config = known_config(sources.base, str(sources.base))
    family = family_of(config, str(sources.base))
    writer = gguf.GGUFWriter(path, family.architecture)
    writer.add_type("model")
    writer.add_file_type(TYPES[kind][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_shape(writer, config)
    _add_tokenizer(writer, sources, int(config.vocab_size))
    with ExitStack() as opened:
        files = [WeightFile(sources.base / name, sources.adapter, sources.modules) for name in sources.weights]
        merged = [tensor for file in files for tensor in opened.enter_context(file).tensors()]
        _write(writer, [*_scaled_positions(config), *_named(merged, config, family, kind)])


def write_adapter(sources: Sources, path: Path) -> None:
    """The adapter alone, for llama.cpp's `--lora`. UserError for DoRA, which it does not know."""
    config = known_config(sources.base, str(sources.base))
    family = family_of(config, str(sources.base))
    adapter = sources.adapter
    if adapter.is_dora:
        raise UserError("spec.publish.formats: llama.cpp has no DoRA; take merged or gguf-q8_0 instead of gguf-adapter")
    writer = gguf.GGUFWriter(path, family.architecture)
    writer.add_type("adapter")
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, adapter.scaling * adapter.rank)
    names, tensors = _names(config, family), list[_Tensor]()
    for module in adapter.modules:
        name = _named_as(names, module)
        a, b = (matrix.float() for matrix in adapter.matrices(module))
        b = torch.cat(list(_in_order([b], name, config, family)))
        for end, matrix in (("lora_a", a), ("lora_b", b)):
            tensors.append(_plain(f"{name}.weight.{end}", matrix))
    _write(writer, tensors)


# --- what is said of the model


def _add_shape(writer: gguf.GGUFWriter, config: Any) -> None:
    head_dim = _head_dim(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(config.vocab_size)


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _scaled_positions(config: Any) -> Iterator[_Tensor]:
    """What Llama 3's frequencies are divided by, as transformers computes them."""
    if rope_type(config) != "llama3":
        return
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled: Tensor = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]
    head_dim = _head_dim(config)
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, head_dim, 2).double() / head_dim)
    yield _plain("rope_freqs.weight", (plain / scaled.double()).float())


# --- its tokenizer


def _add_tokenizer(writer: gguf.GGUFWriter, sources: Sources, size: int) -> None:
    """Tokens, their kinds, merges, special ones, and the chat template."""
    tokenizer = load_tokenizer(sources.adapter_folder, str(sources.adapter_folder), None)
    content: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_of(content, str(sources.base)))
    tokens = [f"[PAD{number}]" for number in range(size)]  # of embeddings that no token has
    kinds = [gguf.TokenType.UNUSED] * size
    for text, number in content["model"]["vocab"].items():
        tokens[number], kinds[number] = text, gguf.TokenType.NORMAL
    for added in content["added_tokens"]:
        kind = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[added["id"]], kinds[added["id"]] = added["content"], kind
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in content["model"]["merges"]])
    begins: list[int] = tokenizer("a")["input_ids"][:1]
    writer.add_add_bos_token(begins == [tokenizer.bos_token_id])
    ends = _ends(sources.adapter_folder, tokenizer.eos_token_id)
    for add, number in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, ends[0] if ends else None),
        (writer.add_eot_token_id, ends[1] if len(ends) > 1 else None),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if number is not None:
            add(number)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _ends(folder: Path, own: int | None) -> list[int]:
    """The tokens that generation ends with, the tokenizer's own first."""
    file = folder / GENERATION_CONFIG_NAME
    told: Any = json.loads(file.read_bytes()).get("eos_token_id") if file.is_file() else None
    others = cast("list[int | None]", told if isinstance(told, list) else [told])
    return [number for number in dict.fromkeys([own, *others]) if number is not None]


# --- its tensors


def _names(config: Any, family: Family) -> gguf.TensorNameMap:
    architecture = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
    return gguf.get_tensor_name_map(architecture, config.num_hidden_layers)


def _named_as(names: gguf.TensorNameMap, name: str) -> str:
    found = names.get_name(name, TENSOR_ENDS)
    if found is None:
        raise UserError(f"spec.publish.formats: GGUF has no name for {name}; take merged")
    return found


def _named(merged: Iterable[MergedTensor], config: Any, family: Family, kind: Kind) -> Iterator[_Tensor]:
    """The model's tensors under llama.cpp's names."""
    names = _names(config, family)
    for tensor in merged:
        name = _named_as(names, tensor.name)
        wanted = TYPES[kind][0]
        block, _ = gguf.GGML_QUANT_SIZES[wanted]
        if len(tensor.shape) < 2:
            wanted = gguf.GGMLQuantizationType.F32
        elif tensor.shape[-1] % block:
            wanted = gguf.GGMLQuantizationType.F16
        rows = lambda tensor=tensor, name=name: _in_order(tensor.rows(), name, config, family)  # noqa: E731 - one of many
        yield _Tensor(name=name, shape=tensor.shape, type=wanted, rows=rows)


def _plain(name: str, values: Tensor) -> _Tensor:
    return _Tensor(name=name, shape=tuple(values.shape), type=gguf.GGMLQuantizationType.F32, rows=lambda: [values])


def _in_order(parts: Iterable[Tensor], name: str, config: Any, family: Family) -> Iterator[Tensor]:
    """Rows of queries and keys, head by head, in the order that llama.cpp rotates them in; any others as they are."""
    if not family.pairs_neighbours or not any(f".{each}." in f"{name}." for each in ROTATED):
        yield from parts
        return
    head_dim, kept = _head_dim(config), list[Tensor]()
    for part in parts:
        kept.append(part)
        rows = torch.cat(kept)
        whole = len(rows) - len(rows) % head_dim
        heads = rows[:whole].reshape(-1, 2, head_dim // 2, *rows.shape[1:])
        yield heads.transpose(1, 2).reshape(whole, *rows.shape[1:])
        kept = [rows[whole:]]
    assert not kept or not len(kept[0]), "queries and keys are whole heads"


# --- the file


def _write(writer: gguf.GGUFWriter, tensors: Iterable[_Tensor]) -> None:
    tensors = list(tensors)
    for tensor in tensors:
        block, size = gguf.GGML_QUANT_SIZES[tensor.type]
        count = int(np.prod(tensor.shape)) // block * size
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), count, raw_dtype=tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None, "it was just opened"
    (file,) = writer.fout
    for tensor in tensors:
        writer.write_padding(file, file.tell())
        for rows in tensor.rows():
            _encoded(rows, tensor).tofile(file)
    writer.write_padding(file, file.tell())
    writer.close()


def _encoded(rows: Tensor, tensor: _Tensor) -> np.ndarray[Any, Any]:
    values = rows.float().contiguous().numpy()
    encoded = quantize(values, tensor.type)
    largest = np.abs(values).max(initial=0.0)
    if not np.isfinite(largest) or (
        tensor.type != gguf.GGMLQuantizationType.F32 and largest > np.finfo(np.float16).max
    ):
        raise UserError(
            f"{tensor.name} has values that are no finite numbers in 16 bits as GGUF has them; take merged instead"
        )
    return encoded
