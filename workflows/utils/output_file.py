"""Checks of an output file before the work that produces it."""

import os
from pathlib import Path

from mfcore.errors import UserInputError


def check_output_file(path: str | Path, *, suffix: str, overwrite: bool) -> None:
    """Raise UserInputError unless a file can be written at ``path``; nothing is created.

    Args:
        path: output file; missing parent folders are allowed.
        suffix: required suffix, such as ".mp4".
        overwrite: an existing file may be replaced.
    """
    target = Path(path).absolute()
    if target.suffix.lower() != suffix:
        raise UserInputError(f"{target}: the output is a {suffix[1:]} file. Use a name that ends in {suffix}.")
    if target.is_dir():
        raise UserInputError(f"{target} is a folder. Choose the name of a file.")
    if target.exists() and not overwrite:
        raise UserInputError(f"{target} exists. Choose another name or add --overwrite.")
    parent = next(folder for folder in target.parents if folder.exists())
    if not parent.is_dir():
        raise UserInputError(f"{parent} is a file, so {target} cannot be written. Choose another folder.")
    if not os.access(parent, os.W_OK):
        raise UserInputError(f"{parent} cannot be written. Change its permissions or choose another folder.")
