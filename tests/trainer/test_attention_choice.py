"""A base keeps packed attention only where that is the model's own; the judge is transformers' eager attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from qlora_trainer.kernels import packed_attention
from qlora_trainer.kernels.packed_attention import NAME, PackedAttention
from qlora_trainer.model.loading import load_base
from qlora_trainer.outcome import UserError

from tests.trainer.test_model import make_model
from tests.trainer.tiny_model import build_tiny_model, tiny_model

CPU = torch.device("cpu")


def chosen(folder: Path, packed: PackedAttention | None = None) -> tuple[str, str | None]:
    packed = packed or PackedAttention()
    base: Any = load_base(folder, CPU, packed)
    return base.config._attn_implementation, packed.unfit_because


class Forgetful(PackedAttention):
    """Packed attention that takes an argument and does not heed it."""

    def __init__(self, forgotten: str) -> None:
        super().__init__()
        self._forgotten = forgotten

    def __call__(self, *tensors: Any, **options: Any) -> Any:
        return super().__call__(*tensors, **{**options, self._forgotten: None})


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite_swa"])
def test_attention_that_is_the_models_own_is_packed(family: str) -> None:
    assert chosen(tiny_model(family)) == (NAME, None)


def test_sinks_beside_heads_that_no_kernel_takes_leave_the_model_its_own_attention(tmp_path: Path) -> None:
    name, reason = chosen(build_tiny_model(tmp_path / "model", "mimo_v2_flash", n_routed_experts=4, v_head_dim=8))
    assert name == "eager"
    assert reason is not None
    assert reason.startswith("its sinks come with")


def test_an_argument_that_is_not_known_leaves_the_model_its_own_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_attention, "HARMLESS_ARGUMENTS", frozenset[str]())
    name, reason = chosen(build_tiny_model(tmp_path / "model", "llama"))
    assert name == "sdpa"
    assert reason is not None
    assert "position_ids" in reason
    assert reason.endswith("which is not known here")


@pytest.mark.parametrize(
    ("family", "forgotten", "config"),
    [
        ("gemma2", "softcap", {"attn_logit_softcapping": 0.05, "initializer_range": 0.3}),
        ("mistral", "sliding_window", {"sliding_window": 9, "initializer_range": 0.3}),
        ("granite", "scaling", {"attention_multiplier": 3.0, "initializer_range": 0.3}),
        ("gpt_oss", "s_aux", {"initializer_range": 0.3, "num_local_experts": 4}),
    ],
    ids=["softcap", "window", "scaling", "sinks"],
)
def test_an_argument_that_is_not_heeded_is_seen_in_the_loaded_weights(
    family: str, forgotten: str, config: dict[str, Any], tmp_path: Path
) -> None:
    folder = build_tiny_model(tmp_path / "model", family, **config)
    assert chosen(folder) == (NAME, None)
    name, reason = chosen(folder, Forgetful(forgotten))
    assert name != NAME
    assert reason is not None
    assert reason.startswith("packed attention is off by ")


def test_a_model_that_sees_the_text_to_its_right_is_refused(tmp_path: Path) -> None:
    model = make_model(build_tiny_model(tmp_path / "model", "bert-generation"), target_modules=("query",))
    with pytest.raises(UserError, match="BertGenerationDecoder sees the text to its right"):
        model.check()
