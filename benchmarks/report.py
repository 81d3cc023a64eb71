"""The document that every benchmark prints: results, and the circumstances they were had under."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from orchestrator.sizing.hardware import GpuClass, gpu_class

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "mlflow",
    "ray",
    "liger-kernel",
    "trl",
    "unsloth",
    "llamafactory",
)


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the option that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--save", metavar="NAME", help="also write the document to benchmarks/results/NAME.json")
    return parser


def class_here(name: str) -> GpuClass:
    """One GPU of a class, with the class's bytes, as fast as the card here and beside as much memory as is here."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return replace(gpu_class(name, capacity=1, products=[card()]), host_bytes=memory)


def emit(results: dict[str, object], *, save: str | None) -> None:
    """Print the document, and keep it if asked to."""
    document = {"command": " ".join(["python -m", *command()]), **circumstances(), "results": results}
    text = json.dumps(document, indent=2) + "\n"
    sys.stdout.write(text)
    if save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{save}.json").write_text(text)


def command() -> list[str]:
    """The module and arguments that were run, without the paths of this machine."""
    module = f"benchmarks.{Path(sys.argv[0]).stem}"
    return [module, *(Path(word).name if word.startswith("/") else word for word in sys.argv[1:])]


def circumstances() -> dict[str, object]:
    """Commit, date, card and versions."""
    return {
        "commit": os.environ.get("QLORA_COMMIT") or git_commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "card": card(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := installed(name))},
    }


def git_commit() -> str:
    """The checked-out commit, marked when the tree differs from it."""
    answer = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return answer.stdout.strip() or "unknown"


def card() -> str:
    """The GPU and its memory, or the processor and its cores."""
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return f"{properties.name} ({properties.total_memory / 2**30:.1f} GiB)"
    return f"CPU, {os.cpu_count()} cores ({cpu_name()})"


def cpu_name() -> str:
    """The processor's name as Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def installed(package: str) -> str | None:
    """A package's version, if it is installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
