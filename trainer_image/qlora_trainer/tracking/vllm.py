"""What vLLM takes of an adapter, in words for the card: by its `vllm/config/lora.py` and `vllm/lora/peft_helper.py`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from orchestrator.api.words import on_one_line

MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values of --max-lora-rank."""
PEFT_RANK = 8
"""PEFT's own, of a config that tells none."""


def serving_words(config: Mapping[str, Any], name: str, base: str) -> str:
    """How vLLM serves the adapter of an adapter_config.json beside its base, or why it does not."""
    merged = "publish the merged model instead (`publish.formats: [merged]`)"
    if config.get("use_dora"):
        return f"vLLM does not take this adapter: it has no DoRA; {merged}."
    if config.get("target_parameters"):
        return (
            f"Whether vLLM takes this adapter depends on its version: it is on routed experts, as parameters; {merged}."
        )
    rank = next((each for each in MAX_RANKS if each >= int(config.get("r", PEFT_RANK))), None)
    if rank is None:
        return f"vLLM does not take this adapter: its rank is above {MAX_RANKS[-1]}; {merged}."
    served, named = (shlex.quote(on_one_line(text)) for text in (base, name))
    command = f"vllm serve {served} --enable-lora --max-lora-rank {rank} --lora-modules {named}=FOLDER"
    return f"With vLLM, the adapter's folder beside the base in 16 bits:\n\n```sh\n{command}\n```"
