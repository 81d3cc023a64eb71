"""The merged model against PEFT's own merging, on models of several kinds; whatever is killed, it ends whole."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from peft_adapter import save_adapter, with_peft
from qlora_trainer import publish
from qlora_trainer.exporting import export as exporting
from qlora_trainer.exporting.merging import ROWS_BYTES, Adapter, WeightFile
from qlora_trainer.exporting.safetensors_file import write_safetensors
from qlora_trainer.model.architecture import refuse_unmergeable
from qlora_trainer.model.source import TensorShape, describe_model, known_config
from qlora_trainer.outcome import UserError
from qlora_trainer.storage.backends import FileSystem
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_model import build_tiny_model, tiny_model
from toy_publish import publish_task, store_with_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT, MLflow and SQLAlchemy speak of their own deprecations

TOKENS = torch.tensor([[5, 9, 100, 42, 7, 300, 21, 8, 77]])


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=TOKENS).logits.float()


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    client = MlflowClient(tracking_uri=uri)
    client.create_experiment(
        "team-a", artifact_location=(tmp_path / "artifacts").as_uri(), tags={"qlora.dev/namespace": "team-a"}
    )
    return client


def exported(tmp_path: Path, base: Path, adapter: Path, *formats: str) -> Path:
    """The folder of a job's formats."""
    store = store_with_adapter(tmp_path / "store", base, adapter)
    task = publish_task(store, base, formats or ("merged",))
    publish.make_formats(task, store, publish.fetch_adapter(store, tmp_path / "fetched"))
    return tmp_path / "store" / "formats"


KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "LoRA on llama": ("llama", {}, {}),
    "rsLoRA on qwen2, which has biases": ("qwen2", {}, {"use_rslora": True}),
    "DoRA on qwen3 in two files": ("qwen3", {"max_shard_size": "200KB"}, {"use_dora": True}),
    "LoRA on some layers of a tied llama": ("llama", {"tied": True}, {"target_modules": ["v_proj", "down_proj"]}),
    "LoRA on the attention of experts": ("qwen3_moe", {}, {"target_modules": ["q_proj", "v_proj"]}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_folder_is_what_peft_merges(tmp_path: Path, kind: str) -> None:
    family, shape, lora = KINDS[kind]
    base = build_tiny_model(tmp_path / "base", family, **shape)
    adapter = save_adapter(base, tmp_path / "adapter", **lora)
    folder = exported(tmp_path, base, adapter) / "merged"
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert merged.dtype is torch.bfloat16
    judge = with_peft(base, adapter).merge_and_unload()
    weights, plain = dict(judge.named_parameters()), dict(AutoModelForCausalLM.from_pretrained(base).named_parameters())
    changed = 0
    for name, parameter in merged.named_parameters():
        wanted = weights[name].to(torch.bfloat16)
        # Sums in float32 in another order may be rounded to the other of two neighbours.
        torch.testing.assert_close(parameter, wanted, rtol=2**-7, atol=1e-6)
        assert (parameter == wanted).float().mean() > 0.99, name
        changed += not torch.equal(parameter, plain[name].to(torch.bfloat16))
    assert changed == 2 * len(lora.get("target_modules", range(7)))
    assert (
        AutoTokenizer.from_pretrained(folder)("La disnea").input_ids
        == AutoTokenizer.from_pretrained(base)("La disnea").input_ids
    )
    assert AutoTokenizer.from_pretrained(folder).chat_template == AutoTokenizer.from_pretrained(base).chat_template
    beside = logits(with_peft(base, adapter))
    error, effect = (
        (logits(merged.float()) - beside).norm(),
        (logits(with_peft(base, adapter).base_model.unload()) - beside).norm(),
    )
    assert error < 0.05 * effect, "what rounding to 16 bits does is small against what the adapter does"


def test_a_base_in_float32_becomes_one_in_16_bits(tmp_path: Path) -> None:
    base = build_tiny_model(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).save_pretrained(base)
    folder = exported(tmp_path, base, save_adapter(base, tmp_path / "adapter")) / "merged"
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    found = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in found.values() if tensor.dim() > 1} == {torch.bfloat16}
    assert {tensor.dtype for tensor in found.values() if tensor.dim() == 1} == {torch.float32}
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype is torch.bfloat16


def test_what_the_adapter_is_not_on_keeps_its_bits(tmp_path: Path) -> None:
    base = tiny_model("qwen2")
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    merged = load_file(exported(tmp_path, base, adapter) / "merged" / "model.safetensors")
    for name, tensor in load_file(base / "model.safetensors").items():
        assert torch.equal(merged[name], tensor) == ("q_proj.weight" not in name)


def test_the_version_says_where_the_formats_are_and_a_repeat_makes_none_anew(
    client: MlflowClient, tmp_path: Path
) -> None:
    base = tiny_model()
    store = store_with_adapter(tmp_path / "store", base, save_adapter(base, tmp_path / "adapter"))
    experiment = client.get_experiment_by_name("team-a")
    assert experiment is not None
    run_id = client.create_run(experiment.experiment_id, tags={"qlora.dev/job-uid": "u-1"}).info.run_id
    task = publish_task(store, base, ("merged",), run_id=run_id)
    first = publish.run(task)
    weights = tmp_path / "store" / "formats" / "merged" / "model.safetensors"
    made = weights.stat()
    assert publish.run(task) == first
    assert (weights.stat().st_ino, weights.stat().st_mtime_ns) == (made.st_ino, made.st_mtime_ns)
    tags = client.get_model_version(first.registered_model, first.model_version).tags
    assert tags["qlora.dev/format/merged"] == f"{store.uri}/formats/merged"


def test_a_base_that_has_changed_since_is_refused(tmp_path: Path) -> None:
    base = build_tiny_model(tmp_path / "base")
    store = store_with_adapter(tmp_path / "store", base, save_adapter(base, tmp_path / "adapter"))
    task = publish_task(store, base, ("merged",))
    build_tiny_model(base, layers=3)
    with pytest.raises(UserError, match=r"spec\.publish\.formats.*is not what it was when the job was prepared"):
        exporting.export(task, store, publish.fetch_adapter(store, tmp_path / "fetched"))


@contextmanager
def killed_at(instant: int) -> Iterator[None]:
    """In a child: SIGKILL before or after a file is put into its place."""
    count = 0
    add = FileSystem.add

    def interruptible(*arguments: Any) -> None:
        nonlocal count
        for step in (lambda: None, lambda: add(*arguments)):
            step()
            if count == instant:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    FileSystem.add = interruptible
    try:
        yield
    finally:
        FileSystem.add = add


def test_a_kill_at_any_file_goes_on_where_it_was(tmp_path: Path) -> None:
    base = build_tiny_model(tmp_path / "base", max_shard_size="100KB")
    adapter = save_adapter(base, tmp_path / "adapter")
    whole = exported(tmp_path / "whole", base, adapter) / "merged"
    names = sorted(path.name for path in whole.iterdir())
    assert sum(name.endswith(".safetensors") for name in names) > 2
    for instant in range(0, 2 * (len(names) - 1), 5):
        store = store_with_adapter(tmp_path / f"killed-{instant}", base, adapter)
        task, fetched = publish_task(store, base, ("merged",)), publish.fetch_adapter(store, tmp_path / "fetched")
        child = os.fork()
        if child == 0:
            with killed_at(instant):
                exporting.export(task, store, fetched)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        folder = tmp_path / f"killed-{instant}" / "formats" / "merged"
        assert not (folder / "manifest.json").exists()
        known = {path: path.stat().st_ino for path in folder.iterdir()} if folder.exists() else {}
        later = task.model_copy(update={"attempt": 3})
        store.take_fence(3)
        exporting.export(later, store, fetched)
        assert sorted(path.name for path in folder.iterdir()) == names
        for name in names:
            if name != "manifest.json":
                assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
        kept = sum(path.stat().st_ino == inode for path, inode in known.items())
        assert kept >= len(known) - 1, "one may have been moved and not remembered"
        assert not (tmp_path / f"killed-{instant}" / "added" / "formats").exists() or not list(
            (tmp_path / f"killed-{instant}" / "added" / "formats").iterdir()
        )


@contextmanager
def private_peak() -> Iterator[Callable[[], int]]:
    """How many bytes of its own, mapped files aside, the process has had at the most over what it began with."""

    def own() -> int:
        status = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in status if line.startswith("RssAnon")).split()[1])

    before, done, seen = own(), Event(), [0]

    def watch() -> None:
        while not done.wait(0.002):
            seen.append(own() - before)

    thread = Thread(target=watch)
    thread.start()
    try:
        yield lambda: max(seen)
    finally:
        done.set()
        thread.join()


def test_memory_is_bounded_whatever_the_size_of_a_tensor(tmp_path: Path) -> None:
    base = tiny_model()
    adapter = Adapter(save_adapter(base, tmp_path / "adapter", target_modules=["q_proj"]))
    module = adapter.modules[0]
    rows = 12 * ROWS_BYTES // (64 * 2)  # in 16 bits
    a, _ = adapter.matrices(module)
    save_file({"w": torch.ones(rows, 64, dtype=torch.bfloat16)}, tmp_path / "large.safetensors")
    wide = torch.full((rows, 4), 0.5, dtype=torch.bfloat16)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "wide").mkdir()
    (tmp_path / "wide" / "adapter_config.json").write_text(json.dumps(config))
    keys = {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": wide}
    save_file(keys, tmp_path / "wide" / "adapter_model.safetensors")
    del wide, keys
    with (
        private_peak() as peak,
        WeightFile(tmp_path / "large.safetensors", Adapter(tmp_path / "wide"), {"w": module}) as file,
    ):
        write_safetensors(tmp_path / "merged.safetensors", file.tensors())
    assert peak() < 10 * ROWS_BYTES, "in float32 the tensor takes 24 times ROWS_BYTES"
    with safe_open(tmp_path / "merged.safetensors", framework="pt") as file:
        wanted = 1 + 4.0 * 0.5 * a.float().sum(dim=0)
        torch.testing.assert_close(file.get_slice("w")[rows - 1 : rows][0].float(), wanted, rtol=2**-7, atol=1e-6)


def test_models_that_no_adapter_is_merged_into_are_refused_before_a_gpu_is_taken(tmp_path: Path) -> None:
    base = tiny_model()
    source = base.as_uri()
    description, config = describe_model(source, "main"), known_config(base, source)
    assert description.tensors is not None
    tensors = dict(description.tensors)
    refuse_unmergeable(tensors, source, config, ["q_proj"])
    with pytest.raises(UserError, match="has no weights to merge"):
        refuse_unmergeable(None, source, config, ["q_proj"])
    fp8 = {**tensors, "model.norm.weight": TensorShape(dtype="F8_E4M3", shape=(64,))}
    with pytest.raises(UserError, match=r"holds model\.norm\.weight in F8_E4M3"):
        refuse_unmergeable(fp8, source, config, ["q_proj"])
    gpt2 = build_tiny_model(tmp_path / "gpt2", "gpt2", n_embd=64, n_layer=2, n_head=4)
    transposed = describe_model(gpt2.as_uri(), "main")
    with pytest.raises(UserError, match=r"stores the weight of .*c_attn otherwise than the model has it"):
        refuse_unmergeable(transposed.tensors, "gpt2", known_config(gpt2, "gpt2"), ["c_attn"])


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"r": 4}, "--enable-lora --max-lora-rank 8 --lora-modules medical-es=FOLDER"),
        ({"r": 64, "use_rslora": True}, "--max-lora-rank 64 "),
        ({"use_dora": True}, "vLLM does not take this adapter: it has no DoRA; publish the merged model"),
    ],
)
def test_the_card_says_how_vllm_serves_the_adapter_or_why_not(tmp_path: Path, lora: dict[str, Any], words: str) -> None:
    base = tiny_model()
    store = store_with_adapter(tmp_path / "store", base, save_adapter(base, tmp_path / "adapter", **lora))
    task = publish_task(store, base, ("merged",))
    card = publish.model_card(task, publish.fetch_adapter(store, tmp_path / "fetched"), {})
    assert words in card
    assert f"- `merged`: `{store.uri}/formats/merged`" in card
