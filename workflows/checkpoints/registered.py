"""Registered models as checkpoints: ``models:/NAME@ALIAS`` and ``models:/NAME/VERSION``."""

import re
import shutil
import tempfile
from pathlib import Path

from mfcore.errors import UserInputError
from preprocessing.io.durable_files import TEMPORARY
from workflows.checkpoints.store import cache_dir
from workflows.tracking.registry import download_version, find_version
from workflows.utils import environment

SCHEME = "models:/"
_REFERENCE = re.compile(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))")


def is_registered_model(text: str) -> bool:
    """Return True for the URI of a registered model."""
    return text.startswith(SCHEME)


def download_model(uri: str) -> Path:
    """Return the folder of a registered model, copied once per machine and version.

    The server is that of ``MLFLOW_TRACKING_URI``, by default runs/mlflow.db.

    Raises:
        UserInputError: The URI is malformed, or the registry has no such model, alias or version.
        InfrastructureError: The registry does not answer.
    """
    found = _REFERENCE.fullmatch(uri)
    if found is None:
        raise UserInputError(f"{uri} names no registered model. Write models:/NAME@ALIAS or models:/NAME/VERSION")
    server = environment.tracking_uri()
    name, alias, version = found.groups()
    source = find_version(server, name, alias=alias, version=version)
    folder = cache_dir(f"{server} {source}")
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=folder.parent) as temporary:
        copy = download_version(server, source, Path(temporary))
        whole = Path(temporary, "whole")
        shutil.copytree(copy, whole)
        if not folder.is_dir():
            whole.rename(folder)
    return folder
