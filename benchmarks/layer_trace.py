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
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from qlora_trainer.kernels.packed_attention import PackedAttention
from qlora_trainer.model.loading import weightless_base
from qlora_trainer.model.recorded_step import Event, run_step
from transformers import AutoConfig

from benchmarks.architectures import CONFIGS
from benchmarks.report import argument_parser
from orchestrator.api.job import AdapterSpec
from orchestrator.api.layer_tables import ATTENTION, EXPERTS_BACKWARD, EXPERTS_FORWARD, Moment, Polynomial, TableKey
from orchestrator.api.model_facts import EXPERT_COUNTS, EXPERT_SIZES, SHARED_SIZES
from orchestrator.api.package_data import TRACED_LAYERS_NAME

FAMILIES = {
    "phi3": "phi-3-mini-3.8b",
    "gpt_neox": "pythia-6.9b",
    "starcoder2": "starcoder2-7b",
    "granite": "granite-3.1-8b",
    "olmo2": "olmo-2-7b",
    "olmo3": "olmo-3-7b",
    "gemma2": "gemma-2-2b",
    "gemma3_text": "gemma-3-1b",
    "llama": "llama-3.1-8b",
    "mistral": "mistral-7b",
    "qwen2": "qwen2.5-7b",
    "qwen3": "qwen3-8b",
    "smollm3": "smollm3-3b",
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


def trace(family: str, widths: Widths, key: TableKey) -> list[Event]:
    """The events of a training step."""
    model = FAMILIES[family]
    config = _config(model, widths)
    PackedAttention().register()
    base, _ = weightless_base(config, torch.device("cpu"))
    adapter = AdapterSpec(
        rank=widths.rank,
        dropout="0.05" if key.drops else "0",
        target_modules=FEW_TARGETS.get(family, ("q_proj", "v_proj")) if key.few else "all-linear",
        use_dora=key.dora,
    )
    return run_step(base, adapter, tokens=widths.tokens, recomputes=key.recomputes)


def _hidden(model: str, widths: Widths) -> int:
    """Most architectures split the hidden size into heads; some give heads a size of their own."""
    return widths.hidden if "head_dim" in CONFIGS[model] else widths.heads * widths.head


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
    if any(name in own for name in EXPERT_COUNTS):
        own |= _expert_sizes(own, widths)
    return AutoConfig.for_model(**own)


def _expert_sizes(own: dict[str, Any], widths: Widths) -> dict[str, Any]:
    sizes: dict[str, Any] = {name: widths.experts for name in EXPERT_COUNTS if name in own}
    sizes |= {"num_experts_per_tok": widths.experts_per_token, next(n for n in EXPERT_SIZES if n in own): EXPERT_SIZE}
    return sizes | {name: widths.inner for name in SHARED_SIZES if name in own}


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
