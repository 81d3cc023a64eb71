"""This trainer, the Hugging Face recipe, unsloth and LLaMA-Factory in turn, on one card and the same random weights.

    python -m benchmarks.peers --shape 8b --cases 2048x4 512x1 [--recipe-cases 2048x4 512x1]
        [--unsloth-cases 2048x4 2048x8 2048x4/0] [--unsloth-path FOLDER] [--llamafactory-cases 2048x4]
        [--llamafactory-path FOLDER] [--cap-gib 21.5] [--save peers_8b]
    python -m benchmarks.peers --objective dpo --shape 8b --cap-gib 21.5 --cases 4096x2+chosen 4096x2+chosen+remembered
        --trl-cases 4096x2 4096x2+remembered [--trl-path FOLDER] --unsloth-cases 4096x2 [--unsloth-path FOLDER]

Each has cases of its own (`benchmarks.cases`), since each may have another best plan: the trainer says in a case what
recomputes and what is offloaded; of the others all layers recompute, as their documentation has it, unless a case ends
in `/0`. Everybody has rank 16 on all linear layers, no dropout, paged 8-bit AdamW, gradients clipped at 0.3, the same
rows and the same cap on torch's allocator. Results come with the best figures for each sequence length.

One process measures the trainer, writes its quantized base as a checkpoint if others are asked for, and measures the
recipe on that base. unsloth and LLaMA-Factory have each a process and the card to themselves, and load the checkpoint.
A case that fails is told and the others go on; so do the other processes where one fails. Neither is installed here:
have `unsloth==2026.10.9`, `unsloth_zoo==2026.10.9` and what they need, or `llamafactory==0.9.5`, `trl==0.24.0` and what
they need, on PYTHONPATH or in folders of their own that the options name. `--unsloth-layers N` writes N layers of the
checkpoint, copied on the card until there are as many as the shape has.

With `--objective dpo` steps are of preferences (`benchmarks.pairs`), by the trainer, by TRL with PEFT, and by TRL with
unsloth, all of whom begin with one adapter: losses and margins of the first steps are told, and how far they agree.
A step asks the reference, unless its case says `remembered`.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.report import argument_parser, emit, installed
from benchmarks.shapes import layers_of

if TYPE_CHECKING:
    from benchmarks.speed import Bench

CHECKPOINT = "checkpoint"
PACKAGES = {
    "trl": ("trl", "peft", "datasets", "triton"),
    "unsloth": ("unsloth", "unsloth_zoo", "trl", "triton"),
    "llamafactory": ("llamafactory", "trl", "liger-kernel", "datasets"),
}
LAST_LINES = 12


def main() -> None:
    """Measure, or be one of the measured processes."""
    parser = argument_parser(__doc__)
    parser.add_argument("--objective", choices=("sft", "dpo"), default="sft")
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--cases", nargs="*", default=["2048x4"], help="the trainer's")
    parser.add_argument("--recipe-cases", nargs="*", help="default: the trainer's, without its plans")
    parser.add_argument("--trl-cases", nargs="*", default=[], help="of preferences")
    parser.add_argument("--trl-path", metavar="FOLDER", help="of packages for TRL's process alone")
    parser.add_argument("--unsloth-cases", nargs="*", default=[])
    parser.add_argument("--unsloth-path", metavar="FOLDER", help="of packages for unsloth's process alone")
    parser.add_argument("--unsloth-layers", type=int, metavar="N", help="written and loaded; default: all")
    parser.add_argument("--llamafactory-cases", nargs="*", default=[])
    parser.add_argument("--llamafactory-path", metavar="FOLDER", help="of packages for LLaMA-Factory's process alone")
    parser.add_argument("--cap-gib", type=float, default=0.0, help="cap on the allocator; 0 is none")
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--process-seconds", type=float, default=3600, help="the most that a process may take")
    parser.add_argument("--part", choices=PARTS, help="for the benchmark's own processes")
    parser.add_argument("--folder", type=Path, help="for the benchmark's own processes")
    arguments = parser.parse_args()
    if arguments.unsloth_layers and arguments.llamafactory_cases:
        parser.error("LLaMA-Factory loads whole checkpoints: leave --unsloth-layers out")
    preferences = arguments.objective == "dpo"
    if preferences and (arguments.recipe_cases or arguments.llamafactory_cases):
        parser.error("preferences are measured of the trainer, TRL and unsloth: leave out the others' cases")
    if not preferences and arguments.trl_cases:
        parser.error("TRL is measured on preferences: add --objective dpo")
    if preferences:
        arguments.recipe_cases = []
    elif arguments.recipe_cases is None:
        arguments.recipe_cases = list(dict.fromkeys(size_of(text) for text in arguments.cases))
    if arguments.part:
        take_part(arguments)
    else:
        emit(measure(arguments), save=arguments.save)


def measure(arguments: Namespace) -> dict[str, object]:
    """Everybody's figures, and who is how fast at which length."""
    with tempfile.TemporaryDirectory() as name:
        found = run("trainer", Path(name), arguments)
        for part in PACKAGES:
            if cases_of(part, arguments):
                found |= run(part, Path(name), arguments)
    add_mfu(found, found.pop("operations", {}))
    return {
        "objective": arguments.objective,
        "shape": arguments.shape,
        "rank": 16,
        "cap_gib": arguments.cap_gib,
        "steps": arguments.steps,
        "repetitions": arguments.repetitions,
        "checkpoint": found.pop("checkpoint", None),
        "stacks": found,
        "by_tokens": best_by_length(found),
        **({"agreement": agreement(found)} if arguments.objective == "dpo" else {}),
    }


# --- processes


def run(part: str, folder: Path, arguments: Namespace) -> dict[str, Any]:
    """What one of our processes finds, however it ends; what it prints goes to our stderr."""
    command = [sys.executable, "-m", "benchmarks.peers", *sys.argv[1:], "--part", part, "--folder", str(folder)]
    environment = {**os.environ, "BENCHMARK_STARTED": repr(time.time())}
    environment["UNSLOTH_COMPILE_LOCATION"] = str(folder / "compiled")
    if path := getattr(arguments, f"{part}_path", None):
        environment["PYTHONPATH"] = os.pathsep.join([path, *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        done = subprocess.run(
            command, env=environment, check=False, stdout=sys.stderr, timeout=arguments.process_seconds
        )
        ended = f"with exit status {done.returncode}"
    except subprocess.TimeoutExpired:
        ended = f"after {arguments.process_seconds:.0f} s, which is all it may take"
    findings = Findings(folder, part)
    if not findings.complete:
        findings.found.setdefault(part, {}).setdefault("error", f"the process ended {ended}")
    findings.found.pop("complete", None)
    return findings.found


class Findings:
    """What a process has found so far, in a file that is read when it has ended."""

    def __init__(self, folder: Path, part: str) -> None:
        self._path = folder / f"{part}.json"
        self.found: dict[str, Any] = json.loads(self._path.read_text()) if self._path.exists() else {}

    @property
    def complete(self) -> bool:
        """Whether the process came to its end."""
        return bool(self.found.get("complete"))

    def note(self, name: str, /, **figures: object) -> None:
        """Add figures about somebody."""
        self.found.setdefault(name, {}).update(figures)
        self._tell({name: figures})

    def note_case(self, name: str, text: str, figures: dict[str, Any]) -> None:
        """Add the figures of somebody's case."""
        self.found.setdefault(name, {}).setdefault("cases", {})[text] = figures
        self._tell({name: {text: figures}})

    def finish(self) -> None:
        """The process has come to its end."""
        self.found["complete"] = True
        self._write()

    def _tell(self, news: dict[str, Any]) -> None:
        print(json.dumps(news), file=sys.stderr, flush=True)
        self._write()

    def _write(self) -> None:
        unfinished = self._path.with_suffix(".part")
        unfinished.write_text(json.dumps(self.found))
        unfinished.replace(self._path)


def take_part(arguments: Namespace) -> None:
    """Be the process that measures somebody; an error is a finding too."""
    findings = Findings(arguments.folder, arguments.part)
    try:
        PARTS[arguments.part](arguments, findings)
    except Exception as error:
        findings.note(arguments.part, error="".join(traceback.format_exception_only(error)).splitlines()[-LAST_LINES:])
        raise
    findings.finish()


def measure_trainer_and_recipe(arguments: Namespace, findings: Findings) -> None:
    """Both on the same base; between them it is written for others, because the recipe changes what is in 16 bits."""
    from benchmarks.speed import Bench  # isort: skip - sets torch up, before anything else loads it
    from benchmarks import nf4_checkpoint
    from benchmarks.cases import attempt
    from benchmarks.recipe import Recipe

    settings = Namespace(**vars(arguments), nondeterministic=False, rank=16, dropout="0", profile=False)
    bench = Bench(settings)
    others = [text for part in PACKAGES for text in cases_of(part, arguments)]
    measure = measure_preferences if arguments.objective == "dpo" else measure_trainer
    measure(bench, settings, findings, {size_of(text) for text in [*arguments.cases, *arguments.recipe_cases, *others]})
    base = bench.leave()
    if others:
        began = time.perf_counter()
        layers = arguments.unsloth_layers or layers_of(arguments.shape)
        written = attempt(lambda: {"gib": nf4_checkpoint.write(base, arguments.folder / CHECKPOINT, layers=layers)})
        findings.note("checkpoint", **written, seconds_to_write=round(time.perf_counter() - began, 1))
    recipe = cache(lambda: Recipe(base))  # whose preparation may be what fails
    for text in arguments.recipe_cases:
        findings.note_case("recipe", text, attempt(lambda text=text: recipe().measure(text, arguments)))


def measure_trainer(bench: Bench, settings: Namespace, findings: Findings, everybody: set[str]) -> None:
    """The trainer's cases, and how much there is to compute in everybody's."""
    from benchmarks.cases import Case, attempt

    findings.note("operations", **{text: bench.operations(Case.parse(text)) for text in sorted(everybody)})
    for text in settings.cases:
        findings.note_case("trainer", text, attempt(lambda text=text: bench.measure(Case.parse(text), settings)))


def measure_preferences(bench: Bench, settings: Namespace, findings: Findings, _everybody: set[str]) -> None:
    """The trainer's cases on preferences; its adapter as it is at first is left for the others."""
    from safetensors.torch import save_file

    from benchmarks import preferences
    from benchmarks.cases import attempt
    from benchmarks.pairs import ADAPTER_FILE

    save_file(bench.first_adapter, settings.folder / ADAPTER_FILE)
    for text in settings.cases:
        findings.note_case("trainer", text, attempt(lambda text=text: preferences.measure(bench, text, settings)))


def measure_trl(arguments: Namespace, findings: Findings) -> None:
    """Measure TRL with PEFT on the checkpoint that the first process has left."""
    from benchmarks.trl_peer import Preferences, load_nf4  # isort: skip - sets torch up, as for the trainer
    from benchmarks.cases import attempt, cap_memory

    cap_memory(arguments.cap_gib)
    peer = Preferences(arguments.folder / CHECKPOINT, arguments.folder, load_nf4)
    findings.note("trl", **start_of("trl"))
    for text in arguments.trl_cases:
        findings.note_case("trl", text, attempt(lambda text=text: peer.measure(text, arguments)))


def measure_unsloth(arguments: Namespace, findings: Findings) -> None:
    """Measure unsloth on the checkpoint that the first process has left."""
    from benchmarks import unsloth_peer  # isort: skip - before anything else that knows torch
    from benchmarks.cases import attempt, cap_memory

    cap_memory(arguments.cap_gib)
    layers = layers_of(arguments.shape)
    longest = max(sequence_of(text) for text in arguments.unsloth_cases)
    if arguments.objective == "dpo":
        from benchmarks.trl_peer import Preferences

        def load(folder: Path) -> tuple[Any, None]:
            return unsloth_peer.load(folder, layers=layers, longest=longest // 2), None

        peer = Preferences(arguments.folder / CHECKPOINT, arguments.folder, load)
    else:
        peer = unsloth_peer.Unsloth(arguments.folder / CHECKPOINT, layers=layers, longest=longest)
    findings.note("unsloth", **start_of("unsloth"), layers_loaded=arguments.unsloth_layers or layers)
    for text in arguments.unsloth_cases:
        findings.note_case("unsloth", text, attempt(lambda text=text: peer.measure(text, arguments)))


def measure_llamafactory(arguments: Namespace, findings: Findings) -> None:
    """Measure LLaMA-Factory on the same checkpoint, loaded anew for each case: its start is told as the imports."""
    from benchmarks.llamafactory_peer import LlamaFactory  # isort: skip - sets torch up, as for the trainer
    from benchmarks.cases import attempt

    peer = LlamaFactory(arguments.folder / CHECKPOINT, arguments.folder, cap_gib=arguments.cap_gib)
    findings.note("llamafactory", **start_of("llamafactory"))
    for text in arguments.llamafactory_cases:
        findings.note_case("llamafactory", text, attempt(lambda text=text: peer.measure(text, arguments)))


PARTS = {
    "trainer": measure_trainer_and_recipe,
    "trl": measure_trl,
    "unsloth": measure_unsloth,
    "llamafactory": measure_llamafactory,
}


def start_of(part: str) -> dict[str, Any]:
    """What was started, and how long it took until the first case."""
    return {
        "versions": {name: installed(name) for name in PACKAGES[part]},
        "seconds_to_start": round(time.time() - float(os.environ["BENCHMARK_STARTED"]), 1),
    }


def cases_of(part: str, arguments: Namespace) -> list[str]:
    """What somebody who is not installed here is to be measured on."""
    return getattr(arguments, f"{part}_cases")


# --- figures


def add_mfu(stacks: dict[str, Any], operations: dict[str, float]) -> None:
    """Add MFU as the trainer counts it: what a step must compute depends on shape and case alone."""
    from qlora_trainer.training.telemetry import Card
    from torch import cuda, device

    if not cuda.is_available():
        return
    card = Card(device("cuda", 0), 0.0)
    cases = [case for stack in stacks.values() for case in stack.get("cases", {}).items()]
    for text, figures in cases:
        seconds = figures.get("step_seconds")
        if not seconds or size_of(text) not in operations:
            continue
        utilization = card.utilization(operations[size_of(text)], seconds)
        figures.update(utilization.rounded() if utilization is not None else {})


def best_by_length(stacks: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Everybody's fastest case by a sequence's tokens, and how many times as fast the trainer is.

    Where the reference's answers are remembered, a step does less: those cases are apart.
    """
    lengths: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, stack in stacks.items():
        for text, figures in stack.get("cases", {}).items():
            speed = figures.get("tokens_per_second", 0.0)
            best = lengths[length_of(text)]
            if speed > best.get(name, {"tokens_per_second": 0.0})["tokens_per_second"]:
                best[name] = {"case": text, "tokens_per_second": speed}
    for best in lengths.values():
        ours = best.get("trainer", {}).get("tokens_per_second", 0.0)
        others = {name: found["tokens_per_second"] for name, found in best.items() if name != "trainer"}
        if ours:
            best["times_as_fast_as"] = {name: round(ours / theirs, 3) for name, theirs in others.items()}
    return {name: lengths[name] for name in sorted(lengths, key=lambda name: (sequence_of(name), name))}


def agreement(stacks: dict[str, Any]) -> dict[str, Any]:
    """By size of micro-batch and who: the first loss less log 2, and by how much losses and margins of the first steps
    differ from the trainer's at most, beside its last margin."""
    found: dict[str, Any] = defaultdict(dict)
    cases = [(name, text, each) for name, stack in stacks.items() for text, each in stack.get("cases", {}).items()]
    first = {size_of(text): each for name, text, each in reversed(cases) if name == "trainer" and "losses" in each}
    for name, text, figures in cases:
        ours = first.get(size_of(text))
        if ours is None or "losses" not in figures:
            continue
        differences = {
            f"{what}_differ_by": round(max(abs(a - b) for a, b in zip(figures[what], ours[what], strict=False)), 5)
            for what in ("losses", "margins")
        }
        found[size_of(text)][f"{name} {text}"] = {
            "first_loss_less_log_2": round(figures["losses"][0] - math.log(2), 6),
            **differences,
            "last_margin": round(figures["margins"][-1], 5),
        }
    return found


def length_of(text: str) -> str:
    """Tokens of one sequence of a case, and whether the reference's answers are remembered in it."""
    return f"{sequence_of(text)}{'+remembered' if 'remembered' in text.split('+') else ''}"


def size_of(text: str) -> str:
    """A case without its plan."""
    return text.partition("+")[0].partition("/")[0]


def sequence_of(text: str) -> int:
    """Tokens of one sequence of a case."""
    return int(text.partition("x")[0].partition("+")[0])


if __name__ == "__main__":
    main()
