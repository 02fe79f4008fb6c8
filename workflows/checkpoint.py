"""What a checkpoint holds, and how it is found and read again (``saving`` writes it, ``shelf`` is where it stands).

<samples>-<attempt>/state/   weights and moments of every trained network, the float32 EMA: each rank its share
<samples>-<attempt>/export/  ema.safetensors, raw.safetensors, model.json: all that generation needs
<samples>-<attempt>/run.json configuration, progress, dataset fingerprint, MLflow run, versions
<samples>-<attempt>/COMPLETE names, sizes and checksums of all the above, put last
"""

import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, cast

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mfcore.codecs.stats import LatentStats
from mfcore.ema import Ema
from mfcore.model.config import ModelConfig
from mfcore.model.transformer import build_model
from mfcore.steps import Mode
from mfcore.timeline import LatentClock, Timeline
from mfcore.weights import load_strict
from preprocessing.storage import Store, is_remote
from workflows import config_io
from workflows.config import Stage
from workflows.engine import Engine
from workflows.training import ranks
from workflows.training.shelf import COMPLETE, Shelf, join
from workflows.training.state import SavedState

MODEL = "model.json"
RECORD = "run.json"
OUTCOME = "outcome.json"
Weights = Literal["ema", "raw"]


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """``model.json``: what stands beside the weights, so that generation needs no dataset."""

    model: ModelConfig
    stage: Stage
    codecs: dict[str, str]  # modality -> codec id
    stats: dict[str, LatentStats]  # what the latents were whitened with
    clocks: dict[str, LatentClock]
    chunk_seconds: Fraction
    text_codec: str  # id of the text encoder
    shift: dict[str, float]  # time shift per modality that the noise levels of training and sampling go through
    dataset: str  # fingerprint of the preprocessing configuration that made the latents
    folders: dict[str, str] = field(default_factory=dict)  # modality or "text" -> where pretrained codecs' weights were
    few_steps: int | None = None  # most per chunk that the few-step mode was trained for; None: not on record

    def doubt(self, mode: Mode, steps: int) -> str | None:
        """What speaks against so many steps: the few-step mode knows no shorter ones than it was trained for."""
        if mode == "multi" or self.few_steps is None or steps <= self.few_steps:
            return None
        return (
            f"the few-step mode was trained for up to {self.few_steps} steps per chunk, and {steps} lead away from the "
            f"data: choose at most {self.few_steps}, or the multi-step mode"
        )

    @property
    def timeline(self) -> Timeline:
        return Timeline(clocks=self.clocks, chunk_seconds=self.chunk_seconds)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run has come."""

    step: int  # optimizer steps done
    samples_seen: int
    first: dict[str, float]  # held-out terms before the first step
    last: dict[str, float]  # held-out terms at the latest evaluation
    skipped: int = 0  # steps left out because a loss or gradient was not finite


def complete(root: str | Path) -> list[Path]:
    """The checkpoints in a local folder that exist, oldest first."""
    return [Path(root, name) for name in Shelf(root).complete()]


def checkpoints_of(run_dir: str | Path, to: str | None) -> str | Path:
    """Where a run keeps its checkpoints: below ``to`` (setting ``checkpoint.to``) by its name, else in its folder."""
    return join(to, Path(run_dir).name, "checkpoints") if to else Path(run_dir, "checkpoints")


def newest_whole(shelf: Shelf, say: Callable[[str], None]) -> str | None:
    """The latest complete checkpoint without damage, as rank 0 sees it. Called by all ranks together."""
    found = None
    if ranks.rank() == 0:
        for name in reversed(shelf.complete()):
            if (damage := shelf.damage(name)) is None:
                found = name
                break
            say(f"{damage}: it is passed over")
    return ranks.from_first(found)


def restore(shelf: Shelf, name: str, engines: Mapping[str, Engine], ema: Ema) -> Progress:
    """Load everything that ``saving.CheckpointWriter`` wrote. Called by all ranks together."""
    if ranks.first_here():
        shelf.fetch(name, "state/")
    ranks.barrier()
    state = shelf.fetch(name, "state/") / "state"
    for key, engine in engines.items():
        engine.load(state, key)
    average = SavedState(state, "ema")
    ema.load_state_dict({key: average.read("weight", key) for key in ema.state_dict()})
    ranks.barrier()
    if ranks.first_here():
        shelf.forget(name, "state")
    return config_io.load(Progress, shelf.read(name, "run.json")["progress"])


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
        return config_io.load(ModelCard, read_json(export / MODEL))
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


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".tmp-{secrets.token_hex(4)}")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    return cast(dict[str, Any], json.loads(path.read_text()))
