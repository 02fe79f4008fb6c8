"""Atomic writes that survive power loss: content and name are flushed before anything refers to them."""

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TEMPORARY = ".tmp-"


def flush_file(path: Path) -> None:
    """Flush the content of a file to its disk."""
    _flush(path, os.O_RDONLY)


def flush_folder(path: Path) -> None:
    """Flush the names in a folder to its disk; file systems that cannot are skipped."""
    with suppress(OSError):  # FUSE and CIFS may refuse to open or flush a folder
        _flush(path, os.O_RDONLY | os.O_DIRECTORY)


def _flush(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folders(path: Path) -> None:
    """Create a folder with its missing parents and flush their names."""
    if path.is_dir():
        return
    make_folders(path.parent)
    path.mkdir(exist_ok=True)
    flush_folder(path.parent)


@contextmanager
def atomic_path(
    path: Path, *, durable: bool = True, before_replace: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """Yield a temporary path next to ``path``; rename it to ``path`` on success, delete it on failure.

    Args:
        path: File to write, in an existing folder.
        durable: Flush content and name. False for files that are worthless after a crash, such as heartbeats.
        before_replace: Called between the flush and the rename; its exceptions discard the new content.
    """
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(4)}")
    try:
        yield temporary
        if durable:
            flush_file(temporary)
        before_replace()
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        flush_folder(path.parent)
