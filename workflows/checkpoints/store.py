"""Storage of the checkpoints of a run: a local folder or shared object storage.

A checkpoint is an immutable prefix, unique to the attempt that wrote it. It is complete once it contains ``COMPLETE``.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, cast

from mfcore.errors import UserInputError
from preprocessing.io.hashing import sha256_file
from preprocessing.io.storage import Store, is_remote

_LOGGER = logging.getLogger(__name__)
COMPLETE_FILE = "COMPLETE"
CHECKPOINT_NAME = re.compile(r"\d{12}-[0-9a-f]{8}")  # samples seen, attempt; folders of other names belong to the user
DAMAGE_HINT = "Use another checkpoint of the run, or copy this one again"
_HASH_THREADS = 8
_SETTLED_NS = 2_000_000_000  # a file this old has another modification time after its next change

FileEntries = Mapping[str, Mapping[str, Any]]  # path below the checkpoint -> size in bytes and sha256


class CheckpointStore:
    """Checkpoints under ``root``, a path or a URI such as s3://bucket/run/checkpoints.

    Checkpoints that were found damaged are in ``damaged``, by name with the reason, and are not listed again.
    """

    def __init__(self, root: str | Path) -> None:
        self.store = Store(str(root))
        self.damaged: dict[str, str] = {}

    @property
    def is_remote(self) -> bool:
        """True for object storage."""
        return self.store.remote

    def uri_of(self, name: str) -> str:
        """Return the path or URI of a checkpoint."""
        return f"{self.store.uri.rstrip('/')}/{name}"

    def list_complete(self) -> list[str]:
        """Return the names of the complete checkpoints that are not known to be damaged, oldest first."""
        return [name for name in self._names() if name not in self.damaged and self.read_entries(name) is not None]

    def _names(self) -> list[str]:
        return [name for name in self.store.list_entries() if CHECKPOINT_NAME.fullmatch(name)]

    def read_entries(self, name: str) -> FileEntries | None:
        """Return the files listed in ``COMPLETE``; None without it. A damaged one is logged and counts as absent."""
        try:
            data = self.store.read(f"{name}/{COMPLETE_FILE}")
        except (FileNotFoundError, NotADirectoryError):
            return None
        entries = parse_entries(data)
        if entries is None and name not in self.damaged:
            self.damaged[name] = f"{self.uri_of(name)}/{COMPLETE_FILE} is damaged"
            _LOGGER.warning(f"{self.damaged[name]}. The checkpoint counts as incomplete")
        return entries

    def read_json(self, name: str, file: str) -> dict[str, Any]:
        """Return the content of a JSON file of a checkpoint. Raises ValueError if it is damaged."""
        return cast(dict[str, Any], json.loads(self.store.read(f"{name}/{file}")))

    def download(self, name: str, part: str, *, verify: bool = True) -> Path:
        """Return the checkpoint as a local folder, with at least its top-level files and those below ``part``.

        Remote files are copied once per machine; a checkpoint never changes. Copies of other content are replaced.
        Without ``verify``, existing copies are compared by size only. Raises UserInputError for a damaged file.
        """
        if not self.is_remote:
            return Path(self.uri_of(name))
        entries = self.read_entries(name)
        if entries is None:
            raise UserInputError(f"{self.uri_of(name)} is not complete: use another checkpoint of the run")
        copy = cache_dir(self.uri_of(name))
        for file, entry in entries.items():
            if "/" in file and not file.startswith(part):
                continue
            if not self._fetch(name, file, entry, verify=verify):
                raise UserInputError(f"{self.uri_of(name)}/{file} is damaged: it differs from COMPLETE. {DAMAGE_HINT}")
        (copy / COMPLETE_FILE).write_text(json.dumps({"files": entries}, indent=1))
        return copy

    def _fetch(self, name: str, file: str, entry: Mapping[str, Any], *, verify: bool) -> bool:
        """Copy a remote file unless an equal copy exists. Return False if the stored file is damaged or missing."""
        target = cache_dir(self.uri_of(name)) / file
        if matches_entry(target, entry, content=verify):
            return True
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.store.download(f"{name}/{file}", target)
        except FileNotFoundError:
            return False
        intact = matches_entry(target, entry)
        if not intact:
            target.unlink()
        return intact

    def drop_local_copy(self, name: str, part: str) -> None:
        """Remove this machine's copies of remote files below ``part``."""
        if self.is_remote:
            shutil.rmtree(cache_dir(self.uri_of(name)) / part, ignore_errors=True)

    def delete(self, name: str) -> None:
        """Remove a checkpoint, ``COMPLETE`` first, so that a partly removed one is not complete."""
        self.store.remove(f"{name}/{COMPLETE_FILE}")
        self.store.remove_folder(name)
        self.damaged.pop(name, None)

    def delete_incomplete(self) -> None:
        """Remove checkpoints of attempts that died while saving. Only the holder of the run's lease may call it.

        Files and folders without the name of a checkpoint stay, and so do checkpoints with a damaged
        ``COMPLETE``.
        """
        for name in self._names():
            if not self.store.exists(f"{name}/{COMPLETE_FILE}"):
                self.store.remove_folder(name)

    def delete_old(self, newest: str, keep: int) -> None:
        """Remove all but the ``keep`` latest complete checkpoints, and damaged ones up to the samples of ``newest``."""
        for name in [name for name in self.damaged if samples_of(name) <= samples_of(newest)]:
            self.delete(name)
        for name in self.list_complete()[:-keep]:
            self.delete(name)

    def find_corruption(self, name: str) -> str | None:
        """Return a message if a file differs from the sizes and checksums in ``COMPLETE``, else None.

        Exports in object storage are compared by size only: resuming needs none of them.
        """
        entries = self.read_entries(name)
        if entries is None:
            return f"{self.uri_of(name)}/{COMPLETE_FILE} is damaged or missing"
        sizes = self.store.list_sizes(f"{name}/export") if self.is_remote else {}

        def is_intact(file: str) -> bool:
            if not self.is_remote:
                return matches_entry(Path(self.uri_of(name), file), entries[file])
            if file.startswith("export/"):
                return sizes.get(f"{name}/{file}") == entries[file]["size"]
            return self._fetch(name, file, entries[file], verify=True)

        with ThreadPoolExecutor(_HASH_THREADS) as pool:
            broken = [file for file, intact in zip(entries, pool.map(is_intact, entries), strict=True) if not intact]
        if not broken:
            return None
        self.drop_local_copy(name, "state")
        self.damaged[name] = f"{self.uri_of(name)}/{broken[0]} is damaged or missing"
        return self.damaged[name]


def samples_of(name: str) -> int:
    """Return the number of samples that a checkpoint has seen, from its name."""
    return int(name.split("-")[0])


def parse_entries(data: bytes) -> FileEntries | None:
    """Return the files listed in the content of ``COMPLETE``; None if it is damaged or names files elsewhere."""
    try:
        files: Any = json.loads(data)["files"]
        paths = [PurePosixPath(file) for file in files]
        if any(path.is_absolute() or ".." in path.parts for path in paths):
            return None
        return {str(file): {"size": int(e["size"]), "sha256": str(e["sha256"])} for file, e in files.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def matches_entry(path: Path, entry: Mapping[str, Any], *, content: bool = True) -> bool:
    """Return True if a file has the size and, with ``content``, the checksum of its entry in ``COMPLETE``."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return status.st_size == entry["size"] and (not content or file_digest(path) == entry["sha256"])


def matching_entries(paths: Sequence[Path], entries: Sequence[Mapping[str, Any]]) -> list[bool]:
    """Return the results of `matches_entry` for several files, read in parallel."""
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        return list(pool.map(matches_entry, paths, entries))


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file. It is computed once per process while the file does not change."""
    status = path.stat()
    if time.time_ns() - status.st_mtime_ns < _SETTLED_NS:
        return sha256_file(path)
    return _digest_of_version(str(path), status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1024)
def _digest_of_version(path: str, _inode: int, _size: int, _modified: int) -> str:
    return sha256_file(path)


def cache_dir(uri: str) -> Path:
    """Return the local folder of this user's copies of a remote folder.

    Raises UserInputError if another user may have written there.
    """
    root = Path(tempfile.gettempdir(), f"mfctl-{os.getuid()}")
    root.mkdir(mode=0o700, exist_ok=True)
    status = root.lstat()
    fix = "Remove it, or set TMPDIR to another folder"
    if not stat.S_ISDIR(status.st_mode):
        raise UserInputError(f"{root} is a link or no folder. {fix}")
    if status.st_uid != os.getuid():
        raise UserInputError(f"{root} belongs to another user. {fix}")
    if status.st_mode & 0o077:
        root.chmod(0o700)
    key = hashlib.sha256(uri.encode()).hexdigest()[:16]
    return root / "checkpoints" / key


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
