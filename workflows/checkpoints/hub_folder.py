"""Exported folders in the layout of the Hugging Face hub (``mfctl export``), also that of packaged models.

config.json               network, stage, sampling defaults; sizes and checksums of the other files
preprocessor_config.json  codecs, whitening statistics, clocks, text encoder
model.safetensors         weights; shards with model.safetensors.index.json above 5 GB
card.json, README.md      model card, and the same as text with the header of the hub
training.json             configuration of the run, where it is recorded
frontier.png              plot of the sweep, where there is one
"""

import json
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, cast

from mfcore.errors import UserInputError
from preprocessing.io.durable_files import TEMPORARY, flush_file, flush_folder, make_folders
from preprocessing.io.hashing import sha256_file
from workflows.checkpoints.layout import CONFIG_FILE, PREPROCESSOR_FILE
from workflows.checkpoints.store import matching_entries

MODEL_TYPE = "mutual-forcing"
FORMAT_VERSION = 1
NETWORK_FIELDS = ("model", "stage", "shift", "few_steps")
"""Fields of ``ExportMetadata`` in config.json; the others are in preprocessor_config.json."""
HUB_DAMAGE_HINT = "Copy or download the whole folder again"
_MISSING: dict[str, Any] = {"size": -1}  # equals no file


def is_hub_folder(folder: Path) -> bool:
    """Return True if a folder has a ``config.json``, ours or that of another library."""
    return (folder / CONFIG_FILE).is_file()


def read_config(folder: Path) -> dict[str, Any]:
    """Return ``config.json``. Raises UserInputError if it is damaged, or that of another library or version."""
    path = folder / CONFIG_FILE
    config = _read_object(path)
    if config.get("model_type") != MODEL_TYPE:
        found = str(config.get("model_type") or config.get("_class_name") or "no model_type")
        raise UserInputError(
            f"{folder} is a model of another library ({found:.60}). Use a folder of `mfctl export`, a run or a "
            "checkpoint"
        )
    if config.get("format_version") != FORMAT_VERSION:
        raise UserInputError(
            f"{path} has format version {config.get('format_version')!r}, and this installation reads version "
            f"{FORMAT_VERSION}. Update mutual-forcing"
        )
    files = config.get("files")
    if not isinstance(files, dict) or any(len(PurePosixPath(name).parts) != 1 or name == ".." for name in files):
        raise UserInputError(f"{path} is damaged: `files` is missing or wrong. {HUB_DAMAGE_HINT}")
    return config


def read_metadata_fields(folder: Path) -> dict[str, Any]:
    """Return the fields of ``ExportMetadata``. Raises UserInputError for damaged files."""
    config = read_config(folder)
    verify_hub_files(folder, [folder / PREPROCESSOR_FILE])
    fields = {name: config[name] for name in NETWORK_FIELDS if name in config}
    return fields | _read_object(folder / PREPROCESSOR_FILE)


def hub_weight_files(folder: Path) -> list[Path]:
    """Return the weight files, shards in order. Raises UserInputError if one is missing."""
    names = sorted(name for name in read_config(folder)["files"] if name.endswith(".safetensors"))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise UserInputError(f"{folder} has no {missing[0] if missing else 'weights'}. {HUB_DAMAGE_HINT}")
    return [folder / name for name in names]


def verify_hub_files(folder: Path, files: Sequence[Path]) -> None:
    """Compare files with the sizes and checksums in ``config.json``. Raises UserInputError for a damaged file."""
    entries = read_config(folder)["files"]
    listed = [entries.get(file.name) or _MISSING for file in files]
    try:
        intact = matching_entries(files, listed)
    except (KeyError, TypeError):
        raise UserInputError(f"{folder / CONFIG_FILE} is damaged. {HUB_DAMAGE_HINT}") from None
    for file, whole in zip(files, intact, strict=True):
        if not whole:
            raise UserInputError(
                f"{file} is damaged or missing: its size or sha256 differs from {CONFIG_FILE}. {HUB_DAMAGE_HINT}"
            )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserInputError(f"{path} cannot be read: {error.strerror}. {HUB_DAMAGE_HINT}") from None
    except ValueError as error:
        raise UserInputError(f"{path} is damaged: {error}. {HUB_DAMAGE_HINT}") from None
    if not isinstance(content, dict):
        raise UserInputError(f"{path} is damaged: it contains no object. {HUB_DAMAGE_HINT}")
    return cast(dict[str, Any], content)


def check_new_folder(folder: Path) -> None:
    """Raise UserInputError unless ``folder`` is new or empty and can be created."""
    folder = folder.absolute()
    if folder.is_dir() and any(folder.iterdir()):
        raise UserInputError(f"{folder} is not empty. Choose a new folder.")
    if folder.exists() and not folder.is_dir():
        raise UserInputError(f"{folder} is a file. Choose a new folder.")
    parent = next(path for path in folder.parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserInputError(f"{folder} cannot be created in {parent}. Choose another place.")


class HubFolderWriter:
    """Context that fills a temporary folder and renames it on success; on failure nothing remains."""

    def __init__(self, folder: Path, *, replace: bool = False) -> None:
        self._target = folder.absolute()
        self._replace = replace
        self.folder = self._target.with_name(f"{TEMPORARY}{secrets.token_hex(4)}")

    def __enter__(self) -> "HubFolderWriter":
        if not self._replace:
            check_new_folder(self._target)
        make_folders(self._target.parent)
        self.folder.mkdir()
        return self

    def write_config(self, fields: Mapping[str, Any]) -> None:
        """Write preprocessor_config.json and, last, config.json with the checksums of the files so far."""
        rest = {name: value for name, value in fields.items() if name not in NETWORK_FIELDS}
        self.write_text(PREPROCESSOR_FILE, json.dumps(rest, indent=1) + "\n")
        files = {
            file.name: {"size": file.stat().st_size, "sha256": sha256_file(file)}
            for file in sorted(self.folder.iterdir())
        }
        network = {name: fields[name] for name in NETWORK_FIELDS if name in fields}
        config = {"model_type": MODEL_TYPE, "format_version": FORMAT_VERSION, **network, "files": files}
        self.write_text(CONFIG_FILE, json.dumps(config, indent=1) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a text file."""
        (self.folder / name).write_text(text, encoding="utf-8")

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _finish(self) -> None:
        for file in self.folder.iterdir():
            file.chmod(0o644)  # safetensors writes files that only their owner can read
            flush_file(file)
        flush_folder(self.folder)
        old = self.folder.with_name(f"{self.folder.name}-old")
        if self._replace and self._target.exists():
            self._target.rename(old)
        try:
            self.folder.rename(self._target)  # replaces an empty folder
        except OSError:
            if old.exists():
                old.rename(self._target)
            raise
        flush_folder(self._target.parent)
        shutil.rmtree(old, ignore_errors=True)
