"""The cache of quantized weights: a base that comes from it is the one that was quantized, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from qlora_trainer.attention import PackedAttention
from qlora_trainer.model import load_base
from qlora_trainer.quantized import tensors_of
from tiny_model import build_tiny_model
from torch import Tensor

CPU = torch.device("cpu")


def load(folder: Path) -> dict[str, Tensor]:
    return dict(tensors_of(load_base(folder, CPU, PackedAttention())))


@pytest.mark.parametrize(
    ("family", "fields"), [("llama", {}), ("llama", {"tied": True}), ("qwen2", {}), ("gemma2", {})]
)
def test_cached_weights_are_the_quantized_ones(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    family: str,
    fields: dict[str, Any],
) -> None:
    folder = build_tiny_model(tmp_path / "model", family, **fields)
    plain = load(folder)
    monkeypatch.setenv("QLORA_MODEL_CACHE", str(tmp_path / "cache"))
    load(folder)
    caplog.set_level("INFO")
    cached = load(folder)
    assert "from the cache of quantized weights" in caplog.text
    assert cached.keys() == plain.keys()
    assert all(torch.equal(cached[name], tensor) for name, tensor in plain.items())


def test_a_damaged_entry_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = build_tiny_model(tmp_path / "model")
    monkeypatch.setenv("QLORA_MODEL_CACHE", str(tmp_path / "cache"))
    plain = load(folder)
    (shard,) = (tmp_path / "cache").glob("quantized/*/weights-*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    again = load(folder)
    assert "are damaged and are made again" in caplog.text
    assert all(torch.equal(again[name], tensor) for name, tensor in plain.items())
