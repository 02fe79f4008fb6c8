"""Where the checkpoints of a run stand: a folder, or object storage that the cluster shares.

A checkpoint is an immutable prefix unique to the attempt that wrote it, and exists once ``COMPLETE`` is in it.
"""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, cast

from preprocessing.io.hashing import sha256_file
from preprocessing.io.storage import Store, is_remote

COMPLETE_FILE = "COMPLETE"


class CheckpointStore:
    """The checkpoints under ``root``, a path or a URI such as s3://bucket/run/checkpoints."""

    def __init__(self, root: str | Path) -> None:
        self.store = Store(str(root))

    @property
    def is_remote(self) -> bool:
        return self.store.remote

    def uri_of(self, name: str) -> str:
        return f"{self.store.uri.rstrip('/')}/{name}"

    def list_complete(self) -> list[str]:
        """Names of the checkpoints that exist, oldest first."""
        return [name for name in self.store.list_entries() if self.store.exists(f"{name}/{COMPLETE_FILE}")]

    def read_json(self, name: str, file: str) -> dict[str, Any]:
        """A JSON file of a checkpoint."""
        return cast(dict[str, Any], json.loads(self.store.read(f"{name}/{file}")))

    def download(self, name: str, part: str = "") -> Path:
        """The checkpoint as a local folder, with at least the files directly in it and those below ``part``.

        What is remote is copied once per machine: a checkpoint never changes.
        """
        if not self.is_remote:
            return Path(self.uri_of(name))
        copy = cache_dir(self.uri_of(name))
        for file in [*self.read_json(name, COMPLETE_FILE)["files"], COMPLETE_FILE]:
            target = copy / file
            if ("/" not in file or file.startswith(part)) and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                self.store.download(f"{name}/{file}", target)
        return copy

    def drop_local_copy(self, name: str, part: str) -> None:
        """Remove this machine's copies of remote files below ``part``."""
        if self.is_remote:
            shutil.rmtree(cache_dir(self.uri_of(name)) / part, ignore_errors=True)

    def delete(self, name: str) -> None:
        """Remove a checkpoint; ``COMPLETE`` first, for a half-removed one must not count."""
        self.store.remove(f"{name}/{COMPLETE_FILE}")
        self.store.remove_folder(name)

    def delete_incomplete(self) -> None:
        """Remove what attempts that died while saving have left. Only for the holder of the run's lease."""
        for name in set(self.store.list_entries()) - set(self.list_complete()):
            self.store.remove_folder(name)

    def find_corruption(self, name: str) -> str | None:
        """What is wrong with a checkpoint by its own list of sizes and checksums; None when nothing is."""
        folder = self.download(name)
        for file, facts in self.read_json(name, COMPLETE_FILE)["files"].items():
            path = folder / file
            if not path.exists() or path.stat().st_size != facts["size"] or sha256_file(path) != facts["sha256"]:
                return f"{self.uri_of(name)}/{file} is damaged or missing"
        return None


def cache_dir(uri: str) -> Path:
    """Where this user's copies of a remote folder are kept on this machine."""
    key = hashlib.sha256(uri.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir(), f"mfctl-{os.getuid()}", "checkpoints", key)


def join_uri(root: str | Path, *parts: str) -> str | Path:
    """A path below a path or a URI."""
    text = str(root)
    return "/".join([text.rstrip("/"), *parts]) if is_remote(text) else Path(text, *parts)


def file_entry(folder: Path, path: Path) -> tuple[str, dict[str, Any]]:
    """The line of ``COMPLETE`` for one file."""
    return path.relative_to(folder).as_posix(), {"size": path.stat().st_size, "sha256": sha256_file(path)}


def list_checkpoints(root: str | Path) -> list[Path]:
    """The checkpoints in a local folder that exist, oldest first."""
    return [Path(root, name) for name in CheckpointStore(root).list_complete()]


def checkpoint_root(run_dir: str | Path, to: str | None) -> str | Path:
    """Where a run keeps its checkpoints: below ``to`` (setting ``checkpoint.to``) by its name, else in its folder."""
    return join_uri(to, Path(run_dir).name, "checkpoints") if to else Path(run_dir, "checkpoints")
