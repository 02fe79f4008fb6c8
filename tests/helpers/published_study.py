"""Folder of the published study, the source of docs/results."""

import tarfile
import tempfile
from functools import cache
from pathlib import Path

ARCHIVE = Path(__file__).parents[2] / "docs" / "results" / "data" / "study.tar.gz"


@cache
def published_study_dir() -> Path:
    """Extract the published rows, costs and settings; return the folder (kept until the process ends)."""
    folder = tempfile.TemporaryDirectory(prefix="published-study-")
    _KEPT.append(folder)
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder.name, filter="data")
    return Path(folder.name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []
