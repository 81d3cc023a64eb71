"""What the benchmark of others gives them: a checkpoint that is the base itself, whole or grown from fewer layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from qlora_trainer.kernels.packed_attention import PackedAttention
from qlora_trainer.model.loading import load_base
from qlora_trainer.model.source import RANDOM_WEIGHTS_VARIABLE
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks import nf4_checkpoint
from benchmarks.peers import best_by_length
from benchmarks.shapes import layers_of, write_model

SHAPE = "tiny"
IDS = torch.arange(5, 45).view(2, 20)


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    monkeypatch.setenv(RANDOM_WEIGHTS_VARIABLE, "1")
    model = load_base(write_model(tmp_path / "base", SHAPE), torch.device("cpu"), PackedAttention())
    model.set_attn_implementation("sdpa")
    return model


def loaded(folder: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # kernels that round otherwise than the base's
            module.support_avx512bf16_for_cpu = False
    return model


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits


def test_a_written_base_gives_the_same_logits_when_transformers_has_loaded_it(base: PreTrainedModel, tmp_path: Path):
    nf4_checkpoint.write(base, tmp_path / "whole", layers=layers_of(SHAPE))
    assert torch.equal(logits(loaded(tmp_path / "whole")), logits(base))


def test_a_grown_model_is_one_whose_first_layers_come_again_in_memory_of_their_own(
    base: PreTrainedModel, tmp_path: Path
):
    nf4_checkpoint.write(base, tmp_path / "first", layers=1)
    grown = loaded(tmp_path / "first")
    nf4_checkpoint.graft(grown, layers_of(SHAPE))
    layers = base.get_decoder().layers
    layers[1] = layers[0]
    assert torch.equal(logits(grown), logits(base))
    states = [module.quant_state for module in grown.modules() if hasattr(module, "quant_state")]
    assert len({state.absmax.data_ptr() for state in states}) == len(states) == 14


def test_the_fastest_case_of_each_length_is_compared():
    figures = {"2048x4": {"tokens_per_second": 300.0}, "2048x2": {"out_of_memory": "at 20 GiB"}}
    stacks = {
        "trainer": {"cases": {**figures, "512x1": {"tokens_per_second": 90.0}}},
        "recipe": {"cases": {"2048x4": {"tokens_per_second": 100.0}, "2048x8": {"tokens_per_second": 120.0}}},
        "unsloth": {"error": ["ModuleNotFoundError: No module named 'unsloth'"]},
    }
    assert best_by_length(stacks) == {
        2048: {
            "trainer": {"case": "2048x4", "tokens_per_second": 300.0},
            "recipe": {"case": "2048x8", "tokens_per_second": 120.0},
            "times_as_fast_as": {"recipe": 2.5},
        },
        512: {"trainer": {"case": "512x1", "tokens_per_second": 90.0}, "times_as_fast_as": {}},
    }
