"""Builds the tiny random models that trainer tests run on: a real tokenizer, a real config, real safetensors.

Nothing is downloaded: the tokenizer is trained on the example dataset, the weights are drawn from a seed. A build is
deterministic in its arguments, and `tiny_model` keeps one per set of arguments and process. Its folder is read-only;
tests that damage a model build their own with `build_tiny_model`.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# Why: torch, transformers and tokenizers declare some of these functions only in part.

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, Literal

EXAMPLE_DATASET = Path(__file__).parents[2] / "examples" / "medical-es" / "train.jsonl"
BOS, EOS, PAD, UNKNOWN, TURN_START = "<s>", "<|im_end|>", "<pad>", "<unk>", "<|im_start|>"
SPECIAL_TOKENS = (BOS, EOS, PAD, UNKNOWN, TURN_START)
# Writes BOS itself although the tokenizer adds one too, as Llama 3's does: encoding naively would double it.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_FOUR_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 256},
    "olmoe": {**_FOUR_EXPERTS, "intermediate_size": 256},
    "qwen2_moe": {**_FOUR_EXPERTS, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 128},
    "qwen3_moe": {**_FOUR_EXPERTS, "moe_intermediate_size": 256},
}
"""What makes a family a mixture of experts, whose matrices are as small as NF4's blocks of scales allow."""
TokenizerKind = Literal["byte-level", "byte-fallback"]

_sessions: list[tempfile.TemporaryDirectory[str]] = []


@cache
def tiny_model(
    family: str = "llama",
    *,
    tokenizer_kind: TokenizerKind = "byte-level",
    chat_template: str | None = CHAT_TEMPLATE,
    layers: int = 2,
    hidden_size: int = 64,
    vocab_size: int = 512,
    tied: bool = False,
) -> Path:
    """The folder of a model built once per process and set of arguments; removed when the process ends."""
    session = tempfile.TemporaryDirectory(prefix="tiny-model-")
    _sessions.append(session)
    return build_tiny_model(
        Path(session.name) / family,
        family,
        tokenizer_kind=tokenizer_kind,
        chat_template=chat_template,
        layers=layers,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        tied=tied,
    )


def build_tiny_model(
    folder: Path,
    family: str = "llama",
    *,
    tokenizer_kind: TokenizerKind = "byte-level",
    chat_template: str | None = CHAT_TEMPLATE,
    layers: int = 2,
    hidden_size: int = 64,
    vocab_size: int = 512,
    tied: bool = False,
    seed: int = 0,
    max_shard_size: str = "1GB",
    **config: Any,
) -> Path:
    """Writes a random causal language model of a transformers `family` ("llama", "qwen2", ...) as a HF folder."""
    save_tokenizer(folder, kind=tokenizer_kind, chat_template=chat_template, vocab_size=vocab_size)
    shape: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": hidden_size // 4,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": tied,
        **{f"{name}_token_id": SPECIAL_TOKENS.index(text) for name, text in (("bos", BOS), ("eos", EOS), ("pad", PAD))},
    }
    save_weights(
        folder, family, {**shape, **EXPERTS.get(family, {}), **config}, seed=seed, max_shard_size=max_shard_size
    )
    return folder


def save_tokenizer(
    folder: Path,
    *,
    kind: TokenizerKind = "byte-level",
    chat_template: str | None = CHAT_TEMPLATE,
    vocab_size: int = 512,
) -> Path:
    """Trains a BPE tokenizer that can spell every UTF-8 text, and saves it with its chat template."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    backend = _byte_level(vocab_size) if kind == "byte-level" else _byte_fallback(vocab_size)
    backend.post_processor = TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=PAD, unk_token=UNKNOWN
    )
    tokenizer.chat_template = chat_template
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    return folder


def save_weights(folder: Path, family: str, config: dict[str, Any], *, seed: int, max_shard_size: str) -> None:
    """Draws the weights from a seed and saves them in bfloat16 safetensors, leaving the caller's RNG alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config), dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=max_shard_size)


def example_texts() -> list[str]:
    """Every message of the example dataset's training file."""
    lines = EXAMPLE_DATASET.read_text(encoding="utf-8").splitlines()
    return [message["content"] for line in lines for message in json.loads(line)["messages"]]


def _byte_level(vocab_size: int) -> Any:
    """A tokenizer like those of GPT-2, Llama 3 and Qwen: text is spelled in bytes, so nothing is ever unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(example_texts(), trainer)
    return tokenizer


def _byte_fallback(vocab_size: int) -> Any:
    """A tokenizer like those of Llama 2, Mistral and Gemma: words carry a `▁`, unknown characters become bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(byte_tokens) - len(SPECIAL_TOKENS),
        initial_alphabet=list("▁abcdefghijklmnopqrstuvwxyz"),
        limit_alphabet=40,
        show_progress=False,
    )
    trained.train_from_iterator(example_texts(), trainer)
    learned = json.loads(trained.to_str())["model"]
    words = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    tokens = [*SPECIAL_TOKENS, *byte_tokens, *words]
    model = models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[tuple(pair) for pair in learned["merges"]],
        unk_token=UNKNOWN,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer
