"""A plan and prepare agree: on models that are refused for their config or files, and on the steps that data gives."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from qlora_trainer.data.dataset import arrange, read_dataset
from qlora_trainer.data.reader import Records
from qlora_trainer.model.architecture import check_architecture
from qlora_trainer.model.source import describe_model, load_tokenizer, read_facts
from qlora_trainer.outcome import UserError

from benchmarks import models
from orchestrator.adapters.job_store import model_config
from orchestrator.api.job import AdapterSpec, DatasetSource, ModelSource, QLoRAJobSpec, TrainingSpec
from orchestrator.api.optimizer_steps import optimizer_steps
from orchestrator.api.packing import FEWEST_ROWS
from orchestrator.errors import InvalidObject, OrchestratorError
from orchestrator.sdk.data_count import count_data
from orchestrator.sdk.preflight import check_planned_model
from tests.trainer.tiny_model import save_tokenizer, tiny_model

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 1048576\n"


def config(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def write(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def rename(name: str, other: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).rename(folder / other) and None


INDEX = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}})
CHANGES: dict[str, Callable[[Path], None]] = {
    "quantized": config(quantization_config={"quant_method": "fp8"}),
    "quantized inside": config(text_config={"quantization_config": {"quant_method": "mxfp4"}}),
    "a text model inside one that holds none": config(text_config={"hidden_size": 8}),
    "a whole model by its text model's class": config(model_type="gemma3", architectures=["Gemma3ForCausalLM"]),
    "classifies": config(architectures=["LlamaForSequenceClassification"]),
    "an encoder and a decoder": config(is_encoder_decoder=True),
    "experts of unknown size": config(num_experts=8),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "a pointer for a config": write("config.json", POINTER),
    "a pointer for weights": write("model.safetensors", POINTER),
    "pickles alone": rename("model.safetensors", "pytorch_model.bin"),
    "GGUF": rename("model.safetensors", "model.gguf"),
    "weights by another name": rename("model.safetensors", "weights.safetensors"),
    "an index of other files beside one file": write("model.safetensors.index.json", INDEX),
    "a stale index": lambda folder: (
        rename("model.safetensors", "model-00001-of-00001.safetensors")(folder),
        write("model.safetensors.index.json", INDEX)(folder),
    )[0],
    "a damaged index": write("model.safetensors.index.json", "[]"),
    "an adapter beside it": write("adapter_config.json", "{}"),
    "an index of nothing": write("model.safetensors.index.json", json.dumps({"weight_map": {}})),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "half of a tokenizer": rename("tokenizer.json", "vocab.json"),
    "a link to nowhere": lambda folder: (folder / "merges.txt").symlink_to("nowhere"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_prepare_refuses_is_no_clean_plan(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model(), folder)
    CHANGES[name](folder)
    source = f"file://{folder}"
    with pytest.raises(UserError):
        read_files(source)
    with pytest.raises(OrchestratorError):
        plan(source)


def test_what_prepare_takes_can_be_planned() -> None:
    source = f"file://{tiny_model()}"
    assert plan(source).hidden_size == read_facts(describe_model(source, "main"), source).hidden_size


def read_files(source: str) -> None:
    """What prepare reads of a model's folder."""
    description = describe_model(source, "main")
    read_facts(description, source)
    load_tokenizer(description.folder, source, None)


def plan(source: str) -> Any:
    check_planned_model(ModelSource(source=source))
    return model_config.read_facts(ModelSource(source=source))


# --- what config.json alone tells, of types and jobs


ROWS = models.known_rows()["types"]


@pytest.mark.parametrize("model_type", models.TYPES)
def test_a_plan_says_of_a_type_what_prepare_was_found_to_say(model_type: str, tmp_path: Path) -> None:
    row = ROWS[model_type]
    if models.NO_DEFAULT in row.get("reason", ""):
        pytest.skip("the type's own defaults are no model")
    try:
        content: Any = models.default_config(model_type)
    except Exception:  # noqa: BLE001 - whatever transformers has against it
        pytest.skip("transformers makes no config of its own defaults")
    content.save_pretrained(tmp_path)
    source = f"file://{tmp_path}"
    said = refusal(lambda: model_config.read_facts(ModelSource(source=source)))
    assert said == (f"{source}: {row['reason']}" if row["verdict"] == "refused" else None)
    if said is None:
        facts = model_config.read_facts(ModelSource(source=source))
        assert facts.record_by_record == ("because" in row)


FIELDS: tuple[dict[str, Any], ...] = (
    {}, {}, {"quantization_config": {"quant_method": "awq"}}, {"architectures": ["XForTokenClassification"]},
    {"architectures": None}, {"architectures": "X"}, {"model_type": "own", "auto_map": {"AutoConfig": "a.B"}},
    {"model_type": "clip"}, {"model_type": None}, {"text_config": {"hidden_size": 8}}, {"is_encoder_decoder": True},
    {"num_experts": 8}, {"num_local_experts": 8}, {"n_routed_experts": 64}, {"use_bidirectional_attention": True},
    {"hidden_size": 1 << 21}, {"num_hidden_layers": 5000}, {"vocab_size": 0}, {"num_attention_heads": "4"},
    {"max_position_embeddings": 64}, {"decoder": {"model_type": "llama"}},
)  # fmt: skip
TARGETS: tuple[Any, ...] = (
    *("all-linear", "all-linear", ("q_proj", "v_proj"), ("c_attn",), ("lm_head",), ("embed_tokens",), ("norm",)),
    ("nothing",),
)  # fmt: skip
FAMILIES = ("llama", "qwen2", "gpt2", "gemma3_text", "bloom", "qwen3_moe", "bert", "mixtral")
PLANS = int(os.environ.get("QLORA_FUZZ_PLANS", "40"))


@pytest.mark.parametrize("number", range(PLANS))
def test_plan_and_prepare_have_one_verdict_where_config_json_says_enough(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_ALLOW_RANDOM_WEIGHTS", "1")
    draw = random.Random(number)
    folder = tmp_path / "model"
    shutil.copytree(tiny_model(draw.choice(FAMILIES)), folder)
    (folder / "model.safetensors").unlink()
    (folder / "random_weights.json").write_text('{"seed": 0}')
    fields, adapter = draw.choice(FIELDS), AdapterSpec(target_modules=draw.choice(TARGETS))
    config(**fields)(folder)
    source = f"file://{folder}"
    in_prepare = refusal(lambda: prepared(source, adapter))
    in_plan = refusal(lambda: model_config.read_facts(ModelSource(source=source), adapter))
    assert (in_plan is None) == (in_prepare is None), (fields, adapter.target_modules, in_plan, in_prepare)


TALK = ("ja ", "Where does it hurt? ", "gripe ", "¿Qué es la fiebre? ", "発熱とは何ですか。", "0x1f9a 77 ")


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
@pytest.mark.parametrize("form", ["messages", "prompt-completion", "text"])
def test_a_count_that_is_called_exact_is_prepares_and_others_are_near(
    form: Any, kind: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Over data and settings of all kinds, with tokenizers of 512 tokens, which need more for a text than others."""
    folder = save_tokenizer(tmp_path / "tokenizer", kind=kind)
    tokenizer, model = load_tokenizer(folder, "tokenizer", None), ModelSource(source=f"file://{folder}")
    draw = random.Random(f"{form} {kind}")
    exact, count = 0, PLANS // 2
    for number in range(count):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("".join(f"{json.dumps(told(form, draw))}\n" for _ in range(draw.choice((3, 40, 150, 500)))))
        training = TrainingSpec(
            packing=draw.random() < 0.8,
            sequence_length=draw.choice((512, 2048)),
            global_batch_size=draw.choice((4, 16)),
            epochs=draw.choice(("1", "2.5", "3")),
            seed=number,
        )
        dataset = DatasetSource(
            source=f"file://{path}",
            format=form,
            eval_fraction=draw.choice(("0", "0.1")),
            too_long=draw.choice(("truncate", "drop", "truncate")),
        )
        counted = count_data(QLoRAJobSpec(model=model, dataset=dataset, training=training))
        records = Records(dataset.source, split="train", scratch=tmp_path, field="spec.dataset.source")
        train = read_dataset(records, tokenizer, dataset, training).train
        sequences = len(arrange(train, training, fewest_rows=FEWEST_ROWS))
        assert counted is not None
        if counted.exact:
            exact += 1
            assert (counted.records, counted.sequences) == (train.samples, sequences), (training, dataset)
            assert counted.steps == optimizer_steps(training, sequences)
        assert 0.8 < counted.sequences / sequences < 1.25
    assert count // 8 < exact < count


def told(form: str, draw: random.Random) -> dict[str, Any]:
    """A record of some hundred characters."""
    question, answer = ("".join(draw.choices(TALK, k=draw.randint(1, 12))) for _ in range(2))
    if form == "messages":
        turns = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
        return {"messages": turns, "source": "what no template writes " * 9}
    return {"prompt": question, "completion": answer} if form == "prompt-completion" else {"text": question + answer}


def prepared(source: str, adapter: AdapterSpec) -> None:
    """What prepare asks of a model."""
    description = describe_model(source, "main")
    read_facts(description, source)
    check_architecture(description, source, adapter)


def refusal(ask: Callable[[], object]) -> str | None:
    """Why it is refused."""
    try:
        ask()
    except (UserError, InvalidObject) as error:
        return str(error)
    return None
