"""Padding to the shapes of CUDA graphs changes no number. What graphs compute, `benchmarks.kernels` tries on a card."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from qlora_trainer.data.encoding import IGNORED_LABEL
from qlora_trainer.data.micro_batch import MicroBatch, StepInputs, collate
from qlora_trainer.model.cuda_graphs import CudaGraphs, Shape

from orchestrator.api import trainer_facts
from tests.trainer.test_model import make_model


def make_batch(*lengths: int, masked: int = 0) -> MicroBatch:
    random = np.random.RandomState(0)
    rows = []
    for length in lengths:
        ids = random.randint(5, 60, size=length).astype(np.int32)
        labels = ids.copy()
        labels[:masked] = IGNORED_LABEL
        rows.append((ids, labels, np.arange(length, dtype=np.int32)))
    return collate(rows)


@pytest.mark.parametrize(
    ("lengths", "shape"),
    [
        ((256,), Shape(tokens=256, records=1, supervised=256)),
        ((255,), Shape(tokens=256, records=4, supervised=256)),
        ((100, 156), Shape(tokens=256, records=4, supervised=256)),
        ((60, 60, 60, 60, 30), Shape(tokens=512, records=16, supervised=384)),
    ],
)
def test_a_shape_is_the_smallest_of_a_few_that_the_micro_batch_fits(lengths: tuple[int, ...], shape: Shape) -> None:
    assert Shape.of(make_batch(*lengths)) == shape


def test_padding_is_a_record_without_loss_and_records_without_tokens() -> None:
    batch = make_batch(100, 120)
    padded = Shape.of(batch).pad(batch)
    assert padded.tokens == 256
    assert padded.record_starts.tolist() == [0, 100, 220, 256, 256]
    assert padded.position_ids[0, 220:].tolist() == list(range(36))
    assert torch.equal(padded.input_ids[:, :220], batch.input_ids)
    assert set(padded.targets[0, 220:].tolist()) == {IGNORED_LABEL}
    assert len(padded.supervised) == 256
    assert set(padded.supervised[len(batch.supervised) :].tolist()) == {255}


def test_rows_of_nearly_the_same_length_share_a_shape() -> None:
    shapes = {Shape.of(make_batch(*lengths)) for lengths in ((250,), (120, 130), (80, 80, 70))}
    assert len(shapes) == 1


@pytest.mark.parametrize("masked", [0, 50])
def test_loss_and_gradients_are_those_without_padding(tmp_path: Path, masked: int) -> None:
    model = make_model()
    batch = make_batch(70, 90, masked=masked)
    shape = Shape.of(batch)
    losses, gradients = [], []
    for each in (batch, shape.pad(batch)):
        model.eval()
        loss = model.loss(each, divisor=100.0)
        loss.backward()
        losses.append(loss.detach())
        gradients.append([parameter.grad for _, parameter in model.trainable()])
        model.peft_model.zero_grad(set_to_none=True)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=0)
    norms = [torch.cat([g.flatten().float() for g in each if g is not None]) for each in gradients]
    assert (norms[0] - norms[1]).norm() < 0.02 * norms[0].norm()


def test_tensors_are_refilled_in_place() -> None:
    first, second = make_batch(256), make_batch(128, 128)
    shape = Shape(tokens=256, records=4, supervised=256)
    inputs = StepInputs.of(shape.pad(first), 1, 2.0, torch.device("cpu"))
    places = [inputs.batch.input_ids.data_ptr(), inputs.scale.data_ptr()]
    inputs.refill(shape.pad(second), 7, 4.0)
    assert [inputs.batch.input_ids.data_ptr(), inputs.scale.data_ptr()] == places
    assert torch.equal(inputs.batch.input_ids, second.input_ids)
    assert inputs.batch.record_starts.tolist() == [0, 128, 256, 256, 256]
    assert (int(inputs.seed), float(inputs.scale)) == (7, 0.25)


def test_long_rows_are_not_taken() -> None:
    assert CudaGraphs.takes(make_batch(trainer_facts.CUDA_GRAPH_TOKENS))
    assert not CudaGraphs.takes(make_batch(trainer_facts.CUDA_GRAPH_TOKENS, 2))
