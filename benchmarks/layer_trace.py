"""Traces what a decoder layer of transformers takes, and writes it as the table that
`orchestrator/sizing/memory/traced_layer` reads.

    python -m benchmarks.layer_trace [--write] [--families granite ...]

A model of three layers is built on fake tensors of a GPU that need not be there (`FakeTensorMode`), as the trainer
builds it: NF4 layers, PEFT's adapters, packed attention, recompute. One training step runs over it while every
allocation and every release is written down; the middle layer's part is cut out. The same step on other widths tells
which widths each allocation is a product of. What is left is, for each instant that can be the layer's peak, a sum of
such products. So is what the norm after the last layer takes, up to the loss and from there back to that layer.
"""

from __future__ import annotations

import json
import sys
import warnings
import weakref
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest import mock

import bitsandbytes as bnb
import numpy as np
import torch
from peft.tuners.lora import dora
from qlora_trainer.data.micro_batch import collate
from qlora_trainer.kernels import packed_attention as packed
from qlora_trainer.kernels.moe_experts import NF4Experts
from qlora_trainer.model.adapter import add_adapter
from qlora_trainer.model.attention import attention_implementation
from qlora_trainer.model.quantization import COMPUTE_DTYPE, replace_experts
from qlora_trainer.model.training_model import set_recompute
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from benchmarks.architectures import CONFIGS
from benchmarks.report import argument_parser
from orchestrator.api import trainer_facts
from orchestrator.api.job import AdapterSpec
from orchestrator.api.layer_tables import ATTENTION, EXPERTS_BACKWARD, EXPERTS_FORWARD, Moment, Polynomial, TableKey
from orchestrator.api.model_facts import MIXTURES
from orchestrator.api.package_data import TRACED_LAYERS_NAME

FAMILIES = {
    "phi3": "phi-3-mini-3.8b",
    "gpt_neox": "pythia-6.9b",
    "starcoder2": "starcoder2-7b",
    "granite": "granite-3.1-8b",
    "olmo2": "olmo-2-7b",
    "gemma2": "gemma-2-2b",
    "gemma3_text": "gemma-3-1b",
    "llama": "llama-3.1-8b",
    "mistral": "mistral-7b",
    "qwen2": "qwen2.5-7b",
    "qwen3": "qwen3-8b",
    "mixtral": "mixtral-8x7b",
    "olmoe": "olmoe-7b-a1b",
    "qwen2_moe": "qwen1.5-moe-14b-a2.7b",
    "qwen3_moe": "qwen3-30b-a3b",
}
"""Model types that are traced, and a model of each."""
FEW_TARGETS = {"phi3": ("qkv_proj",), "gpt_neox": ("query_key_value",)}
"""Targets of few adapters where queries and values have no matrices of their own."""
AT_WORK = (ATTENTION, EXPERTS_FORWARD, EXPERTS_BACKWARD)
LAYERS, MIDDLE = 3, 1
TABLES_PATH = Path(__file__).parents[1] / "orchestrator" / "api" / TRACED_LAYERS_NAME
DEVICE = "cpu"
"""Where the fake tensors are: autograd refuses a GPU that is not there. What one does otherwise is done by hand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """Sizes that no product of others equals by chance."""

    tokens: int
    hidden: int
    inner: int
    heads: int
    key_heads: int
    head: int
    rank: int
    experts: int
    experts_per_token: int

    def symbols(self, hidden: int) -> dict[str, int]:
        """The sizes by the letters of the table."""
        query, key = self.heads * self.head, self.key_heads * self.head
        return {
            "t": self.tokens, "h": hidden, "i": self.inner, "q": query, "k": key, "r": self.rank, "n": self.heads,
            "m": self.key_heads, "d": self.head, "p": query + 2 * key, "e": self.experts, "s": self.experts_per_token,
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """An allocation (`number` is new), a release, or a mark."""

    kind: str
    number: int = -1
    size: int = 0
    name: str = ""


def _key(storage: Any) -> int:
    """Where a storage is, the same for every view of it."""
    return storage._cdata


class Recorder(TorchDispatchMode):
    """Writes down when storages come to be and when they go."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self._numbers: dict[int, int] = {}
        self._count = 0

    def ignore(self, tensor: Tensor) -> None:
        """It is there already, and so is whatever views it."""
        self._numbers[_key(tensor.untyped_storage())] = -1

    def mark(self, name: str) -> None:
        """A place in the list of events."""
        self.events.append(Event(kind="mark", name=name))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == DEVICE:
                self._see(tensor.untyped_storage(), str(func))
        return found

    def _see(self, storage: Any, name: str) -> None:
        key = _key(storage)
        if key in self._numbers:
            return
        self._numbers[key] = self._count
        self.events.append(Event(kind="take", number=self._count, size=storage.nbytes(), name=name))
        weakref.finalize(storage, self._drop, key)
        self._count += 1

    def _drop(self, key: int) -> None:
        self.events.append(Event(kind="drop", number=self._numbers.pop(key)))


def trace(family: str, widths: Widths, key: TableKey) -> list[Event]:
    """The events of a training step."""
    model = FAMILIES[family]
    config = _config(model, widths)
    recorder = Recorder()
    AttentionInterface.register(packed.NAME, _Attention(recorder))
    base = _base(config)
    adapter = AdapterSpec(
        rank=widths.rank,
        dropout="0.05" if key.drops else "0",
        target_modules=FEW_TARGETS.get(family, ("q_proj", "v_proj")) if key.few else "all-linear",
        use_dora=key.dora,
    )
    with warnings.catch_warnings(), mock.patch.object(dora.DoraLinearLayer, "update_layer", _add_magnitudes):
        warnings.simplefilter("ignore")
        peft_model = add_adapter(base, adapter, seed=0)
    ids = np.arange(widths.tokens, dtype=np.int32) % 5
    batch = collate([(ids, ids, np.arange(widths.tokens, dtype=np.int32))])
    with FakeTensorMode(allow_non_fake_inputs=True):
        _move_to_card(base)
        peft_model.train()
        decoder = base.get_decoder()
        set_recompute(decoder, LAYERS if key.recomputes else 0)
        _mark_layers(decoder, recorder)
        for tensor in (*peft_model.parameters(), *peft_model.buffers()):
            recorder.ignore(tensor)
        dense = mock.patch.object(dora, "dequantize_module_weight", TracedLinear.dense)
        dropout_patch = mock.patch("torch.nn.functional.dropout", _Dropout.apply_to)
        with _traced_experts(recorder), recorder, dense, dropout_patch:
            hidden = decoder(
                input_ids=batch.input_ids.to(DEVICE), position_ids=batch.position_ids.to(DEVICE), use_cache=False
            ).last_hidden_state
            loss = _Loss.apply(hidden, recorder)
            del hidden
            loss.backward()
    return recorder.events


class _Attention:
    """`PackedAttention`: what it keeps and gives. The workspace of its backward pass is `sizing/memory/attention`'s."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def __call__(
        self, _module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, softcap: float | None = None, **__: Any
    ) -> tuple[Tensor, None]:
        if softcap is None:
            parts = (part[0].transpose(0, 1) for part in (query, key, value))
            return _AttentionFunction.apply(*parts, self._recorder, True).unsqueeze(0), None
        output = _AttentionFunction.apply(query[0], key[0], value[0], self._recorder, False).unsqueeze(0)
        return torch.cat([output], dim=2).transpose(1, 2).contiguous(), None


class _AttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, recorder: Recorder, keeps_output: bool) -> Tensor:
        output = torch.empty_like(query)
        ctx.recorder = recorder
        kept = (output, torch.empty(query.shape[1], len(query), device=DEVICE)) if keeps_output else ()
        ctx.save_for_backward(query, key, value, *kept)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        grad = grads[0].contiguous()
        found = tuple(torch.empty_like(part) for part in (query, key, value))
        ctx.recorder.events.append(Event(kind=ATTENTION))
        del grad
        return *found, None, None


@contextmanager
def _traced_experts(recorder: Recorder) -> Generator[None]:
    """`NF4Experts`: what they give. What they take by the way is `sizing/memory/experts`'s."""

    def mix(_: Any, x: Tensor, *__: Tensor) -> Tensor:
        recorder.events.append(Event(kind=EXPERTS_FORWARD))
        return torch.empty_like(x)

    def mix_backward(_: Any, __: Tensor, x: Tensor, ___: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        recorder.events.append(Event(kind=EXPERTS_BACKWARD))
        return torch.empty_like(x), torch.empty_like(weights)

    with mock.patch.multiple(NF4Experts, mix=mix, mix_backward=mix_backward):
        yield


class _Loss(torch.autograd.Function):
    """The loss of `qlora_trainer.model.loss`: the gradient is there from the forward pass on."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, recorder: Recorder) -> Tensor:
        ctx.save_for_backward(torch.empty(hidden.shape, dtype=hidden.dtype, device=DEVICE))
        recorder.mark("loss")
        return torch.zeros((), device=DEVICE)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0], None


class _Dropout(torch.autograd.Function):
    """Dropout as on a GPU: a mask of a byte for each element."""

    @staticmethod
    def apply_to(x: Tensor, p: float = 0.5, training: bool = True, *_: Any) -> Tensor:
        """`torch.nn.functional.dropout`'s signature."""
        return _Dropout.apply(x) if training and p > 0 else x

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(torch.empty(x.shape, dtype=torch.bool, device=DEVICE))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # noqa: ARG004 - torch's signature
        return torch.empty_like(grads[0])


class _Product(torch.autograd.Function):
    """What bitsandbytes' `MatMul4Bit` does on a GPU, allocation by allocation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: TracedLinear) -> Tensor:
        ctx.layer = layer
        own: Any = layer.bias
        bias = None if own is None else own.to(x.dtype)
        scales = layer.scales(), layer.scales()  # as they were kept, and with their mean: `_dequant_linear_fallback`
        weights = torch.empty(layer.out_features, layer.in_features, dtype=COMPUTE_DTYPE, device=DEVICE)
        output = torch.nn.functional.linear(x, weights, bias)
        del scales
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return torch.matmul(grads[0], ctx.layer.dense()), None


class TracedLinear(bnb.nn.Linear4bit):
    """A 4-bit layer whose weights are nowhere: they only take room while they are dense."""

    def dense(self) -> Tensor:
        """Scales first, as bitsandbytes' `dequantize_4bit` has it, then the weights."""
        scales = self.scales()
        weights = torch.empty(self.out_features, self.in_features, dtype=COMPUTE_DTYPE, device=DEVICE)
        del scales
        return weights

    def scales(self) -> Tensor:
        """One for each block of weights."""
        return torch.empty(self.in_features * self.out_features // trainer_facts.NF4_BLOCK, device=DEVICE)

    def forward(self, x: Tensor) -> Tensor:
        """The product with weights that are dense for its time alone."""
        return _Product.apply(x, self)


def _add_magnitudes(layer: Any, *, base_layer: TracedLinear, **_: Any) -> None:
    layer.weight = torch.nn.Parameter(torch.empty(base_layer.out_features))


def _hidden(model: str, widths: Widths) -> int:
    """Most architectures split the hidden size into heads; some give heads a size of their own."""
    return widths.hidden if "head_dim" in CONFIGS[model] else widths.heads * widths.head


def _base(config: Any) -> Any:
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(
            config, dtype=COMPUTE_DTYPE, attn_implementation=attention_implementation(config)
        )
    replace_experts(base)
    head = base.get_output_embeddings()
    for name, module in list(base.named_modules()):
        if isinstance(module, torch.nn.Linear) and module is not head:
            own: Any = module.bias
            layer = TracedLinear(
                module.in_features, module.out_features, bias=own is not None, compute_dtype=COMPUTE_DTYPE,
                quant_type="nf4", device="meta",
            )  # fmt: skip
            bias: Any = layer.bias
            if bias is not None:
                bias.data = bias.data.to(COMPUTE_DTYPE)  # as it is read from a checkpoint
            base.set_submodule(name, layer)
    base.requires_grad_(False)
    base.is_loaded_in_4bit = True
    return base


def _move_to_card(base: Any) -> None:
    for module in base.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not isinstance(parameter, bnb.nn.Params4bit):
                fresh = torch.empty(parameter.shape, dtype=parameter.dtype, device=DEVICE)
                module._parameters[name] = torch.nn.Parameter(fresh, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=DEVICE)


def _config(model: str, widths: Widths) -> Any:
    own: dict[str, Any] = {
        **CONFIGS[model],
        "num_hidden_layers": LAYERS,
        "hidden_size": _hidden(model, widths),
        "intermediate_size": widths.inner,
        "num_attention_heads": widths.heads,
        "num_key_value_heads": widths.key_heads,
        "vocab_size": 97,
    }
    if "head_dim" in own:
        own["head_dim"] = widths.head
    if "query_pre_attn_scalar" in own:
        own["query_pre_attn_scalar"] = widths.head
    if own["model_type"] in MIXTURES:
        own |= _expert_sizes(own, widths)
    return AutoConfig.for_model(**own)


def _expert_sizes(own: dict[str, Any], widths: Widths) -> dict[str, Any]:
    fields = MIXTURES[own["model_type"]]
    sizes: dict[str, Any] = {name: widths.experts for name in fields.experts if name in own}
    sizes |= {"num_experts_per_tok": widths.experts_per_token, fields.size: EXPERT_SIZE}
    return sizes | ({fields.shared_size: widths.inner} if fields.shared_size else {})


def _mark_layers(decoder: Any, recorder: Recorder) -> None:
    for index in range(LAYERS):
        layer = decoder.layers[index]
        layer.register_forward_pre_hook(partial(_mark, recorder, f"forward {index}"))
        layer.register_forward_hook(partial(_mark_gradient, recorder, f"backward {index}"))
    norm = [module for name, module in decoder.named_children() if "norm" in name][-1]
    norm.register_forward_pre_hook(partial(_mark, recorder, "end"))


def _mark(recorder: Recorder, name: str, *_: Any) -> None:
    recorder.mark(name)


def _mark_gradient(recorder: Recorder, name: str, _module: Any, _inputs: Any, out: Any) -> None:
    tensor: Any = out[0] if isinstance(out, tuple) else out
    if tensor.requires_grad:
        tensor.register_hook(partial(_mark, recorder, name))


# --- from sizes to products of widths


PRODUCTS = (
    *("th", "ti", "tq", "tk", "tp", "tr", "ttn", "tt", "tn", "tm", "td", "t"),
    *("ii", "qq", "kk", "hi", "hh", "hq", "hk", "hp", "rh", "ri", "rq", "rk", "rp", "h", "i", "q", "k", "p", "r", ""),
    *("te", "ts", "he"),
)
SMALL_BYTES = 4096
"""What is smaller whatever the widths is left to the margin."""
SAMPLES = (
    Widths(
        tokens=2018, hidden=576, inner=1376, heads=8, key_heads=2, head=64, rank=11, experts=24, experts_per_token=4
    ),
    Widths(
        tokens=1213, hidden=384, inner=1984, heads=6, key_heads=3, head=80, rank=23, experts=56, experts_per_token=5
    ),
    Widths(
        tokens=3011, hidden=720, inner=1152, heads=10, key_heads=5, head=64, rank=37, experts=40, experts_per_token=3
    ),
)


EXPERT_SIZE = 1024
"""The width inside a routed expert, which only `sizing/memory/experts` asks for."""
SHAPES = 20_000


def polynomial(sizes: tuple[int, ...], values: list[dict[str, int]]) -> Polynomial:
    """The product of widths that has these sizes on the samples; raises ValueError where there is none."""
    if max(sizes) <= SMALL_BYTES:
        return {}
    for name in PRODUCTS:
        factors = {size / value[name] for size, value in zip(sizes, values, strict=True)}
        if max(factors) - min(factors) < 1e-9 * max(factors):
            return {name: min(factors)}
    for one, other in combinations(PRODUCTS, 2):
        matrix = np.array([[value[one], value[other]] for value in values], dtype=float)
        found, *_ = np.linalg.lstsq(matrix, np.array(sizes, dtype=float), rcond=None)
        if np.allclose(matrix @ found, sizes, rtol=1e-9) and min(found) > 0:
            return {one: round(float(found[0]), 6), other: round(float(found[1]), 6)}
    raise ValueError(f"no product of widths has the sizes {sizes}")


def _values(model: str, widths: Widths) -> dict[str, int]:
    symbols = widths.symbols(_hidden(model, widths))
    return {name: int(np.prod([symbols[letter] for letter in name], dtype=np.int64)) for name in PRODUCTS}


def table(family: str, key: TableKey) -> dict[str, Any]:
    """What a layer keeps, the first one too, and the instants of both passes that can be its peak."""
    traces = [trace(family, widths, key) for widths in SAMPLES]
    assert len({len(events) for events in traces}) == 1, "the widths change what is computed"
    takes = [[event for event in events if event.kind == "take"] for events in traces]
    sizes = {events[0].number: tuple(e.size for e in events) for events in zip(*takes, strict=True)}
    values = [_values(FAMILIES[family], widths) for widths in SAMPLES]
    polynomials = {number: polynomial(found, values) for number, found in sizes.items()}
    stream = {"th": 2.0}
    forward = _segment(traces[0], polynomials, f"forward {MIDDLE}", f"forward {MIDDLE + 1}", stream)
    kept = _sum(forward[-1][1], stream, -1)
    backward = _segment(traces[0], polynomials, f"backward {MIDDLE}", f"backward {MIDDLE - 1}", _sum(kept, stream, 1))
    first = _segment(traces[0], polynomials, "forward 0", "forward 1", {})
    events = [event for event in traces[0] if event != _embeddings_drop(traces[0], polynomials)]
    end = _segment(events, polynomials, "end", "loss", stream)
    norm = _segment(events, polynomials, "loss", f"backward {LAYERS - 1}", end[-1][1])
    released = len(events) < len(traces[0])
    return {
        "kept": kept,
        "first": first[-1][1],
        "forward": _largest(forward),
        "backward": _largest(backward),
        "loss": end[-1][1],
        "norm": _largest(norm),
        "released": stream if released else {},
    }


def _embeddings_drop(events: list[Event], polynomials: dict[int, Polynomial]) -> Event | None:
    """The end of the first layer's input, where the decoder lets go of it before the loss and nothing else needs it."""
    names = [event.name for event in events]
    before = events[: names.index("forward 0")]
    made = [event.number for event in before if event.kind == "take" and polynomials[event.number] == {"th": 2.0}]
    between = events[names.index("end") : names.index("loss")]
    return next((event for event in between if event.kind == "drop" and event.number in made), None)


def _segment(
    events: list[Event], polynomials: dict[int, Polynomial], first: str, last: str, start: Polynomial
) -> list[Moment]:
    names = [event.name for event in events]
    live, moments = start, [("", start)]
    for event in events[names.index(first) : names.index(last) + 1]:
        if event.kind == "take":
            live = _sum(live, polynomials[event.number], 1)
        elif event.kind == "drop":
            live = _sum(live, polynomials[event.number], -1)
        moments.append((event.kind if event.kind in AT_WORK else "", live))
    return moments


def _sum(one: Polynomial, other: Polynomial, sign: int) -> Polynomial:
    found = {key: round(one.get(key, 0) + sign * other.get(key, 0), 6) for key in {*one, *other}}
    return {key: found[key] for key in sorted(found) if found[key]}


def _largest(moments: list[Moment]) -> list[Moment]:
    """Those that are the largest on any of many shapes that models and micro-batches have."""
    kept: list[Moment] = []
    for at_work in ("", *AT_WORK):
        own = list({json.dumps(m[1], sort_keys=True): m[1] for m in moments if m[0] == at_work}.values())
        if own:
            matrix = np.array([[one.get(name, 0.0) for name in PRODUCTS] for one in own])
            first = np.argmax(matrix @ _shapes(), axis=0)
            kept += [(at_work, own[index]) for index in sorted(set(first.tolist()))]
    return kept


@cache
def _shapes() -> np.ndarray:
    """The value of every product [products, shapes] on shapes drawn at random."""
    draw = np.random.RandomState(0)

    def spread(low: float, high: float) -> np.ndarray:
        return np.exp(draw.uniform(np.log(low), np.log(high), SHAPES))

    hidden, head = spread(256, 16384), draw.choice([64, 80, 96, 128, 256], SHAPES)
    query = hidden * draw.choice([0.5, 0.8, 1.0, 1.0, 1.0, 2.0], SHAPES)
    key = query / draw.choice([1, 1, 2, 4, 5, 7, 8, 16], SHAPES)
    letters = {
        "t": spread(64, 262144), "h": hidden, "i": hidden * spread(1, 8), "q": query, "k": key, "p": query + 2 * key,
        "n": query / head, "m": key / head, "d": head, "r": spread(4, 256), "e": spread(4, 512), "s": spread(1, 16),
    }  # fmt: skip
    return np.array([np.prod([letters[x] for x in name], axis=0) * np.ones(SHAPES) for name in PRODUCTS])


def main() -> None:
    """Print or write the tables."""
    parser = argument_parser(__doc__)
    parser.add_argument("--families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--write", action="store_true", help="write orchestrator/api/traced_layers.json")
    arguments = parser.parse_args()
    tables: dict[str, Any] = {}
    for family in arguments.families:
        tables[family] = {str(key): table(family, key) for key in TableKey.every()}
        print(family, {key: len(entry["backward"]) for key, entry in tables[family].items()}, file=sys.stderr)
    lines = (f'"{family}": {json.dumps(entry)}' for family, entry in tables.items())
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    if arguments.write:
        TABLES_PATH.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
