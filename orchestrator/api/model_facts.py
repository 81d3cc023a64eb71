"""A base model's shape, read from its config: what sizing and the trainer must know of an architecture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, cast

from pydantic import Field

from orchestrator.api.base import MAX_COUNT, Count, Model, ShortText
from orchestrator.api.layer_trace import MAX_WIDTH, ModelTrace
from orchestrator.api.words import on_one_line

MAX_SHOWN_CHARACTERS = 60
MAX_LAYERS = 1024
MAX_VOCABULARY = 1 << 24

ATTENTION_HEADS = "num_attention_heads"
OVERRIDES = "per_layer_config"
"""What of a layer is other than in the others, by the layer's number."""
TEXT_CONFIG = "text_config"
"""Where the config of a model of images and text has that of its text model."""

Width = Annotated[int, Field(ge=1, le=MAX_WIDTH)]


class FieldMissing(ValueError):
    """A size that a config does not tell, by none of its names."""

    def __init__(self, field: str) -> None:
        super().__init__(f"{field} is missing")
        self.field = field


class Mixture(Model):
    """The experts of a model: where not all layers have them, or not alike, the most that one has."""

    experts: Width
    """Routed experts of a layer, of which each token chooses some."""
    experts_per_token: Width
    expert_size: Width
    """The width inside one of them."""
    shared_size: int = Field(default=0, ge=0, le=MAX_WIDTH)
    """The width inside what every token goes through beside them; 0 where there is no such thing."""


class ModelFacts(Model):
    """The base model's shape, read from its config: what sizing needs and nothing more."""

    model_type: ShortText
    architecture: ShortText
    part_of: ShortText | None = None
    """The type of the model of images or sound whose text part this is; nothing else of it is loaded."""
    hidden_size: Width
    intermediate_size: Width
    num_layers: int = Field(ge=1, le=MAX_LAYERS)
    num_attention_heads: Width
    num_key_value_heads: Width
    head_dim: Width
    vocab_size: int = Field(ge=1, le=MAX_VOCABULARY)
    tied_embeddings: bool
    layer_inputs: Count = 0
    """Weights of the embeddings of which every layer has its own part, and which stay in host memory; 0 for none."""
    mixture: Mixture | None = None
    """Its experts, where it has any."""
    context_length: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = None
    """The largest number of positions that it was made for, where its config tells."""
    record_by_record: bool = False
    """Whether records are computed one after the other, because packed rows of this model would not be right."""
    flash_attention: bool = False
    """Whether the trainer has flash-attn-4, and that is right for heads of this size."""
    trace: ModelTrace | None = None
    """What its layers take under the job's adapter, where no table says it."""
    revision: ShortText
    """The commit of a hub model, or the digest of a folder's config and tensor index."""

    @classmethod
    def from_config(cls, config: Mapping[str, object], revision: str) -> ModelFacts:
        """The facts in a parsed config.json, that of the text model where others are nested beside it.

        Raises ValueError naming the field that is missing or not what it should be.
        """
        text = _widest(_text_config(config))
        hidden_size, num_layers = _count(text, "hidden_size", "n_embd", "d_model"), _layers(text)
        num_attention_heads = _count(text, ATTENTION_HEADS, "n_head", "n_heads", "num_heads", "attention_heads")
        return cls(
            model_type=_text(text, "model_type"),
            part_of=_text(config, "model_type") if isinstance(config.get(TEXT_CONFIG), Mapping) else None,
            architecture=_architecture(config),
            hidden_size=hidden_size,
            intermediate_size=_count(text, *_INTERMEDIATE_SIZE, default=_default_intermediate_size(text, hidden_size)),
            num_layers=num_layers,
            num_attention_heads=num_attention_heads,
            num_key_value_heads=_key_value_heads(text, num_attention_heads),
            head_dim=_count(text, "head_dim", default=hidden_size // num_attention_heads),
            vocab_size=_count({**config, **text}, "vocab_size", most=MAX_VOCABULARY),
            tied_embeddings=_tied_embeddings(config, text),
            layer_inputs=num_layers * _layer_inputs(text),
            mixture=_mixture(text),
            context_length=_context_length(text),
            revision=revision,
        )


EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
EXPERT_SIZES = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size", "ffn_hidden_size")
SHARED_SIZES = ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size")
_SHARED_COUNTS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
MIXTURE_FIELDS = (*EXPERT_COUNTS, *CHOSEN, *EXPERT_SIZES, *SHARED_SIZES, *_SHARED_COUNTS)
"""What configs call the sizes of experts."""
ALIKE = frozenset({"mixtral", "olmoe", "qwen2_moe", "qwen3_moe"})
"""Types whose layers are known before they are traced, if all of them have experts."""


def is_mixture(text: Mapping[str, object]) -> bool:
    """Whether a config's layers have experts."""
    if text.get("is_moe") is False or text.get("enable_moe_block") is False:
        return False
    return any((count := _size_of(text, name)) is not None and count > 1 for name in EXPERT_COUNTS)


def _mixture(text: Mapping[str, object]) -> Mixture | None:
    """The experts of a config; of types that are not known before they are traced, as if every layer had them."""
    if not is_mixture(text):
        return None
    if text.get("model_type") in ALIKE and (text.get("mlp_only_layers") or text.get("decoder_sparse_step", 1) != 1):
        raise ValueError("some layers have experts and others none (mlp_only_layers, decoder_sparse_step)")
    sizes = {name: size for name in MIXTURE_FIELDS if (size := _size_of(text, name)) is not None}
    size = _count(sizes, *EXPERT_SIZES)
    shared = next((sizes[name] for name in SHARED_SIZES if name in sizes), None)
    return Mixture(
        experts=_count(sizes, *EXPERT_COUNTS),
        experts_per_token=_count(sizes, *CHOSEN),
        expert_size=size,
        shared_size=size * next((sizes[name] for name in _SHARED_COUNTS if name in sizes), 0)
        if shared is None
        else shared,
    )


def _size_of(text: Mapping[str, object], name: str) -> int | None:
    """A size, the largest where layers have their own."""
    value = text.get(name)
    each = cast("list[object]", value if isinstance(value, list) else [value])
    return max((one for one in each if type(one) is int), default=None)


_INTERMEDIATE_SIZE = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "dff", "dim_ff")
_FOUR_TIMES_HIDDEN = frozenset(
    {"bloom", "codegen", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox_japanese", "gptj", "mpt", "openai-gpt"}
)
"""Families whose MLP is four times as wide as the model unless the config says otherwise."""
_TIED_BY_DEFAULT = frozenset(
    {"bloom", "cohere", "cohere2", "ernie4_5", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox_japanese", "lfm2"}
    | {"gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "gemma4", "gemma4_text", "vaultgemma"}
    | {"mpt", "opt", "smollm3", "starcoder2"}
)
"""Families whose head shares the embeddings' weights unless the config says otherwise (their transformers classes)."""


def _text_config(config: Mapping[str, object]) -> Mapping[str, object]:
    nested = config.get(TEXT_CONFIG)
    return cast(Mapping[str, object], nested) if isinstance(nested, Mapping) else config


def _widest(text: Mapping[str, object]) -> Mapping[str, object]:
    """A config whose sizes are the largest that any of its layers has."""
    overrides = text.get(OVERRIDES)
    layers = cast("Mapping[str, object]", overrides if isinstance(overrides, Mapping) else {}).values()
    found = dict(text)
    for own in (cast("Mapping[str, object]", each) for each in layers if isinstance(each, Mapping)):
        for name, value in own.items():
            known = found.get(name)
            if type(value) is int and (known is None or (type(known) is int and value > known)):
                found[name] = value
    return found


def _count(config: Mapping[str, object], *names: str, default: int | None = None, most: int = MAX_WIDTH) -> int:
    """The first of the fields that is set: families name the same thing differently."""
    found = next((name for name in names if config.get(name) is not None), None)
    value = default if found is None else config[found]
    if value is None:
        raise FieldMissing(names[0])
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{found or names[0]} must be a positive integer, not {_shown(value)}")
    if value > most:
        raise ValueError(f"{found or names[0]} must be at most {most:,}, as in every model that is known here")
    return value


def _shown(value: object) -> str:
    """A value of a stranger's file as it is quoted in a message: one line, bounded, nothing in it but what is seen."""
    text = on_one_line(repr(value)) if not isinstance(value, int) or abs(value) < MAX_COUNT else "one beyond all bounds"
    return text if len(text) <= MAX_SHOWN_CHARACTERS else text[: MAX_SHOWN_CHARACTERS - 3] + "..."


def _text(config: Mapping[str, object], name: str) -> str:
    value = config.get(name)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} is missing" if value is None else f"{name} must be a text, not {_shown(value)}")
    return value


LAYER_LISTS = ("layer_types", "layers_block_type")
"""Fields that have an entry for each layer."""
STRETCHING_ROPE_TYPES = frozenset({"linear", "dynamic", "yarn", "longrope", "llama3"})


def _context_length(text: Mapping[str, object]) -> int | None:
    """Positions, to which rotary embeddings may have been stretched while max_position_embeddings stayed as it was.

    A factor of the original length (linear: Chen et al., 2023; YaRN: Peng et al., 2023; LongRoPE: Ding et al., 2024).
    """
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
    length = next((found for name in names if type(found := text.get(name)) is int), 0)
    if not 0 < length <= MAX_COUNT:
        return None
    rope = text.get("rope_parameters") or text.get("rope_scaling")
    whole = cast("Mapping[str, object]", rope if isinstance(rope, Mapping) else {})
    by_layer_type = [cast(Mapping[str, object], each) for each in whole.values() if isinstance(each, Mapping)]
    return max(length, *(_stretched(each, length) for each in by_layer_type or [whole]))


def _stretched(rope: Mapping[str, object], length: int) -> int:
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
    kind = str(rope.get("rope_type", rope.get("type")))
    if kind not in STRETCHING_ROPE_TYPES or not isinstance(factor, int | float):
        return length
    stretched = factor * (original if type(original) is int and 0 < original <= MAX_COUNT else length)
    return int(stretched) if 0 < stretched <= MAX_COUNT else length


def _architecture(config: Mapping[str, object]) -> str:
    names = config.get("architectures")
    if names is None:
        raise ValueError("architectures is missing")
    if not isinstance(names, list | tuple) or not names:
        raise ValueError(f"architectures must be a list of class names, not {_shown(cast(object, names))}")
    return str(cast(list[object], names)[0])


def _layers(text: Mapping[str, object]) -> int:
    """How many: some configs only list them."""
    lists = [cast("list[object]", each) for name in LAYER_LISTS if isinstance(each := text.get(name), list)]
    names = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    return _count(text, *names, default=len(lists[0]) if lists else None, most=MAX_LAYERS)


def _default_intermediate_size(text: Mapping[str, object], hidden_size: int) -> int | None:
    """What some families leave out, or have only inside their experts."""
    if text.get("model_type") in _FOUR_TIMES_HIDDEN:
        return 4 * hidden_size
    return _size_of(text, "moe_intermediate_size")


def _key_value_heads(text: Mapping[str, object], num_attention_heads: int) -> int:
    """Multi-query attention keeps one pair of heads (and Falcon's config then counts others); grouped-query some."""
    if text.get("multi_query") is True and not text.get("new_decoder_architecture"):
        return 1
    return _count(text, "num_key_value_heads", "num_kv_heads", default=num_attention_heads)


def _layer_inputs(text: Mapping[str, object]) -> int:
    """Weights of a layer's own embeddings of tokens, by the names that Gemma 3n and Gemma 4 have for their sizes."""
    if not text.get("hidden_size_per_layer_input"):
        return 0
    rows = _count(text, "vocab_size_per_layer_input", "vocab_size", most=MAX_VOCABULARY)
    return rows * _count(text, "hidden_size_per_layer_input")


def _tied_embeddings(config: Mapping[str, object], text: Mapping[str, object]) -> bool:
    for level in (config, text):
        if isinstance(tied := level.get("tie_word_embeddings"), bool):
            return tied
    return not {config.get("model_type"), text.get("model_type")}.isdisjoint(_TIED_BY_DEFAULT)
