"""Answer questions with a base model and with an adapter on top of it, from the registry, side by side.

Imports nothing of the orchestrator: this is all that it takes to use what a job left in MLflow.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportPrivateImportUsage=false
# Why: transformers, PEFT and MLflow declare the types of what they return only in part.

from __future__ import annotations

import warnings
from typing import Any

import mlflow
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig


def compare(
    base: str, model_uri: str, questions: list[str], *, max_new_tokens: int = 48
) -> tuple[list[str], list[str]]:
    """The base model's answers and the tuned model's, greedy, one a question.

    `base` is a Hugging Face folder or id, `model_uri` a registered model such as `models:/notes-es@candidate`.
    """
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    # Through four bits, as it was trained on; then unpacked once, for a CPU would do so at every token.
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=nf4, dtype=torch.bfloat16).dequantize()
    # What is generated stands at the right end of every row, so that shorter questions are filled up at the left.
    tokenizer: Any = AutoTokenizer.from_pretrained(base, padding_side="left")
    folder = mlflow.artifacts.download_artifacts(model_uri)
    with warnings.catch_warnings():
        # PEFT still asks for `is_gradient_checkpointing`, which transformers has renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        tuned = PeftModel.from_pretrained(model, f"{folder}/artifacts/adapter").eval()
    with tuned.disable_adapter():
        before = answers(tuned, tokenizer, questions, max_new_tokens)
    return before, answers(tuned, tokenizer, questions, max_new_tokens)


def answers(model: PeftModel, tokenizer: Any, questions: list[str], max_new_tokens: int) -> list[str]:
    """One greedy answer a question, all at once."""
    chats = [[{"role": "user", "content": question}] for question in questions]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]
