"""Files in a local folder or under s3://, through fsspec.

Names in a store are relative, with forward slashes, and cannot lead out of it. A file is either absent or complete.
Local files are written next to their target, flushed and renamed; S3 objects appear when their upload ends. A killed
process may leave local temporary files, which `Store.delete_temporary` removes.
"""

import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import IO, Any, Concatenate, ParamSpec, TypeVar
from urllib.parse import quote_from_bytes, unquote, unquote_to_bytes

import fsspec

from mfcore.errors import UserInputError
from preprocessing.io.durable_files import TEMPORARY, atomic_path, flush_file, flush_folder, make_folders
from preprocessing.io.errors import InfrastructureError, translate_storage_errors
from preprocessing.io.processes import scratch_dir

_NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL, errno.EACCES)
_LOST_RACE = ("PreconditionFailed", "ConditionalRequestConflict")  # codes of S3
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


def _nothing() -> None: ...


class Store:
    """Local folder or prefix in object storage. Raises InfrastructureError if storage fails.

    Every method raises UserInputError for a name that leads out of the store.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri if is_remote(uri) else os.path.abspath(local_path(uri) if uri.startswith("file://") else uri)
        self.remote = is_remote(uri)
        self._fs, self._root = filesystem_for(self.uri)

    def _full(self, name: str) -> str:
        if name.startswith("/") or ".." in name.split("/"):
            raise UserInputError(
                f"{self.uri} has a file that names {name!r}, which is outside of it. Remove the file that names it"
            )
        return f"{self._root.rstrip('/')}/{name}"

    @_translating_errors(bucket=False)
    def exists(self, name: str) -> bool:
        """Return True if a file or folder of this name exists."""
        if self.remote:
            self._fs.invalidate_cache()
        return bool(self._fs.exists(self._full(name)))

    @_translating_errors(bucket=False)
    def list_entries(self) -> list[str]:
        """Return the sorted names of files and folders in the store; empty if it is absent."""
        return sorted(str(entry["name"]).rstrip("/").rsplit("/", 1)[-1] for entry in self._entries(self._root))

    @_translating_errors(bucket=False)
    def read(self, name: str) -> bytes:
        """Return the content of a file. Raise FileNotFoundError if it is absent."""
        return self._fs.cat_file(self._full(name))

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading; it is seekable."""
        return self._fs.open(self._full(name), "rb")

    def list_files(self, folder: str) -> list[str]:
        """Return the sorted names of the complete files directly in a folder; empty if it is absent."""
        return sorted(self.list_sizes(folder))

    @_translating_errors(bucket=False)
    def list_sizes(self, folder: str) -> dict[str, int]:
        """Return the bytes of the complete files directly in a folder by name, from one listing."""
        found = {str(entry["name"]).rsplit("/", 1)[1]: entry for entry in self._entries(self._full(folder))}
        return {
            f"{folder}/{name}": entry["size"]
            for name, entry in found.items()
            if name and not name.startswith(TEMPORARY)
        }

    def _entries(self, full: str) -> list[dict[str, Any]]:
        if self.remote:
            self._fs.invalidate_cache()
        try:
            return self._fs.ls(full, detail=True)
        except FileNotFoundError:
            return []

    @_translating_errors(bucket=True)
    def write(self, name: str, data: bytes, *, before_publish: Callable[[], None] | None = None) -> None:
        """Write a file, replacing one of that name.

        `before_publish` is called when the content is ready and flushed, just before it replaces the file. Its
        exceptions keep the old file. With it, raise FileExistsError if another process replaced the file meanwhile, in
        S3, and FileNotFoundError if another process deleted the temporary file, in a local store.
        """
        full = self._full(name)
        if not self.remote:
            with self._replacing(name, before_publish) as temporary:
                temporary.write_bytes(data)
        elif before_publish is None:
            self._fs.pipe_file(full, data)
        else:
            version = self._version(full)
            before_publish()
            if not self._put_if(full, data, version):
                raise FileExistsError(f"{self.uri}/{name} was replaced by another process")

    @_translating_errors(bucket=True)
    def upload(self, local: Path, name: str, *, before_publish: Callable[[], None] | None = None) -> None:
        """Copy a local file into the store, replacing one of that name. `before_publish`: as in `write`."""
        if not self.remote:
            with self._replacing(name, before_publish) as temporary:
                shutil.copyfile(local, temporary)
            return
        (before_publish or _nothing)()
        self._fs.put_file(str(local), self._full(name))
        stored = self._fs.info(self._full(name), refresh=True)["size"]
        if stored != local.stat().st_size:
            raise InfrastructureError(
                f"{self.uri}/{name}: only {stored} of {local.stat().st_size} bytes were stored. Try again"
            )

    @_translating_errors(bucket=True)
    def create_exclusive(self, name: str, data: bytes) -> bool:
        """Write a file unless it exists; return True if written. Of several processes, one succeeds."""
        if self.remote:
            return self._put_if(self._full(name), data, None)
        target = Path(self._full(name))
        make_folders(target.parent)
        temporary = target.with_name(f"{TEMPORARY}{secrets.token_hex(4)}")
        temporary.write_bytes(data)
        flush_file(temporary)
        try:
            return _link_or_create(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    @_translating_errors(bucket=True)
    def replace_exclusive(self, name: str, old: bytes, new: bytes) -> bool:
        """Replace the content `old` of a file by `new` of equal length; return True if it was replaced.

        Return False if the file is absent or has another content: a file that was removed is never created again.
        """
        full = self._full(name)
        try:
            if not self.remote:
                return _rewrite(full, old, new)
            version = self._version(full)
            return version is not None and self._fs.cat_file(full) == old and self._put_if(full, new, version)
        except FileNotFoundError:
            return False

    def _version(self, full: str) -> str | None:
        """Return the ETag of an object, "" in stores without ETags; None if it is absent."""
        self._fs.invalidate_cache()
        try:
            return self._fs.info(full).get("ETag", "")
        except FileNotFoundError:
            return None

    def _put_if(self, full: str, data: bytes, version: str | None) -> bool:
        """Write an object if it has this version (None: is absent); return True if written."""
        condition: dict[str, str] = {"mode": "create"} if version is None else {"IfMatch": version} if version else {}
        try:
            self._fs.pipe_file(full, data, **condition)
        except FileExistsError:
            return False
        except FileNotFoundError:
            if not version:
                raise
            return False
        except OSError as error:
            if _lost_race(error):
                return False
            raise
        return True

    @_translating_errors(bucket=True)
    def remove(self, name: str, *, before_publish: Callable[[], None] | None = None) -> None:
        """Remove a file if it exists. `before_publish` and errors: as in `write`."""
        full = self._full(name)
        if before_publish is None:
            with suppress(FileNotFoundError):
                self._fs.rm_file(full)
        elif not self.remote:
            _move_and_delete(Path(full), Path(self._root), before_publish)
        elif (version := self._version(full)) is not None:
            before_publish()
            if not self._delete_if(full, version):
                raise FileExistsError(f"{self.uri}/{name} was replaced by another process")

    def _delete_if(self, full: str, version: str) -> bool:
        """Delete an object if it has this version; return True if deleted."""
        if not version or not hasattr(self._fs, "call_s3"):  # a store without conditional deletion
            self._fs.rm_file(full)
            return True
        bucket, key, _ = self._fs.split_path(full)
        try:
            self._fs.call_s3("delete_object", Bucket=bucket, Key=key, IfMatch=version)
        except OSError as error:
            if _lost_race(error):
                return False
            raise
        return True

    @_translating_errors(bucket=False)
    def download(self, name: str, local: Path) -> None:
        """Copy a file to a local path, completely or not at all."""
        with atomic_path(local) as temporary:
            self._fs.get_file(self._full(name), str(temporary))

    @_translating_errors(bucket=True)
    def remove_folder(self, name: str) -> None:
        """Remove a folder with its content if it exists."""
        if self.remote:
            self._fs.invalidate_cache()
        if self._fs.exists(self._full(name)):
            self._fs.rm(self._full(name), recursive=True)

    @_translating_errors(bucket=True)
    def delete_temporary(self) -> None:
        """Remove temporary files of a local store, also those that a paused process is about to publish."""
        if not self.remote and os.path.isdir(self._root):
            for path in list(Path(self._root).glob(f"**/{TEMPORARY}*")):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    @contextmanager
    def _replacing(self, name: str, before_publish: Callable[[], None] | None) -> Generator[Path]:
        target = Path(self._full(name))
        make_folders(target.parent)
        with atomic_path(target, before_replace=before_publish or _nothing) as temporary:
            yield temporary


def _link_or_create(temporary: Path, target: Path) -> bool:
    """Give `temporary` a second name; return False if it exists. Copy it where hard links are not supported.

    Return False too if another driver deleted `temporary`.
    """
    try:
        os.link(temporary, target)  # atomic: fails if the name exists
    except FileNotFoundError:
        return False
    except FileExistsError:
        with suppress(FileNotFoundError):
            return temporary.stat().st_nlink == 2  # NFS may repeat a request that succeeded
        return False
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        try:
            with target.open("xb") as file:
                file.write(temporary.read_bytes())
        except FileExistsError:
            return False
        flush_file(target)
    flush_folder(target.parent)
    return True


def _move_and_delete(path: Path, root: Path, before_move: Callable[[], None]) -> None:
    """Move a file into a temporary folder and delete both; the next driver deletes the folder of a paused one.

    Raise FileNotFoundError if the folder was deleted before the file was moved.
    """
    folder = root / f"{TEMPORARY}{secrets.token_hex(4)}"
    folder.mkdir()
    try:
        before_move()
        path.replace(folder / "removed")
    except FileNotFoundError:
        if path.exists():
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    flush_folder(path.parent)


def _lost_race(error: OSError) -> bool:
    return any(f"({code})" in str(error.__cause__) for code in _LOST_RACE)


def _rewrite(path: str, old: bytes, new: bytes) -> bool:
    """Overwrite a file in place; the name may be removed or taken by another file meanwhile, without harm."""
    assert len(old) == len(new)
    with open(path, "r+b", buffering=0) as file:
        if file.read() != old:
            return False
        file.seek(0)
        file.write(new)
    return True


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
