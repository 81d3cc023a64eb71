"""Held-out loss of a registered adapter, computed by somebody who has never heard of the orchestrator.

    python independent_eval.py TRACKING_URI MODEL_URI BASE HELDOUT.jsonl

Run as a process of its own. Uses MLflow, transformers and PEFT alone; every record goes through the model by itself,
so nothing of the trainer's masking, packing or loss is shared; and it computes in float32, without the trainer's
roundings. Prints JSON: the mean loss over the assistants' tokens and how many there were.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateImportUsage=false
# Why: transformers, PEFT and MLflow declare the types of what they return only in part.

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlflow
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig


def main() -> None:
    """Print the loss of the held-out file that the arguments name."""
    tracking_uri, model_uri, base, heldout = sys.argv[1:]
    mlflow.set_tracking_uri(tracking_uri)
    adapter = mlflow.artifacts.download_artifacts(model_uri) + "/artifacts/adapter"
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=nf4, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    total, count = 0.0, 0
    for line in Path(heldout).read_text(encoding="utf-8").splitlines():
        loss, tokens = record_loss(model, tokenizer, json.loads(line)["messages"])
        total, count = total + loss, count + tokens
    signature = mlflow.models.get_model_info(model_uri).signature
    print(json.dumps({"loss": total / count, "tokens": count, "has_signature": signature is not None}))


@torch.no_grad()
def record_loss(model: PeftModel, tokenizer: Any, messages: Sequence[Any]) -> tuple[float, int]:
    """Summed loss over the answer and its end-of-turn token, and how many tokens those are."""
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
    answer = messages[-1]["content"] + tokenizer.eos_token
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([prompt_ids + tokenizer(answer, add_special_tokens=False)["input_ids"]])
    logits = model(input_ids=ids).logits[0, len(prompt_ids) - 1 : -1].float()
    targets = ids[0, len(prompt_ids) :]
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item(), len(targets)


if __name__ == "__main__":
    main()
