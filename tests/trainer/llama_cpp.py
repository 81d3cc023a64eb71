"""llama.cpp as the judge of GGUF files: its own server in this process, asked as programs ask it."""

from __future__ import annotations

import importlib
import json
import urllib.request
from pathlib import Path
from typing import Any

import torch

xllamacpp: Any = importlib.import_module("xllamacpp")  # Any: it has no types
SECONDS = 60.0


class LlamaCpp:
    """A file that llama.cpp has loaded, with the adapter of another beside it where one is given."""

    def __init__(self, model: Path, adapter: Path | None = None, *, context: int = 256) -> None:
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(model)
        parameters.n_ctx, parameters.n_parallel = context, 1
        parameters.n_gpu_layers, parameters.cpuparams.n_threads = 0, 1
        parameters.warmup, parameters.verbosity = False, 0
        if adapter is not None:
            parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self._server = xllamacpp.Server(parameters)

    def log_probabilities(self, tokens: list[int], vocabulary: int) -> torch.Tensor:
        """Of every token to come after these."""
        found = torch.full((vocabulary,), float("nan"))
        for each in self._most_likely(tokens, vocabulary):
            found[each["id"]] = each["logprob"]
        return found

    def likeliest(self, tokens: list[int]) -> int:
        """The token to come after these."""
        return self._most_likely(tokens, 1)[0]["id"]

    def _most_likely(self, tokens: list[int], count: int) -> list[dict[str, Any]]:
        asked = {
            "prompt": tokens,
            "n_predict": 1,
            "n_probs": count,
            "cache_prompt": False,
            # Probabilities are told of tokens with a text alone, so one that has some is drawn, whatever they are.
            "logit_bias": [[self.tokens("A")[-1], 1000.0]],
        }
        answer = self._server.handle_completions(asked)
        [choice] = (json.loads(answer) if isinstance(answer, str | bytes) else answer)["choices"]
        return choice["logprobs"]["content"][0]["top_logprobs"]

    def tokens(self, text: str) -> list[int]:
        """As it cuts a text, with what the file says comes first."""
        body = json.dumps({"content": text, "add_special": True}).encode()
        request = urllib.request.Request(
            f"{self._server.listening_address}/tokenize", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return json.load(answer)["tokens"]
