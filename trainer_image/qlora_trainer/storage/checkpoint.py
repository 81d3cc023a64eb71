"""Checkpoints and the final adapter: training state as safetensors and JSON in the job's store.

The rules of a `Checkpointer`, of which an attempt has one:

- The training thread only copies its state to host memory; one writer thread does the rest. At most one checkpoint is
  being written: a save that comes earlier waits, so memory is bounded by one copy and no save is dropped.
- What goes wrong while writing surfaces at the next call.
- A checkpoint names the prepared data that its steps were made on; one of other data is never resumed.
- `latest` believes digests, not names: a damaged checkpoint is passed over for the one before it.
- The fence is checked before a folder is begun, which takes the place of one of its name, before its manifest is
  written and before anything is deleted.
- Nothing is pickled. The same adapter gives the same file, byte for byte.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import file_digest
from pathlib import Path
from time import perf_counter
from typing import Any

from orchestrator.api.base import MAX_COUNT, Digest
from orchestrator.api.contained_files import open_regular
from orchestrator.api.formats import (
    ADAPTER_FOLDER,
    ANSWERS_NAME,
    CHECKPOINTS_FOLDER,
    JOURNAL_NAME,
    AnswerTable,
    CheckpointManifest,
    FileEntry,
    JournalRecord,
    checkpoint_folder,
    checkpoint_step,
)
from orchestrator.api.json_text import read_json
from qlora_trainer.storage.backends import DamagedFolder
from qlora_trainer.storage.final_adapter import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_NAME,
    GENERATION_CONFIG_NAME,
    TOKENIZER_NAMES,
    Json,
    StoredAdapter,
)
from qlora_trainer.storage.job_store import JobStore
from qlora_trainer.storage.journal import Journal
from qlora_trainer.storage.tensors import Tensors, on_host, read_tensors, save_tensors

OPTIMIZER_NAME = "optimizer.safetensors"
STATE_NAME = "state.json"
BEST_ADAPTER_NAME = "best_adapter.safetensors"
OBJECTIVE_NAME = "objective.safetensors"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """All of the training state that is neither a tensor nor in the journal; the rest follows from the step."""

    step: int
    """Optimizer steps that are done."""

    def to_bytes(self) -> bytes:
        """JSON."""
        return json.dumps(asdict(self), sort_keys=True).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> TrainingState:
        """The state behind `to_bytes`; other fields are passed over. Raises KeyError, TypeError or ValueError."""
        fields: Any = read_json(data)
        return cls(step=_count(fields["step"]))


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value <= MAX_COUNT:
        raise ValueError(f"{STATE_NAME} has {value!r:.40} where a count belongs")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What a checkpoint holds."""

    state: TrainingState
    adapter: Tensors
    """PEFT's state dict, with the keys of adapter_model.safetensors."""
    optimizer: Tensors
    """Flat: `<parameter>.<state>`."""
    journal: Sequence[JournalRecord]
    best_adapter: Tensors | None = None
    """The adapter of the best evaluation where that is an earlier step's. Never changed after it was taken, so not
    copied."""
    objective: Tensors | None = None
    """What the objective remembers, where it does."""

    def on_host(self) -> Snapshot:
        """A copy that training cannot change."""
        return Snapshot(
            state=self.state,
            adapter=on_host(self.adapter),
            optimizer=on_host(self.optimizer),
            journal=list(self.journal),
            best_adapter=self.best_adapter,
            objective=None if self.objective is None else on_host(self.objective),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredCheckpoint:
    """A checkpoint that is durable."""

    step: int
    uri: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OnItsWay:
    """A checkpoint that is being written."""

    step: int
    since: float
    """By `perf_counter`."""

    @property
    def seconds(self) -> float:
        """For how long it has been on its way."""
        return perf_counter() - self.since


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What a checkpoint or adapter says about where it comes from."""

    attempt: int
    prepared: Digest
    adapter_config: Json
    """What PEFT needs to load the adapter: see `final_adapter.adapter_config`."""
    versions: dict[str, str]


class Checkpointer:
    """Saves and finds the checkpoints of one attempt."""

    def __init__(
        self, store: JobStore, provenance: Provenance, *, keep: int, way_back_steps: int | None = None
    ) -> None:
        """`keep` checkpoints stay, and the last one of a multiple of `way_back_steps`, which `way_back` gives."""
        self._store = store
        self._provenance = provenance
        self._keep = keep
        self._way_back_steps = way_back_steps
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._damaged: set[str] = set()
        self.last: StoredCheckpoint | None = None
        """The newest durable checkpoint of this job that this attempt has written or read."""
        self.last_seconds: float | None = None
        """What the last checkpoint took until it was durable."""
        self._on_its_way: OnItsWay | None = None

    def save(self, snapshot: Snapshot, *, wait: bool = False) -> None:
        """Copy the state and write it in the background; with `wait`, return when it is durable."""
        self.finish()
        self._on_its_way = OnItsWay(step=snapshot.state.step, since=perf_counter())
        self._writing = self._writer.submit(self._write, snapshot.on_host())
        if wait:
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written; raises what went wrong with it."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    @property
    def on_its_way(self) -> OnItsWay | None:
        """The checkpoint that is being written, if there is one."""
        return self._on_its_way if self._writing is not None and not self._writing.done() else None

    def is_written_within(self, seconds: float) -> bool:
        """Whether nothing is being written any more, after so long at the most."""
        return self._writing is None or not wait([self._writing], seconds).not_done

    def raise_if_failed(self) -> None:
        """Raise what went wrong in the background, if it already has; costs nothing."""
        if self._writing is not None and self._writing.done():
            self.finish()

    def latest(self) -> Snapshot | None:
        """The newest checkpoint of this data that is whole; None where there is none."""
        for name in reversed(self._names()):
            manifest = self._store.read_manifest(name, CheckpointManifest)
            if manifest is None:
                self._damaged.add(name)
            elif manifest.prepared != self._provenance.prepared:
                log.warning("checkpoint %s is ignored: its data was %s", name, manifest.prepared)
            elif (snapshot := self._load(name, manifest)) is not None:
                self.last = StoredCheckpoint(step=manifest.step, uri=self._store.folder_uri(name))
                return snapshot
        return None

    def way_back(self, step: int) -> Snapshot | None:
        """The last whole checkpoint of a multiple of `way_back_steps` up to this step; it stays where it is.

        Which one that is does not depend on when there were others. None where none can be read.
        """
        self.finish()
        for name in reversed(self._ways_back(step)):
            manifest = self._store.read_manifest(name, CheckpointManifest)
            if manifest is not None and (snapshot := self._load(name, manifest)) is not None:
                return snapshot
        return None

    def _ways_back(self, step: int) -> list[str]:
        every = self._way_back_steps
        if every is None:
            return []
        names = [name for name in self._names() if self._is_usable(name)]
        return [name for name in names if checkpoint_step(name) <= step and checkpoint_step(name) % every == 0]

    def publish_adapter(
        self,
        step: int,
        adapter: Tensors,
        journal: Sequence[JournalRecord],
        tokenizer: Path,
        generation: Json | None = None,
        answers: AnswerTable | None = None,
    ) -> StoredAdapter:
        """Store the final adapter in PEFT's layout, with the tokenizer of the folder `tokenizer` and the journal.

        `generation` is the content of generation_config.json; `answers` are those to held-out prompts.
        """
        self.finish()
        with self._store.scratch_folder() as folder:
            self._write_adapter(adapter, journal, folder)
            if generation is not None:
                (folder / GENERATION_CONFIG_NAME).write_text(json.dumps(generation, indent=2, sort_keys=True))
            if answers is not None:
                (folder / ANSWERS_NAME).write_text(answers.model_dump_json(by_alias=True))
            for name in TOKENIZER_NAMES:
                with suppress(FileNotFoundError), open_regular(tokenizer / name) as file:
                    (folder / name).write_bytes(file.read())
            with (folder / ADAPTER_NAME).open("rb") as file:
                digest = "sha256:" + file_digest(file, "sha256").hexdigest()
            uri = self._publish(folder, ADAPTER_FOLDER, step, complete=True)
        return StoredAdapter(uri=uri, digest=digest)

    # --- writing, on the writer thread

    def _write(self, snapshot: Snapshot) -> None:
        started = perf_counter()
        step = snapshot.state.step
        name = f"{CHECKPOINTS_FOLDER}/{checkpoint_folder(step)}"
        with self._store.scratch_folder() as folder:
            self._write_adapter(snapshot.adapter, snapshot.journal, folder)
            save_tensors(snapshot.optimizer, folder / OPTIMIZER_NAME)
            if snapshot.best_adapter is not None:
                save_tensors(snapshot.best_adapter, folder / BEST_ADAPTER_NAME)
            if snapshot.objective is not None:
                save_tensors(snapshot.objective, folder / OBJECTIVE_NAME)
            (folder / STATE_NAME).write_bytes(snapshot.state.to_bytes())
            uri = self._publish(folder, name, step, complete=False)
        self._damaged.discard(name)
        self.last = StoredCheckpoint(step=step, uri=uri)
        self._delete_superfluous(name)
        self.last_seconds = perf_counter() - started
        log.info("checkpoint %s is durable; written in %.2f s", uri, self.last_seconds)

    def _write_adapter(self, adapter: Tensors, journal: Sequence[JournalRecord], folder: Path) -> None:
        save_tensors(adapter, folder / ADAPTER_NAME)
        config = json.dumps(self._provenance.adapter_config, indent=2, sort_keys=True)
        (folder / ADAPTER_CONFIG_NAME).write_text(config)
        Journal(journal).save(folder / JOURNAL_NAME)

    def _publish(self, folder: Path, name: str, step: int, *, complete: bool) -> str:
        def make_manifest(files: tuple[FileEntry, ...]) -> CheckpointManifest:
            self._store.check_fence(self._provenance.attempt)
            return CheckpointManifest(
                step=step,
                attempt=self._provenance.attempt,
                prepared=self._provenance.prepared,
                complete=complete,
                versions=self._provenance.versions,
                files=files,
            )

        self._store.check_fence(self._provenance.attempt)
        return self._store.publish_folder(folder, name, make_manifest)

    def _delete_superfluous(self, newest: str) -> None:
        """Keep the newest checkpoints that can be resumed; the others, damaged or of other data, go."""
        names, last = self._names(), checkpoint_step(newest)
        usable = [name for name in names if checkpoint_step(name) <= last and self._is_usable(name)]
        kept = [*usable[-self._keep :], *self._ways_back(last)[-1:]]
        for name in names:
            if name not in kept:
                self._store.check_fence(self._provenance.attempt)
                self._store.delete_folder(name)

    def _names(self) -> list[str]:
        """The folders of checkpoints, by their steps."""
        return sorted(self._store.list_folders(CHECKPOINTS_FOLDER), key=checkpoint_step)

    def _is_usable(self, name: str) -> bool:
        manifest = self._store.read_manifest(name, CheckpointManifest)
        return name not in self._damaged and manifest is not None and manifest.prepared == self._provenance.prepared

    # --- reading

    def _load(self, name: str, manifest: CheckpointManifest) -> Snapshot | None:
        try:
            with tempfile.TemporaryDirectory(prefix="qlora-") as scratch:
                folder = self._store.fetch_folder(name, manifest.files, Path(scratch))
                return _read_snapshot(folder, manifest.step)
        except (DamagedFolder, FileNotFoundError, ValueError, KeyError, TypeError) as error:
            log.warning("checkpoint %s is damaged, the one before it is tried: %s", name, error)
            self._damaged.add(name)
            return None


def _read_snapshot(folder: Path, step: int) -> Snapshot:
    best, objective = folder / BEST_ADAPTER_NAME, folder / OBJECTIVE_NAME
    state = TrainingState.from_bytes((folder / STATE_NAME).read_bytes())
    if state.step != step:
        raise DamagedFolder(f"{STATE_NAME} is of step {state.step}, the manifest of step {step}")
    return Snapshot(
        state=state,
        adapter=read_tensors(folder / ADAPTER_NAME),
        optimizer=read_tensors(folder / OPTIMIZER_NAME),
        journal=Journal.load(folder / JOURNAL_NAME).records(),
        best_adapter=read_tensors(best) if best.is_file() else None,
        objective=read_tensors(objective) if objective.is_file() else None,
    )
