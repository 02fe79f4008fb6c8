"""The working tree as one archive: without runs, data and secrets, and no larger than said."""

import logging
import os
import zipfile
from pathlib import Path

from workflows.jobs.command import SECRET_ENV

EXCLUDED = (
    "/.git",
    "/.venv",
    "/runs",
    "/data",
    "/build",
    "**/__pycache__",
    "*.egg-info",
    "*.mp4",
    # where people keep keys and passwords
    ".env",
    ".env.*",
    ".netrc",
    ".aws",
    ".ssh",
    ".pgpass",
    "id_rsa*",
    "id_ed25519*",
    "*.pem",
    "*.key",
    "*credentials*",
    "secrets",
)
MAX_BYTES = 50 * 2**20


def package_working_dir(root: Path, folder: Path, *, most: int = MAX_BYTES) -> Path:
    """Write the tree at ``root`` to an archive in ``folder``; what .gitignore names is left out as well.

    ValueError when the archive is larger than ``most`` bytes, or when a file holds the value of a secret variable.
    """
    from ray._private.runtime_env.packaging import create_package

    archive = folder / "tree.zip"
    quiet = logging.getLogger("mfctl.pack")
    quiet.setLevel(logging.ERROR)  # Ray lists what it leaves out
    create_package(str(root), archive, include_gitignore=True, excludes=list(EXCLUDED), logger=quiet)
    with zipfile.ZipFile(archive) as packed:
        _check_size(packed, archive.stat().st_size, most)
        _check_content(packed)
    return archive


def _check_size(packed: zipfile.ZipFile, size: int, most: int) -> None:
    if size > most:
        largest = sorted(packed.infolist(), key=lambda info: -info.compress_size)[:3]
        named = ", ".join(f"{info.filename} ({info.compress_size / 2**20:.1f} MB)" for info in largest)
        raise ValueError(
            f"the working tree packs into {size / 2**20:.1f} MB, over the limit of {most / 2**20:.0f} MB; largest: "
            f"{named}. Move "
            "them under runs/ or data/, or name them in .gitignore"
        )


def _check_content(packed: zipfile.ZipFile) -> None:
    secrets = {name: value.encode() for name in SECRET_ENV if len(value := os.environ.get(name, "")) >= 8}
    for info in packed.infolist():
        content = packed.read(info) if secrets else b""
        for name, value in secrets.items():
            if value in content:
                raise ValueError(f"{info.filename} holds the value of {name} and would travel: name it in .gitignore")
