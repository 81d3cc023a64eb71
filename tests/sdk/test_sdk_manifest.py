"""Every mistake in a manifest gets a line that says where it is and what to write instead."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from orchestrator.api.job import QLoRAJob, TrackingSpec, TrainingSpec
from orchestrator.api.queue import QLoRAQueue
from orchestrator.errors import InvalidObject
from orchestrator.sdk.manifest import MAX_MANIFEST_BYTES, load_manifest, parse_manifest, parse_object

JOB = """\
apiVersion: qlora.dev/v1alpha1
kind: QLoRAJob
metadata: {name: medical}
spec:
  model: {source: "hf://meta-llama/Llama-3.1-8B"}
  dataset: {source: "file:///data/train.jsonl"}
"""
LINE_OF_EXTRA = 7


@pytest.mark.parametrize(
    ("written", "sent"),
    [
        ("3", "3"),
        ("0.5", "0.5"),
        ("2.0e-4", "0.0002"),
        ("1.0e-8", "1e-08"),
        ("0", "0"),
        ('"2e-4"', "2e-4"),
        ("2e-4", "2e-4"),
    ],
)
def test_a_number_is_sent_as_text(written: str, sent: str) -> None:
    (job,) = parse_manifest(f"{JOB}  training: {{neftuneAlpha: {written}}}\n", name="job.yaml", folder=Path("/jobs"))
    assert isinstance(job, QLoRAJob)
    assert job.spec.training.neftune_alpha == sent
    assert TrainingSpec(neftune_alpha=yaml.safe_load(written)).neftune_alpha == sent


def message_of(text: str) -> str:
    with pytest.raises(InvalidObject) as caught:
        parse_manifest(text, name="job.yaml", folder=Path("/jobs"))
    return str(caught.value)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (
            "  tracking: {experiment: 2.0e-4}",
            'spec.tracking.experiment: must be text; found the number 2.0e-4; write it in quotes: "2.0e-4"',
        ),
        ("  training: {learningRate: -2.0e-4}", "must be a decimal number of at least 0"),
        ("  training: {epochs: true}", "spec.training.epochs: must be text; found true"),
        ("  training: {warmupRatio: 5%}", 'found "5%"; write "0.05"'),
        ('  training: {warmupRatio: "0,05"}', 'found "0,05"; write "0.05"'),
        ('  training: {weightDecay: "-1"}', "must be a decimal number of at least 0"),
        (
            '  training: {learning_rate: "2e-4"}',
            "spec.training.learning_rate: unknown field; did you mean learningRate?",
        ),
        ('  training: {learningRte: "2e-4"}', "spec.training.learningRte: unknown field; did you mean learningRate?"),
        ('  learningRate: "2e-4"', "spec.learningRate: unknown field here; it belongs in spec.training.learningRate"),
        ("  xyzzy: 1", "spec.xyzzy: unknown field; known are model, dataset, adapter"),
        ('  training: {packing: "yes"}', 'spec.training.packing: must be true or false, without quotes; found "yes"'),
        (
            "  training: {scheduler: cosin}",
            'must be one of constant, linear, cosine; found "cosin"; did you mean cosine?',
        ),
        ("  training: {globalBatchSize: 0}", "spec.training.globalBatchSize: must be at least 1; found 0"),
        ('  training: {learningRate: "0"}', "spec.training: learningRate must be above 0"),
        ("  adapter: {rank: 1000}", "spec.adapter.rank: must be at most 512; found 1000"),
        (
            '  adapter: {rank: "16"}',
            'spec.adapter.rank: must be a whole number, without quotes or decimals; found "16"',
        ),
        ('  adapter: {dropout: "1.5"}', 'dropout must be at least 0 and below 1; found "1.5"'),
        ("  adapter: {targetModules: all}", 'spec.adapter.targetModules: must be all-linear or a list; found "all"'),
        ("  adapter: {targetModules: [q proj]}", "spec.adapter.targetModules[0]: does not match"),
        (
            "  resources: {vram: 48GB}",
            'spec.resources.vram: must be auto or a quantity in Gi; found "48GB"; write "48Gi"',
        ),
        (
            "  resources: {vram: 48}",
            'spec.resources.vram: must be auto or a quantity in Gi; found the number 48; write "48Gi"',
        ),
        ("  resources: {vram: 49152Mi}", 'found "49152Mi"; write "48Gi"'),
        ("  resources: {vram: lots}", 'spec.resources.vram: must be auto or a quantity in Gi; found "lots"'),
        ("  resources: {gpuClasses: 24Gi}", 'spec.resources.gpuClasses: must be a list; found "24Gi"'),
        ("  queue: Team_A", 'found "Team_A"; write "team-a"'),
        ("  queue: no", "spec.queue: must be text; found false; YAML reads yes, no, on and off as true or false"),
        (
            '  store: {uri: "hf://a/b"}',
            "spec.store.uri: must be one of file:///path, s3://bucket/prefix, pvc://claim/path",
        ),
        ("  store: {uri: /data/store}", 'found "/data/store"; write "file:///data/store"'),
        ("  checkpoint: 3", "spec.checkpoint: must be a mapping of fields; give it fields or leave it out; found 3"),
        ("  tracking: {alias: latest}", "alias must not be `latest`"),
        ('  suspend: "true"', 'spec.suspend: must be true or false, without quotes; found "true"'),
    ],
)
def test_a_wrong_field_is_named_with_its_line_and_what_is_right(extra: str, expected: str) -> None:
    message = message_of(f"{JOB}{extra}\n")
    assert expected in message
    assert message.startswith(f"job.yaml, line {LINE_OF_EXTRA}: ")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("medical", "Medical_ES", 'metadata.name: may hold lower-case letters, digits and \'-\''),
        ("medical", "123", 'metadata.name: must be text; found the number 123; write it in quotes: "123"'),
        ('"hf://meta-llama/Llama-3.1-8B"', "meta-llama/Llama-3.1-8B", 'write "hf://meta-llama/Llama-3.1-8B"'),
        ('"hf://meta-llama/Llama-3.1-8B"', "https://example.com/m", "nothing is fetched from the web"),
        ('"file:///data/train.jsonl"', "data/train.jsonl", 'write "file://./data/train.jsonl"'),
        ('"file:///data/train.jsonl"', '"file:///my data/train.jsonl"', "must not contain spaces"),
        ('"file:///data/train.jsonl"', '"file://data/train.jsonl"', "write file://./data/train.jsonl"),
        ("{source: \"file:///data/train.jsonl\"}", "{}", "spec.dataset.source: is required"),
        ("kind: QLoRAJob", "kind: QloraJob", 'kind: is "QloraJob"; did you mean QLoRAJob?'),
        ("kind: QLoRAJob", "kind: Deployment", 'kind: is "Deployment"; write one of QLoRAJob, QLoRAQueue'),
        ("apiVersion: qlora.dev/v1alpha1\n", "", "apiVersion: is missing; write apiVersion: qlora.dev/v1alpha1"),
        ("qlora.dev/v1alpha1", "v1", 'apiVersion: is "v1"; write apiVersion: qlora.dev/v1alpha1'),
    ],
)  # fmt: skip
def test_a_wrong_start_is_told_apart(before: str, after: str, expected: str) -> None:
    assert before in JOB
    assert expected in message_of(JOB.replace(before, after))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "job.yaml: holds no object"),
        ("# nothing\n---\n", "job.yaml: holds no object"),
        ("- 1\n", "must be an object with apiVersion and kind; found [1]"),
        ("a: [1\n", "job.yaml, line 2: not valid YAML"),
        ("a: 1\na: 2\n", "job.yaml, line 2: not valid YAML: the key a stands twice"),
        ("a: !!python/object/apply:os.system [ls]\n", "job.yaml, line 1: not valid YAML"),
        ("[" * 600, "job.yaml: not valid YAML"),
    ],
)
def test_what_is_no_manifest_is_refused(text: str, expected: str) -> None:
    assert expected in message_of(text)


def test_aliases_that_would_fill_the_memory_are_refused() -> None:
    lines = ["l0: &l0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 12)]
    text = "apiVersion: qlora.dev/v1alpha1\nkind: QLoRAJob\n" + "\n".join(lines)
    assert "holds more than 100000 values" in message_of(text)


def test_every_problem_is_told_in_the_order_of_the_lines() -> None:
    message = message_of(JOB.replace("medical", "Med") + "  queu: a\n  training:\n    epochs: -3\n    seed: -1\n")
    fields = [line.split(": ")[1] for line in message.splitlines()]
    assert fields == ["metadata.name", "spec.queu", "spec.training.epochs", "spec.training.seed"]


def test_documents_are_numbered_where_there_are_several() -> None:
    message = message_of(f"{JOB}---\n{JOB.replace('medical', 'other')}  priority: high\n")
    assert message.startswith("job.yaml, document 2, line 14: spec.priority: must be a whole number")


def test_a_file_may_hold_jobs_and_queues() -> None:
    queue = "apiVersion: qlora.dev/v1alpha1\nkind: QLoRAQueue\nmetadata: {name: team-a}\nspec: {weight: 2}\n"
    job, team = parse_manifest(f"{JOB}---\n{queue}", name="job.yaml", folder=Path("/jobs"))
    assert isinstance(job, QLoRAJob)
    assert isinstance(team, QLoRAQueue)
    assert (job.metadata.name, team.spec.weight) == ("medical", 2)


def test_relative_files_are_found_beside_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "job.yaml"
    path.write_text(JOB.replace("file:///data/train.jsonl", "file://../train.jsonl") + "  store: {uri: file://./out}\n")
    (job,) = load_manifest(path)
    assert isinstance(job, QLoRAJob)
    assert job.spec.dataset.source == f"file://{tmp_path}/train.jsonl"
    assert job.spec.store is not None
    assert job.spec.store.uri == f"file://{tmp_path}/sub/out"


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"\xff\xfe\x00", "not UTF-8 text"), (b"#" * (MAX_MANIFEST_BYTES + 1), "larger than")],
)
def test_files_that_are_no_text_or_too_large_are_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(content)
    with pytest.raises(InvalidObject, match=expected):
        load_manifest(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidObject, match=r"nowhere\.yaml: cannot be read: No such file or directory"):
        load_manifest(tmp_path / "nowhere.yaml")


def test_what_only_the_service_writes_is_dropped() -> None:
    text = JOB.replace(
        "{name: medical}",
        '{name: medical, uid: u, resourceVersion: "7", generation: 3, annotations: {qlora.dev/cancel: "true", a: b}}',
    )
    (job,) = parse_manifest(f"{text}status: {{summary: done}}\n", name="job.yaml", folder=Path("/jobs"))
    assert isinstance(job, QLoRAJob)
    assert (job.metadata.uid, job.metadata.resource_version, job.metadata.generation) == ("", "", 1)
    assert job.metadata.annotations == {"a": "b"}
    assert job.status.summary == ""


def test_an_object_built_in_python_keeps_its_nulls_and_is_judged_too() -> None:
    (job,) = parse_manifest(JOB, name="job.yaml", folder=Path("/jobs"))
    assert isinstance(job, QLoRAJob)
    spec = job.spec.model_copy(update={"tracking": TrackingSpec(alias=None)})
    again = parse_object(job.model_copy(update={"spec": spec}))
    assert isinstance(again, QLoRAJob)
    assert again.spec.tracking.alias is None
    broken = job.model_copy(update={"spec": spec.model_copy(update={"priority": "high"})})
    with pytest.warns(UserWarning, match="serializ"), pytest.raises(InvalidObject, match=r"spec\.priority"):
        parse_object(broken)
