"""What the benchmark of others gives them: a checkpoint that is the base itself, whole or grown from fewer layers."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from qlora_trainer.kernels.packed_attention import PackedAttention
from qlora_trainer.model.loading import load_base
from qlora_trainer.model.source import RANDOM_WEIGHTS_VARIABLE
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks import nf4_checkpoint
from benchmarks.peers import agreement, best_by_length
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
        "2048": {
            "trainer": {"case": "2048x4", "tokens_per_second": 300.0},
            "recipe": {"case": "2048x8", "tokens_per_second": 120.0},
            "times_as_fast_as": {"recipe": 2.5},
        },
        "512": {"trainer": {"case": "512x1", "tokens_per_second": 90.0}, "times_as_fast_as": {}},
    }


def test_where_the_reference_is_remembered_is_compared_apart():
    found = {"64x1": {"tokens_per_second": 3.0}, "64x1+remembered": {"tokens_per_second": 4.0}}
    theirs = {"64x2": {"tokens_per_second": 2.0}, "64x2+remembered": {"tokens_per_second": 1.0}}
    best = best_by_length({"trainer": {"cases": found}, "trl": {"cases": theirs}})
    assert [each["times_as_fast_as"] for each in best.values()] == [{"trl": 1.5}, {"trl": 4.0}]


@pytest.mark.filterwarnings("ignore")
def test_preferences_are_the_same_to_the_trainer_and_to_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    for name in (RANDOM_WEIGHTS_VARIABLE, "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    from safetensors.torch import save_file

    from benchmarks import preferences
    from benchmarks.pairs import ADAPTER_FILE
    from benchmarks.speed import Bench
    from benchmarks.trl_peer import Preferences, load_nf4

    settings = Namespace(
        shape=SHAPE, cap_gib=0.0, rank=16, dropout="0", nondeterministic=False, profile=False,
        warm_up=4, steps=2, repetitions=1,
    )  # fmt: skip
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    bench = Bench(settings)
    save_file(bench.first_adapter, tmp_path / ADAPTER_FILE)
    ours = {text: preferences.measure(bench, text, settings) for text in ("64x2", "64x2+chosen+remembered")}
    nf4_checkpoint.write(bench.leave(), tmp_path / "base", layers=layers_of(SHAPE))
    theirs = Preferences(tmp_path / "base", tmp_path, load_nf4).measure("64x2+remembered", settings)
    stacks = {"trainer": {"cases": ours}, "trl": {"cases": {"64x2+remembered": theirs}}}
    found = agreement(stacks)["64x2"]
    assert len(found) == 3
    for each in found.values():
        assert abs(each["first_loss_less_log_2"]) < 1e-6
        assert each["last_margin"] > 0.003, "what came again was learned"
        assert each["margins_differ_by"] < 0.003
