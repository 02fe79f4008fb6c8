"""Small files that are written whole or not at all, and JSON read with a clear error."""

import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_NO_DEFAULT: Any = object()


def read_json(path: Path, *, default: Any = _NO_DEFAULT) -> Any:
    """Return the content of a JSON file, or ``default`` (if given) when the file does not exist.

    Raises ValueError for a file that is not JSON.
    """
    if default is not _NO_DEFAULT and not path.exists():
        return default
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise corrupt_file_error(path) from None


def corrupt_file_error(path: Path) -> ValueError:
    """Return the error for a file with unexpected content."""
    return ValueError(f"{path} is damaged: move it away, and the same command makes it again")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path``; rename it to ``path`` on success, delete it on failure."""
    temporary = path.with_name(f".tmp-{secrets.token_hex(4)}")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text_atomically(path: Path, text: str) -> None:
    """Write a text file into an existing folder; a reader sees the old or the new content."""
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, value: Any, *, indent: int | None = 1) -> None:
    """Write ``value`` as JSON, atomically; missing parent folders are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, json.dumps(value, indent=indent) + "\n")
