"""qlora-orchestrator: schedules QLoRA fine-tuning jobs onto single GPUs sized by VRAM.

The packages, from the inside out: `api` (the contract), `sizing` (what a job takes), `core` (what happens next),
`ports` (what the controller asks of the world), `adapters` (one outside system each), `controller` (observe, decide,
act), `sdk` and `cli` (how people reach it). `docs/architecture.md` says where to start reading.
"""

__version__: str
"""The installed distribution's version."""


def __getattr__(name: str) -> str:
    """The version, looked up when it is asked for: reading the metadata takes longer than most imports."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import version

    return version("qlora-orchestrator")
