"""What a checkpoint holds, and how it is found and read again (``saving`` writes it, ``shelf`` is where it stands).

<samples>-<attempt>/state/   weights and moments of every trained network, the float32 EMA: each rank its share
<samples>-<attempt>/export/  ema.safetensors, raw.safetensors, model.json: all that generation needs
<samples>-<attempt>/run.json configuration, progress, dataset fingerprint, MLflow run, versions
<samples>-<attempt>/COMPLETE names, sizes and checksums of all the above, put last
"""

from pathlib import Path
from typing import Literal

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

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
    """The export folder of a run (its latest complete checkpoint), of a checkpoint, or the export folder itself.

    What lies in object storage is copied to this machine first.
    """
    if is_remote(str(path)):
        return _fetched_export(str(path))
    place = Path(path)
    if not place.exists():
        raise ValueError(f"{place} does not exist: name a run, such as runs/mutual, or a checkpoint inside one")
    if (place / METADATA_FILE).exists():
        return place
    if (place / RUN_FILE).exists() and not (place / "export").exists():
        to = read_json(place / RUN_FILE)["config"]["checkpoint"].get("to")
        return _latest_export(checkpoint_root(place, to), place)
    if (place / "checkpoints").is_dir():
        return _latest_export(place / "checkpoints", place)
    if (place / "export" / METADATA_FILE).exists():
        if not (place / COMPLETE_FILE).exists():
            raise ValueError(f"{place} is not complete (its writer died): use another checkpoint of the run")
        return place / "export"
    raise ValueError(
        f"{place} is neither a run, a checkpoint nor an export: it has no checkpoints/ and no {METADATA_FILE}"
    )


def _latest_export(root: str | Path, run: str | Path) -> Path:
    shelf = CheckpointStore(root)
    if not (found := shelf.list_complete()):
        raise ValueError(f"{run} has no complete checkpoint yet: run its `mfctl train` command to the end")
    return shelf.download(found[-1], "export/") / "export"


def _fetched_export(uri: str) -> Path:
    uri = uri.rstrip("/")
    store = Store(uri)
    if store.exists(METADATA_FILE):  # an export itself
        uri, store = uri.rpartition("/")[0], Store(uri.rpartition("/")[0])
    if store.exists(COMPLETE_FILE):
        root, _, name = uri.rpartition("/")
        return CheckpointStore(root).download(name, "export/") / "export"
    if "checkpoints" in store.list_entries():
        return _latest_export(join_uri(uri, "checkpoints"), uri)
    raise ValueError(f"{uri} is neither a run, a complete checkpoint nor its export: name one that `mfctl train` wrote")


def load_metadata(path: str | Path) -> ExportMetadata:
    """The ``model.json`` of a run, checkpoint or export."""
    export = find_export(path)
    try:
        return serialization.from_dict(ExportMetadata, read_json(export / METADATA_FILE))
    except ValueError as error:
        raise ValueError(f"{export / METADATA_FILE} cannot be read: {error}") from None


def weight_files(export: Path, weights: WeightKind) -> list[Path]:
    """The files of these weights in an export folder: one, or all of a set. ValueError where any is not there."""
    if (whole := export / f"{weights}.safetensors").exists():
        return [whole]
    found = sorted(export.glob(f"{weights}-*-of-*.safetensors"))
    if not found:
        raise ValueError(f"{whole} does not exist: name a checkpoint that has {weights} weights")
    if len(found) != (wanted := int(found[0].stem.rsplit("-", 1)[1])):
        raise ValueError(
            f"{export} holds {len(found)} of the {wanted} files of its {weights} weights: copy all of them"
        )
    return found


def load_weights(path: str | Path, weights: WeightKind = "ema") -> dict[str, Tensor]:
    loaded: dict[str, Tensor] = {}
    for file in weight_files(find_export(path), weights):
        try:
            loaded |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from None
    return loaded


def load_export(path: str | Path, weights: WeightKind = "ema") -> tuple[nn.Module, ExportMetadata]:
    """The network of a run, checkpoint or export in evaluation mode, and its card. ValueError says what is wrong."""
    card = load_metadata(path)
    model = build_model(card.model, 0)
    load_strict(model, load_weights(path, weights), f"{weights} weights of {path}")
    return model.eval().requires_grad_(False), card
