"""GGUF files as others read them: transformers' reader, and llama.cpp itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from llama_cpp import LlamaCpp
from peft_adapter import save_adapter, with_peft
from qlora_trainer import publish
from qlora_trainer.exporting.gguf_families import family_of, pre_tokenizer_of
from qlora_trainer.model.source import known_config
from qlora_trainer.outcome import UserError
from tiny_model import build_tiny_model, tiny_model
from toy_publish import publish_task, store_with_adapter
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT speaks of its own deprecations

TOKENS = [5, 9, 100, 42, 7, 300, 21, 8, 77]
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {"layers": 3}, {}),
    "llama with a tied head": ("llama", {"tied": True}, {"use_rslora": True}),
    "llama with the positions of Llama 3": ("llama", {"rope_parameters": LLAMA_3}, {}),
    "qwen2, which has biases": ("qwen2", {"max_shard_size": "100KB"}, {}),
    "qwen3, which has norms of heads": ("qwen3", {}, {}),
}


def exported(tmp_path: Path, base: Path, adapter: Path, *formats: str) -> Path:
    """The folder of a job's formats."""
    store = store_with_adapter(tmp_path / "store", base, adapter, generation={"eos_token_id": [1, 2]})
    task = publish_task(store, base, formats)
    publish.make_formats(task, store, publish.fetch_adapter(store, tmp_path / "fetched"))
    return tmp_path / "store" / "formats"


def logits(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([tokens])).logits[0].float()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "llama with the positions of Llama 3"])
def test_transformers_reads_back_the_model_and_its_tokenizer(tmp_path: Path, kind: str) -> None:
    family, shape, lora = KINDS[kind]
    base = build_tiny_model(tmp_path / "base", family, **shape)
    adapter = save_adapter(base, tmp_path / "adapter", **lora)
    folder = exported(tmp_path, base, adapter, "gguf-f16") / "gguf-f16"
    config = AutoConfig.from_pretrained(base)  # transformers does not read every field of GGUF's
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model-f16.gguf", config=config, dtype=torch.float32)
    wanted, found = logits(with_peft(base, adapter), TOKENS), logits(read, TOKENS)
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)
    assert (found - wanted).norm() < 0.01 * wanted.norm()
    tokenizer, own = (
        AutoTokenizer.from_pretrained(folder, gguf_file="model-f16.gguf"),
        AutoTokenizer.from_pretrained(base),
    )
    for text in ("La disnea es falta de aire.", "¿Qué dosis? 1200 mg", "<|im_start|>user\n hola<|im_end|>"):
        assert tokenizer(text, add_special_tokens=False).input_ids == own(text, add_special_tokens=False).input_ids
    fields = gguf.GGUFReader(folder / "model-f16.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == own.chat_template
    assert fields["tokenizer.ggml.eos_token_id"].contents() == own.eos_token_id
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True


def test_blocks_of_eight_bits_are_as_near_as_their_scale_allows(tmp_path: Path) -> None:
    base = tiny_model("qwen3")
    folder = exported(tmp_path, base, save_adapter(base, tmp_path / "adapter"), "gguf-f16", "gguf-q8_0")
    exact = {each.name: each for each in gguf.GGUFReader(folder / "gguf-f16" / "model-f16.gguf").tensors}
    coarse = {each.name: each for each in gguf.GGUFReader(folder / "gguf-q8_0" / "model-q8_0.gguf").tensors}
    assert exact.keys() == coarse.keys()
    assert {each.tensor_type.name for each in coarse.values()} == {"F32", "Q8_0"}
    for name, tensor in coarse.items():
        wanted = exact[name].data.astype(np.float32)
        if tensor.tensor_type.name == "F32":
            assert np.array_equal(tensor.data, wanted)
            continue
        blocks = wanted.reshape(-1, 32)
        step = np.abs(blocks).max(axis=1, keepdims=True) / 127
        error = np.abs(dequantize(tensor.data, tensor.tensor_type).reshape(-1, 32) - blocks)
        assert (error <= 0.52 * step + 1e-4).all(), name


def test_the_adapter_alone_is_what_peft_has(tmp_path: Path) -> None:
    base = tiny_model("qwen2")
    adapter = save_adapter(base, tmp_path / "adapter", use_rslora=True)
    reader = gguf.GGUFReader(exported(tmp_path, base, adapter, "gguf-adapter") / "gguf-adapter" / "adapter.gguf")
    tensors = {each.name: torch.from_numpy(each.data.copy()) for each in reader.tensors}
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    assert reader.fields["general.type"].contents() == "adapter"
    judge = with_peft(base, adapter)
    for layer in (0, 1):
        for module, name in (("self_attn.q_proj", "attn_q"), ("mlp.down_proj", "ffn_down")):
            linear = judge.get_submodule(f"base_model.model.model.layers.{layer}.{module}")
            a, b = (tensors[f"blk.{layer}.{name}.weight.lora_{side}"] for side in "ab")
            torch.testing.assert_close(b @ a * (alpha / len(a)), linear.get_delta_weight("default"))
    assert len(tensors) == 2 * 2 * 7


def test_what_gguf_is_not_written_of_is_refused_in_words(tmp_path: Path) -> None:
    def refusal(family: str, **config: Any) -> str:
        base = build_tiny_model(tmp_path / f"{family}-{len(config)}", family, **config)
        with pytest.raises(UserError) as caught:
            family_of(known_config(base, "the base"), "the base")
        return str(caught.value)

    assert "is of model type mixtral, and GGUF is written of llama, qwen2, qwen3" in refusal("mixtral")
    assert "has attention_bias True" in refusal("llama", attention_bias=True)
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 1024}
    assert "has positions of type 'yarn'" in refusal("qwen3", rope_parameters=yarn)
    content = json.loads((tiny_model(tokenizer_kind="byte-fallback") / "tokenizer.json").read_text())
    with pytest.raises(UserError, match="tells words apart in a way that GGUF is not written of"):
        pre_tokenizer_of(content, "the base")


# --- llama.cpp


def greedy(model: Any, prompt: list[int], steps: int) -> list[int]:
    """transformers' prompt and most likely tokens, one after the other."""
    tokens = list(prompt)
    for _ in range(steps):
        tokens.append(int(logits(model, tokens)[-1].argmax()))
    return tokens


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_computes_what_peft_does(tmp_path: Path, kind: str) -> None:
    family, shape, lora = KINDS[kind]
    base = build_tiny_model(tmp_path / "base", family, **shape)
    adapter = save_adapter(base, tmp_path / "adapter", **lora)
    nothing = save_adapter(base, tmp_path / "nothing", scale=0.0, **lora)
    folder = exported(tmp_path, base, adapter, "gguf-f16", "gguf-q8_0", "gguf-adapter")
    plain = exported(tmp_path / "plain", base, nothing, "gguf-f16") / "gguf-f16" / "model-f16.gguf"
    whole = LlamaCpp(folder / "gguf-f16" / "model-f16.gguf")
    beside = LlamaCpp(plain, folder / "gguf-adapter" / "adapter.gguf")
    coarse = LlamaCpp(folder / "gguf-q8_0" / "model-q8_0.gguf")
    judge, without = with_peft(base, adapter), AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for tokens in (TOKENS, TOKENS * 12):  # the second far enough for scaled positions to matter
        wanted = logits(judge, tokens)[-1].log_softmax(-1)
        effect = (wanted - logits(without, tokens)[-1].log_softmax(-1)).norm()

        def off(model: LlamaCpp, tokens: list[int] = tokens, wanted: torch.Tensor = wanted) -> float:
            return float((model.log_probabilities(tokens, len(wanted)) - wanted).norm())

        assert off(whole) < 0.02 * effect
        assert off(beside) < 0.02 * effect
        assert off(coarse) < 0.1 * effect
        said = greedy(judge, tokens, 8)
        assert [whole.likeliest(said[:end]) for end in range(len(tokens), len(said))] == said[len(tokens) :]
    own = AutoTokenizer.from_pretrained(base)
    for text in ("La disnea es falta de aire.", "¿Qué dosis? 1200 mg  y 3,5", "it's  12345\n\n x"):
        assert whole.tokens(text) == own(text).input_ids, text
