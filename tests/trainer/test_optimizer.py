"""AdamW against torch's, its state through a checkpoint bit for bit, and the learning rate by step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from qlora_trainer.training.optimizer import AdapterOptimizer, learning_rate
from torch import Tensor
from torch.nn import Parameter

from orchestrator.api.job import TrainingSpec

ALL = ["paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw_32bit"]
A, B, MAGNITUDE = "q_proj.lora_A.weight", "q_proj.lora_B.weight", "q_proj.lora_magnitude_vector"
C = "k_proj.lora_A.weight"


def make_parameters(dtype: torch.dtype = torch.bfloat16) -> dict[str, Parameter]:
    """Large enough for 8-bit state (4096 elements); the vector is not."""
    generator = torch.Generator().manual_seed(1)
    shapes = {A: (64, 96), B: (96, 64), MAGNITUDE: (96,)}
    return {name: Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in shapes.items()}


def make_spec(**fields: Any) -> TrainingSpec:
    return TrainingSpec(**fields)


def take_steps(optimizer: AdapterOptimizer, parameters: dict[str, Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step(1e-2)


def values(parameters: dict[str, Parameter]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters.values()]


@pytest.mark.parametrize("name", ALL)
def test_state_goes_through_a_checkpoint_bit_for_bit(name: str) -> None:
    spec = make_spec(optimizer=name, weight_decay="0.1", lora_plus_ratio="4")
    parameters = make_parameters()
    optimizer = AdapterOptimizer(parameters.items(), spec)
    take_steps(optimizer, parameters, range(3))
    saved = {key: tensor.clone() for key, tensor in optimizer.export_state().items()}
    resumed = {key: Parameter(parameter.detach().clone()) for key, parameter in parameters.items()}
    take_steps(optimizer, parameters, range(3, 6))

    fresh = AdapterOptimizer(resumed.items(), spec)
    fresh.import_state(saved)
    take_steps(fresh, resumed, range(3, 6))
    assert all(torch.equal(one, other) for one, other in zip(values(parameters), values(resumed), strict=True))
    assert saved[f"{A}.state1"].dtype == (torch.uint8 if name.endswith("8bit") else torch.float32)
    assert saved[f"{MAGNITUDE}.state1"].dtype == torch.float32


def test_state_is_copied_into_the_optimizers_own_buffers() -> None:
    parameters = make_parameters()
    optimizer = AdapterOptimizer(parameters.items(), make_spec(optimizer="adamw_8bit"))
    take_steps(optimizer, parameters, range(2))
    saved = optimizer.export_state()
    fresh = AdapterOptimizer(parameters.items(), make_spec(optimizer="adamw_8bit"))
    fresh.import_state(saved)
    restored = fresh.export_state()
    assert restored.keys() == saved.keys()
    assert all(torch.equal(restored[key], saved[key]) for key in saved)
    assert not {tensor.data_ptr() for tensor in restored.values()} & {tensor.data_ptr() for tensor in saved.values()}


@pytest.mark.parametrize("name", ALL)
def test_one_piece_or_many_changes_no_bit(name: str) -> None:
    spec = make_spec(optimizer=name, weight_decay="0.1")
    ends, states = [], []
    for largest in (1 << 28, 2 * 64 * 96, 0):  # A, B and C in one piece; in two; each on its own
        parameters = make_parameters() | {C: Parameter(torch.ones(64, 96, dtype=torch.bfloat16))}
        adam = AdapterOptimizer(parameters.items(), spec, largest_piece=largest)
        addresses = sorted(parameters[key].data_ptr() for key in (A, B, C))
        if largest:
            assert [place - addresses[0] for place in addresses] == [0, 2 * 64 * 96, 4 * 64 * 96]
        take_steps(adam, parameters, range(4))
        assert all(parameter.grad is None for parameter in parameters.values())
        ends.append(values(parameters))
        states.append(adam.export_state())
    assert all(torch.equal(one, other) for end in ends[1:] for one, other in zip(end, ends[0], strict=True))
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[key], states[0][key]) for key in state)


def test_an_adapter_with_other_names_is_an_error_not_a_fresh_start() -> None:
    parameters = make_parameters()
    optimizer = AdapterOptimizer(parameters.items(), make_spec())
    take_steps(optimizer, parameters, range(1))
    renamed = {f"other.{key}": tensor for key, tensor in optimizer.export_state().items()}
    with pytest.raises(KeyError, match="other"):
        AdapterOptimizer(make_parameters().items(), make_spec()).import_state(renamed)


@pytest.mark.parametrize("name", ["paged_adamw_32bit", "adamw_32bit"])
def test_32_bit_adamw_is_torchs(name: str) -> None:
    spec = make_spec(optimizer=name, weight_decay="0.1", adam_beta2="0.99")
    parameters = make_parameters(torch.float32)
    reference = {key: Parameter(parameter.detach().clone()) for key, parameter in parameters.items()}
    decayed = [parameter for parameter in reference.values() if parameter.dim() > 1]
    groups = [
        {"params": decayed, "weight_decay": 0.1},
        {"params": [reference[MAGNITUDE]], "weight_decay": 0.0},
    ]
    torch_adamw = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.99), eps=1e-8)
    optimizer = AdapterOptimizer(parameters.items(), spec)
    for step in range(5):
        take_steps(optimizer, parameters, range(step, step + 1))
        generator = torch.Generator().manual_seed(100 + step)
        for parameter in reference.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        torch_adamw.step()
    for one, other in zip(values(parameters), values(reference), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_8_bit_state_stays_close_to_32_bit() -> None:
    ends = []
    for name in ("adamw_8bit", "adamw_32bit"):
        parameters = make_parameters(torch.float32)
        start = values(parameters)
        take_steps(AdapterOptimizer(parameters.items(), make_spec(optimizer=name)), parameters, range(10))
        ends.append(torch.cat([(end - begin).flatten() for end, begin in zip(values(parameters), start, strict=True)]))
    assert 0 < (ends[0] - ends[1]).norm() < 0.05 * ends[1].norm()


def test_lora_plus_moves_b_faster_by_its_ratio() -> None:
    # Adam's first step is the learning rate times the gradient's sign.
    parameters = make_parameters(torch.float32)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = AdapterOptimizer(parameters.items(), make_spec(lora_plus_ratio="16"))
    take_steps(optimizer, parameters, range(1))
    moved = {name: (parameter.detach() - before[name]).abs().median().item() for name, parameter in parameters.items()}
    assert moved[A] == pytest.approx(1e-2, rel=1e-3)
    assert moved[MAGNITUDE] == pytest.approx(1e-2, rel=1e-3)
    assert moved[B] == pytest.approx(16e-2, rel=1e-3)


@pytest.mark.parametrize(
    ("scheduler", "warmup", "expected"),
    [
        ("constant", "0", [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("constant", "0.2", [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", "0.2", [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        ("cosine", "0.2", [0.5, 1, *((1 + math.cos(math.pi * step / 8)) / 2 for step in range(8))]),
    ],
)
def test_the_learning_rate_warms_up_and_follows_its_schedule(
    scheduler: str, warmup: str, expected: list[float]
) -> None:
    spec = make_spec(learning_rate="3e-4", scheduler=scheduler, warmup_ratio=warmup)
    rates = [learning_rate(step, 10, spec) for step in range(10)]
    assert rates == pytest.approx([3e-4 * share for share in expected])
