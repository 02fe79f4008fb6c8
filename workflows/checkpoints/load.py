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
from workflows.checkpoints.layout import MODEL, RECORD
from workflows.checkpoints.model_card import ModelCard
from workflows.checkpoints.store import COMPLETE, Shelf, checkpoints_of, join
from workflows.config import serialization
from workflows.utils.json_io import read_json

Weights = Literal["ema", "raw"]


def find_export(path: str | Path) -> Path:
    """The export folder of a run (its latest complete checkpoint), of a checkpoint, or the export folder itself.

    What lies in object storage is copied to this machine first.
    """
    if is_remote(str(path)):
        return _fetched_export(str(path))
    place = Path(path)
    if not place.exists():
        raise ValueError(f"{place} does not exist: name a run, such as runs/mutual, or a checkpoint inside one")
    if (place / MODEL).exists():
        return place
    if (place / RECORD).exists() and not (place / "export").exists():
        to = read_json(place / RECORD)["config"]["checkpoint"].get("to")
        return _latest_export(checkpoints_of(place, to), place)
    if (place / "checkpoints").is_dir():
        return _latest_export(place / "checkpoints", place)
    if (place / "export" / MODEL).exists():
        if not (place / COMPLETE).exists():
            raise ValueError(f"{place} is not complete (its writer died): use another checkpoint of the run")
        return place / "export"
    raise ValueError(f"{place} is neither a run, a checkpoint nor an export: it has no checkpoints/ and no {MODEL}")


def _latest_export(root: str | Path, run: str | Path) -> Path:
    shelf = Shelf(root)
    if not (found := shelf.complete()):
        raise ValueError(f"{run} has no complete checkpoint yet: run its `mfctl train` command to the end")
    return shelf.fetch(found[-1], "export/") / "export"


def _fetched_export(uri: str) -> Path:
    uri = uri.rstrip("/")
    store = Store(uri)
    if store.exists(MODEL):  # an export itself
        uri, store = uri.rpartition("/")[0], Store(uri.rpartition("/")[0])
    if store.exists(COMPLETE):
        root, _, name = uri.rpartition("/")
        return Shelf(root).fetch(name, "export/") / "export"
    if "checkpoints" in store.listing():
        return _latest_export(join(uri, "checkpoints"), uri)
    raise ValueError(f"{uri} is neither a run, a complete checkpoint nor its export: name one that `mfctl train` wrote")


def load_card(path: str | Path) -> ModelCard:
    """The ``model.json`` of a run, checkpoint or export."""
    export = find_export(path)
    try:
        return serialization.load(ModelCard, read_json(export / MODEL))
    except ValueError as error:
        raise ValueError(f"{export / MODEL} cannot be read: {error}") from None


def weight_files(export: Path, weights: Weights) -> list[Path]:
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


def load_weights(path: str | Path, weights: Weights = "ema") -> dict[str, Tensor]:
    loaded: dict[str, Tensor] = {}
    for file in weight_files(find_export(path), weights):
        try:
            loaded |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from None
    return loaded


def load_export(path: str | Path, weights: Weights = "ema") -> tuple[nn.Module, ModelCard]:
    """The network of a run, checkpoint or export in evaluation mode, and its card. ValueError says what is wrong."""
    card = load_card(path)
    model = build_model(card.model, 0)
    load_strict(model, load_weights(path, weights), f"{weights} weights of {path}")
    return model.eval().requires_grad_(False), card
