"""Attention by a package: when it is asked, what it is told, and what becomes of a plan where it is not there.

That its kernels are right, and what they take, only a card can tell: `benchmarks.attention`, `benchmarks.sizing`.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from qlora_trainer.data.micro_batch import collate
from qlora_trainer.kernels import flash_attention, ops
from qlora_trainer.kernels.flash_attention import DISTRIBUTION, VERSION, Row, has_kernels_for, takes, usable
from qlora_trainer.kernels.packed_attention import PackedAttention
from test_model import equal, gradients, make_model, make_records, wake_adapter
from torch import Tensor

from orchestrator.api import trainer_facts

CPU = torch.device("cpu")


class Standin:
    """Both passes by our own operations, from what the package is told of a row."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def _spans(self, row: Row) -> tuple[Tensor, Tensor]:
        self.rows.append(row)
        attention = PackedAttention()
        attention._starts, attention._boundaries = row.starts, row.starts.tolist()
        attention._longest_record = row.longest
        return attention.spans(row.window)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, row: Row, scaling: float) -> tuple[Tensor, Tensor]:
        return ops.attention(query, key, value, self._spans(row), scaling)

    def backward(
        self, grad: Tensor, inputs: Any, output: Tensor, logsumexp: Tensor, row: Row, scaling: float, out_grads: Any
    ) -> None:
        ops.attention_backward(grad, inputs, output, logsumexp, self._spans(row), scaling, out_grads)


@pytest.fixture
def _for_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_facts, "FLASH_RECORD_TOKENS", 1)


@pytest.mark.usefixtures("_for_every_row")
@pytest.mark.parametrize("more", [{}, {"recompute_layers": 2}, {"recompute_layers": 2, "keep_attention": True}])
def test_a_layer_that_is_attended_by_it_learns_the_same(more: dict[str, Any]) -> None:
    batch = collate(make_records())
    own, other = make_model(), make_model(**more)
    for model in (own, other):
        wake_adapter(model)
    other.attention.flash = standin = Standin()
    assert equal(gradients(other, [batch]), gradients(own, [batch]))
    passes = 2 + (2 if more.get("recompute_layers") and not more.get("keep_attention") else 0) + 2
    assert len(standin.rows) == passes, "forward, perhaps again, and back, in two layers"
    assert all(row.starts.tolist() == batch.record_starts.tolist() for row in standin.rows)
    assert {row.longest for row in standin.rows} == {batch.longest_record}


def test_rows_of_short_records_are_left_to_our_own() -> None:
    batch = collate(make_records())
    model = make_model()
    wake_adapter(model)
    model.attention.flash = standin = Standin()
    gradients(model, [batch])
    assert standin.rows == []
    long = trainer_facts.FLASH_RECORD_TOKENS
    assert takes(4 * long, 4)
    assert not takes(4 * long, 5)
    assert takes(100, 1), "one record is a row, however short"


def test_without_the_package_or_a_card_that_it_was_measured_on_our_own_compute_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert not has_kernels_for(128), "nothing here installs it"
    assert usable(CPU, 4, 2, 64) is None
    assert "Hopper" in caplog.text
    monkeypatch.setattr(flash_attention, "is_hopper", lambda _: True)
    assert usable(CPU, 4, 2, 64) is None
    assert VERSION in caplog.text


@pytest.mark.parametrize(
    ("installed", "size", "expected"),
    [(VERSION, 128, True), (VERSION, 64, True), (VERSION, 80, False), (VERSION, 256, False), ("4.0.0", 128, False)],
)
def test_one_release_is_taken_and_for_heads_that_it_is_right_for(
    monkeypatch: pytest.MonkeyPatch, installed: str, size: int, expected: bool
) -> None:
    monkeypatch.setattr(flash_attention, "version", {DISTRIBUTION: installed}.__getitem__)
    assert has_kernels_for(size) is expected


def test_kernels_that_are_off_are_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Wrong(Standin):
        def backward(self, *args: Any) -> None:
            super().backward(*args)
            args[-1][1].mul_(1.1)

    monkeypatch.setattr(flash_attention, "_obstacle", lambda *_: None)
    monkeypatch.setattr(flash_attention, "FlashAttention", Standin)
    assert usable(CPU, 4, 2, 64) is not None
    monkeypatch.setattr(flash_attention, "FlashAttention", Wrong)
    assert usable(CPU, 4, 2, 64) is None
    assert "more than rounding" in caplog.text


def test_a_plan_that_asks_for_it_in_vain_trains_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="qlora_trainer.kernels")
    batch = collate(make_records())
    own, asks = make_model(), make_model(attention="flash-attn-4")
    for model in (own, asks):
        wake_adapter(model)
    assert "our own kernels" in caplog.text
    assert equal(gradients(asks, [batch]), gradients(own, [batch]))
