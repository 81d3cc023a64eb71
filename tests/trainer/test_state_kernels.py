"""Layers that carry a state are computed by packages' kernels on a GPU alone, and there only where bits may differ."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from qlora_trainer.data.report import state_warning
from qlora_trainer.kernels import state_kernels
from qlora_trainer.kernels.packed_attention import PackedAttention
from qlora_trainer.model.loading import weightless_base
from transformers import AutoConfig

CONFIG = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 99, "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
KERNEL = """
def chunk_gated_delta_rule(query, key, value, g, beta, initial_state=None, output_final_state=False):
    raise RuntimeError("Triton is not supported on current platform")
"""
CHOICE = """
import json, sys
import torch
from qlora_trainer.kernels import state_kernels
from qlora_trainer.kernels.packed_attention import PackedAttention
from qlora_trainer.model.loading import _settle_state_kernels, weightless_base
from transformers import AutoConfig, AutoModelForCausalLM

config = AutoConfig.for_model("qwen3_5_text", **json.loads(sys.argv[1]))
base = AutoModelForCausalLM.from_config(config)

def computes():
    try:
        return bool(base(torch.arange(5, 20)[None], use_cache=False).logits.isfinite().all())
    except RuntimeError as error:
        assert "not supported on current platform" in str(error), error
        return False

found = [(computes(), state_kernels.in_use(base)["torch_chunk_gated_delta_rule"])]
for by_packages in (False, True, False, True):
    state_kernels.settle(base, by_packages=by_packages)
    found.append((computes(), state_kernels.in_use(base)["torch_chunk_gated_delta_rule"]))
weightless_base(config, torch.device("cpu"))
found.append((computes(), state_kernels.in_use(base)["torch_chunk_gated_delta_rule"]))
state_kernels.settle(base, by_packages=True)
_settle_state_kernels(base, torch.device("cuda"), PackedAttention())  # where kernels are to compute, if they do
found.append((computes(), state_kernels.in_use(base)["torch_chunk_gated_delta_rule"]))
print(json.dumps(found))
"""


def test_a_package_that_is_installed_computes_only_where_it_is_let_and_can(tmp_path: Path) -> None:
    """In a process of its own: transformers looks for packages once, when it is imported."""
    package = tmp_path / "fla" / "ops"
    package.mkdir(parents=True)
    (tmp_path / "fla" / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "gated_delta_rule.py").write_text(KERNEL)
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", CHOICE, json.dumps(CONFIG)],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    by_torch, by_package = [True, False], [False, True]
    expected = [by_package, by_torch, by_package, by_torch, by_package, by_torch, by_torch]
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def test_the_packages_of_a_hybrid_are_named_and_those_of_others_are_none() -> None:
    PackedAttention().register()
    config = AutoConfig.for_model("qwen3_5_text", **CONFIG)
    hybrid, _ = weightless_base(config, torch.device("cpu"))
    assert state_kernels.packages(hybrid).keys() == {"causal-conv1d", "flash-linear-attention"}
    assert not any(state_kernels.in_use(hybrid).values())
    dense, _ = weightless_base(AutoConfig.for_model("qwen3", num_hidden_layers=1), torch.device("cpu"))
    assert state_kernels.packages(dense) == {}


def test_what_computes_is_said_with_what_would_change_it() -> None:
    some: dict[str, str | None] = {"flash-linear-attention": "0.6.0", "causal-conv1d": None}
    none = dict.fromkeys(some)
    assert state_warning({}, deterministic=True) is None
    exact, free, missing = (
        state_warning(packages, deterministic=deterministic) or ""
        for packages, deterministic in ((some, True), (some, False), (none, False))
    )
    assert "transformers' own code in torch" in exact
    assert "training.deterministic" in exact
    assert "flash-linear-attention 0.6.0 on a GPU" in free
    assert free.endswith("not in the trainer's image: causal-conv1d")
    assert "transformers' own code in torch" in missing
    assert missing.endswith("not in the trainer's image: flash-linear-attention, causal-conv1d")
