"""The cache of quantized weights: a base that comes from it is the one that was quantized, bit for bit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from qlora_trainer.kernels.packed_attention import PackedAttention
from qlora_trainer.model.loading import load_base
from qlora_trainer.model.quantized_cache import MANIFEST_NAME, QuantizedCache, tensors_of
from safetensors.torch import load_file, save_file
from tiny_model import build_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM

CPU = torch.device("cpu")


def load(folder: Path) -> dict[str, Tensor]:
    return dict(tensors_of(load_base(folder, CPU, PackedAttention())))


@pytest.mark.parametrize(
    ("family", "fields"),
    [("llama", {}), ("llama", {"tied": True}), ("qwen2", {}), ("gemma2", {}), ("mixtral", {}), ("qwen2_moe", {})],
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


def test_tied_weights_that_are_stored_with_other_values_stay_apart_as_in_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = build_tiny_model(tmp_path / "model", tied=True)
    tensors = load_file(folder / "model.safetensors")
    head = torch.randn_like(tensors["model.embed_tokens.weight"])
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    monkeypatch.setenv("QLORA_MODEL_CACHE", str(tmp_path / "cache"))
    caplog.set_level("INFO")
    for _ in range(2):
        ours: Any = load_base(folder, CPU, PackedAttention())
        assert torch.equal(ours.lm_head.weight, theirs.lm_head.weight)
        assert torch.equal(ours.model.embed_tokens.weight, theirs.model.embed_tokens.weight)
        assert ours.all_tied_weights_keys == theirs.all_tied_weights_keys == {}
    assert "from the cache of quantized weights" in caplog.text


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


def weights(value: int) -> list[tuple[str, Tensor]]:
    """An entry of 1,000 bytes."""
    return [("layer", torch.full((1000,), value, dtype=torch.uint8))]


def cache_of(folder: Path, entries: float) -> QuantizedCache:
    """Room for so many entries."""
    return QuantizedCache(folder, int(1200 * entries))


def used(cache: QuantizedCache, key: str, second: int) -> None:
    os.utime(cache.folder / key / MANIFEST_NAME, (second, second))


def test_what_was_used_longest_ago_makes_room(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, 2.5)
    for number, key in enumerate(("first", "second")):
        cache.write(key, weights(number))
        used(cache, key, 1000 + number)
    used(cache, "first", 2000)
    cache.write("third", weights(2))
    assert {key for key in ("first", "second", "third") if cache.read(key, CPU)} == {"first", "third"}


def test_what_does_not_fit_is_not_kept_and_drives_nothing_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = cache_of(tmp_path, 1.5)
    cache.write("small", weights(1))
    cache.write("large", [*weights(1), ("other", torch.zeros(2000, dtype=torch.uint8))])
    assert "do not fit" in caplog.text
    assert cache.read("large", CPU) is None
    assert cache.read("small", CPU) is not None


def test_an_entry_that_cannot_be_read_now_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = cache_of(tmp_path, 2)
    cache.write("entry", weights(7))
    manifest = tmp_path / "entry" / MANIFEST_NAME
    content = manifest.read_bytes()
    manifest.unlink()
    manifest.symlink_to(MANIFEST_NAME)  # a link to itself: the storage answers with an error
    assert cache.read("entry", CPU) is None
    assert "cannot be read" in caplog.text
    manifest.unlink()
    manifest.write_bytes(content)
    found = cache.read("entry", CPU)
    assert found is not None
    assert torch.equal(found["layer"], weights(7)[0][1])
