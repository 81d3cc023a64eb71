"""What the formats are made of: the base that the adapter was trained on, in the checkpoint's bits, and the adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrator.api.task import StageTask
from qlora_trainer.exporting.merging import Adapter, tensor_names, weight_files
from qlora_trainer.model.architecture import linears_of_checkpoint
from qlora_trainer.model.source import describe_model, known_config, resolve_model
from qlora_trainer.outcome import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Base and adapter on this machine."""

    base: Path
    """The base's folder, weights included where a format needs them."""
    weights: tuple[str, ...]
    """The names of its files of weights, in order; none where no format needs them."""
    adapter: Adapter
    adapter_folder: Path
    """Holds the tokenizer with the chat template that was trained, too."""
    modules: Mapping[str, str]
    """The adapted modules, by the checkpoint's names of their weights."""


MakeFile = Callable[[Sources, Path], None]
"""Writes a file of a format at a path, where there is none."""


def open_sources(task: StageTask, adapter_folder: Path, *, whole: bool) -> Sources:
    """The job's, with the base's weights if it is to be `whole`.

    UserError where the base is another one by now, or cannot take the adapter.
    """
    assert task.prepared is not None, "a job that is published was prepared"
    source, revision = task.spec.model.source, task.prepared.model.revision
    described = describe_model(source, revision)
    if described.revision != revision:
        raise UserError(
            f"spec.publish.formats: {source} is not what it was when the job was prepared, so the adapter is not "
            "merged into it; put the model back, or submit the job again"
        )
    adapter = Adapter(adapter_folder)
    if not whole:
        return Sources(
            base=described.folder, weights=(), adapter=adapter, adapter_folder=adapter_folder, modules=dict[str, str]()
        )
    base = resolve_model(source, revision)
    weights = weight_files(base)
    names = [name for file in weights for name in tensor_names(base / file)]
    stored = linears_of_checkpoint(known_config(base, source), names)
    if absent := [module for module in adapter.modules if module not in stored]:
        raise UserError(
            f"spec.publish.formats: {source} holds no weight of its own for {absent[0]}, which the adapter is on; "
            "leave the formats out"
        )
    return Sources(
        base=base,
        weights=weights,
        adapter=adapter,
        adapter_folder=adapter_folder,
        modules={stored[module]: module for module in adapter.modules},
    )
