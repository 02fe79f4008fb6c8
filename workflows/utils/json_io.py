"""Small files of a study: whole or not there, and a clear word about one that something else has been at."""

import json
import secrets
from pathlib import Path
from typing import Any

_NONE: Any = object()


def read_json(path: Path, *, default: Any = _NONE) -> Any:
    """What ``write_json`` wrote; ``default``, if given, where there is no file. ValueError for one that is no JSON."""
    if default is not _NONE and not path.exists():
        return default
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise corrupt_file_error(path) from None


def corrupt_file_error(path: Path) -> ValueError:
    """The error for a file that no study writes."""
    return ValueError(f"{path} is damaged: move it away, and the same command makes it again")


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{secrets.token_hex(4)}")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)
