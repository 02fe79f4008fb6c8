"""Storage of the checkpoints of a run: a local folder or shared object storage.

A checkpoint is an immutable prefix, unique to the attempt that wrote it. It is complete once it contains ``COMPLETE``.
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
    """Checkpoints under ``root``, a path or a URI such as s3://bucket/run/checkpoints."""

    def __init__(self, root: str | Path) -> None:
        self.store = Store(str(root))

    @property
    def is_remote(self) -> bool:
        """True for object storage."""
        return self.store.remote

    def uri_of(self, name: str) -> str:
        """Return the path or URI of a checkpoint."""
        return f"{self.store.uri.rstrip('/')}/{name}"

    def list_complete(self) -> list[str]:
        """Return the names of the complete checkpoints, oldest first."""
        return [name for name in self.store.list_entries() if self.store.exists(f"{name}/{COMPLETE_FILE}")]

    def read_json(self, name: str, file: str) -> dict[str, Any]:
        """Return the content of a JSON file of a checkpoint."""
        return cast(dict[str, Any], json.loads(self.store.read(f"{name}/{file}")))

    def download(self, name: str, part: str = "") -> Path:
        """Return the checkpoint as a local folder, with at least its top-level files and those below ``part``.

        Remote files are copied once per machine; a checkpoint never changes.
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
        """Remove a checkpoint, ``COMPLETE`` first, so that a partly removed one is not complete."""
        self.store.remove(f"{name}/{COMPLETE_FILE}")
        self.store.remove_folder(name)

    def delete_incomplete(self) -> None:
        """Remove checkpoints of attempts that died while saving. Only the holder of the run's lease may call it."""
        for name in set(self.store.list_entries()) - set(self.list_complete()):
            self.store.remove_folder(name)

    def find_corruption(self, name: str) -> str | None:
        """Return a message if a file differs from the sizes and checksums in ``COMPLETE``, else None."""
        folder = self.download(name)
        for file, facts in self.read_json(name, COMPLETE_FILE)["files"].items():
            path = folder / file
            if not path.exists() or path.stat().st_size != facts["size"] or sha256_file(path) != facts["sha256"]:
                return f"{self.uri_of(name)}/{file} is damaged or missing"
        return None


def cache_dir(uri: str) -> Path:
    """Return the local folder of this user's copies of a remote folder."""
    key = hashlib.sha256(uri.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir(), f"mfctl-{os.getuid()}", "checkpoints", key)


def join_uri(root: str | Path, *parts: str) -> str | Path:
    """Return a path below a path or a URI."""
    text = str(root)
    return "/".join([text.rstrip("/"), *parts]) if is_remote(text) else Path(text, *parts)


def file_entry(folder: Path, path: Path) -> tuple[str, dict[str, Any]]:
    """Return the entry of one file in ``COMPLETE``: relative path, size and checksum."""
    return path.relative_to(folder).as_posix(), {"size": path.stat().st_size, "sha256": sha256_file(path)}


def checkpoint_root(run_dir: str | Path, to: str | None) -> str | Path:
    """Return the checkpoint root of a run: below ``to`` (``checkpoint.to``) by run name, else in the run directory."""
    return join_uri(to, Path(run_dir).name, "checkpoints") if to else Path(run_dir, "checkpoints")
