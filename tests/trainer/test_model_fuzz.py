"""Model folders that were damaged at random: each is refused in a sentence, or it is a model that trains.

`QLORA_FUZZ_MODELS` sets how many folders are tried; each is made from its number alone. `prepare`'s whole look at a
model is taken, but for the small copy, which is tried of every `REHEARSED`th folder alone, because it takes seconds.
Anything but a UserError, more than `SECONDS`, or more memory than `BYTES` is a failure.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from qlora_trainer.model import architecture
from qlora_trainer.model.source import context_length, describe_model, load_tokenizer, read_facts, tokenizer_digest
from qlora_trainer.outcome import UserError

from orchestrator.api.job import AdapterSpec
from tests.trainer.tiny_model import tiny_model

FOLDERS = int(os.environ.get("QLORA_FUZZ_MODELS", "100"))
SECONDS = 30
BYTES = 3 << 30
"""Of memory that a folder may add: a tiny model's own takes a hundredth of it."""
REHEARSED = 10
MOST_CHARACTERS = 1200
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 63, 10**6, 10**12, 10**30, 0.5, -0.5, 1e308, float("nan"), float("inf"), "", "1",
    "llama", "x" * 5000, "\ud800", "\x00\n", [], [1, 2], [[]], [None] * 3, {}, {"a": 1}, {"rope_type": "yarn"},
    {"rope_type": "?"}, {"rope_theta": "1"}, ["LlamaForCausalLM"], ["GPT2LMHeadModel", 5],
)  # fmt: skip
"""What a field is replaced by."""
TYPES = ("gpt2", "qwen2", "gemma3_text", "bert", "t5", "mixtral", "mamba", "nothing", "clip", "qwen3_moe", "bloom")
EXTRA = ("quantization_config", "rope_parameters", "rope_scaling", "text_config", "layer_types", "auto_map",
         "pad_token_id", "sliding_window", "dtype", "torch_dtype", "num_experts", "use_bidirectional_attention",
         "is_encoder_decoder", "attn_implementation", "transformers_version", "pruned_heads", "per_layer_config",
         "id2label")  # fmt: skip


def _config(draw: random.Random, folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for _ in range(draw.randint(1, 3)):
        name = draw.choice([*config, *EXTRA])
        if draw.random() < 0.25:
            config.pop(name, None)
        elif draw.random() < 0.15:
            config["model_type"] = draw.choice(TYPES)
        else:
            config[name] = draw.choice(VALUES)
    path.write_text(json.dumps(config))


def _json(name: str) -> Callable[[random.Random, Path], None]:
    def damage(draw: random.Random, folder: Path) -> None:
        path = folder / name
        content: Any = json.loads(path.read_text()) if path.exists() else {}
        if not isinstance(content, dict) or not content:
            content = {"eos_token_id": 1}
        key = draw.choice(list(content))
        if draw.random() < 0.2:
            del content[key]
        else:
            content[key] = draw.choice(VALUES)
        path.write_text(json.dumps(content))

    return damage


def _bytes(draw: random.Random, folder: Path) -> None:
    path = draw.choice([each for each in sorted(folder.iterdir()) if each.is_file()])
    content = bytearray(path.read_bytes())
    kind = draw.randrange(5)
    if kind == 0:
        content = content[: draw.randrange(len(content))]
    elif kind == 1:
        content[draw.randrange(min(64, len(content)))] ^= 1 << draw.randrange(8)
    elif kind == 2:
        content += bytes(draw.randrange(1, 100))
    elif kind == 3:
        content = bytearray(
            draw.choice([b"", b"\xff\xfe", b"[" * 100_000, b"version https://git-lfs.github.com/spec/v1\n"])
        )
    else:
        start = draw.randrange(len(content))
        content[start : start + 20] = draw.randbytes(20)
    path.write_bytes(bytes(content))


def _header(draw: random.Random, folder: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = draw.choice([each for each in header if each != "__metadata__"])
    kind = draw.randrange(7)
    if kind == 0:
        header[name]["dtype"] = draw.choice(["I8", "F8_E4M3", "F32", "U8", "", 5, None, "F4"])
    elif kind == 1:
        header[name]["shape"] = draw.choice([[], [1], [-1, 4], [10**12, 10**12], ["4"], None, [2.5], [[1]]])
    elif kind == 2:
        header[name]["data_offsets"] = draw.choice([[0, 0], [0, 10**15], [5, 1], [], None, ["0", "4"], [-8, 8]])
    elif kind == 3:
        header[f"model.{draw.choice(['extra', 'layers.7.q_proj.weight', ''])}"] = header[name]
    elif kind == 4:
        header[name.replace("model.", "")] = header.pop(name)
    elif kind == 5:
        header[name] = draw.choice([None, [], {}, "x", 7])
    else:
        del header[name]
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + content[8 + length :])


def _index(draw: random.Random, folder: Path) -> None:
    weight_map: Any = {f"model.layers.{layer}.x": "model.safetensors" for layer in range(3)}
    if draw.random() < 0.5:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    odd = draw.choice([weight_map, {}, None, [], {"a": None}, {"a": "../../etc/passwd"}, {"a": "model.safetensors"},
                       {"a": "x" * 300}, {"": ""}, {"a": "."}, {"a": "config.json"}])  # fmt: skip
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": odd}))


def _files(draw: random.Random, folder: Path) -> None:
    name = draw.choice([each.name for each in sorted(folder.iterdir())])
    kind = draw.randrange(5)
    if kind == 0:
        (folder / name).unlink()
    elif kind == 1:
        (folder / "adapter_config.json").write_text(draw.choice(["{}", "[]", "x", '{"base_model_name_or_path": 5}']))
    elif kind == 2:
        (folder / name).unlink()
        (folder / name).mkdir()
    elif kind == 3:
        (folder / name).unlink()
        (folder / name).symlink_to(draw.choice(["nowhere", name, "/dev/null"]))
    else:
        (folder / name).rename(
            folder / draw.choice(["model.gguf", "pytorch_model.bin", "chat_template.jinja", "a.json"])
        )


DAMAGES: tuple[Callable[[random.Random, Path], None], ...] = (
    _config, _config, _config, _json("tokenizer.json"), _json("tokenizer_config.json"), _json("generation_config.json"),
    _bytes, _header, _header, _index, _files,
)  # fmt: skip


@pytest.mark.parametrize("first", range(0, FOLDERS, 10))
def test_a_damaged_folder_is_refused_in_a_sentence_or_is_a_model(
    first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rehearse = architecture.rehearse
    for number in range(first, min(first + 10, FOLDERS)):
        folder = tmp_path / str(number)
        shutil.copytree(tiny_model(), folder)
        draw = random.Random(number)
        draw.choice(DAMAGES)(draw, folder)
        monkeypatch.setattr(architecture, "rehearse", rehearse if number % REHEARSED == 0 else lambda *_: None)
        began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        refusal = _refusal(f"file://{folder}", folder)
        if refusal is not None:
            assert len(refusal) <= MOST_CHARACTERS, (number, refusal)
            assert str(folder) in refusal or "adapter" in refusal, (number, refusal)
        assert time.monotonic() - began < SECONDS, number
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BYTES, number


def _refusal(source: str, folder: Path) -> str | None:
    """What prepare says against a folder; whatever else it raises is a failure."""
    try:
        _look_at(source, folder)
    except UserError as error:
        return error.message
    return None


def _look_at(source: str, folder: Path) -> None:
    """What prepare asks of a model."""
    description = describe_model(source, "main")
    read_facts(description, source)
    architecture.check_architecture(description, source, AdapterSpec())
    load_tokenizer(description.folder, source, None)
    tokenizer_digest(folder)
    context_length(description, source)
