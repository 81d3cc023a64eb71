"""The base install, without any extra: what works, and what says in one line which extra it wants."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

from orchestrator.sdk import extras
from orchestrator.sizing import guess

REPOSITORY = Path(__file__).parents[2]
RUN = "import sys; sys.path[:0] = sys.argv[1:3]; del sys.argv[1:3]; from orchestrator.cli.main import app; app()"


def closure(name: str, found: dict[str, str]) -> dict[str, str]:
    """The distribution and all that it needs, extras aside: normalized name -> name."""
    key = re.sub(r"[-_.]+", "-", name).lower()
    if key not in found:
        found[key] = name
        for text in distribution(name).requires or ():
            if "extra ==" not in text and extras.is_installed(needed := re.split(r"[^\w.-]", text, maxsplit=1)[0]):
                closure(needed, found)
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages as `pip install qlora-orchestrator` leaves it."""
    folder = tmp_path_factory.mktemp("base")
    for name in closure(extras.DISTRIBUTION, {}).values():
        files = distribution(name).files or ()
        tops = {file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            place = folder / top
            if not place.exists():
                place.symlink_to(Path(str(distribution(name).locate_file(top))).resolve())
    return folder


def qlora(base: Path, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command with the base install's packages alone."""
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", RUN, str(REPOSITORY), str(base), *arguments],
        env={"QLORA_HOME": str(home), "HOME": str(home), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_what_needs_no_extra_works(base: Path, tmp_path: Path) -> None:
    assert qlora(base, tmp_path, "--version").stdout.startswith("qlora-orchestrator ")
    assert qlora(base, tmp_path, "get").returncode == 0


def test_a_cluster_without_its_client_names_the_extra_in_one_line(base: Path, tmp_path: Path) -> None:
    done = qlora(base, tmp_path, "--context", "current", "get")

    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: a service on a cluster needs the extra kubernetes, of which kubernetes is not installed; install it: "
        'pip install "qlora-orchestrator[kubernetes]", or in a clone: pip install ".[kubernetes]"'
    ]


def test_the_service_is_not_started_without_what_it_runs_on(base: Path, tmp_path: Path) -> None:
    done = qlora(base, tmp_path, "up")

    assert done.returncode == 2
    said = done.stderr.splitlines()
    assert len(said) == 1
    assert "needs the extra local, of which accelerate, " in said[0]
    assert all(f" {name}," in said[0] for name in ("mlflow", "prometheus-client", "ray", "torch"))
    assert not (tmp_path / "logs").exists(), "nothing was started"


def test_a_plan_of_layers_that_no_table_knows_is_said_to_be_a_guess(base: Path, tmp_path: Path) -> None:
    model, data, job = (tmp_path / name for name in ("model", "data.jsonl", "job.yaml"))
    model.mkdir()
    sizes = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24, "num_attention_heads": 16}
    glm4 = {"model_type": "glm4", "architectures": ["Glm4ForCausalLM"], "vocab_size": 32000, **sizes}
    (model / "config.json").write_text(json.dumps(glm4))
    (model / "tokenizer.json").write_text("{}")
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    spec = {"model": {"source": f"file://{model}"}, "dataset": {"source": f"file://{data}"}}
    whole = {"apiVersion": "qlora.dev/v1alpha1", "kind": "QLoRAJob", "metadata": {"name": "j"}, "spec": spec}
    job.write_text(json.dumps(whole))
    done = qlora(base, tmp_path, "plan", str(job))
    text = " ".join(done.stdout.split())
    assert "a guess layers of model type glm4 were never traced" in text, done.stderr
    assert f"from {-guess.WORST_UNDER:.1%} under to {guess.WORST_OVER:.1%} over what they took" in text
    assert "no job gets a GPU by this figure" in text


def test_extras_of_our_own_are_followed() -> None:
    requirements = [
        "pydantic>=2",
        'qlora-orchestrator[controller,s3]; extra == "local"',
        'ray>=2.50; extra == "controller"',
        'kubernetes<40,>=34; python_version < "4" and extra == "controller"',
        's3fs>=2025.3; extra == "s3"',
    ]

    assert extras.libraries("local", requirements) == ["kubernetes", "ray", "s3fs"]
    assert extras.libraries("unknown", requirements) == []
