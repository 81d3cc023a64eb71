"""The config.json of published models, as far as bytes depend on it, for `benchmarks.sizing`.

Written from the models' own configs. A name ends in the size that the model is published under.
"""

from __future__ import annotations

from typing import Any

_GATED = {"hidden_act": "silu", "attention_dropout": 0.0}
_LLAMA: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **_GATED}
_MISTRAL: dict[str, Any] = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", **_GATED}
_QWEN2: dict[str, Any] = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **_GATED}
_QWEN3: dict[str, Any] = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128, **_GATED}
_PHI3: dict[str, Any] = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", **_GATED}
_GEMMA: dict[str, Any] = {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}


def _shape(
    hidden: int, inner: int, layers: int, heads: int, key_heads: int, vocabulary: int, *, tied: bool = False
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 131072,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }


def _sparse(most: str, few: str, layers: int, at: tuple[int, ...]) -> list[str]:
    return [few if layer in at else most for layer in range(layers)]


CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {**_LLAMA, **_shape(256, 512, 4, 4, 2, 1024)},
    "smollm2-135m": {**_LLAMA, **_shape(576, 1536, 30, 9, 3, 49152, tied=True)},
    "llama-3.2-1b": {**_LLAMA, **_shape(2048, 8192, 16, 32, 8, 128256, tied=True)},
    "llama-3.1-8b": {**_LLAMA, **_shape(4096, 14336, 32, 32, 8, 128256)},
    "llama-2-13b": {**_LLAMA, **_shape(5120, 13824, 40, 40, 40, 32000)},
    "llama-65b": {**_LLAMA, **_shape(8192, 22016, 80, 64, 64, 32000)},
    "llama-3.1-70b": {**_LLAMA, **_shape(8192, 28672, 80, 64, 8, 128256)},
    "mistral-7b": {**_MISTRAL, **_shape(4096, 14336, 32, 32, 8, 32768), "head_dim": 128, "sliding_window": None},
    "mistral-small-24b": {
        **_MISTRAL, **_shape(5120, 32768, 40, 32, 8, 131072), "head_dim": 128, "sliding_window": 4096,
    },
    "qwen2.5-0.5b": {**_QWEN2, **_shape(896, 4864, 24, 14, 2, 151936, tied=True)},
    "qwen2.5-7b": {**_QWEN2, **_shape(3584, 18944, 28, 28, 4, 152064)},
    "qwen2.5-32b": {**_QWEN2, **_shape(5120, 27648, 64, 40, 8, 152064)},
    "qwen3-0.6b": {**_QWEN3, **_shape(1024, 3072, 28, 16, 8, 151936, tied=True)},
    "qwen3-8b": {**_QWEN3, **_shape(4096, 12288, 36, 32, 8, 151936)},
    "smollm3-3b": {"model_type": "smollm3", **_GATED, **_shape(2048, 11008, 36, 16, 4, 128256, tied=True)},
    "gemma-2-2b": {
        "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "head_dim": 256, "sliding_window": 4096,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 256,
        **_shape(2304, 9216, 26, 8, 4, 256000), **_GEMMA,
    },
    "gemma-3-1b": {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "head_dim": 256, "sliding_window": 512,
        "query_pre_attn_scalar": 256, **_shape(1152, 6912, 26, 4, 1, 262144), **_GEMMA,
    },
    "gemma-3-27b": {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "head_dim": 128, "sliding_window": 1024,
        "query_pre_attn_scalar": 168, **_shape(5376, 21504, 62, 32, 16, 262208), **_GEMMA,
    },
    "phi-3-mini-3.8b": {**_PHI3, **_shape(3072, 8192, 32, 32, 32, 32064), "sliding_window": 2047},
    "phi-4-14b": {**_PHI3, **_shape(5120, 17920, 40, 40, 10, 100352), "sliding_window": None},
    "olmo-2-7b": {
        "architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", **_GATED,
        **_shape(4096, 11008, 32, 32, 32, 100352),
    },
    "olmo-3-7b": {"model_type": "olmo3", **_GATED, "sliding_window": 4096, **_shape(4096, 11008, 32, 32, 32, 100278)},
    "granite-3.1-8b": {
        "architectures": ["GraniteForCausalLM"], "model_type": "granite", **_GATED, "logits_scaling": 16.0,
        "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.0078125,
        **_shape(4096, 12800, 40, 32, 8, 49155, tied=True),
    },
    "falcon-7b": {
        "architectures": ["FalconForCausalLM"], "model_type": "falcon", "multi_query": True, "parallel_attn": True,
        "new_decoder_architecture": False, "bias": False, "alibi": False, "attention_dropout": 0.0,
        "hidden_dropout": 0.0, **_shape(4544, 18176, 32, 71, 71, 65024, tied=True),
    },
    "pythia-6.9b": {
        "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "hidden_act": "gelu", "rotary_pct": 0.25,
        "use_parallel_residual": True, "attention_dropout": 0.0, "hidden_dropout": 0.0,
        **_shape(4096, 16384, 32, 32, 32, 50432),
    },
    "starcoder2-7b": {
        "architectures": ["Starcoder2ForCausalLM"], "model_type": "starcoder2", "hidden_act": "gelu_pytorch_tanh",
        "use_bias": True, "sliding_window": 4096, "attention_dropout": 0.0, "residual_dropout": 0.0,
        "embedding_dropout": 0.0, **_shape(4608, 18432, 32, 36, 4, 49152, tied=True),
    },
    "mixtral-8x7b": {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", **_GATED, "sliding_window": None,
        "num_local_experts": 8, "num_experts_per_tok": 2, **_shape(4096, 14336, 32, 32, 8, 32000),
    },
    "olmoe-7b-a1b": {
        "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", **_GATED, "num_experts": 64,
        "num_experts_per_tok": 8, "norm_topk_prob": False, **_shape(2048, 1024, 16, 16, 16, 50304),
    },
    "qwen1.5-moe-14b-a2.7b": {
        "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", **_GATED, "num_experts": 60,
        "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
        "decoder_sparse_step": 1, "norm_topk_prob": False, **_shape(2048, 5632, 24, 16, 16, 151936),
    },
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", **_GATED, "head_dim": 128,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "decoder_sparse_step": 1,
        "norm_topk_prob": True,
        **_shape(2048, 6144, 48, 32, 4, 151936),
    },
}  # fmt: skip
"""Each architecture's config, by name."""

UNTABLED: dict[str, dict[str, Any]] = {
    "olmo-7b": {"model_type": "olmo", **_GATED, "clip_qkv": None, **_shape(4096, 11008, 32, 32, 32, 50304)},
    "aya-expanse-8b": {
        "model_type": "cohere", **_GATED, "logit_scale": 0.125, **_shape(4096, 14336, 32, 32, 8, 256000, tied=True),
    },
    "command-r7b": {
        "model_type": "cohere2", **_GATED, "logit_scale": 0.25, "sliding_window": 4096, "head_dim": 128,
        **_shape(4096, 14336, 32, 32, 8, 256000, tied=True),
    },
    "glm-4-9b": {
        "model_type": "glm", **_GATED, "attention_bias": True, "head_dim": 128,
        **_shape(4096, 13696, 40, 32, 2, 151552),
    },
    "glm-4-9b-0414": {"model_type": "glm4", **_GATED, "head_dim": 128, **_shape(4096, 13696, 40, 32, 2, 151552)},
    "afm-4.5b": {
        "model_type": "arcee", "hidden_act": "relu2", "attention_dropout": 0.0, "head_dim": 128,
        **_shape(2560, 18432, 36, 20, 4, 128004),
    },
    "seed-oss-36b": {
        "model_type": "seed_oss", **_GATED, "attention_bias": True, "head_dim": 128, "residual_dropout": 0.0,
        **_shape(5120, 27648, 64, 80, 8, 155136),
    },
    "exaone-4-32b": {
        "model_type": "exaone4", **_GATED, "sliding_window": 4096, **_shape(5120, 27392, 64, 40, 8, 102400),
    },
    "helium-1-2b": {"model_type": "helium", **_GATED, "head_dim": 128, **_shape(2560, 7040, 24, 20, 20, 48000)},
    "minitron-4b": {
        "model_type": "nemotron", "hidden_act": "relu2", "attention_dropout": 0.0, "head_dim": 128,
        **_shape(3072, 9216, 32, 24, 8, 256000),
    },
    "phi-2": {
        "model_type": "phi", "hidden_act": "gelu_new", "resid_pdrop": 0.0, "embd_pdrop": 0.0,
        "attention_dropout": 0.0, "partial_rotary_factor": 0.4, **_shape(2560, 10240, 32, 32, 32, 51200),
    },
    "hunyuan-7b": {
        "model_type": "hunyuan_v1_dense", **_GATED, "head_dim": 128,
        **_shape(4096, 14336, 32, 32, 8, 128167, tied=True),
    },
    "ernie-4.5-0.3b": {
        "model_type": "ernie4_5", **_GATED, "head_dim": 128, "use_bias": False,
        **_shape(1024, 3072, 18, 16, 2, 103424, tied=True),
    },
    "apertus-8b": {
        "model_type": "apertus", "hidden_act": "xielu", "attention_dropout": 0.0,
        **_shape(4096, 21504, 32, 32, 8, 131072),
    },
    "gemma-7b": {
        "model_type": "gemma", "head_dim": 256, "attention_dropout": 0.0,
        **_shape(3072, 24576, 28, 16, 16, 256000), **_GEMMA,
    },
    "minicpm3-4b": {
        "model_type": "minicpm3", **_GATED, "q_lora_rank": 768, "kv_lora_rank": 256, "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32, "v_head_dim": 64, **_shape(2560, 6400, 62, 40, 40, 73448),
    },
    "ministral-8b": {
        "model_type": "ministral", **_GATED, "head_dim": 128, "sliding_window": 32768,
        **_shape(4096, 12288, 36, 32, 8, 131072),
    },
    "stablelm-3b": {
        "model_type": "stablelm", **_GATED, "hidden_dropout": 0.0, "partial_rotary_factor": 0.25,
        **_shape(2560, 6912, 32, 32, 32, 50304),
    },
    "gpt-j-6b": {
        "model_type": "gptj", "n_embd": 4096, "n_layer": 28, "n_head": 16, "n_inner": 16384, "rotary_dim": 64,
        "vocab_size": 50400, "tie_word_embeddings": False, "n_positions": 32768, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 1,
    },
    "deepseek-v2-lite-16b": {
        "model_type": "deepseek_v2", **_GATED, "n_routed_experts": 64, "num_experts_per_tok": 6, "n_shared_experts": 2,
        "moe_intermediate_size": 1408, "first_k_dense_replace": 1, "q_lora_rank": None, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_group": 1, "topk_group": 1,
        **_shape(2048, 10944, 27, 16, 16, 102400),
    },
    "granite-3-3b-a800m": {
        "model_type": "granitemoe", **_GATED, "num_local_experts": 40, "num_experts_per_tok": 8,
        **_shape(1536, 512, 32, 24, 8, 49155, tied=True),
    },
    "ernie-4.5-21b-a3b": {
        "model_type": "ernie4_5_moe", **_GATED, "moe_num_experts": 64, "moe_k": 6, "moe_num_shared_experts": 2,
        "moe_intermediate_size": 1536, "moe_layer_start_index": 1, "use_bias": False,
        **_shape(2560, 12288, 28, 20, 4, 103424, tied=True),
    },
    "phi-3.5-moe-42b": {
        "model_type": "phimoe", **_GATED, "num_local_experts": 16, "num_experts_per_tok": 2, "attention_bias": True,
        **_shape(4096, 6400, 32, 32, 8, 32064),
    },
    "glm-4.5-air-106b": {
        "model_type": "glm4_moe", **_GATED, "n_routed_experts": 128, "num_experts_per_tok": 8, "n_shared_experts": 1,
        "moe_intermediate_size": 1408, "first_k_dense_replace": 1, "attention_bias": True, "head_dim": 128,
        "n_group": 1, "topk_group": 1, **_shape(4096, 10944, 46, 96, 8, 151552),
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss", "num_local_experts": 32, "num_experts_per_tok": 4, "head_dim": 64,
        "sliding_window": 128, "attention_bias": True, **_shape(2880, 2880, 24, 64, 8, 201088),
    },
    "gpt-oss-120b": {
        "model_type": "gpt_oss", "num_local_experts": 128, "num_experts_per_tok": 4, "head_dim": 64,
        "sliding_window": 128, "attention_bias": True, **_shape(2880, 2880, 36, 64, 8, 201088),
    },
    "qwen3.5-9b": {
        "model_type": "qwen3_5_text", **_GATED, "head_dim": 256, "full_attention_interval": 4,
        "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "linear_num_key_heads": 16, "linear_num_value_heads": 32, **_shape(4096, 12288, 32, 16, 4, 248320),
    },
    "qwen3.5-35b-a3b": {
        "model_type": "qwen3_5_moe_text", **_GATED, "head_dim": 256, "full_attention_interval": 4,
        "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "linear_num_key_heads": 16, "linear_num_value_heads": 32, "num_experts": 256, "num_experts_per_tok": 8,
        "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
        **_shape(2048, 5120, 40, 16, 2, 248320),
    },
    "qwen3-next-80b-a3b": {
        "model_type": "qwen3_next", **_GATED, "head_dim": 256, "full_attention_interval": 4,
        "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "linear_num_key_heads": 16, "linear_num_value_heads": 32, "num_experts": 512, "num_experts_per_tok": 10,
        "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "norm_topk_prob": True,
        **_shape(2048, 5120, 48, 16, 2, 151936),
    },
    "gemma-4-2b-like": {
        "model_type": "gemma4_text", **_GEMMA, "head_dim": 256, "global_head_dim": 512, "sliding_window": 512,
        "hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262144, "num_kv_shared_layers": 20,
        "use_double_wide_mlp": True,
        "layer_types": _sparse("sliding_attention", "full_attention", 35, tuple(range(4, 35, 5))),
        **_shape(1536, 6144, 35, 8, 1, 262144, tied=True),
    },
    "gemma-4-31b-like": {
        "model_type": "gemma4_text", **_GEMMA, "head_dim": 256, "global_head_dim": 512, "sliding_window": 1024,
        "hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "num_global_key_value_heads": 4,
        "layer_types": _sparse("sliding_attention", "full_attention", 60, tuple(range(5, 60, 6))),
        **_shape(5376, 21504, 60, 32, 16, 262144, tied=True),
    },
    "lfm2-1.2b": {
        "model_type": "lfm2", "full_attn_idxs": [2, 5, 8, 10, 12, 14], "conv_L_cache": 3, "conv_bias": False,
        "block_auto_adjust_ff_dim": True, **_shape(2048, 12288, 16, 32, 8, 65536, tied=True),
    },
    "granite-4-h-micro-3b": {
        "model_type": "granitemoehybrid", **_GATED, "num_local_experts": 0, "num_experts_per_tok": 0,
        "shared_intermediate_size": 8192, "layer_types": _sparse("mamba", "attention", 40, (5, 15, 25, 35)),
        "mamba_n_heads": 64, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1, "mamba_expand": 2,
        "attention_multiplier": 0.015625, "embedding_multiplier": 12, "residual_multiplier": 0.22,
        "logits_scaling": 8, **_shape(2048, 8192, 40, 32, 8, 100352, tied=True),
    },
}  # fmt: skip
"""Models of types that are in no table, so that prepare traces them."""


def config(name: str, layers: int | None = None) -> dict[str, Any]:
    """A model's config, cut to so many layers if they are given."""
    found = {"architectures": ["ForCausalLM"], **(CONFIGS | UNTABLED)[name]}
    if layers is not None:
        found["n_layer" if "n_layer" in found else "num_hidden_layers"] = layers
        if "layer_types" in found:
            found["layer_types"] = _stretch(found["layer_types"], layers)
    return found


def _stretch(kinds: list[str], layers: int) -> list[str]:
    """The first so many layers in a row that are of the most kinds."""
    stretches = [kinds[first : first + layers] for first in range(len(kinds) - layers + 1)]
    return max(stretches, key=lambda stretch: len(set(stretch)))
