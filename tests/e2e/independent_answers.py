"""Answers of a registered adapter, given by somebody who has never heard of the orchestrator.

    python -I independent_answers.py TRACKING_URI MODEL_URI BASE LIMIT < rows

Rows are JSON lines of `messages` or `prompt`, as the adapter is asked. They are answered twice: by
`mlflow.pyfunc` alone, and by transformers and PEFT as the model card says. Any import of the project fails. Prints
JSON: the answers, and how many tokens of the limit each took, the token that ended it included.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateImportUsage=false
# Why: transformers, PEFT and MLflow declare the types of what they return only in part.

from __future__ import annotations

import importlib.abc
import json
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PROJECT = ("orchestrator", "qlora_trainer")


class Stranger(importlib.abc.MetaPathFinder):
    """Finds nothing of the project, wherever it is installed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Refuse the project's packages."""
        if fullname.partition(".")[0] in PROJECT:
            raise ModuleNotFoundError(f"{fullname} is not to be found here", name=fullname)
        return None


sys.meta_path.insert(0, Stranger())

import mlflow  # noqa: E402 - after the refusal
import torch  # noqa: E402 - after the refusal
from peft import PeftModel  # noqa: E402 - after the refusal
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig  # noqa: E402


def main() -> None:
    """Print what both ways answer."""
    tracking_uri, model_uri, base, limit = sys.argv[1:]
    mlflow.set_tracking_uri(tracking_uri)
    rows = [json.loads(line) for line in sys.stdin]
    served = mlflow.pyfunc.load_model(model_uri).predict(rows, params={"max_new_tokens": int(limit)})
    folder = mlflow.artifacts.download_artifacts(model_uri) + "/artifacts/adapter"
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base_model = AutoModelForCausalLM.from_pretrained(base, quantization_config=nf4, dtype=torch.bfloat16)
    model: Any = PeftModel.from_pretrained(base_model, folder).eval()
    model.generation_config = GenerationConfig.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    by_peft = [answer(model, tokenizer, row, int(limit)) for row in rows]
    print(
        json.dumps(
            {
                "served": served,
                "served_tokens": [len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in served],
                "peft": [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in by_peft],
                "peft_tokens": [len(ids) for ids in by_peft],
                "peft_ends": [tokenizer.convert_ids_to_tokens(ids[-1]) for ids in by_peft],
                "project": [name for name in sys.modules if name.partition(".")[0] in PROJECT],
            }
        )
    )


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, row: dict[str, Any], limit: int) -> list[int]:
    """The tokens of one greedy answer."""
    if "messages" in row:
        inputs = tokenizer.apply_chat_template(
            row["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(row["prompt"], return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=limit, do_sample=False)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


if __name__ == "__main__":
    main()
