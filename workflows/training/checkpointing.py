"""Asynchronous checkpoints: copied at the step, written by threads.

At the step each rank copies its state shard to CPU memory. A thread per rank then writes the files and lists them in
``parts/<rank>.json``. The thread of rank 0 waits for all lists, writes ``COMPLETE`` and deletes old checkpoints. The
threads coordinate through the storage only: collectives are reserved for the training loop. At most one checkpoint is
written at a time: the next save, the end of the run and an error wait for it.
"""

import contextlib
import json
import logging
import secrets
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from mfcore.ema import Ema
from mfcore.weights import shard_weights
from preprocessing.io.durable_files import flush_file, flush_folder
from preprocessing.io.processes import delete_stale_scratch, scratch_dir
from workflows.checkpoints.layout import METADATA_FILE, RUN_FILE
from workflows.checkpoints.model_card import ExportMetadata
from workflows.checkpoints.store import COMPLETE_FILE, CheckpointStore, file_entry
from workflows.config import serialization
from workflows.training.engines.base import Engine
from workflows.training.engines.state import ShardedStateReader, StateShard, shard_state, to_cpu_copy
from workflows.training.progress import Progress
from workflows.utils import distributed
from workflows.utils.json_io import write_json

_LOGGER = logging.getLogger(__name__)
PEER_TIMEOUT_S = 60.0  # seconds that an error waits for a checkpoint in progress
PARTS_DIR = "parts"


class CheckpointSaveError(RuntimeError):
    """A checkpoint could not be written; earlier ones are intact. Raised on all ranks."""


@dataclass(frozen=True, kw_only=True)
class _Content:
    """Copies of what one rank writes, so that training can continue."""

    networks: dict[str, StateShard]
    export: dict[str, dict[str, Tensor]]  # file name -> weights; rank 0 alone
    record: dict[str, Any]
    metadata: ExportMetadata

    def write(self, folder: Path) -> list[Path]:
        """Write all files of this rank into ``folder`` and return their paths."""
        (folder / "state").mkdir(parents=True, exist_ok=True)
        files = [part.write(folder / "state", name) for name, part in self.networks.items()]
        if not self.export:
            return files
        (folder / "export").mkdir(exist_ok=True)
        for name, weights in self.export.items():
            save_file(weights, folder / "export" / name)
            files.append(folder / "export" / name)
        write_json(folder / "export" / METADATA_FILE, serialization.to_dict(self.metadata))
        write_json(folder / RUN_FILE, self.record)
        return [*files, folder / "export" / METADATA_FILE, folder / RUN_FILE]


class CheckpointWriter:
    """Writer of the checkpoints of one run. Every method except ``close`` is called by all ranks together."""

    def __init__(
        self, store: CheckpointStore, *, engines: Mapping[str, Engine], ema: Ema, metadata: ExportMetadata,
        record: Callable[[Progress], Mapping[str, Any]], keep: int, may_write: Callable[[], bool],
    ) -> None:  # fmt: skip
        self._store, self._engines, self._ema, self._metadata = store, engines, ema, metadata
        self._record, self._keep, self._may_write = record, keep, may_write
        self._pending: _Writing | None = None
        delete_stale_scratch()  # shares of uploads that were killed
        if distributed.get_rank() == 0 and may_write():
            self._store.delete_incomplete()
        self._attempt = distributed.broadcast_from_rank_zero(
            secrets.token_hex(4)
        )  # after the sweep, which would take new files for old

    def save(self, progress: Progress) -> str:
        """Start a checkpoint and return its URI. Raise CheckpointSaveError if the previous one failed."""
        self.wait()
        name = f"{progress.samples_seen:012d}-{self._attempt}"
        self._pending = _Writing(self._store, name, self._content(progress), self._finish)
        return self._store.uri_of(name)

    def _content(self, progress: Progress) -> _Content:
        networks = {key: engine.state_shard() for key, engine in self._engines.items()}
        networks["ema"] = shard_state((("weight", k, v) for k, v in self._ema.weights()), progress.step)
        first = distributed.get_rank() == 0  # all ranks iterate over all weights: some engines gather them
        raw = {k: to_cpu_copy(v) for k, v in self._engines["student"].weights() if first}
        export = shard_weights("raw", raw) | shard_weights(
            "ema", {k: to_cpu_copy(v) for k, v in self._ema.weights() if first}
        )
        record = {**self._record(progress), "progress": serialization.to_dict(progress)}
        return _Content(networks=networks, export=export if first else {}, record=record, metadata=self._metadata)

    def _finish(self, name: str, files: Mapping[str, Any]) -> None:
        """Write the completion marker and delete old checkpoints, on rank 0."""
        if not self._may_write():
            raise RuntimeError("the run now belongs to another driver: this one stops")
        self._store.store.remove_folder(f"{name}/{PARTS_DIR}")
        self._store.store.write(f"{name}/{COMPLETE_FILE}", json.dumps({"files": files}, indent=1).encode())
        self._store.delete_old(name, self._keep)

    @property
    def has_failed(self) -> bool:
        """True if this rank could not write its part of the checkpoint in progress."""
        return self._pending is not None and self._pending.error is not None

    def wait(self) -> None:
        """Wait for the checkpoint in progress. Raise CheckpointSaveError, on all ranks, with the ranks that failed."""
        if (pending := self._pending) is None:
            return
        pending.written.wait()
        if not (errors := _gather_errors(pending.error)):
            pending.thread.join()
            errors = _gather_errors(pending.error)
        pending.abandon()
        self._pending = None
        if errors:
            raise CheckpointSaveError(
                f"the checkpoint {self._store.uri_of(pending.name)} could not be written: {'; '.join(errors)}. "
                f"Fix the cause, then run the same command. {self._resume_point()}"
            )

    def _resume_point(self) -> str:
        saved = distributed.broadcast_from_rank_zero(self._last_complete() if distributed.get_rank() == 0 else None)
        return f"It resumes from {saved}" if saved else "It starts from the beginning: no checkpoint is complete"

    def _last_complete(self) -> str | None:
        with contextlib.suppress(OSError, RuntimeError):  # the storage may be the cause
            return next((self._store.uri_of(name) for name in reversed(self._store.list_complete())), None)
        return None

    def close(self) -> None:
        """Wait a limited time for the threads, after an error when other ranks may not respond."""
        if self._pending is not None:
            self._pending.thread.join(PEER_TIMEOUT_S)
            self._pending.abandon()
            self._pending = None


class _Writing:
    """A checkpoint in progress, with the thread of this rank."""

    def __init__(
        self, store: CheckpointStore, name: str, content: _Content, finish: Callable[[str, Mapping[str, Any]], None]
    ) -> None:
        self.name = name
        self.error: str | None = None
        self.written = threading.Event()  # this rank's files
        self._store, self._finish, self._rank, self._world = (
            store,
            finish,
            distributed.get_rank(),
            distributed.get_world_size(),
        )
        self._abandoned = threading.Event()
        self.thread = threading.Thread(target=self._run, args=(content,), name=f"save {name}", daemon=True)
        self.thread.start()

    def abandon(self) -> None:
        """Stop waiting for other ranks and join the thread."""
        self._abandoned.set()
        self.thread.join()

    def _run(self, content: _Content) -> None:
        try:
            self._write_part({"files": self._write_files(content)})
            del content
            self.written.set()
            if self._rank == 0:
                self._complete()
        except BaseException as error:  # the training loop raises it on all ranks
            self.error = f"rank {self._rank}: {type(error).__name__}: {error}"
            with contextlib.suppress(Exception):  # the storage may fail again; the error is kept above
                self._delete_files()
                self._write_part({"error": self.error})
        finally:
            self.written.set()

    def _write_files(self, content: _Content) -> dict[str, Any]:
        """Write the files of this rank and return their entries; for object storage through a temporary folder."""
        if not self._store.is_remote:
            folder = Path(self._store.uri_of(self.name))
            paths = content.write(folder)
            _flush(folder, paths)
            return dict(file_entry(folder, path) for path in paths)
        with scratch_dir() as folder:
            entries: dict[str, Any] = {}
            for path in content.write(folder):
                file, facts = file_entry(folder, path)
                self._store.store.upload(path, f"{self.name}/{file}")
                path.unlink()
                entries[file] = facts
            return entries

    def _delete_files(self) -> None:
        """Delete the files of this rank after a failure: on a full disk, the outcome of the run needs their space."""
        if self._store.is_remote:
            return
        folder = Path(self._store.uri_of(self.name))
        for path in (folder / "state").glob(f"*-{self._rank:05d}-of-*"):
            path.unlink()
        if self._rank == 0:
            shutil.rmtree(folder / "export", ignore_errors=True)

    def _write_part(self, part: Mapping[str, Any]) -> None:
        self._store.store.write(f"{self.name}/{PARTS_DIR}/{self._rank:05d}.json", json.dumps(part).encode())

    def _complete(self) -> None:
        """Finish the checkpoint when all parts exist. A rank that failed raises its own error."""
        files: dict[str, Any] = {}
        for rank in range(self._world):
            name = f"{PARTS_DIR}/{rank:05d}.json"
            while not self._store.store.exists(f"{self.name}/{name}"):
                if self._abandoned.wait(0.5 if self._store.is_remote else 0.02):
                    return
            part = self._store.read_json(self.name, name)
            if "error" in part:
                return
            files |= part["files"]
        self._finish(self.name, files)


def _flush(folder: Path, paths: Sequence[Path]) -> None:
    """Flush files and the names of their folders to disk: after power loss, a complete checkpoint has its content."""
    for path in paths:
        flush_file(path)
    for parent in {*(path.parent for path in paths), folder, folder.parent, folder.parent.parent}:
        flush_folder(parent)


def _gather_errors(error: str | None) -> list[str]:
    return [text for text in distributed.all_gather_object(error) if text]


def latest_intact_checkpoint(store: CheckpointStore) -> str | None:
    """Return the latest complete checkpoint that rank 0 finds intact. Called by all ranks together."""
    found = None
    if distributed.get_rank() == 0:
        for name in reversed(store.list_complete()):
            if (damage := store.find_corruption(name)) is None:
                found = name
                break
            _LOGGER.warning(f"{damage}. Using an older checkpoint")
    return distributed.broadcast_from_rank_zero(found)


def load_training_state(store: CheckpointStore, name: str, engines: Mapping[str, Engine], ema: Ema) -> Progress:
    """Load a checkpoint into the engines and the EMA and return its progress. Called by all ranks together."""
    if distributed.is_local_rank_zero():
        store.download(name, "state/")
    distributed.barrier()
    state = store.download(name, "state/", verify=False) / "state"  # verified above
    for key, engine in engines.items():
        engine.load(state, key)
    ema_state = ShardedStateReader(state, "ema")
    ema.load_state_dict({key: ema_state.read("weight", key) for key in ema.state_dict()})
    distributed.barrier()
    if distributed.is_local_rank_zero():
        store.drop_local_copy(name, "state")
    return serialization.from_dict(Progress, store.read_json(name, RUN_FILE)["progress"])
