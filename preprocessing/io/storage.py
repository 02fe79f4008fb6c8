"""Files on a local path or under s3://, through fsspec; names inside a store are relative, with forward slashes.

A file is either absent or complete: local files are written beside their target and renamed, S3 objects appear when
their upload ends. What a killed process leaves are local temporary files, which ``sweep`` removes.
"""

import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import IO, Any, Concatenate, ParamSpec, TypeVar
from urllib.parse import quote_from_bytes, unquote, unquote_to_bytes

import fsspec

from preprocessing.io.errors import InfrastructureError, translate_storage_errors
from preprocessing.io.processes import scratch_dir

TEMPORARY = ".tmp-"
READ_TIMEOUT_S = 20  # after which a connection to an object store counts as broken
_P = ParamSpec("_P")
_T = TypeVar("_T")


def local_uri(path: str | os.PathLike[str]) -> str:
    """file:// URI of a local path, percent-encoded from the bytes of its name."""
    return "file://" + quote_from_bytes(os.fsencode(os.path.abspath(os.fspath(path))))


def local_path(uri: str) -> str:
    """The local path behind a file:// URI (any bytes come back as they were)."""
    return os.fsdecode(unquote_to_bytes(uri.removeprefix("file://")))


def is_remote(uri: str) -> bool:
    return "://" in uri and not uri.startswith("file://")


def _reaching(
    bucket: bool,
) -> "Callable[[Callable[Concatenate[Store, _P], _T]], Callable[Concatenate[Store, _P], _T]]":
    """Of a method of a store: failures to read or write are Outage; ``bucket``: also that there is no bucket."""

    def decorate(method: "Callable[Concatenate[Store, _P], _T]") -> "Callable[Concatenate[Store, _P], _T]":
        @wraps(method)
        def reaching(store: "Store", *args: _P.args, **kwargs: _P.kwargs) -> _T:
            with translate_storage_errors(store.uri, bucket=bucket):
                return method(store, *args, **kwargs)

        return reaching

    return decorate


class Store:
    """A folder, here or in object storage. Where that fails, its methods raise Outage."""

    def __init__(self, uri: str) -> None:
        self.uri = uri if is_remote(uri) else os.path.abspath(local_path(uri) if uri.startswith("file://") else uri)
        self.remote = is_remote(uri)
        self._fs, self._root = filesystem_for(self.uri)

    def _full(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    @_reaching(bucket=False)
    def exists(self, name: str) -> bool:
        if self.remote:
            self._fs.invalidate_cache()
        return bool(self._fs.exists(self._full(name)))

    @_reaching(bucket=False)
    def list_entries(self) -> list[str]:
        """Sorted names of what lies directly in the store, folders too; none when there is no such place."""
        if self.remote:
            self._fs.invalidate_cache()
        if not self._fs.exists(self._root):
            return []
        return sorted(str(path).rstrip("/").rsplit("/", 1)[-1] for path in self._fs.ls(self._root, detail=False))

    @_reaching(bucket=False)
    def read(self, name: str) -> bytes:
        """The content of a file. FileNotFoundError when it is absent."""
        with self.open(name) as file:
            return file.read()

    def open(self, name: str) -> IO[bytes]:
        """A seekable file for reading."""
        return self._fs.open(self._full(name), "rb")

    @_reaching(bucket=False)
    def list_files(self, folder: str) -> list[str]:
        """Sorted names of the complete files directly in a folder; none when it is absent."""
        if self.remote:
            self._fs.invalidate_cache()
        full = self._full(folder)
        if not self._fs.exists(full):
            return []
        names = (str(path).rsplit("/", 1)[1] for path in self._fs.ls(full, detail=False))
        return sorted(f"{folder}/{name}" for name in names if name and not name.startswith(TEMPORARY))

    @_reaching(bucket=True)
    def write(self, name: str, data: bytes) -> None:
        """Put a whole file, replacing one of that name."""
        if self.remote:
            self._fs.pipe_file(self._full(name), data)
            return
        with self._beside(name) as temporary:
            temporary.write_bytes(data)

    @_reaching(bucket=True)
    def upload(self, local: Path, name: str) -> None:
        """Put a finished local file, replacing one of that name."""
        if self.remote:
            self._fs.put_file(str(local), self._full(name))
            if (arrived := self._fs.info(self._full(name), refresh=True)["size"]) != local.stat().st_size:
                raise InfrastructureError(
                    f"{self.uri}/{name} arrived with {arrived} of {local.stat().st_size} bytes: try again"
                )
            return
        with self._beside(name) as temporary:
            shutil.copyfile(local, temporary)

    @_reaching(bucket=True)
    def create_exclusive(self, name: str, data: bytes) -> bool:
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

    @_reaching(bucket=True)
    def remove(self, name: str) -> None:
        """Remove a file of ours; nothing happens when it is absent."""
        if self._fs.exists(self._full(name)):
            self._fs.rm_file(self._full(name))

    @_reaching(bucket=False)
    def download(self, name: str, local: Path) -> None:
        """Copy a file to a local path, whole or not at all."""
        temporary = local.with_name(f"{TEMPORARY}{secrets.token_hex(4)}")
        try:
            self._fs.get_file(self._full(name), str(temporary))
            os.replace(temporary, local)
        finally:
            temporary.unlink(missing_ok=True)

    @_reaching(bucket=True)
    def remove_folder(self, name: str) -> None:
        """Remove a folder of ours with everything in it; nothing happens when it is absent."""
        if self.remote:
            self._fs.invalidate_cache()
        if self._fs.exists(self._full(name)):
            self._fs.rm(self._full(name), recursive=True)

    @_reaching(bucket=True)
    def delete_temporary(self) -> None:
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
def local_copy(uri: str) -> Generator[str]:
    """A local path with the content of a source: the file itself, or a temporary copy of a remote object.

    FileNotFoundError or PermissionError when there is no such object, or it is not for us; Outage for all else.
    """
    if not is_remote(uri):
        yield local_path(uri)
        return
    fs, path = filesystem_for(unquote(uri))
    with scratch_dir() as folder:
        copy = folder / ("source" + os.path.splitext(path)[1])
        with translate_storage_errors(
            f"{uri}, or its copy in {tempfile.gettempdir()},", hint=" (or set TMPDIR to another disk)"
        ):
            fs.get_file(path, str(copy))
        yield str(copy)


def filesystem_for(uri: str) -> tuple[Any, str]:
    """fsspec filesystem and path of a URI."""
    return fsspec.core.url_to_fs(uri, **filesystem_options(uri))


def _ask_no_leave_to_write() -> None:
    """Let botocore send what it writes at once. It asks the server first (`Expect: 100-continue`), and aiohttp waits
    for that answer without any limit: a store that fell silent then was waited for for ever.
    """
    from botocore import handlers

    asks = ("before-call.s3", handlers.add_expect_header)
    if asks in handlers.BUILTIN_HANDLERS:
        handlers.BUILTIN_HANDLERS.remove(asks)


def filesystem_options(uri: str) -> dict[str, Any]:
    """How patient a filesystem is. S3: what AWS_MAX_ATTEMPTS and AWS_RETRY_MODE say, by default six attempts with
    growing pauses at errors of the server, broken connections and silence; s3fs repeats broken transfers on top."""
    if uri.split("://", 1)[0] not in ("s3", "s3a"):
        return {}
    _ask_no_leave_to_write()
    retries = {
        "mode": os.environ.get("AWS_RETRY_MODE", "standard"),
        "total_max_attempts": int(os.environ.get("AWS_MAX_ATTEMPTS", "6")),
    }
    silence = {"connect_timeout": READ_TIMEOUT_S, "read_timeout": READ_TIMEOUT_S}
    return {"config_kwargs": {**silence, "retries": retries}}
