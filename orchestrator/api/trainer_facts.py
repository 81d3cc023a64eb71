"""What the trainer does and the sizing must know: each fact once, read by both when they need it.

Read values as attributes of the module (`trainer_facts.MLP_TILE_TOKENS`), never import one by name: then there is no
copy that another value could miss.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# --- layers

HANDWRITTEN_TYPES = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "granite", "phi3", "mixtral", "qwen3_moe", "smollm3", "olmo2", "olmo3"}
    | {"gemma3_text"}
)
"""Model types whose decoder layers the trainer computes by hand (`qlora_trainer/kernels/takeover.py`)."""
MLP_TILE_TOKENS = 8192
"""Tokens that a recomputed MLP takes at a time: enough for matrix products at full speed."""
EXPERT_TILE_TOKENS = 4096
"""Tokens that are sorted by expert at a time: with 8 of 128 experts each, 256 rows an expert."""
EXPERT_DENSE_BYTES = 256 << 20
"""Of experts' dense weights at a time, but for one expert: more are hardly faster."""

# --- attention

LARGEST_TRITON_HEAD = 128
"""The largest head size of the trainer's own attention kernels."""
LARGEST_FLASH_HEAD = 256
"""The largest of flash attention; with larger ones scores are computed tile by tile."""
FLASH_HEADS = frozenset({64, 128})
"""Sizes of heads for which flash-attn-4 was found right: its gradients of others are wrong (80), or were not tried."""
FLASH_RECORD_TOKENS = 1024
"""How long a packed row's records have to be on average for flash-attn-4: with shorter ones our own are as fast."""
SCORES_BYTES = 64 << 20
"""Of a float32 tile of scores where attention is computed tile by tile; a few such tensors are alive at once."""

# --- CUDA graphs

CUDA_GRAPH_TOKENS = 6144
"""Micro-batches of up to so many tokens run as CUDA graphs. Beyond, kernels take so long that their launches hide."""
CUDA_GRAPH_TOKENS_STEP = 256
"""Their tokens are padded to a multiple of this."""

# --- answers to held-out prompts

ANSWER_TOKENS = 4096
"""Prompt and answer together have at most so many: longer records are not asked, whatever was trained on."""

# --- NF4 (Dettmers et al., 2023, section 3; the defaults of bitsandbytes)

NF4_BLOCK, NF4_SCALE_BLOCK = 64, 256
"""Weights that share an 8-bit scale, and scales that share a 32-bit one."""

# --- optimizer

OPTIMIZER_BLOCK = 256
"""8-bit moments that share a 32-bit scale."""
OPTIMIZER_PIECE = 1 << 28
"""The most elements that are updated at once, their gradients side by side: bitsandbytes counts them in 32 bits."""
SMALLEST_PAGED = 100_000
"""bitsandbytes pages the state of parameters with as many elements or more alone (`get_state_buffer`)."""
OPTIMIZER_BYTES: Mapping[str, float] = MappingProxyType(
    {
        "adamw_8bit": 2 + 8 / OPTIMIZER_BLOCK,  # two 8-bit moments, and their scales
        "paged_adamw_8bit": 2 + 8 / OPTIMIZER_BLOCK,
        "adamw_32bit": 8.0,
        "paged_adamw_32bit": 8.0,
    }
)
"""State for each trainable parameter, in the allocator or in paged memory."""

# --- cuBLAS

CUBLAS_WORKSPACE_BYTES = 32 << 20
"""Of each pair of thread and stream that multiplies matrices."""
CUBLAS_WORKSPACES = 8
"""Buffers that it is made of: with a fixed number, products give the same bits on every run."""


def cublas_workspace_config() -> str:
    """The value of CUBLAS_WORKSPACE_CONFIG that asks for this workspace."""
    return f":{CUBLAS_WORKSPACE_BYTES // CUBLAS_WORKSPACES >> 10}:{CUBLAS_WORKSPACES}"


# --- host memory

STREAM_BUFFERS = 2
"""Rooms on the card that layers from the host share: one computes while the next one comes."""
STREAM_ALIGNMENT = 512
"""Bytes at which each tensor of a layer begins in the host's memory: what the card's allocator aligns to, and kernels
are used to."""


def streamed_numbers(streamed: int, layers: int) -> tuple[int, ...]:
    """The numbers of the layers that are streamed from the host: so many of all, evenly among them."""
    count = min(streamed, layers)
    return tuple(number for number in range(layers) if (number + 1) * count // layers > number * count // layers)
