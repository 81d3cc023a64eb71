"""Whose an error is that a model under trial provokes: the model's, which its user can change, or a bug of ours.

It is the model's where transformers or PEFT, or a library that they called, raised it: they cannot do what this config
asks for. Where the trainer's own code stands nearer to where it was raised, it is a bug of ours; and a machine without
disk or memory is nobody's model.
"""

from __future__ import annotations

from traceback import walk_tb

THEIRS, OURS = frozenset({"transformers", "peft"}), frozenset({"qlora_trainer", "orchestrator"})


def is_models(error: BaseException) -> bool:
    """Whether a model that its libraries cannot handle is what an error comes of."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None):
        return False
    packages = [str(frame.f_globals.get("__name__")).partition(".")[0] for frame, _ in walk_tb(error.__traceback__)]
    nearest = next((package for package in reversed(packages) if package in THEIRS | OURS), None)
    return nearest in THEIRS
