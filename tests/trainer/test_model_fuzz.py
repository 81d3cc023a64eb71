"""Model folders that were damaged at random: each is refused by prepare in a sentence, or it is trained and published.

`QLORA_FUZZ_MODELS` sets how many folders are tried; each is made from its number alone, and goes through the stages
themselves. Of the hundred that are tried without that switch, only every `WHOLE`th does, because it takes seconds; of
the others prepare's look at a model is taken, without the small copy. Anything but a UserError in prepare, more than
`SECONDS`, or more memory than `BYTES` is a failure; so is a user's error later, because a GPU would have been taken.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from qlora_trainer import prepare, publish, train
from qlora_trainer.model import architecture
from qlora_trainer.model.source import describe_model, load_tokenizer, read_facts, tokenizer_digest
from qlora_trainer.outcome import DivergedError, UserError

from orchestrator.api.job import AdapterSpec, QLoRAJobSpec
from orchestrator.api.plan import MemoryPlan
from orchestrator.api.task import StageTask
from tests.trainer.tiny_model import build_tiny_model, tiny_model

FOLDERS = int(os.environ.get("QLORA_FUZZ_MODELS", "100"))
WHOLE = 1 if "QLORA_FUZZ_MODELS" in os.environ else 10
SECONDS = 60
BYTES = 3 << 30
"""Of memory that a folder may add: a tiny model's own takes a hundredth of it."""
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
    path = draw.choice(sorted(folder.glob("*.safetensors")))
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
    if draw.random() < 0.5 and (folder / "model.safetensors").exists():
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


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """MLflow on a SQLite file, and the id of an experiment in it."""
    folder = tmp_path_factory.mktemp("tracking")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        yield MlflowClient().create_experiment("fuzz", artifact_location=(folder / "artifacts").as_uri())


@pytest.mark.filterwarnings("ignore")  # of whatever libraries find odd in damaged files, and of MLflow's own
@pytest.mark.parametrize("first", range(0, FOLDERS, 10))
def test_a_damaged_folder_is_refused_in_a_sentence_or_is_trained_and_published(
    first: int, tmp_path: Path, tracking: str
) -> None:
    for number in range(first, min(first + 10, FOLDERS)):
        folder, store = tmp_path / str(number), tmp_path / f"store-{number}"
        draw = random.Random(number)
        shutil.copytree(_healthy(draw), folder)
        draw.choice(DAMAGES)(draw, folder)
        began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            refusal = _tried(folder, store, number, tracking)
        except Exception as error:
            raise AssertionError(f"folder {number} ends with {type(error).__name__}") from error
        if refusal is not None:
            assert len(refusal) <= MOST_CHARACTERS, (number, refusal)
            assert str(folder) in refusal or "adapter" in refusal, (number, refusal)
        assert time.monotonic() - began < SECONDS, number
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BYTES, number


def _healthy(draw: random.Random) -> Path:
    """A model to damage: dense, tied, a mixture, or in shards."""
    kind = draw.choice(("llama", "llama", "tied", "mixture", "shards"))
    if kind == "shards":
        return _sharded()
    return tiny_model("qwen3_moe") if kind == "mixture" else tiny_model(tied=kind == "tied")


@cache
def _sharded() -> Path:
    folder = tiny_model(layers=3).with_name("shards")
    return build_tiny_model(folder, layers=3, max_shard_size="100KB")


def _tried(folder: Path, store: Path, number: int, experiment: str) -> str | None:
    """What prepare says against a folder; whatever else is raised is a failure."""
    try:
        if number % WHOLE:
            _look_at(folder)
            return None
        task = _task(folder, store, number)
        prepared = prepare.run(task)
    except UserError as error:
        return error.message
    plan = MemoryPlan(micro_batch_size=1, accumulation_steps=1, recompute_layers=0, loss_chunk_tokens=16)
    task = task.model_copy(update={"stage": "train", "prepared": prepared, "plan": plan})
    if not _trained(task):
        return None
    run_id = MlflowClient().create_run(experiment, tags={"qlora.dev/job-uid": task.uid}).info.run_id
    publish.run(task.model_copy(update={"stage": "publish", "run_id": run_id}))
    return None


def _trained(task: StageTask) -> bool:
    """Whether training comes to an end; it may find that weights, which it alone reads, are no numbers."""
    try:
        train.run(task)
    except DivergedError:
        return False
    except UserError as error:
        if "weights that are not finite" not in error.message:
            raise AssertionError("a GPU was taken for it") from error
        return False
    return True


def _task(folder: Path, store: Path, number: int) -> StageTask:
    data = folder.with_name(f"data-{number}.jsonl")
    data.write_text(json.dumps({"prompt": "hello", "completion": "good morning"}) + "\n")
    spec = {
        "model": {"source": folder.as_uri()},
        "dataset": {"source": data.as_uri(), "format": "prompt-completion"},
        "adapter": {"rank": 4},
        "training": {"sequenceLength": 64, "maxSteps": 1, "globalBatchSize": 1},
    }
    return StageTask(
        stage="prepare", namespace="fuzz", job=f"folder-{number}", uid=f"u-{number}", attempt=1,
        spec=QLoRAJobSpec.model_validate(spec), store_uri=store.as_uri(), threads=1, grace_seconds=60,
    )  # fmt: skip


def _look_at(folder: Path) -> None:
    """What prepare asks of a model, but for a step on a small copy."""
    source = folder.as_uri()
    description = describe_model(source, "main")
    read_facts(description, source)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(architecture, "rehearse", lambda *_, **__: None)
        architecture.check_architecture(description, source, AdapterSpec())
    load_tokenizer(description.folder, source, None)
    tokenizer_digest(folder)
