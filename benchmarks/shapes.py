"""Published model shapes, written as model folders with random weights, so that nothing has to be downloaded.

Bytes, speed and exactness do not depend on what the weights are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.architectures import config
from tests.trainer.tiny_model import save_tokenizer

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
LLAMA_SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
    "small": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "vocab_size": 32000,
    },
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}


def write_model(folder: Path, shape: str, *, seed: int = 0) -> Path:
    """A Hugging Face folder of a shape above or of `benchmarks.architectures`, whose weights the trainer draws."""
    save_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config_of(shape)))
    (folder / "random_weights.json").write_text(json.dumps({"seed": seed}))
    return folder


def layers_of(shape: str) -> int:
    """Decoder layers of a shape."""
    return int(config_of(shape)["num_hidden_layers"])


def write_texts(path: Path, *, records: int, words: int) -> Path:
    """A JSONL file of `text` records, each of so many words that differ from record to record."""
    lines = (
        json.dumps({"text": " ".join(f"w{(i * 31 + j * 17) % 997}" for j in range(words))}) for i in range(records)
    )
    path.write_text("\n".join(lines) + "\n")
    return path


def config_of(shape: str) -> dict[str, Any]:
    """The config.json of one of the shapes above, or else of `benchmarks.architectures`."""
    return {**LLAMA, **LLAMA_SHAPES[shape]} if shape in LLAMA_SHAPES else config(shape)
