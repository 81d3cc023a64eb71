"""The formats of spec.publish.formats, each a folder of the job's store, each made once.

A format is there when its manifest is. It is made file by file, each moved into the store as soon as it is whole and
remembered there: whoever is killed goes on with the next, and of the local disk one file is taken at a time.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from time import monotonic

from orchestrator.api.base import Digest
from orchestrator.api.formats import FileEntry, FormatManifest, format_folder
from orchestrator.api.job import WHOLE_MODEL_FORMATS, PublishFormat
from orchestrator.api.task import StageTask
from qlora_trainer.exporting import gguf_file, merged_folder
from qlora_trainer.exporting.sources import MakeFile, Sources, open_sources
from qlora_trainer.storage.final_adapter import FinalAdapter
from qlora_trainer.storage.job_store import JobStore

EXPORT_VERSION = 1
"""Raise it when the same adapter and base would give other files than before."""

log = logging.getLogger(__name__)


def export(task: StageTask, store: JobStore, adapter: FinalAdapter) -> None:
    """Make the formats that the store lacks. UserError where they cannot be made."""
    missing: list[tuple[PublishFormat, Digest]] = []
    for name in task.spec.publish.formats:
        inputs = inputs_digest(task, adapter, name)
        if not _is_there(store, name, inputs):
            missing.append((name, inputs))
    if not missing:
        return
    whole = any(name in WHOLE_MODEL_FORMATS for name, _ in missing)
    sources = open_sources(task, adapter.folder, whole=whole)
    for name, inputs in missing:
        _make(task, store, name, inputs, sources)


def inputs_digest(task: StageTask, adapter: FinalAdapter, name: PublishFormat) -> Digest:
    """Digest over what a format's files depend on."""
    assert task.prepared is not None, "a job that is published was prepared"
    facts = [EXPORT_VERSION, name, adapter.digest, task.prepared.model.revision, task.job]
    return f"sha256:{hashlib.sha256(json.dumps(facts).encode()).hexdigest()}"


def _is_there(store: JobStore, name: PublishFormat, inputs: Digest) -> bool:
    manifest = store.read_manifest(format_folder(name), FormatManifest)
    return manifest is not None and manifest.inputs == inputs


def _make(task: StageTask, store: JobStore, name: PublishFormat, inputs: Digest, sources: Sources) -> None:
    started = monotonic()
    folder = format_folder(name)
    if store.read_manifest(folder, FormatManifest) is not None:  # of another base
        store.delete_folder(folder)
    entries = [
        _made(task, store, (folder, file_name), inputs, lambda path, make=make: make(sources, path))
        for file_name, make in _files(name, sources).items()
    ]
    store.finish_folder(task.attempt, folder, FormatManifest(format=name, inputs=inputs, files=tuple(entries)))
    gib = sum(entry.bytes for entry in entries) / 2**30
    log.info("%s: %d files, %.2f GiB, in %.0f s", name, len(entries), gib, monotonic() - started)


def _files(name: PublishFormat, sources: Sources) -> Mapping[str, MakeFile]:
    match name:
        case "merged":
            return merged_folder.files(sources)
        case "gguf-f16":
            return {"model-f16.gguf": lambda sources, path: gguf_file.write_model(sources, path, "f16")}
        case "gguf-q8_0":
            return {"model-q8_0.gguf": lambda sources, path: gguf_file.write_model(sources, path, "q8_0")}
        case "gguf-adapter":
            return {"adapter.gguf": gguf_file.write_adapter}


def _made(
    task: StageTask, store: JobStore, where: tuple[str, str], inputs: Digest, make: Callable[[Path], None]
) -> FileEntry:
    folder, file_name = where
    known = store.added_file(folder, file_name, inputs)
    if known is not None:
        log.info("%s/%s is there already", folder, file_name)
        return known
    with store.scratch_folder() as scratch:
        make(scratch / file_name)
        return store.add_file(task.attempt, folder, scratch / file_name, inputs)
