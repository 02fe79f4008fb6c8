"""Find and load checkpoints, which ``training.checkpointing`` writes into a ``CheckpointStore``.

<samples>-<attempt>/state/   weights and moments of every trained network, the float32 EMA: one shard per rank
<samples>-<attempt>/export/  ema.safetensors, raw.safetensors, model.json: all that generation needs
<samples>-<attempt>/run.json configuration, progress, dataset fingerprint, MLflow run, versions
<samples>-<attempt>/COMPLETE names, sizes and checksums of all the above, written last
"""

from pathlib import Path
from typing import Literal

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mfcore.errors import UserInputError
from mfcore.model.transformer import build_model
from mfcore.weights import load_strict
from preprocessing.io.storage import Store, is_remote
from workflows.checkpoints.layout import METADATA_FILE, RUN_FILE
from workflows.checkpoints.model_card import ExportMetadata
from workflows.checkpoints.store import COMPLETE_FILE, CheckpointStore, checkpoint_root, join_uri
from workflows.config import serialization
from workflows.utils.json_io import read_json

WeightKind = Literal["ema", "raw"]


def find_export(path: str | Path) -> Path:
    """Return the export folder of a run (its latest complete checkpoint), of a checkpoint, or ``path`` itself.

    Exports in object storage are copied to this machine. Raises ValueError if there is none.
    """
    if is_remote(str(path)):
        return _download_export(str(path))
    folder = Path(path)
    if not folder.exists():
        raise UserInputError(f"{folder} does not exist: name a run, such as runs/mutual, or a checkpoint inside one")
    if (folder / METADATA_FILE).exists():
        return folder
    if (folder / RUN_FILE).exists() and not (folder / "export").exists():
        to = read_json(folder / RUN_FILE)["config"]["checkpoint"].get("to")
        return _latest_export(checkpoint_root(folder, to), folder)
    if (folder / "checkpoints").is_dir():
        return _latest_export(folder / "checkpoints", folder)
    if (folder / "export" / METADATA_FILE).exists():
        if not (folder / COMPLETE_FILE).exists():
            raise UserInputError(f"{folder} is not complete (its writer died): use another checkpoint of the run")
        return folder / "export"
    raise UserInputError(
        f"{folder} is neither a run, a checkpoint nor an export: it has no checkpoints/ and no {METADATA_FILE}"
    )


def _latest_export(root: str | Path, run: str | Path) -> Path:
    store = CheckpointStore(root)
    found = store.list_complete()
    if not found:
        raise UserInputError(f"{run} has no complete checkpoint yet: run its `mfctl train` command to the end")
    return store.download(found[-1], "export/") / "export"


def _download_export(uri: str) -> Path:
    uri = uri.rstrip("/")
    store = Store(uri)
    if store.exists(METADATA_FILE):  # an export
        uri, store = uri.rpartition("/")[0], Store(uri.rpartition("/")[0])
    if store.exists(COMPLETE_FILE):
        root, _, name = uri.rpartition("/")
        return CheckpointStore(root).download(name, "export/") / "export"
    if "checkpoints" in store.list_entries():
        return _latest_export(join_uri(uri, "checkpoints"), uri)
    raise UserInputError(
        f"{uri} is neither a run, a complete checkpoint nor an export: name one that `mfctl train` wrote"
    )


def load_metadata(path: str | Path) -> ExportMetadata:
    """Return the ``model.json`` of a run, checkpoint or export; ValueError if it cannot be read."""
    export = find_export(path)
    try:
        return serialization.from_dict(ExportMetadata, read_json(export / METADATA_FILE))
    except ValueError as error:
        raise UserInputError(f"{export / METADATA_FILE} cannot be read: {error}") from None


def weight_files(export: Path, weights: WeightKind) -> list[Path]:
    """Return the files of these weights in an export folder: one file, or all shards.

    Raises ValueError if a file is missing.
    """
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
    """Return the weights of a run, checkpoint or export by parameter name."""
    loaded: dict[str, Tensor] = {}
    for file in weight_files(find_export(path), weights):
        try:
            loaded |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserInputError(f"{file} cannot be read: {error}") from None
    return loaded


def load_export(path: str | Path, weights: WeightKind = "ema") -> tuple[nn.Module, ExportMetadata]:
    """Return the network of a run, checkpoint or export in evaluation mode, and its metadata."""
    metadata = load_metadata(path)
    model = build_model(metadata.model, 0)
    load_strict(model, load_weights(path, weights), f"{weights} weights of {path}")
    return model.eval().requires_grad_(False), metadata
