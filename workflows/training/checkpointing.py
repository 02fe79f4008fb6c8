"""Saving a checkpoint while training goes on.

At the step every rank copies its share of the state to its machine's memory, which takes the time of the copy. A
thread of each rank then writes the files and lists them in ``parts/<rank>.json``; rank 0's waits for all lists, puts
``COMPLETE`` and removes what is too old. The threads speak through the storage, never through the process group,
whose collectives belong to the training loop. At most one checkpoint is being written: the next save, the end of the
run and an error wait for it.
"""

import contextlib
import json
import logging
import secrets
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from mfcore.ema import Ema
from mfcore.weights import shard_weights
from workflows.checkpoints.layout import METADATA_FILE
from workflows.checkpoints.model_card import ExportMetadata
from workflows.checkpoints.store import COMPLETE_FILE, CheckpointStore, file_entry
from workflows.config import serialization
from workflows.training.engines.base import Engine
from workflows.training.engines.state import ShardedStateReader, StateShard, shard_state, to_cpu_copy
from workflows.training.progress import Progress
from workflows.utils import distributed
from workflows.utils.json_io import write_json

_LOGGER = logging.getLogger(__name__)
PEER_TIMEOUT_S = 60.0  # seconds that an error waits for the checkpoint being written
PARTS_DIR = "parts"


class CheckpointSaveError(RuntimeError):
    """A checkpoint could not be written; the ones before it are whole. Raised on all ranks."""


@dataclass(frozen=True, kw_only=True)
class _Content:
    """What one rank writes: copies, so that training may go on."""

    networks: dict[str, StateShard]
    export: dict[str, dict[str, Tensor]]  # file name -> weights; rank 0 alone
    facts: dict[str, Any]
    metadata: ExportMetadata

    def write(self, folder: Path) -> list[Path]:
        """All files of this rank under ``folder``."""
        (folder / "state").mkdir(parents=True, exist_ok=True)
        files = [part.write(folder / "state", name) for name, part in self.networks.items()]
        if not self.export:
            return files
        (folder / "export").mkdir(exist_ok=True)
        for name, weights in self.export.items():
            save_file(weights, folder / "export" / name)
            files.append(folder / "export" / name)
        write_json(folder / "export" / METADATA_FILE, serialization.to_dict(self.metadata))
        write_json(folder / "run.json", self.facts)
        return [*files, folder / "export" / METADATA_FILE, folder / "run.json"]


class CheckpointWriter:
    """Saves a run's checkpoints on its shelf. Every method but ``close`` is called by all ranks together."""

    def __init__(
        self, shelf: CheckpointStore, *, engines: Mapping[str, Engine], ema: Ema, metadata: ExportMetadata,
        facts: Callable[[Progress], Mapping[str, Any]], keep: int, may_write: Callable[[], bool],
    ) -> None:  # fmt: skip
        self._shelf, self._engines, self._ema, self._metadata = shelf, engines, ema, metadata
        self._facts, self._keep, self._may_write = facts, keep, may_write
        self._pending: _Writing | None = None
        if distributed.get_rank() == 0 and may_write():
            self._shelf.delete_incomplete()
        self._attempt = distributed.broadcast_from_rank_zero(
            secrets.token_hex(4)
        )  # after the sweep, which would take new files for old

    def save(self, progress: Progress) -> str:
        """Begin a checkpoint and return its place; SaveError when the one before it could not be written."""
        self.wait()
        name = f"{progress.samples_seen:012d}-{self._attempt}"
        self._pending = _Writing(self._shelf, name, self._content(progress), self._finish)
        return self._shelf.uri_of(name)

    def _content(self, progress: Progress) -> _Content:
        networks = {key: engine.state_shard() for key, engine in self._engines.items()}
        networks["ema"] = shard_state((("weight", k, v) for k, v in self._ema.weights()), progress.step)
        first = distributed.get_rank() == 0  # all ranks walk over all weights, for some engines gather them on the way
        raw = {k: to_cpu_copy(v) for k, v in self._engines["student"].weights() if first}
        export = shard_weights("raw", raw) | shard_weights(
            "ema", {k: to_cpu_copy(v) for k, v in self._ema.weights() if first}
        )
        facts = {**self._facts(progress), "progress": serialization.to_dict(progress)}
        return _Content(networks=networks, export=export if first else {}, facts=facts, metadata=self._metadata)

    def _finish(self, name: str, files: Mapping[str, Any]) -> None:
        """Rank 0's last act: from now on the checkpoint exists."""
        if not self._may_write():
            raise RuntimeError("the run now belongs to another driver: this one stops")
        self._shelf.store.remove_folder(f"{name}/{PARTS_DIR}")
        self._shelf.store.write(f"{name}/{COMPLETE_FILE}", json.dumps({"files": files}, indent=1).encode())
        for old in self._shelf.list_complete()[: -self._keep]:
            self._shelf.delete(old)

    @property
    def has_failed(self) -> bool:
        """Whether this rank's part of the checkpoint being written could not be."""
        return self._pending is not None and self._pending.error is not None

    def wait(self) -> None:
        """Until the checkpoint being written is complete. SaveError, on all ranks, says which rank failed and why."""
        if (pending := self._pending) is None:
            return
        pending.written.wait()
        if not (errors := _gathered(pending.error)):
            pending.thread.join()
            errors = _gathered(pending.error)
        pending.abandon()
        self._pending = None
        if errors:
            raise CheckpointSaveError(
                f"the checkpoint {self._shelf.uri_of(pending.name)} could not be written: {'; '.join(errors)}. The one "
                "before it is whole: put this right, then run the same command to go on from there"
            )

    def close(self) -> None:
        """After an error of this rank, when the others may not answer: let the threads finish what they can."""
        if self._pending is not None:
            self._pending.thread.join(PEER_TIMEOUT_S)
            self._pending.abandon()
            self._pending = None


class _Writing:
    """One checkpoint on its way: this rank's thread."""

    def __init__(
        self, shelf: CheckpointStore, name: str, content: _Content, finish: Callable[[str, Mapping[str, Any]], None]
    ) -> None:
        self.name = name
        self.error: str | None = None
        self.written = threading.Event()  # this rank's files
        self._shelf, self._finish, self._rank, self._world = (
            shelf,
            finish,
            distributed.get_rank(),
            distributed.get_world_size(),
        )
        self._abandoned = threading.Event()
        self.thread = threading.Thread(target=self._run, args=(content,), name=f"save {name}", daemon=True)
        self.thread.start()

    def abandon(self) -> None:
        """Do not wait for ranks that will not come."""
        self._abandoned.set()
        self.thread.join()

    def _run(self, content: _Content) -> None:
        try:
            self._tell({"files": self._put(content)})
            del content
            self.written.set()
            if self._rank == 0:
                self._complete()
        except BaseException as error:  # told to the training loop, which raises on all ranks
            self.error = f"rank {self._rank}: {type(error).__name__}: {error}"
            with contextlib.suppress(Exception):  # the error stands above; the storage that broke may break again
                self._tell({"error": self.error})
        finally:
            self.written.set()

    def _put(self, content: _Content) -> dict[str, Any]:
        """Write this rank's files; on object storage by way of a temporary folder."""
        if not self._shelf.is_remote:
            folder = Path(self._shelf.uri_of(self.name))
            return dict(file_entry(folder, path) for path in content.write(folder))
        with tempfile.TemporaryDirectory(prefix="mfctl-save-") as folder:
            entries: dict[str, Any] = {}
            for path in content.write(Path(folder)):
                file, facts = file_entry(Path(folder), path)
                self._shelf.store.upload(path, f"{self.name}/{file}")
                path.unlink()
                entries[file] = facts
            return entries

    def _tell(self, part: Mapping[str, Any]) -> None:
        self._shelf.store.write(f"{self.name}/{PARTS_DIR}/{self._rank:05d}.json", json.dumps(part).encode())

    def _complete(self) -> None:
        """Once all parts are there. A part that tells of an error is raised by its own rank as well."""
        files: dict[str, Any] = {}
        for rank in range(self._world):
            name = f"{PARTS_DIR}/{rank:05d}.json"
            while not self._shelf.store.exists(f"{self.name}/{name}"):
                if self._abandoned.wait(0.5 if self._shelf.is_remote else 0.02):
                    return
            part = self._shelf.read_json(self.name, name)
            if "error" in part:
                return
            files |= part["files"]
        self._finish(self.name, files)


def _gathered(error: str | None) -> list[str]:
    return [text for text in distributed.all_gather_object(error) if text]


def latest_intact_checkpoint(shelf: CheckpointStore) -> str | None:
    """The latest complete checkpoint without damage, as rank 0 sees it. Called by all ranks together."""
    found = None
    if distributed.get_rank() == 0:
        for name in reversed(shelf.list_complete()):
            if (damage := shelf.find_corruption(name)) is None:
                found = name
                break
            _LOGGER.warning(f"{damage}: it is passed over")
    return distributed.broadcast_from_rank_zero(found)


def load_training_state(shelf: CheckpointStore, name: str, engines: Mapping[str, Engine], ema: Ema) -> Progress:
    """Load everything that ``saving.CheckpointWriter`` wrote. Called by all ranks together."""
    if distributed.is_local_rank_zero():
        shelf.download(name, "state/")
    distributed.barrier()
    state = shelf.download(name, "state/") / "state"
    for key, engine in engines.items():
        engine.load(state, key)
    average = ShardedStateReader(state, "ema")
    ema.load_state_dict({key: average.read("weight", key) for key in ema.state_dict()})
    distributed.barrier()
    if distributed.is_local_rank_zero():
        shelf.drop_local_copy(name, "state")
    return serialization.from_dict(Progress, shelf.read_json(name, "run.json")["progress"])
