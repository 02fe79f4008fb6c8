"""Find and load checkpoints, which ``training.checkpointing`` writes into a ``CheckpointStore``.

<samples>-<attempt>/state/   weights and moments of every trained network, the float32 EMA: one shard per rank
<samples>-<attempt>/export/  ema.safetensors, raw.safetensors, model.json: all that generation needs
<samples>-<attempt>/run.json configuration, progress, dataset fingerprint, MLflow run, versions
<samples>-<attempt>/COMPLETE names, sizes and checksums of all the above, written last
"""

import json
import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from mfcore.errors import UserInputError
from mfcore.model.config import ModelConfig
from mfcore.model.transformer import AVTransformer, build_model
from mfcore.weights import load_strict
from preprocessing.io.storage import Store, is_remote
from workflows.checkpoints import hub_folder
from workflows.checkpoints.layout import METADATA_FILE, RUN_FILE
from workflows.checkpoints.model_card import ExportMetadata
from workflows.checkpoints.packaged import packaged_folder, packaged_names
from workflows.checkpoints.registered import download_model, is_registered_model
from workflows.checkpoints.store import (
    COMPLETE_FILE,
    DAMAGE_HINT,
    CheckpointStore,
    checkpoint_root,
    join_uri,
    matching_entries,
    parse_entries,
)
from workflows.config import serialization
from workflows.utils.json_io import read_intact_json

WeightKind = Literal["ema", "raw"]
_LOGGER = logging.getLogger(__name__)
_UNLISTED: dict[str, Any] = {"size": -1}  # equals no file


def locate_export(path: str | Path) -> str:
    """Return the checkpoint or export that ``path`` names, as a path or URI; for a run its latest intact checkpoint.

    The name of a packaged model counts unless a file has this name. Raises UserInputError if there is none.
    """
    if is_remote(str(path)):
        return _locate_remote(str(path).rstrip("/"))
    if is_registered_model(str(path)):
        return str(download_model(str(path)))
    folder = Path(path)
    if not folder.exists():
        if packaged := packaged_folder(str(path)):
            return str(packaged)
        names = ", ".join(packaged_names())
        raise UserInputError(
            f"{folder} does not exist: name a run, such as runs/mutual, or a checkpoint inside one"
            + (f", or a packaged model ({names})" if names else "")
        )
    if (folder / METADATA_FILE).exists():
        return str(folder)
    if hub_folder.is_hub_folder(folder):
        hub_folder.read_config(folder)
        return str(folder)
    if (folder / RUN_FILE).exists() and not (folder / "export").exists():
        return _latest_intact(checkpoint_root(folder, _checkpoint_setting(folder)), folder)
    if (folder / "checkpoints").is_dir():
        return _latest_intact(folder / "checkpoints", folder)
    if (folder / "export" / METADATA_FILE).exists():
        if not (folder / COMPLETE_FILE).exists():
            raise UserInputError(f"{folder} is not complete (its writer died): use another checkpoint of the run")
        verify_export(folder / "export", [])
        return str(folder)
    raise UserInputError(
        f"{folder} is neither a run, a checkpoint nor an export: it has no checkpoints/, no {METADATA_FILE} and no "
        "config.json. Name a run, a checkpoint, a folder of `mfctl export` or a packaged model"
    )


def find_export(path: str | Path) -> Path:
    """Return the export folder of a run (its latest intact checkpoint), of a checkpoint, or ``path`` itself.

    Exports in object storage are copied to this machine. Raises UserInputError if there is none.
    """
    located = locate_export(path)
    if is_remote(located):
        root, _, name = located.rpartition("/")
        return CheckpointStore(root).download(name, "export/") / "export"
    folder = Path(located)
    is_export = (folder / METADATA_FILE).exists() or hub_folder.is_hub_folder(folder)
    return folder if is_export else folder / "export"


def _checkpoint_setting(run_dir: Path) -> str | None:
    """Return ``checkpoint.to`` from the record of a run."""
    record = read_intact_json(run_dir / RUN_FILE)
    if record is None:
        if (run_dir / "checkpoints").is_dir():
            return None
        raise UserInputError(
            f"{run_dir / RUN_FILE} is damaged, and {run_dir} has no checkpoints/. "
            "Run the `mfctl train` command of this run again: it rewrites the file"
        )
    return record["config"]["checkpoint"].get("to")


def _latest_intact(root: str | Path, run: str | Path) -> str:
    """Return the path or URI of the latest checkpoint with an intact export; log those that are damaged."""
    store = CheckpointStore(root)
    damage = ""
    for name in reversed(store.list_complete()):
        try:
            export = store.download(name, "export/") / "export"
            verify_export(export, [export / METADATA_FILE, *weight_files(export, "ema")])
        except UserInputError as error:
            damage = damage or str(error)
            _warn_once(f"{run}: an older checkpoint is used. {error}")
        else:
            return store.uri_of(name)
    if damage or store.damaged:
        raise UserInputError(f"{run} has no intact checkpoint: {damage or next(iter(store.damaged.values()))}")
    raise UserInputError(f"{run} has no complete checkpoint yet: run its `mfctl train` command to the end")


@cache
def _warn_once(text: str) -> None:
    _LOGGER.warning(text)


def _locate_remote(uri: str) -> str:
    store = Store(uri)
    if store.exists(METADATA_FILE):  # an export
        uri, store = uri.rpartition("/")[0], Store(uri.rpartition("/")[0])
    if store.exists(COMPLETE_FILE):
        return uri
    if "checkpoints" in store.list_entries():
        return _latest_intact(join_uri(uri, "checkpoints"), uri)
    raise UserInputError(
        f"{uri} is neither a run, a complete checkpoint nor an export: name one that `mfctl train` wrote"
    )


def verify_export(export: Path, files: Sequence[Path]) -> None:
    """Compare files of an export with the checksums in the ``COMPLETE`` file of its checkpoint.

    An export that was copied without its checkpoint has no checksums. Raises UserInputError for a damaged file.
    """
    if is_hub_export(export):
        hub_folder.verify_hub_files(export, files)
        return
    marker = export.parent / COMPLETE_FILE
    if export.name != "export" or not marker.exists():
        return
    entries = parse_entries(marker.read_bytes())
    if entries is None:
        raise UserInputError(f"{marker} is damaged. {DAMAGE_HINT}")
    listed = [entries.get(f"export/{file.name}", _UNLISTED) for file in files]
    for file, intact in zip(files, matching_entries(files, listed), strict=True):
        if not intact:
            raise UserInputError(f"{file} is damaged: its size or sha256 differs from {COMPLETE_FILE}. {DAMAGE_HINT}")


def load_metadata(path: str | Path) -> ExportMetadata:
    """Return the metadata of a run, checkpoint or export. Raises UserInputError if they are damaged."""
    export = find_export(path)
    if is_hub_export(export):
        try:
            return serialization.from_dict(ExportMetadata, hub_folder.read_metadata_fields(export))
        except ValueError as error:
            raise UserInputError(f"{export} cannot be read: {error}") from None
    file = export / METADATA_FILE
    verify_export(export, [file])
    try:
        return serialization.from_dict(ExportMetadata, json.loads(file.read_text()))
    except ValueError as error:
        raise UserInputError(f"{file} cannot be read: {error}. {DAMAGE_HINT}") from None


def is_hub_export(export: Path) -> bool:
    """Return True for a folder of `mfctl export`; a ``model.json`` in the folder takes precedence."""
    return not (export / METADATA_FILE).exists() and hub_folder.is_hub_folder(export)


def weight_files(export: Path, weights: WeightKind) -> list[Path]:
    """Return the files of these weights in an export folder: one file, or all shards.

    Raises ValueError if a file is missing.
    """
    if is_hub_export(export):
        if weights != "ema":
            raise UserInputError(f"{export} has no {weights} weights: use the checkpoint that it was exported from")
        return hub_folder.hub_weight_files(export)
    whole = export / f"{weights}.safetensors"
    if whole.exists():
        return [whole]
    found = sorted(export.glob(f"{weights}-*-of-*.safetensors"))
    if not found:
        raise UserInputError(f"{whole} does not exist: name a checkpoint that has {weights} weights")
    expected = int(found[0].stem.rsplit("-", 1)[1])
    if len(found) != expected:
        raise UserInputError(
            f"{export} has {len(found)} of the {expected} files of its {weights} weights: copy all of them"
        )
    return found


def load_weights(path: str | Path, weights: WeightKind = "ema") -> dict[str, Tensor]:
    """Return the weights of a run, checkpoint or export by parameter name; those in bfloat16 become float32.

    Raises UserInputError for a file that differs from its checksum or cannot be read.
    """
    export = find_export(path)
    files = weight_files(export, weights)
    verify_export(export, files)
    loaded: dict[str, Tensor] = {}
    for file in files:
        try:
            loaded |= {name: w.float() if w.dtype == torch.bfloat16 else w for name, w in load_file(file).items()}
        except (OSError, SafetensorError) as error:
            raise UserInputError(f"{file} cannot be read: {error}. {DAMAGE_HINT}") from None
    return loaded


def load_export(path: str | Path, weights: WeightKind = "ema") -> tuple[nn.Module, ExportMetadata]:
    """Return the network of a run, checkpoint or export in evaluation mode, and its metadata.

    Raises UserInputError for damaged files, and for metadata and weights of different networks.
    """
    export = find_export(path)
    metadata = load_metadata(export)
    _check_sizes(metadata.model, export, weights)
    model = build_model(metadata.model, 0)
    load_strict(model, load_weights(export, weights), f"{weights} weights of {path}")
    return model.eval().requires_grad_(False), metadata


def _check_sizes(config: ModelConfig, export: Path, weights: WeightKind) -> None:
    """Compare the network of ``model.json`` with the headers of the weight files before memory is allocated."""
    stored: dict[str, Tensor] = {}
    for path in weight_files(export, weights):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dictionary
                    stored[name] = torch.empty(file.get_slice(name).get_shape(), device="meta")
        except (OSError, SafetensorError) as error:
            raise UserInputError(f"{path} cannot be read: {error}. {DAMAGE_HINT}") from None
    source = f"{export} ({weights} weights compared with {METADATA_FILE})"
    if config.layers > len(stored):
        raise UserInputError(f"{source} is of another size: {config.layers} layers, {len(stored)} weights")
    try:
        with torch.device("meta"):
            network = AVTransformer(config)
    except (RuntimeError, OverflowError, TypeError) as error:  # sizes beyond 64 bits
        raise UserInputError(f"{export / METADATA_FILE} describes no network: {error}. {DAMAGE_HINT}") from None
    load_strict(network, stored, source)
