"""Whether what a job has published answers held-out prompts as its adapter does.

    python -m benchmarks.formats --model FOLDER --job FOLDER [--prompts 20] [--tokens 16] [--save formats]

`--job` is the job's folder in its store, with adapter/ and formats/; `--model` is the base. PEFT's greedy answers, with
the adapter beside the base's 16-bit weights, are what the others are held against: the merged model in transformers, in
float32, and each GGUF file in llama.cpp. All are led along PEFT's answer and asked for the next token at each step:
where every one is the same, so is the answer.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# Why: transformers and PEFT declare the types of what they return only in part.

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.report import argument_parser, emit
from tests.trainer.llama_cpp import LlamaCpp

HELD_OUT = Path(__file__).parents[1] / "examples" / "medical-es" / "heldout.jsonl"
Next = Callable[[Tensor, int], Tensor]
"""The most likely tokens of a text [n] from a place on [n - place], each after all before it."""


def main() -> None:
    """Ask all, and tell."""
    parser = argument_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--job", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=16)
    arguments = parser.parse_args()
    adapter = PeftModel.from_pretrained(read(arguments.model), arguments.job / "adapter").eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(arguments.job / "adapter")
    asked = [
        tokenizer.apply_chat_template(
            json.loads(line)["messages"][:-1], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        for line in HELD_OUT.read_text().splitlines()[: arguments.prompts]
    ]
    with torch.inference_mode():
        answered = [adapter.generate(**each, max_new_tokens=arguments.tokens, do_sample=False)[0] for each in asked]
        starts = [each["input_ids"].shape[1] for each in asked]
        found = {
            name: {"read_by": reader, **compare(ask, answered, starts)}
            for name, reader, ask in readers(arguments.job / "formats")
        }
    emit(
        {"model": arguments.model.name, "prompts": len(asked), "tokens": arguments.tokens, **found}, save=arguments.save
    )


def readers(formats: Path) -> list[tuple[str, str, Next]]:
    """What there is to be asked: the format, what reads it, and how it is asked."""
    found: list[tuple[str, str, Next]] = []
    if (formats / "merged").is_dir():
        found.append(("merged", "transformers", of_transformers(read(formats / "merged"))))
    for path in sorted(formats.glob("gguf-*/model-*.gguf")):
        found.append((path.parent.name, "llama.cpp", of_llama_cpp(LlamaCpp(path, context=2048))))
    return found


def compare(ask: Next, answered: list[Tensor], starts: list[int]) -> dict[str, float]:
    """Of all steps, how many have the same token, and how many whole answers are the same."""
    same = [(ask(text, start) == text[start:]).tolist() for text, start in zip(answered, starts, strict=True)]
    steps = [each for answer in same for each in answer]
    return {
        "steps": len(steps),
        "same_tokens": round(sum(steps) / len(steps), 4),
        "same_answers": sum(all(answer) for answer in same),
    }


def read(folder: Path) -> Any:
    """A model of transformers', in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def of_transformers(model: Any) -> Next:
    """A model of transformers' as what is asked."""
    return lambda text, start: model(text[None]).logits[0].argmax(-1)[start - 1 : -1]


def of_llama_cpp(model: LlamaCpp) -> Next:
    """A GGUF file in llama.cpp as what is asked."""
    return lambda text, start: torch.tensor([model.likeliest(text[:end].tolist()) for end in range(start, len(text))])


if __name__ == "__main__":
    main()
