"""Files on a local path or under s3://, through fsspec; names inside a store are relative, with forward slashes.

A file is either absent or complete: local files are written beside their target and renamed, S3 objects appear when
their upload ends. What a killed process leaves are local temporary files, which ``sweep`` removes.
"""

import os
import secrets
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote_from_bytes, unquote, unquote_to_bytes

import fsspec

TEMPORARY = ".tmp-"


def local_uri(path: str | os.PathLike[str]) -> str:
    """file:// URI of a local path, percent-encoded from the bytes of its name."""
    return "file://" + quote_from_bytes(os.fsencode(os.path.abspath(os.fspath(path))))


def local_path(uri: str) -> str:
    """The local path behind a file:// URI (any bytes come back as they were)."""
    return os.fsdecode(unquote_to_bytes(uri.removeprefix("file://")))


def is_remote(uri: str) -> bool:
    return "://" in uri and not uri.startswith("file://")


class Store:
    """A folder, here or in object storage."""

    def __init__(self, uri: str) -> None:
        self.uri = uri if is_remote(uri) else os.path.abspath(local_path(uri) if uri.startswith("file://") else uri)
        self.remote = is_remote(uri)
        self._fs, self._root = fsspec.core.url_to_fs(self.uri)

    def _full(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def exists(self, name: str) -> bool:
        if self.remote:
            self._fs.invalidate_cache()
        return bool(self._fs.exists(self._full(name)))

    def listing(self) -> list[str]:
        """Sorted names of what lies directly in the store, folders too; none when there is no such place."""
        if self.remote:
            self._fs.invalidate_cache()
        if not self._fs.exists(self._root):
            return []
        return sorted(str(path).rstrip("/").rsplit("/", 1)[-1] for path in self._fs.ls(self._root, detail=False))

    def read(self, name: str) -> bytes:
        """The content of a file. FileNotFoundError when it is absent."""
        with self.open(name) as file:
            return file.read()

    def open(self, name: str) -> IO[bytes]:
        """A seekable file for reading."""
        return self._fs.open(self._full(name), "rb")

    def names(self, folder: str) -> list[str]:
        """Sorted names of the complete files directly in a folder; none when it is absent."""
        if self.remote:
            self._fs.invalidate_cache()
        full = self._full(folder)
        if not self._fs.exists(full):
            return []
        names = (str(path).rsplit("/", 1)[1] for path in self._fs.ls(full, detail=False))
        return sorted(f"{folder}/{name}" for name in names if name and not name.startswith(TEMPORARY))

    def write(self, name: str, data: bytes) -> None:
        """Put a whole file, replacing one of that name."""
        if self.remote:
            self._fs.pipe_file(self._full(name), data)
            return
        with self._beside(name) as temporary:
            temporary.write_bytes(data)

    def put(self, local: Path, name: str) -> None:
        """Put a finished local file, replacing one of that name."""
        if self.remote:
            self._fs.put_file(str(local), self._full(name))
            return
        with self._beside(name) as temporary:
            shutil.copyfile(local, temporary)

    def create(self, name: str, data: bytes) -> bool:
        """Put a file unless one of that name exists; whether it was put. (Object storage: check, then put.)"""
        if self.remote:
            if self.exists(name):
                return False
            self.write(name, data)
            return True
        target = Path(self._full(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{TEMPORARY}{secrets.token_hex(4)}")
        temporary.write_bytes(data)
        try:
            os.link(temporary, target)  # fails when the name is taken, and never shows a half-written file
        except FileExistsError:
            return False
        finally:
            temporary.unlink()
        return True

    def remove(self, name: str) -> None:
        """Remove a file of ours; nothing happens when it is absent."""
        if self._fs.exists(self._full(name)):
            self._fs.rm_file(self._full(name))

    def get(self, name: str, local: Path) -> None:
        """Copy a file to a local path, whole or not at all."""
        temporary = local.with_name(f"{TEMPORARY}{secrets.token_hex(4)}")
        try:
            self._fs.get_file(self._full(name), str(temporary))
            os.replace(temporary, local)
        finally:
            temporary.unlink(missing_ok=True)

    def remove_folder(self, name: str) -> None:
        """Remove a folder of ours with everything in it; nothing happens when it is absent."""
        if self.remote:
            self._fs.invalidate_cache()
        if self._fs.exists(self._full(name)):
            self._fs.rm(self._full(name), recursive=True)

    def sweep(self) -> None:
        """Remove temporary files that killed processes of ours left in a local store."""
        if not self.remote and os.path.isdir(self._root):
            for path in Path(self._root).glob(f"**/{TEMPORARY}*"):
                path.unlink()

    @contextmanager
    def _beside(self, name: str) -> Generator[Path]:
        target = Path(self._full(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{TEMPORARY}{secrets.token_hex(4)}-{target.name}")
        try:
            yield temporary
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def fetched(uri: str) -> Generator[str]:
    """A local path with the content of a source: the file itself, or a temporary copy of a remote object."""
    if not is_remote(uri):
        yield local_path(uri)
        return
    fs, path = file_system(unquote(uri))
    with tempfile.TemporaryDirectory(prefix="mfctl-") as folder:
        copy = os.path.join(folder, "source" + os.path.splitext(path)[1])
        fs.get_file(path, copy)
        yield copy


def file_system(uri: str) -> tuple[Any, str]:
    """fsspec filesystem and path of a URI."""
    return fsspec.core.url_to_fs(uri)
