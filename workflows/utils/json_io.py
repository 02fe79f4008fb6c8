"""Small files that are written whole or not at all, and JSON read with a clear error."""

import json
import logging
from pathlib import Path
from typing import Any, cast

from preprocessing.io.durable_files import atomic_path, make_folders

_LOGGER = logging.getLogger(__name__)
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


def read_intact_json(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file; None without the file. A damaged one is logged and counts as absent."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError):
        content = None
    if isinstance(content, dict):
        return cast(dict[str, Any], content)
    _LOGGER.warning(f"{path} is damaged ({path.stat().st_size} bytes) and counts as absent")
    return None


def corrupt_file_error(path: Path) -> ValueError:
    """Return the error for a file with unexpected content."""
    return ValueError(f"{path} is damaged: move it away, and the same command makes it again")


def write_text_atomically(path: Path, text: str, *, durable: bool = True) -> None:
    """Write a text file into an existing folder; a reader sees the old or the new content.

    ``durable``: flush it to disk, so that it survives power loss.
    """
    with atomic_path(path, durable=durable) as temporary:
        temporary.write_text(text)


def write_json(path: Path, value: Any, *, indent: int | None = 1) -> None:
    """Write ``value`` as JSON, atomically and durably; missing parent folders are created."""
    make_folders(path.parent)
    write_text_atomically(path, json.dumps(value, indent=indent) + "\n")
