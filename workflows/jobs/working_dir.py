"""Package the files that git tracks, with local changes; refuse files that look like keys; enforce a size limit."""

import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from mfcore.errors import UserInputError
from workflows.jobs.command import secret_values

MAX_BYTES = 50 * 2**20
KEY_NAMES = (
    *(".env", ".env.*", "*.env", ".envrc", ".netrc", "_netrc", ".pgpass", ".npmrc", ".pypirc", ".boto", ".s3cfg"),
    *(".aws", ".azure", ".docker", ".gnupg", ".huggingface", ".kube", ".ssh", "kubeconfig*", "secrets"),
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "*.pem", "*.key", "*.p12", "*.pfx", "*.ppk", "*.jks", "*.kdbx"),
    *("*credentials*", "*service-account*", "*service_account*", "*key.json", "*keys.json", "*key.csv", "*keys.csv"),
    *("*password*", "secret.*", "secrets.*", "*token", "*token.txt", "*token.json", "*.tfstate", "*.tfstate.*"),
)
"""Usual names of files and folders with keys or passwords, in lower case."""
SOURCE_SUFFIXES = (".py", ".pyi", ".md")
"""Files that may have such a name."""
KEY_CONTENTS = {
    "an AWS access key": re.compile(rb"\b(AKIA|ASIA)[0-9A-Z]{16}\b"),
    "an AWS secret key": re.compile(rb"aws_secret_access_key[\"']?\s*[=:]\s*[\"']?[A-Za-z0-9/+]{30,}", re.IGNORECASE),
    "a private key": re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
}


def package_working_dir(root: Path, folder: Path, *, untracked: bool = False, max_bytes: int = MAX_BYTES) -> Path:
    """Write the files at ``root`` that git tracks, as they are on disk, to an archive in ``folder``.

    Args:
        root: A git checkout, or a folder in one.
        folder: Receives ``tree.zip``.
        untracked: Include files that git neither tracks nor ignores; without it, a warning counts them.
        max_bytes: Maximum size of the archive.

    Raises:
        UserInputError: if ``root`` is not in a git checkout, a file has the name or the content of a key or contains
            the value of a secret variable, a link leaves the tree, or the archive exceeds ``max_bytes``.
    """
    names = _list_files(root, "--cached")
    if not names:
        raise UserInputError(f"git tracks no file in {root}. Add the files of the job: git add .")
    others = _list_files(root, "--others", "--exclude-standard")
    if untracked:
        names += others
    elif others:
        print(
            f"warning: {len(others)} untracked files are not part of the job, e.g. {others[0]}. Use `git add` or "
            "--untracked to include them",
            file=sys.stderr,
        )
    archive = folder / "tree.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in sorted(set(names)):
            _add_file(packed, root, name)
    with zipfile.ZipFile(archive) as packed:
        _check_size(packed, archive.stat().st_size, max_bytes)
    return archive


def _list_files(root: Path, *options: str) -> list[str]:
    """Return the paths relative to ``root`` of the files that git lists."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "ls-files", "-z", *options], capture_output=True, check=False, timeout=60
        )
    except FileNotFoundError as error:
        raise UserInputError(
            "submit packages the files that git tracks, and git is not installed. Install it"
        ) from error
    if done.returncode != 0:
        raise UserInputError(
            f"submit packages the files that git tracks, and {root} is not a usable git checkout: "
            f"{done.stderr.decode(errors='replace').strip()}. Clone the repository, or run `git init && git add .` "
            "there"
        )
    return [os.fsdecode(name) for name in done.stdout.split(b"\0") if name]


def _add_file(packed: zipfile.ZipFile, root: Path, name: str) -> None:
    """Add a file; skips deleted files and submodules."""
    path = root / name
    if not path.is_file():
        return
    if not path.resolve().is_relative_to(root.resolve()):
        raise UserInputError(f"{name} is a link to {path.resolve()}, outside the checkout. Remove it")
    _check_name(name)
    _check_content(name, path.read_bytes())
    packed.write(path, name)


def _check_name(name: str) -> None:
    if name.endswith(SOURCE_SUFFIXES):
        parts: Sequence[str] = PurePosixPath(name).parts[:-1]
    else:
        parts = PurePosixPath(name).parts
    for part in parts:
        pattern = next((pattern for pattern in KEY_NAMES if fnmatch(part.lower(), pattern)), None)
        if pattern:
            raise UserInputError(
                f"{name} has the name of a file with keys ({pattern}), and everyone who reaches the job server could "
                f"read it. {_FIX}, or rename it"
            )


def _check_content(name: str, content: bytes) -> None:
    kind = next((kind for kind, pattern in KEY_CONTENTS.items() if pattern.search(content)), None)
    if kind:
        raise UserInputError(
            f"{name} contains {kind}, and everyone who reaches the job server could read it. {_FIX}, or remove the key"
        )
    for variable, value in secret_values().items():
        if value.encode() in content:
            raise UserInputError(f"{name} contains the value of {variable}. {_FIX}, or remove the value")


_FIX = "Add it to .gitignore (if tracked: `git rm --cached` it)"


def _check_size(packed: zipfile.ZipFile, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        largest = sorted(packed.infolist(), key=lambda info: -info.compress_size)[:3]
        named = ", ".join(f"{info.filename} ({info.compress_size / 2**20:.1f} MB)" for info in largest)
        raise UserInputError(
            f"the working tree packs into {size / 2**20:.1f} MB, over the limit of {max_bytes / 2**20:.0f} MB; "
            f"largest: {named}. Move these files below runs/ or data/, or add them to .gitignore (if tracked: "
            "`git rm --cached` them)"
        )
