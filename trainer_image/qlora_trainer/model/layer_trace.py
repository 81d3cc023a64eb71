"""The layers of a model that no table knows, traced under a job's adapter: what `ModelTrace` holds of them.

Rules:

- Layers of one kind have the same modules, sizes and settings. A decoder of the first layer, one of each kind and a
  last one is traced instead of the whole; each kind's own part of the step is cut out of the middle.
- A step is traced with three numbers of tokens, which gives every allocation's polynomial in them. Of the moments of a
  pass those are kept that are the largest for some number of tokens.
- Where the tokens decide how often something is computed, as in layers that carry a state from one chunk of them to the
  next, allocations have no counterparts; the largest moments of the three steps give the polynomial then.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from itertools import pairwise
from typing import Any

import bitsandbytes as bnb
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Module, ModuleList
from transformers import PreTrainedConfig

from orchestrator.api import trainer_facts
from orchestrator.api.adapter import AdapterSpec
from orchestrator.api.layer_tables import ATTENTION, EXPERTS_BACKWARD, EXPERTS_FORWARD, has_table
from orchestrator.api.layer_trace import (
    KIND_LETTERS,
    MOST_INSTANTS,
    MOST_KINDS,
    MOST_WALK_CHARACTERS,
    EndInstants,
    ExpertInstants,
    Heads,
    InTokens,
    LayerInstants,
    LayerKind,
    ModelTrace,
)
from orchestrator.api.model_facts import ModelFacts
from orchestrator.api.step_walk import StepWalk, TileWalk
from qlora_trainer.kernels.moe_experts import NF4Experts
from qlora_trainer.kernels.packed_attention import NAME as PACKED_ATTENTION
from qlora_trainer.kernels.packed_attention import PackedAttention
from qlora_trainer.model.attention import own_attention_implementation
from qlora_trainer.model.layer_inputs import layer_inputs_table
from qlora_trainer.model.loading import weightless_base
from qlora_trainer.model.recorded_step import (
    OUTPUTS,
    Event,
    TracedExperts,
    decoder_layers,
    run_experts,
    run_step,
    take_weights_away,
)
from qlora_trainer.model.text_part import decoder_of
from qlora_trainer.model.traced_walk import Part, Sizes, Unwalkable, WalkedStep, tile_codes

Lengths = tuple[int, int, int]
TOKENS: Lengths = (769, 1281, 2049)
"""Of the traced micro-batches: one more than whole chunks of 256 or fewer, which is what is padded most."""
CHUNK_TOKENS = 256
"""What layers that go from chunk to chunk pad to is this or a part of it."""
LONGEST_TRACED_TOKENS = 8192
"""A longer record is not traced itself: it takes minutes."""
MOST_TOKENS = 1 << 20
ALLOCATION_BYTES, CODE_BYTES, OFFSET_BYTES = 512, 64, 4
ITS_NUMBER = ("_idx", "layer_id", "layer_number")
"""How settings of a module end that only say which layer it is in, or whose output it adds."""


log = logging.getLogger(__name__)


class Untraceable(Exception):
    """A model whose layers are not what is assumed of them here."""


def traced_facts(
    facts: ModelFacts, config: PreTrainedConfig, adapter: AdapterSpec, *, packs: bool, record_tokens: int
) -> ModelFacts:
    """The facts with a trace of the model's layers, where no table says what these take. Raises Untraceable.

    `packs`: whether rows of records are packed; else each is attended to by transformers, and the longest has so many
    tokens.
    """
    if has_table(facts.model_type, use_dora=adapter.use_dora, experts=adapter.experts):
        return facts
    began = time.perf_counter()
    PackedAttention().register()
    try:
        base, _ = weightless_base(deepcopy(config), torch.device("cpu"))
        if not packs:
            base.set_attn_implementation(own_attention_implementation(base.config))
        trace = trace_layers(base, adapter, TOKENS if packs else record_lengths(record_tokens))
    except (Untraceable, MemoryError):
        raise
    except Exception as error:  # whatever a class of transformers' does that was not foreseen
        log.warning("tracing failed", exc_info=True)
        raise Untraceable(f"{type(error).__name__}: {error}") from error
    log.info("traced %d kinds of layers in %.1f s", len(trace.kinds), time.perf_counter() - began)
    return facts.model_copy(update={"trace": trace})


def record_lengths(longest: int) -> tuple[int, int, int]:
    """The tokens of traced records that go through the layers alone: the longest, and others that are padded alike."""
    rest = longest % CHUNK_TOKENS
    top = min(longest, LONGEST_TRACED_TOKENS + rest)
    if top < 4 * CHUNK_TOKENS:
        return top, top + CHUNK_TOKENS, top + 2 * CHUNK_TOKENS
    quarter, half = (rest + top // part // CHUNK_TOKENS * CHUNK_TOKENS for part in (4, 2))
    return quarter, half, top


def trace_layers(base: Any, adapter: AdapterSpec, lengths: Lengths = TOKENS) -> ModelTrace:
    """What the layers of a base without memory take with such an adapter. Raises Untraceable.

    `lengths` are the tokens of the traced steps: where layers pad them, bytes are right for tokens padded alike.

    `base` is `loading.weightless_base`'s, and is good for nothing else afterwards.
    """
    take_weights_away(base)
    layers = list(decoder_layers(decoder_of(base)))
    numbers, kinds = _kinds(base, layers)
    chosen = [0, *(numbers.index(kind, 1 if kind in numbers[1:] else 0) for kind in range(kinds)), len(layers) - 1]
    recomputed, whole = (
        _Step(base, chosen, adapter, lengths, recomputes=recomputes, like_last=1 + numbers[-1])
        for recomputes in (True, False)
    )
    found = [
        LayerKind(
            weight_bytes=_weight_bytes(layers[index]),
            other_bytes=_sixteen_bit_bytes(layers[index]),
            gradient_bytes=whole.gradient_bytes[place],
            recomputed=recomputed.instants(place),
            whole=whole.instants(place),
            experts=whole.experts[place],
            heads=whole.heads(place),
        )
        for place, index in enumerate(chosen[1:-1], start=1)
    ]
    distinct = tuple(dict.fromkeys(found))  # layers that differ in their windows alone take the same
    places = [1 + found.index(kind) for kind in distinct]
    return ModelTrace(
        packed=base.config._attn_implementation == PACKED_ATTENTION,
        kinds=distinct,
        layers="".join(KIND_LETTERS[distinct.index(found[kind])] for kind in numbers),
        recomputed=recomputed.ends,
        whole=whole.ends,
        fusing_bytes=max(_fusing_bytes(layer) for layer in layers),
        other_bytes=_outside_bytes(base, layers),
        other_gradient_bytes=whole.other_gradient_bytes,
        adapter_parameters=sum(whole.adapter_parameters[1 + kind] for kind in numbers) + whole.other_adapter_parameters,
        walk=_walk(recomputed, whole, places),
    )


def _walk(recomputed: _Step, whole: _Step, places: Sequence[int]) -> str:
    """The walk of both steps, where the same is computed whatever the tokens, and it is no longer than can be kept."""
    sizes = Sizes()
    try:
        steps = recomputed.walked(sizes), whole.walked(sizes)
        if steps[0] is None or steps[1] is None:
            return ""
        experts = tuple(whole.tile_walk(place, sizes) for place in places)
        walk = StepWalk(
            recomputed=steps[0].parts(places),
            whole=steps[1].parts(places),
            experts=experts if any(experts) else (),
            sizes=sizes.all(),
        )
    except Unwalkable:
        return ""
    packed = walk.packed()
    return packed if len(packed) <= MOST_WALK_CHARACTERS else ""


# --- kinds of layers


def _kinds(base: Any, layers: Sequence[Module]) -> tuple[list[int], int]:
    """The kind of each layer, numbered as they come, and how many kinds there are."""
    config = base.config.get_text_config()
    every = list(range(len(layers)))  # a list of layers, which tells nothing of one
    lists = [
        each
        for each in config.to_dict().values()
        if isinstance(each, list) and len(each) == len(layers) and each != every
    ]
    described = [(str([each[index] for each in lists]), _described(layer)) for index, layer in enumerate(layers)]
    kinds = list(dict.fromkeys(described))
    if len(kinds) > MOST_KINDS:
        raise Untraceable(f"it has {len(kinds)} kinds of layers, more than {MOST_KINDS}")
    return [kinds.index(each) for each in described], len(kinds)


def _described(layer: Module) -> str:
    """Modules, their settings and the shapes of their parameters."""
    return str(
        [
            (name, type(module).__name__, _settings(module), [tuple(each.shape) for each in module.parameters(False)])
            for name, module in layer.named_modules()
        ]
    )


def _settings(module: Module) -> dict[str, Any]:
    plain = (bool, int, float, str, type(None))
    return {
        name: bool(value) if isinstance(value, float) else value  # a probability of nothing makes no mask
        for name, value in vars(module).items()
        if isinstance(value, plain) and not name.startswith("_") and not name.endswith(ITS_NUMBER)
    }


# --- weights


def _weight_bytes(layer: Module) -> int:
    """What bitsandbytes keeps of a layer's matrices (`orchestrator/sizing/memory/linear_layers` counts the same)."""
    return sum(
        _nf4_bytes(module.in_features * module.out_features)
        for module in layer.modules()
        if isinstance(module, bnb.nn.Linear4bit)
    ) + sum(_nf4_bytes(matrix.numel()) for matrix in _expert_matrices(layer))


def _fusing_bytes(layer: Module) -> int:
    """`ModelTrace.fusing_bytes` of a layer: twice its experts' larger matrix in 16 bits, instead of NF4."""
    return max((2 * 2 * matrix.numel() - _nf4_bytes(matrix.numel()) for matrix in _expert_matrices(layer)), default=0)


def _expert_matrices(layer: Module) -> list[Tensor]:
    experts = [module for module in layer.modules() if isinstance(module, NF4Experts)]
    return [getattr(module, name) for module in experts for name in module.matrices]


def _nf4_bytes(weights: int) -> int:
    scales = -(-weights // trainer_facts.NF4_BLOCK)
    outer = -(-scales // trainer_facts.NF4_SCALE_BLOCK)
    return sum(map(_allocated, (-(-weights // 2), scales, 4 * outer, CODE_BYTES, OFFSET_BYTES)))


def _sixteen_bit_bytes(layer: Module) -> int:
    return sum(_allocated(2 * each.numel()) for each in _unquantized(layer)) + _buffer_bytes(layer)


def _buffer_bytes(module: Module) -> int:
    return sum(_allocated(each.nbytes) for each in module.buffers())


def _outside_bytes(base: Any, layers: Sequence[Module]) -> int:
    """What is neither in a layer, nor embeddings or head, nor on the host."""
    known = {id(each) for layer in layers for each in layer.parameters()}
    tables = base.get_input_embeddings(), base.get_output_embeddings(), layer_inputs_table(base)
    known |= {id(table.weight) for table in tables if table is not None}
    others = sum(_allocated(2 * each.numel()) for each in _unquantized(base) if id(each) not in known)
    others += _buffer_bytes(base) - sum(map(_buffer_bytes, layers))
    return others + _weight_bytes(base) - sum(map(_weight_bytes, layers))


def _unquantized(module: Module) -> list[Any]:
    return [each for each in module.parameters() if not isinstance(each, bnb.nn.Params4bit)]


def _allocated(size_bytes: int) -> int:
    return -(-size_bytes // ALLOCATION_BYTES) * ALLOCATION_BYTES


# --- steps


Bytes = NDArray[np.float64]
"""Coefficients [3] of 1, t and t squared; or [1], a number of them."""


class _Run:
    """A step over a decoder of chosen layers; the bytes of its allocations, as an array for each.

    What layers keep is counted by itself, and so are the gradients of their adapters: what is there besides, whoever
    made it, is among the bytes of each moment.
    """

    def __init__(
        self,
        events: Sequence[Event],
        sizes: Mapping[int, Bytes],
        stream: Bytes,
        gradient_bytes: Sequence[int],
        like_last: int,
    ) -> None:
        """`gradient_bytes` are those of each layer; `like_last` is a layer in the middle, of the last one's kind."""
        self._events = events
        self._names = [event.name if event.kind == "mark" else "" for event in events]
        self._sizes = sizes
        self._stream = stream
        self._gradient_bytes = gradient_bytes
        self._last = len(gradient_bytes) - 1
        self._like_last = like_last
        self._alive = self._after_events()
        self._let_go = self._dropped_at_the_end()

    def layer(self, index: int) -> dict[str, list[Bytes]]:
        """The moments of a layer that is neither the first nor the last, by their field of `LayerInstants`."""
        below = self._kept_below(index)
        forward = self._segment(f"forward {index}", f"forward {index + 1}", below)
        less = below + self._behind(index) - self._sum(self._let_go)
        backward = self._segment(f"backward {index}", f"backward {index - 1}", less)
        return {
            "kept": [self._kept(index)],
            "operations": [self._operations(index)],
            "forward": [each for at_work, each in forward if at_work != EXPERTS_FORWARD],
            "backward": [each for at_work, each in backward if not at_work],
            "attention": [each for at_work, each in backward if at_work == ATTENTION],
            "experts": [each for at_work, each in forward if at_work == EXPERTS_FORWARD],
            "experts_again": [each for at_work, each in backward if at_work == EXPERTS_FORWARD],
            "experts_backward": [each for at_work, each in backward if at_work == EXPERTS_BACKWARD],
        }

    def heads(self, index: int) -> Heads | None:
        """What a layer attends with, where it is not transformers that computes it."""
        backward = self._events[self._place(f"backward {index}") : self._place(f"backward {index - 1}")]
        return next((event.heads for event in backward if event.kind == ATTENTION), None)

    def walked(self, sizes: Sizes) -> WalkedStep:
        """The step in its order."""
        return WalkedStep(self._events, _in_tokens_of(self._sizes), sizes, self._parts(), _in_tokens(self._stream))

    def _parts(self) -> list[Part]:
        """What is before the layers, each of them, and what is behind."""
        layers, end, loss = range(len(self._gradient_bytes)), self._place("end"), self._place("loss")
        forward = [*(self._place(f"forward {index}") for index in layers), end, loss]
        backward = [len(self._events), *(self._place(f"backward {index}") for index in layers), loss]
        begin = Part(forward=range(forward[0]), backward=range(end, loss))
        passes = zip(pairwise(forward), pairwise(backward), strict=True)
        return [begin, *(Part(forward=range(*to), backward=range(*reversed(back))) for to, back in passes)]

    def ends(self) -> dict[str, list[Bytes]]:
        """Of the first layer, of what is around the layers, and from the end of the last one's forward pass to the
        beginning of its backward pass: the moments by their field of `EndInstants`."""
        everything = self._kept_below(self._last) + self._kept(self._like_last) - self._sum(self._let_go)
        left = self._at("passed") - self._kept_below(self._last) - self._kept(self._like_last)
        loss = self._at("loss") - everything
        norm = self._segment("loss", f"backward {self._last}", everything)
        first = self._place("backward 0")
        embeddings = [each for each in self._let_go if np.array_equal(self._sizes[each.number], self._stream)]
        return {
            "first_kept": [self._kept(0)],
            "released": [self._stream] if embeddings else [],
            "shared": [self._at("forward 0") - self._stream],
            "outside": [*self._alive[: self._place("forward 0")], *(e - self._behind(0) for e in self._alive[first:])],
            "left": [left],
            "loss": [loss],
            "norm": [each for _, each in norm],
        }

    def _operations(self, index: int) -> Bytes:
        """Operations of a layer's two passes, which the host starts one by one."""
        counts = [
            self._events[self._place(mark)].number
            for mark in (f"forward {index}", f"forward {index + 1}", f"backward {index}", f"backward {index - 1}")
        ]
        found = np.zeros_like(self._stream)
        found[0] = counts[1] - counts[0] + counts[3] - counts[2]
        return found

    def _after_events(self) -> list[Bytes]:
        """What is alive after each event of the step, weights and adapters not counted."""
        live, found = np.zeros_like(self._stream), list[Bytes]()
        for event in self._events:
            if event.kind in ("take", "drop"):
                live = live + (1 if event.kind == "take" else -1) * self._sizes[event.number]
            found.append(live)
        return found

    def _at(self, mark: str) -> Bytes:
        return self._alive[self._place(mark)]

    def _kept(self, index: int) -> Bytes:
        """What a layer that is not the last leaves for its backward pass, with its input if it does, not its output."""
        return self._at(f"forward {index + 1}") - self._at(f"forward {index}")

    def _kept_below(self, index: int) -> Bytes:
        return self._at(f"forward {index}") - self._at("forward 0")

    def _behind(self, index: int) -> Bytes:
        """The gradients of the adapters of the layers behind one."""
        found = np.zeros_like(self._stream)
        found[0] = sum(self._gradient_bytes[index + 1 :])
        return found

    def _dropped_at_the_end(self) -> list[Event]:
        """What was there before the first layer and goes when the decoder ends, since nothing needs it any more: the
        embeddings, rotary tables. Layers that recompute would hold on to it, so it counts as if it stayed."""
        made = {event.number for event in self._events[: self._place("forward 0")] if event.kind == "take"}
        between = self._events[self._place("end") : self._place("loss")]
        return [event for event in between if event.kind == "drop" and event.number in made]

    def _sum(self, events: Iterable[Event]) -> Bytes:
        return sum((self._sizes[event.number] for event in events), np.zeros_like(self._stream))

    def _place(self, mark: str) -> int:
        if mark not in self._names:
            raise Untraceable(f"its step has no {mark}")
        return self._names.index(mark)

    def _segment(self, first: str, last: str, less: Bytes) -> list[tuple[str, Bytes]]:
        """What is alive after each event between two marks, less so much, and what of its own bytes is at work."""
        begin, end = self._place(first), self._place(last) + 1
        moments = [("", self._alive[begin] - less)]
        for place, event in enumerate(self._events[begin:end], start=begin):
            if event.kind in ("take", "drop"):
                moments.append(("", self._alive[place] - less))
            elif event.kind != "mark":
                moments.append((event.kind, self._alive[place] - less + self._outputs(place)))
        return moments

    def _outputs(self, place: int) -> Bytes:
        """What experts that begin their work have made by then: the tensors that they give."""
        count = OUTPUTS.get(self._events[place].kind, 0)
        return self._sum(self._events[place + 1 : place + 1 + count])


class _Step:
    """The same step with several numbers of tokens: its bytes as polynomials of them."""

    def __init__(
        self,
        base: Any,
        chosen: Sequence[int],
        adapter: AdapterSpec,
        lengths: Lengths,
        *,
        recomputes: bool,
        like_last: int,
    ) -> None:
        self._lengths = lengths
        hidden: int = base.config.get_text_config().hidden_size
        copies = [_cut(base, chosen) for _ in lengths]
        steps = [
            run_step(copy, adapter, tokens=tokens, recomputes=recomputes)
            for copy, tokens in zip(copies, lengths, strict=True)
        ]
        layers = list(decoder_layers(decoder_of(copies[0])))
        adapted = [[each for each in layer.parameters() if each.requires_grad] for layer in layers]
        self.adapter_parameters = [sum(each.numel() for each in parameters) for parameters in adapted]
        self.gradient_bytes = [sum(_allocated(2 * each.numel()) for each in parameters) for parameters in adapted]
        in_layers = {id(each) for parameters in adapted for each in parameters}
        others = [each for each in copies[0].parameters() if each.requires_grad and id(each) not in in_layers]
        self.other_adapter_parameters = sum(each.numel() for each in others)
        self.other_gradient_bytes = sum(_allocated(2 * each.numel()) for each in others)
        self._tiles = [_expert_tiles(layer) for layer in layers]
        self.experts = [
            _expert_instants(layer, tiles, lengths[0]) for layer, tiles in zip(layers, self._tiles, strict=True)
        ]
        self._alike = _alike(steps)
        if self._alike:
            stream = np.array([0.0, 2.0 * hidden, 0.0])
            runs = [(steps[0], _polynomials(steps, lengths), stream)]
        else:
            streams = [np.array([2.0 * hidden * tokens]) for tokens in lengths]
            runs = [(step, _bytes(step), each) for step, each in zip(steps, streams, strict=True)]
        self._runs = [_Run(*run, self.gradient_bytes, like_last) for run in runs]

    def instants(self, index: int) -> LayerInstants:
        """Those of a layer that is neither the first nor the last."""
        found = self._joined([run.layer(index) for run in self._runs])
        return LayerInstants.model_validate({**found, "kept": found["kept"][0], "operations": found["operations"][0]})

    def heads(self, index: int) -> Heads | None:
        """What such a layer attends with; None where transformers computes it."""
        return self._runs[0].heads(index)

    def walked(self, sizes: Sizes) -> WalkedStep | None:
        """The step in its order; None where it is another one for other numbers of tokens."""
        return self._runs[0].walked(sizes) if self._alike else None

    def tile_walk(self, index: int, sizes: Sizes) -> TileWalk | None:
        """Of a layer's routed experts, where it has any."""
        tiles = self._tiles[index]
        if not tiles:
            return None
        forward, backward = (
            tile_codes(runs[0], _in_tokens_of(_polynomials(runs, TOKENS)), sizes) for runs in zip(*tiles, strict=True)
        )
        return TileWalk(forward=forward, backward=backward)

    @property
    def ends(self) -> EndInstants:
        """The first layer's, and what is between the passes."""
        found = self._joined([run.ends() for run in self._runs])
        alone = {
            name: next(iter(found.get(name, ())), ()) for name in ("first_kept", "released", "shared", "left", "loss")
        }
        return EndInstants.model_validate({**found, **alone})

    def _joined(self, found: Sequence[Mapping[str, Sequence[Bytes]]]) -> dict[str, tuple[InTokens, ...]]:
        """The moments that can be the largest ones, by field."""
        if len(found) == 1:
            return {name: _largest(moments) for name, moments in found[0].items()}
        return {
            name: (_in_tokens(_solved([max(float(each[0]) for each in run[name]) for run in found], self._lengths)),)
            for name in found[0]
            if all(run[name] for run in found)
        }


def _alike(steps: Sequence[Sequence[Event]]) -> bool:
    """Whether the same is computed whatever the number of tokens."""
    first, *others = ([event.kind for event in step] for step in steps)
    return all(other == first for other in others)


Tile = tuple[list[Event], list[Event]]
"""What both passes of experts do."""


def _experts(layer: Module) -> TracedExperts | None:
    """The routed experts of a layer that was traced."""
    experts = next((module for module in layer.modules() if isinstance(module, TracedExperts)), None)
    return None if experts is None or experts.row is None else experts


def _expert_tiles(layer: Module) -> list[Tile]:
    """The experts of a layer at work, over tiles of so many rows as steps have tokens; none where it has none."""
    experts = _experts(layer)
    return [] if experts is None else [run_experts(experts, rows=rows) for rows in TOKENS]


def _expert_instants(layer: Module, tiles: Sequence[Tile], tokens: int) -> ExpertInstants | None:
    """What the experts of a layer that was traced with so many tokens take by the way."""
    experts = _experts(layer)
    if experts is None or experts.row is None:
        return None
    forward, backward = (_largest(_alive([tile[number] for tile in tiles])) for number in range(2))
    return ExpertInstants(rows_per_token=experts.row[0] // tokens, forward=forward, backward=backward)


def _alive(runs: Sequence[list[Event]]) -> list[Bytes]:
    """What is alive after each event."""
    sizes, live, moments = _polynomials(runs, TOKENS), np.zeros(3), [np.zeros(3)]
    for event in runs[0]:
        live = live + (1 if event.kind == "take" else -1) * sizes[event.number]
        moments.append(live)
    return moments


def _cut(base: Any, chosen: Sequence[int]) -> Any:
    """A copy of the model with a few of its layers, in the order given."""
    layers = decoder_layers(decoder_of(base))
    parent, name = next(
        (module, name) for module in base.modules() for name, each in module.named_children() if each is layers
    )
    try:
        setattr(parent, name, ModuleList(deepcopy(layers[index]) for index in chosen))
        copy = deepcopy(base)
    finally:
        setattr(parent, name, layers)
    config: Any = copy.config.get_text_config()
    for field, each in config.to_dict().items():
        if isinstance(each, list) and len(each) == len(layers):
            setattr(config, field, [each[index] for index in chosen])
    if layer_inputs_table(base) is None:
        config.num_hidden_layers = len(chosen)
    elif len(chosen) > len(layers):  # every token has inputs for all layers, and as many are asked for
        raise Untraceable(f"of its {len(layers)} layers {len(chosen)} would have to be traced")
    return copy


# --- polynomials


def _polynomials(steps: Sequence[Sequence[Event]], lengths: Lengths) -> dict[int, Bytes]:
    """Of each allocation, by its number in the first step; all steps do the same."""
    return {
        events[0].number: _solved([event.size for event in events], lengths)
        for events in zip(*steps, strict=True)
        if events[0].kind == "take"
    }


def _bytes(step: Sequence[Event]) -> dict[int, Bytes]:
    return {event.number: np.array([float(event.size)]) for event in step if event.kind == "take"}


def _solved(values: Sequence[float], lengths: Lengths) -> Bytes:
    """The polynomial that has these values for so many tokens."""
    powers = np.vander(np.array(lengths, dtype=np.float64), 3, increasing=True)
    return np.linalg.solve(powers, np.array(values, dtype=np.float64)).round(6).astype(np.float64)


def _largest(moments: Iterable[Bytes]) -> tuple[InTokens, ...]:
    """Those that are the largest for some number of tokens."""
    each = np.unique(np.array(list(moments) or np.empty((0, 3))), axis=0)
    if not len(each):
        return ()
    tokens = np.unique(np.geomspace(16, MOST_TOKENS, 400).round())
    first = np.argmax(each @ np.vander(tokens, 3, increasing=True).T, axis=0)
    chosen = sorted(set(first.tolist()))
    if len(chosen) > MOST_INSTANTS:
        raise Untraceable(f"{len(chosen)} moments of a layer can be its peak, more than {MOST_INSTANTS}")
    return tuple(_in_tokens(each[index]) for index in chosen)


def _in_tokens_of(sizes: Mapping[int, Bytes]) -> dict[int, InTokens]:
    return {number: _in_tokens(size) for number, size in sizes.items()}


def _in_tokens(polynomial: Bytes) -> InTokens:
    values = [round(float(each), 3) for each in polynomial]
    while values and values[-1] == 0:
        values.pop()
    return tuple(values)
