"""What a train stage tells before its first step, by the very bar that transformers draws."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from qlora_trainer.kernels.packed_attention import PackedAttention
from qlora_trainer.model.loading import load_base
from qlora_trainer.training.start_up import teller, weights_told
from transformers.utils import logging as transformers_logging

from tests.trainer.tiny_model import build_tiny_model


def test_loading_weights_is_told_in_per_cent_and_nothing_is_drawn(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    build_tiny_model(tmp_path / "model")
    capfd.readouterr()
    told: list[str] = []
    with weights_told(told.append):
        load_base(tmp_path / "model", torch.device("cpu"), PackedAttention())
    first, *percents = told
    assert first == "loading weights"
    assert percents[0] == "loading weights: 0 %"
    numbers = [int(text.split()[2]) for text in percents]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] > 80
    assert "\r" not in capfd.readouterr().err
    assert transformers_logging.set_tqdm_hook(None) is None, "the hook is gone"


def test_without_an_agent_nobody_is_told() -> None:
    teller(None)("loading weights")
