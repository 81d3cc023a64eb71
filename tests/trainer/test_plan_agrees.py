"""A plan is never clean for a model that prepare refuses for its config or its files: both look at the same folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from qlora_trainer.model.source import describe_model, read_facts
from qlora_trainer.outcome import UserError

from orchestrator.adapters.job_store import model_config
from orchestrator.api.job import ModelSource
from orchestrator.errors import OrchestratorError
from orchestrator.sdk.preflight import check_planned_model
from tests.trainer.tiny_model import tiny_model

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 1048576\n"


def config(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def write(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def rename(name: str, other: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).rename(folder / other) and None


INDEX = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}})
CHANGES: dict[str, Callable[[Path], None]] = {
    "quantized": config(quantization_config={"quant_method": "fp8"}),
    "quantized inside": config(text_config={"quantization_config": {"quant_method": "mxfp4"}}),
    "a wrapper": config(model_type="gemma3", architectures=["Gemma3ForConditionalGeneration"], text_config={}),
    "classifies": config(architectures=["LlamaForSequenceClassification"]),
    "an encoder and a decoder": config(is_encoder_decoder=True),
    "experts of unknown size": config(num_experts=8),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "a pointer for a config": write("config.json", POINTER),
    "a pointer for weights": write("model.safetensors", POINTER),
    "pickles alone": rename("model.safetensors", "pytorch_model.bin"),
    "GGUF": rename("model.safetensors", "model.gguf"),
    "weights by another name": rename("model.safetensors", "weights.safetensors"),
    "an index of other files beside one file": write("model.safetensors.index.json", INDEX),
    "a stale index": lambda folder: (
        rename("model.safetensors", "model-00001-of-00001.safetensors")(folder),
        write("model.safetensors.index.json", INDEX)(folder),
    )[0],
    "a damaged index": write("model.safetensors.index.json", "[]"),
    "an adapter beside it": write("adapter_config.json", "{}"),
    "a link to nowhere": lambda folder: (folder / "merges.txt").symlink_to("nowhere"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_prepare_refuses_is_no_clean_plan(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model(), folder)
    CHANGES[name](folder)
    source = f"file://{folder}"
    with pytest.raises(UserError):
        read_facts(describe_model(source, "main"), source)
    with pytest.raises(OrchestratorError):
        plan(source)


def test_what_prepare_takes_can_be_planned() -> None:
    source = f"file://{tiny_model()}"
    assert plan(source).hidden_size == read_facts(describe_model(source, "main"), source).hidden_size


def plan(source: str) -> Any:
    check_planned_model(ModelSource(source=source))
    return model_config.read_facts(ModelSource(source=source))
