"""Answer questions with a base model and with an adapter on top of it, from the registry, side by side.

Imports nothing of the orchestrator: this is all that it takes to use what a job left in MLflow.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateImportUsage=false
# Why: transformers, PEFT and MLflow declare the types of what they return only in part.

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlflow
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig


def compare(
    base: str, model_uri: str, questions: list[str], *, max_new_tokens: int = 56
) -> Iterator[tuple[str, str, str]]:
    """(question, the base model's answer, the tuned model's answer), greedy.

    `base` is a Hugging Face folder or id, `model_uri` a registered model such as `models:/medical-es@candidate`.
    """
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=nf4, dtype=torch.bfloat16)
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    folder = mlflow.artifacts.download_artifacts(model_uri)
    tuned = PeftModel.from_pretrained(model, f"{folder}/artifacts/adapter").eval()
    for question in questions:
        with tuned.disable_adapter():
            before = answer(tuned, tokenizer, question, max_new_tokens)
        yield question, before, answer(tuned, tokenizer, question, max_new_tokens)


def answer(model: PeftModel, tokenizer: Any, question: str, max_new_tokens: int) -> str:
    """One greedy answer to one question."""
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
