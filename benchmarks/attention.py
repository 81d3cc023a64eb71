"""The trainer's own attention kernels and flash-attn-4 on one card: who is how fast at which shape, and do they agree?

    python -m benchmarks.attention [--save attention]

Milliseconds are of CUDA graphs, so launches do not count. A few layers are then trained with either, with and without
keeping what attention gave: gradients may differ by rounding alone, and what must have the same bits must have them.
Exit 1 otherwise. flash-attn-4 and what it needs must be on PYTHONPATH.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from benchmarks.report import argument_parser, emit

from benchmarks import kernels  # isort: skip - sets torch's environment up, before anything else loads it
import torch
from qlora_trainer.kernels import ops
from qlora_trainer.kernels.flash_attention import FlashAttention, Row
from qlora_trainer.kernels.packed_attention import PackedAttention
from qlora_trainer.model.adapter import add_adapter
from qlora_trainer.model.loading import load_base
from qlora_trainer.training import runtime
from torch import Tensor

from benchmarks.shapes import write_model
from orchestrator.api.job import AdapterSpec

HEADS = ((32, 8, 128), (40, 40, 128), (14, 2, 64), (32, 8, 64))
"""Heads, those of keys, and their size."""
RECORDS = (
    *((length,) for length in (1024, 2048, 4096, 8192, 16384, 32768)),
    *((length,) * (8192 // length) for length in (512, 1024, 2048, 4096)),
    (700, 300, 24, 7168),
)
WINDOWS = (512, 4096)
"""How far tokens see, of a record of 8192 with the first heads."""
TOLERANCE = 0.005
LAYER_TOLERANCE = 0.03
REPETITIONS = 5


def main() -> None:
    """Compare, print, judge."""
    arguments = argument_parser(__doc__).parse_args()
    device = runtime.set_up(threads=1, deterministic=True)
    flash = FlashAttention()
    shapes = [(*heads, lengths, None) for heads in HEADS for lengths in RECORDS]
    shapes += [(*HEADS[0], (8192,), window) for window in WINDOWS]
    compared = [compare(flash, device, *shape) for shape in shapes]
    layers = compare_layers(device)
    agree = (
        all(each["same_bits"] and max(each["differences"].values()) <= TOLERANCE for each in compared)
        and layers["largest_gradient_difference"] <= LAYER_TOLERANCE
        and all(layers["same_bits"].values())
    )
    emit({"agree": agree, "shapes": compared, "layers": layers}, save=arguments.save)
    sys.exit(0 if agree else 1)


def compare(
    flash: FlashAttention,
    device: torch.device,
    heads: int,
    keys: int,
    size: int,
    lengths: Sequence[int],
    window: int | None,
) -> dict[str, Any]:
    """Both passes over a row of records."""
    tokens, scaling = sum(lengths), size**-0.5
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    attention = PackedAttention()
    attention.expect(kernels.records(lengths), starts)
    spans, row = attention.spans(window), Row(starts=starts, longest=max(lengths), window=window)
    inputs, grad = kernels.draw_heads(device, tokens, heads, keys, size)

    def new() -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = torch.empty(tokens, heads + 2 * keys, size, dtype=grad.dtype, device=device).split(
            (heads, keys, keys), dim=1
        )
        return query, key, value

    ours, theirs, again = new(), new(), new()
    output, logsumexp = ops.attention(*inputs, spans, scaling)
    flash_output, flash_logsumexp = flash.forward(*inputs, row, scaling)
    passes: dict[str, Callable[[], object]] = {
        "own forward": lambda: ops.attention(*inputs, spans, scaling),
        "own backward": lambda: ops.attention_backward(grad, inputs, output, logsumexp, spans, scaling, ours),
        "flash forward": lambda: flash.forward(*inputs, row, scaling),
        "flash backward": lambda: flash.backward(grad, inputs, flash_output, flash_logsumexp, row, scaling, theirs),
    }
    milliseconds = {name: graph_milliseconds(run) for name, run in passes.items()}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    flash.backward(grad, inputs, flash_output, flash_logsumexp, row, scaling, again)
    torch.cuda.synchronize()
    workspace = torch.cuda.max_memory_allocated() - before
    print(heads, keys, size, lengths, window, milliseconds, file=sys.stderr, flush=True)
    names = ("output", "query gradient", "key gradient", "value gradient")
    pairs = zip(names, (flash_output, *theirs), (output, *ours), strict=True)
    return {
        "heads": heads,
        "keys": keys,
        "size": size,
        "records": list(lengths),
        "window": window,
        "milliseconds": milliseconds,
        "flash_backward_bytes": workspace,
        "differences": {name: round(kernels.difference(one, other), 5) for name, one, other in pairs},
        "same_bits": all(map(torch.equal, theirs, again))
        and torch.equal(flash.forward(*inputs, row, scaling)[0], flash_output),
    }


def graph_milliseconds(run: Callable[[], object]) -> float:
    """Of one run on the card, the best of a few."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    best = float("inf")
    for _ in range(REPETITIONS):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize()
        best = min(best, began.elapsed_time(ended))
    return round(best, 3)


def compare_layers(device: torch.device) -> dict[str, Any]:
    """Gradients of a few layers with dropout: by flash-attn-4 against our own, and what must not change a bit."""
    attention = PackedAttention()
    with tempfile.TemporaryDirectory() as folder:
        base = load_base(write_model(Path(folder), "small"), device, attention)
    model = kernels.woken(add_adapter(base, AdapterSpec(rank=16, alpha=32, dropout="0"), seed=0))
    kernels.drop(model)
    short, long = kernels.records((1500, 2500)), kernels.records(kernels.LONG)

    def gradients(batch: Any = long, **plan: Any) -> Any:
        trained = kernels.training_model(model, attention, kernels.ALL_LAYERS, **plan)
        assert (attention.flash is not None) == (plan.get("attention") == "flash-attn-4"), "the plan's kernels"
        return kernels.loss_and_gradients(trained, batch)

    by_flash = {"attention": "flash-attn-4"}
    own, theirs = gradients(), gradients(**by_flash)
    kept = {**by_flash, "keep_attention": True}
    graph = kernels.graph_bits(model, attention, short, **by_flash)
    return {
        "largest_gradient_difference": round(max(map(kernels.difference, theirs[1], own[1])), 5),
        "same_bits": {
            "flash twice": kernels.same(theirs, gradients(**by_flash)),
            "own, attention kept": kernels.same(own, gradients(keep_attention=True)),
            "flash, attention kept": kernels.same(theirs, gradients(**kept)),
            "flash, attention kept, activations offloaded": kernels.same(
                theirs, gradients(**kept, offload=("activations",))
            ),
            **{f"flash, {name}": equal for name, equal in graph.items()},
        },
    }


if __name__ == "__main__":
    main()
