"""Package the working tree without runs, data and secrets; enforce a size limit."""

import logging
import zipfile
from pathlib import Path

from mfcore.errors import UserInputError
from workflows.jobs.command import secret_values

EXCLUDED = (
    "/.git",
    "/.venv",
    "/runs",
    "/data",
    "/build",
    "**/__pycache__",
    "*.egg-info",
    "*.mp4",
    # usual files of keys and passwords
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


def package_working_dir(root: Path, folder: Path, *, max_bytes: int = MAX_BYTES) -> Path:
    """Write the tree at ``root``, without the files in .gitignore, to an archive in ``folder``.

    Raises ValueError if the archive exceeds ``max_bytes`` or a file contains the value of a secret variable.
    """
    from ray._private.runtime_env.packaging import create_package

    archive = folder / "tree.zip"
    quiet = logging.getLogger("mfctl.pack")
    quiet.setLevel(logging.ERROR)  # Ray logs every excluded file
    create_package(str(root), archive, include_gitignore=True, excludes=list(EXCLUDED), logger=quiet)
    with zipfile.ZipFile(archive) as packed:
        _check_size(packed, archive.stat().st_size, max_bytes)
        _check_content(packed)
    return archive


def _check_size(packed: zipfile.ZipFile, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        largest = sorted(packed.infolist(), key=lambda info: -info.compress_size)[:3]
        named = ", ".join(f"{info.filename} ({info.compress_size / 2**20:.1f} MB)" for info in largest)
        raise UserInputError(
            f"the working tree packs into {size / 2**20:.1f} MB, over the limit of {max_bytes / 2**20:.0f} MB; "
            f"largest: {named}. Move these files below runs/ or data/, or add them to .gitignore"
        )


def _check_content(packed: zipfile.ZipFile) -> None:
    secrets = {name: value.encode() for name, value in secret_values().items()}
    for info in packed.infolist():
        content = packed.read(info) if secrets else b""
        for name, value in secrets.items():
            if value in content:
                raise UserInputError(
                    f"{info.filename} contains the value of {name}. Remove it or add the file to .gitignore"
                )
