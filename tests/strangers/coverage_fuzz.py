"""The parsers under a coverage-guided fuzzer: `python -m tests.strangers.coverage_fuzz --seconds 600`.

atheris (libFuzzer) writes texts that reach branches which no text before them did, in YAML's reader and in ours. The
first byte says which parser gets the rest. Anything but a value or words ends the run, with the text in a file.
atheris has no wheels for every Python, so it belongs to no lock file: `make nightly` installs it by itself.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import yaml

atheris: Any = import_module("atheris")  # where it is not installed, whoever runs this is told so
with atheris.instrument_imports(include=["yaml", "orchestrator.sdk", "orchestrator.api"]):
    from orchestrator.api.json_text import read_json
    from orchestrator.api.model_facts import ModelFacts
    from orchestrator.api.protocol import from_trainer
    from orchestrator.api.results import StageResult
    from orchestrator.api.words import in_json, in_lines, on_one_line
    from orchestrator.core.job.unreadable import read_leniently
    from orchestrator.errors import InvalidObject
    from orchestrator.sdk.manifest import parse_manifest, parse_object
    from tests.strangers.harm import harmful
    from tests.strangers.test_fuzz import JOB, QUEUE


def manifest(data: bytes) -> None:
    parse_manifest(data.decode(errors="replace"), name="job.yaml", folder=Path("/jobs"))


def wire(data: bytes) -> None:
    found = read_json(data)
    read_leniently(found, namespace="n", name="m")
    if isinstance(found, dict):
        parse_object(cast("dict[str, object]", found))


def config(data: bytes) -> None:
    found = read_json(data)
    if isinstance(found, dict):
        ModelFacts.from_config(cast("dict[str, object]", found), "main")


def words(data: bytes) -> None:
    text = data.decode(errors="surrogateescape")
    assert harmful(on_one_line(text)) == []
    assert harmful(in_lines(text).replace("\n", "").replace("\t", "")) == []
    in_json(text)


PARSERS: tuple[Callable[[bytes], Any], ...] = (
    manifest,
    wire,
    config,
    words,
    StageResult.model_validate_json,
    from_trainer.validate_json,
)


def one_input(data: bytes) -> None:
    """What the fuzzer calls; whatever this raises is a find."""
    if not data:
        return
    try:
        PARSERS[data[0] % len(PARSERS)](data[1:])
    except InvalidObject as error:
        if found := harmful(str(error).replace("\n", "")):
            raise RuntimeError(f"a refusal with {found}") from error
    except ValueError:  # pydantic's own is one
        return


def main() -> None:
    """Fuzz for so long, from valid objects on."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--seconds", type=int, default=600)
    seconds = arguments.parse_args().seconds
    with tempfile.TemporaryDirectory() as corpus:
        for number, item in enumerate((JOB, QUEUE)):
            for parser in range(3):
                text = yaml.safe_dump(item) if parser == 0 else json.dumps(item)
                Path(corpus, f"{number}-{parser}").write_bytes(bytes([parser]) + text.encode())
        atheris.Setup([sys.argv[0], corpus, f"-max_total_time={seconds}", "-timeout=30", "-max_len=8192"], one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
