"""Every number that comes from outside has a bound, and what is beyond it is refused in words."""

from __future__ import annotations

import json
import math
import subprocess
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from orchestrator.api.base import SourceUri
from orchestrator.api.formats import JournalRecord
from orchestrator.api.job import QLoRAJob, QLoRAJobSpec, QLoRAJobStatus, TrackingSpec
from orchestrator.api.model_facts import MAX_LAYERS, ModelFacts
from orchestrator.api.plan import MemoryPlan
from orchestrator.api.results import PrepareResult, ProgressReport, StageResult
from orchestrator.api.task import TASK_VARIABLE, StageTask, task_text, task_variables
from tests.builders import NOW, prepare_result

SOURCES = {"model": {"source": "hf://owner/model"}, "dataset": {"source": "hf://owner/data"}}
CONFIG: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 1000,
}


# --- a model's config --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("num_hidden_layers", 1500, "num_hidden_layers must be at most 1,024"),
        ("num_hidden_layers", 10**7, "num_hidden_layers must be at most 1,024"),
        ("hidden_size", 10**400, "hidden_size must be at most 1,048,576"),
        ("hidden_size", -(10**400), "hidden_size must be a positive integer, not one beyond all bounds"),
        ("vocab_size", 10**9, "vocab_size must be at most 16,777,216"),
        ("hidden_size", "64\x1b[2J", r"hidden_size must be a positive integer, not '64\x1b[2J'"),
        ("model_type", ["\u202e" * 100], "model_type must be a text, not ['\\u202e"),
        ("architectures", {"a": "b" * 500}, "architectures must be a list of class names, not {'a': 'bbb"),
    ],
)
def test_a_config_beyond_the_bounds_is_refused_in_words(field: str, value: object, expected: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are looked at below
        ModelFacts.from_config({**CONFIG, field: value}, "r")
    assert expected in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": [], "factor": 2.0},
        {"rope_type": {"yarn": 1}, "factor": 2.0},
        {"rope_type": "yarn", "factor": math.nan},
        {"rope_type": "yarn", "factor": math.inf},
        {"rope_type": "yarn", "factor": 10**400},
        {"rope_type": "yarn", "factor": -2.0},
        {"rope_type": "yarn", "factor": "2"},
        {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 10**400},
        {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": [64]},
    ],
)
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_a_rotary_embedding_that_is_none_stretches_no_context(name: str, rope: dict[str, object]) -> None:
    for odd in (rope, {"full_attention": rope}):
        facts = ModelFacts.from_config({**CONFIG, "max_position_embeddings": 128, name: odd}, "r")
        assert facts.context_length == 128


def test_a_plan_can_recompute_as_many_layers_as_a_model_may_have() -> None:
    assert ModelFacts.from_config({**CONFIG, "num_hidden_layers": MAX_LAYERS}, "r").num_layers == MAX_LAYERS
    MemoryPlan(micro_batch_size=1, accumulation_steps=1, recompute_layers=MAX_LAYERS)


# --- what stages report ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("figure", [math.nan, math.inf, -math.inf])
def test_a_figure_that_is_no_number_is_absent(figure: float) -> None:
    """JSON cannot say it: the API server would refuse the status, over and over again."""
    report = ProgressReport(stage="train", step=1, loss=figure, eval_loss=figure, eta_seconds=figure, time=NOW)
    assert (report.loss, report.eval_loss, report.eta_seconds) == (None, None, None)
    parsed = StageResult.model_validate_json(
        json.dumps({"train": {"step": 1, "complete": False, "trainLoss": figure, "evalLoss": 1.5}})
    )
    assert parsed.train is not None
    assert (parsed.train.train_loss, parsed.train.eval_loss) == (None, 1.5)


def test_a_journal_leaves_out_what_is_no_number_and_reads_its_own_lines() -> None:
    record = JournalRecord(step=1, time_ms=1, metrics={"train/loss": math.nan, "train/grad_norm": 2.0})
    assert record.metrics == {"train/grad_norm": 2.0}
    assert JournalRecord.model_validate_json(record.model_dump_json()) == record
    old = JournalRecord.model_validate_json('{"step": 1, "time_ms": 1, "metrics": {"train/loss": null}}')
    assert old.metrics == {}


@pytest.mark.parametrize("field", ["steps", "trainTokens", "evalRecords", "truncatedRecords"])
def test_a_count_that_no_store_takes_is_refused(field: str) -> None:
    wire = prepare_result().to_wire()
    with pytest.raises(ValidationError, match=field):
        PrepareResult.model_validate({**wire, field: 10**30})


def test_times_have_a_zone() -> None:
    """Those of several writers are subtracted from each other."""
    with pytest.raises(ValidationError, match="timezone"):
        QLoRAJobStatus(retry_after=datetime(2026, 1, 1))


# --- what is submitted -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", ["1e30", "1000001", "9999999999"])
def test_more_epochs_than_steps_can_be_counted_in_are_refused(epochs: str) -> None:
    with pytest.raises(ValidationError, match="epochs must be at most 1000000"):
        QLoRAJobSpec.model_validate({**SOURCES, "training": {"epochs": epochs}})


UNADDRESSABLE = [
    "",
    " ",
    ".",
    "..",
    "a/b",
    "a:b",
    "a?b",
    "a\nb",
    " a",
    "a ",
    "tab\t",
    "\u00a0a",
    "a\u202eb",
    "a\u200bb",
]
UNADDRESSABLE += ["\ufeffa", "a\u2028b", "\x7f", "a" * 257]


@pytest.mark.parametrize("name", UNADDRESSABLE, ids=ascii)
def test_a_registered_name_that_mlflow_cannot_address_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match="registeredModel"):
        TrackingSpec.model_validate({"registeredModel": name})


@pytest.mark.parametrize("name", ["a", "medical-es", "Médico 2", "模型", "a.b", "...", "x@y", "100%", "a" * 256])
def test_a_registered_name_that_it_can_is_taken(name: str) -> None:
    assert TrackingSpec.model_validate({"registeredModel": name}).registered_model == name


@pytest.mark.parametrize("alias", ["", "a" * 256, "1a", "a b", "latest", "v1", "a\n"])
def test_an_alias_that_mlflow_refuses_is_refused(alias: str) -> None:
    with pytest.raises(ValidationError, match="alias"):
        TrackingSpec.model_validate({"alias": alias})


@pytest.mark.parametrize(
    "template", ["llama 3", "templates/chat.jinja", "alpaca", "{messages}", "{{ x }}\x1b", "{{ '模' }}" * 9000]
)
def test_a_template_that_is_none_or_that_no_task_can_carry_is_refused(template: str) -> None:
    with pytest.raises(ValidationError, match="chatTemplate"):
        QLoRAJob.model_validate(
            {
                "metadata": {"name": "a"},
                "spec": {**SOURCES, "model": {"source": "hf://o/n", "chatTemplate": template}},
            }
        )


LARGEST = ["{{ x }}" + character * (48 * 1024 - 7) for character in ('"', "\n", "x")]
LARGEST += ["{{ x }}" + "模" * ((48 * 1024 - 7) // 3)]


@pytest.mark.parametrize("template", LARGEST, ids=lambda text: ascii(text[-1]))
def test_the_largest_template_fits_the_variable_that_carries_it(template: str) -> None:
    """Linux takes 131,072 bytes of one variable, its name and the end included; everything else has its share."""
    wide = {"source": "hf://" + "a" * 1019, "chatTemplate": template}
    spec: dict[str, Any] = {
        "model": wide,
        "dataset": {"source": "hf://" + "a" * 1019, "evalSource": "hf://" + "a" * 1019},
    }
    task = StageTask(
        stage="train",
        namespace="a" * 63,
        job="b" * 48,
        uid="1" * 36,
        attempt=1,
        store_uri="file:///" + "s" * 2000,
        spec=QLoRAJobSpec.model_validate({**spec, "adapter": {"targetModules": ["m" * 128] * 64}}),
        prepared=prepare_result(),
    )
    assert len(f"{TASK_VARIABLE}={task.model_dump_json(by_alias=True)}\0".encode()) < 128 * 1024


@settings(max_examples=300)
@given(
    scheme=st.sampled_from(("hf", "pvc", "s3", "file")),
    rest=st.one_of(st.text(max_size=20), st.text("[]@:/?#a.\\%ａ／", max_size=12)),
)
@example(scheme="s3", rest="[a/b")
@example(scheme="pvc", rest="a＃b/c")
def test_a_uri_that_is_accepted_can_be_split(scheme: str, rest: str) -> None:
    try:
        uri = TypeAdapter(SourceUri).validate_python(f"{scheme}://{rest}")
    except ValidationError:
        return
    assert urlsplit(uri).scheme == scheme


@pytest.mark.parametrize("letter", ["a", "\N{MATHEMATICAL BOLD SMALL A}"], ids=["one-byte", "four-bytes"])
def test_a_task_as_large_as_the_largest_object_of_a_server_reaches_a_process(letter: str) -> None:
    """An API server takes 1.5 MiB, and Linux 128 KiB a variable and 2 MiB of all."""
    text = letter * (3 * 2**19 // len(letter.encode()))
    printed = subprocess.run(["env", "-0"], env=task_variables(text), capture_output=True, check=True).stdout.decode()
    assert task_text(dict(line.split("=", 1) for line in printed.split("\0") if line)) == text
