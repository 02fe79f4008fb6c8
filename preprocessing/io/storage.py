"""Files in a local folder or under s3://, through fsspec.

Names in a store are relative, with forward slashes. A file is either absent or complete. Local files are written next
to their target and renamed; S3 objects appear when their upload ends. A killed process may leave local temporary files,
which `Store.delete_temporary` removes.
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
READ_TIMEOUT_S = 20  # after which a connection to an object store is closed
_P = ParamSpec("_P")
_T = TypeVar("_T")


def local_uri(path: str | os.PathLike[str]) -> str:
    """Return the file:// URI of a local path, percent-encoded from the bytes of its name."""
    return "file://" + quote_from_bytes(os.fsencode(os.path.abspath(os.fspath(path))))


def local_path(uri: str) -> str:
    """Return the local path of a file:// URI, with the original bytes of its name."""
    return os.fsdecode(unquote_to_bytes(uri.removeprefix("file://")))


def is_remote(uri: str) -> bool:
    """Return True for a URI of object storage."""
    return "://" in uri and not uri.startswith("file://")


def _translating_errors(
    bucket: bool,
) -> "Callable[[Callable[Concatenate[Store, _P], _T]], Callable[Concatenate[Store, _P], _T]]":
    """Decorate a method of a store with `translate_storage_errors`."""

    def decorate(method: "Callable[Concatenate[Store, _P], _T]") -> "Callable[Concatenate[Store, _P], _T]":
        @wraps(method)
        def translated(store: "Store", *args: _P.args, **kwargs: _P.kwargs) -> _T:
            with translate_storage_errors(store.uri, bucket=bucket):
                return method(store, *args, **kwargs)

        return translated

    return decorate


class Store:
    """Local folder or prefix in object storage. Raises InfrastructureError if storage fails."""

    def __init__(self, uri: str) -> None:
        self.uri = uri if is_remote(uri) else os.path.abspath(local_path(uri) if uri.startswith("file://") else uri)
        self.remote = is_remote(uri)
        self._fs, self._root = filesystem_for(self.uri)

    def _full(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    @_translating_errors(bucket=False)
    def exists(self, name: str) -> bool:
        """Return True if a file or folder of this name exists."""
        if self.remote:
            self._fs.invalidate_cache()
        return bool(self._fs.exists(self._full(name)))

    @_translating_errors(bucket=False)
    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes; None if it is absent."""
        if self.remote:
            self._fs.invalidate_cache()
        try:
            return int(self._fs.info(self._full(name))["size"])
        except FileNotFoundError:
            return None

    @_translating_errors(bucket=False)
    def list_entries(self) -> list[str]:
        """Return the sorted names of files and folders in the store; empty if it is absent."""
        if self.remote:
            self._fs.invalidate_cache()
        if not self._fs.exists(self._root):
            return []
        return sorted(str(path).rstrip("/").rsplit("/", 1)[-1] for path in self._fs.ls(self._root, detail=False))

    @_translating_errors(bucket=False)
    def read(self, name: str) -> bytes:
        """Return the content of a file. Raise FileNotFoundError if it is absent."""
        with self.open(name) as file:
            return file.read()

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading; it is seekable."""
        return self._fs.open(self._full(name), "rb")

    @_translating_errors(bucket=False)
    def list_files(self, folder: str) -> list[str]:
        """Return the sorted names of the complete files directly in a folder; empty if it is absent."""
        if self.remote:
            self._fs.invalidate_cache()
        full = self._full(folder)
        if not self._fs.exists(full):
            return []
        names = (str(path).rsplit("/", 1)[1] for path in self._fs.ls(full, detail=False))
        return sorted(f"{folder}/{name}" for name in names if name and not name.startswith(TEMPORARY))

    @_translating_errors(bucket=True)
    def write(self, name: str, data: bytes) -> None:
        """Write a file, replacing one of that name."""
        if self.remote:
            self._fs.pipe_file(self._full(name), data)
            return
        with self._replacing(name) as temporary:
            temporary.write_bytes(data)

    @_translating_errors(bucket=True)
    def upload(self, local: Path, name: str) -> None:
        """Copy a local file into the store, replacing one of that name."""
        if self.remote:
            self._fs.put_file(str(local), self._full(name))
            stored = self._fs.info(self._full(name), refresh=True)["size"]
            if stored != local.stat().st_size:
                raise InfrastructureError(
                    f"{self.uri}/{name}: only {stored} of {local.stat().st_size} bytes were stored. Try again"
                )
            return
        with self._replacing(name) as temporary:
            shutil.copyfile(local, temporary)

    @_translating_errors(bucket=True)
    def create_exclusive(self, name: str, data: bytes) -> bool:
        """Write a file unless it exists; return True if written. Not atomic in object storage."""
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
            os.link(temporary, target)  # atomic: fails if the name exists
        except FileExistsError:
            return False
        finally:
            temporary.unlink()
        return True

    @_translating_errors(bucket=True)
    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        if self._fs.exists(self._full(name)):
            self._fs.rm_file(self._full(name))

    @_translating_errors(bucket=False)
    def download(self, name: str, local: Path) -> None:
        """Copy a file to a local path, completely or not at all."""
        temporary = local.with_name(f"{TEMPORARY}{secrets.token_hex(4)}")
        try:
            self._fs.get_file(self._full(name), str(temporary))
            os.replace(temporary, local)
        finally:
            temporary.unlink(missing_ok=True)

    @_translating_errors(bucket=True)
    def remove_folder(self, name: str) -> None:
        """Remove a folder with its content if it exists."""
        if self.remote:
            self._fs.invalidate_cache()
        if self._fs.exists(self._full(name)):
            self._fs.rm(self._full(name), recursive=True)

    @_translating_errors(bucket=True)
    def delete_temporary(self) -> None:
        """Remove temporary files that killed processes left in a local store."""
        if not self.remote and os.path.isdir(self._root):
            for path in Path(self._root).glob(f"**/{TEMPORARY}*"):
                path.unlink()

    @contextmanager
    def _replacing(self, name: str) -> Generator[Path]:
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
    """Yield a local path of a source: the file itself or a temporary copy of a remote object.

    Raise FileNotFoundError or PermissionError for an absent or forbidden object, else InfrastructureError.
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
    """Return the fsspec filesystem and the path of a URI."""
    return fsspec.core.url_to_fs(uri, **filesystem_options(uri))


def _disable_expect_header() -> None:
    """Disable `Expect: 100-continue` of botocore: aiohttp awaits the reply without a timeout."""
    from botocore import handlers

    handler = ("before-call.s3", handlers.add_expect_header)
    if handler in handlers.BUILTIN_HANDLERS:
        handlers.BUILTIN_HANDLERS.remove(handler)


def filesystem_options(uri: str) -> dict[str, Any]:
    """Return the timeouts and retries of a filesystem; empty except for S3.

    AWS_MAX_ATTEMPTS (default: 6) and AWS_RETRY_MODE (default: standard) apply. s3fs retries broken transfers as well.
    """
    if uri.split("://", 1)[0] not in ("s3", "s3a"):
        return {}
    _disable_expect_header()
    retries = {
        "mode": os.environ.get("AWS_RETRY_MODE", "standard"),
        "total_max_attempts": int(os.environ.get("AWS_MAX_ATTEMPTS", "6")),
    }
    timeouts = {"connect_timeout": READ_TIMEOUT_S, "read_timeout": READ_TIMEOUT_S}
    return {"config_kwargs": {**timeouts, "retries": retries}}
