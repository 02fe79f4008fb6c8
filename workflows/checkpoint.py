"""Checkpoints: immutable folders that exist once ``COMPLETE`` is in them (the contract is in docs, ARCHITECTURE).

<samples>-<attempt>/state/   weights and moments of every trained network, the float32 EMA: each rank its share
<samples>-<attempt>/export/  ema.safetensors, raw.safetensors, model.json: all that generation needs
<samples>-<attempt>/run.json configuration, progress, dataset fingerprint, MLflow run, versions
<samples>-<attempt>/COMPLETE names, sizes and checksums of all the above, put last
"""

import hashlib
import json
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, cast

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mfcore.codecs.stats import LatentStats
from mfcore.ema import Ema
from mfcore.model.config import ModelConfig
from mfcore.model.transformer import build_model
from mfcore.timeline import LatentClock, Timeline
from mfcore.weights import load_strict
from workflows import config_io, ranks
from workflows.config import Stage
from workflows.engine import Engine, SavedState, save_share

COMPLETE = "COMPLETE"
MODEL = "model.json"
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


class CheckpointWriter:
    """Saves a run's checkpoints under ``root``; every method is called by all ranks together."""

    def __init__(
        self, root: Path, *, engines: Mapping[str, Engine], ema: Ema, card: ModelCard, facts: Mapping[str, Any],
        keep: int, may_write: Callable[[], bool],
    ) -> None:  # fmt: skip
        self._root, self._engines, self._ema, self._card = root, engines, ema, card
        self._facts, self._keep, self._may_write = facts, keep, may_write

    def save(self, progress: Progress) -> Path:
        """A new checkpoint. RuntimeError when another driver has taken the run over meanwhile."""
        name = ranks.from_first(f"{progress.samples_seen:012d}-{secrets.token_hex(4)}")
        folder = self._root / name
        (folder / "state").mkdir(parents=True, exist_ok=True)
        (folder / "export").mkdir(exist_ok=True)
        mine = [path for key, engine in self._engines.items() for path in engine.save(folder / "state", key)]
        average = self._ema.state_dict().items()
        mine += save_share(folder / "state", "ema", (("weight", k, v) for k, v in average), progress.step)
        mine += self._export(folder, progress)
        entries = [entry for part in ranks.gather([_entry(folder, path) for path in mine]) for entry in part]
        if ranks.rank() == 0:
            self._complete(folder, dict(entries))
        ranks.barrier()
        return folder

    def _export(self, folder: Path, progress: Progress) -> list[Path]:
        raw = {k: v.float().cpu().clone() for k, v in self._engines["student"].weights()}
        if ranks.rank() != 0:
            return []
        export = folder / "export"
        save_file(raw, export / "raw.safetensors")
        save_file({k: v.cpu().contiguous() for k, v in self._ema.state_dict().items()}, export / "ema.safetensors")
        write_json(export / MODEL, config_io.dump(self._card))
        write_json(folder / "run.json", {**self._facts, "progress": config_io.dump(progress)})
        return [export / "raw.safetensors", export / "ema.safetensors", export / MODEL, folder / "run.json"]

    def _complete(self, folder: Path, files: Mapping[str, Any]) -> None:
        if not self._may_write():
            raise RuntimeError(f"{self._root.parent} now belongs to another driver: this one stops")
        write_json(folder / COMPLETE, {"files": files})
        for old in sorted(self._root.iterdir()):
            if not (old / COMPLETE).exists():  # of an attempt that died while saving; the run's lock is ours
                shutil.rmtree(old)
        for old in complete(self._root)[: -self._keep]:
            (old / COMPLETE).unlink()  # first: a half-deleted checkpoint must not count
            shutil.rmtree(old)


def complete(root: Path) -> list[Path]:
    """The checkpoints that exist, oldest first."""
    return sorted(path.parent for path in root.glob(f"*/{COMPLETE}")) if root.is_dir() else []


def verify(folder: Path) -> None:
    """ValueError when a file is not what COMPLETE says."""
    for name, facts in read_json(folder / COMPLETE)["files"].items():
        path = folder / name
        if not path.exists() or path.stat().st_size != facts["size"] or _digest(path) != facts["sha256"]:
            raise ValueError(f"{path} is damaged or missing: delete {folder} to go on from the checkpoint before it")


def restore(folder: Path, engines: Mapping[str, Engine], ema: Ema) -> Progress:
    """Load everything that ``CheckpointWriter.save`` wrote."""
    if ranks.rank() == 0:
        verify(folder)
    ranks.barrier()
    for name, engine in engines.items():
        engine.load(folder / "state", name)
    average = SavedState(folder / "state", "ema")
    ema.load_state_dict({name: average.read("weight", name) for name in ema.state_dict()})
    return progress_of(folder)


def progress_of(folder: Path) -> Progress:
    return config_io.load(Progress, read_json(folder / "run.json")["progress"])


def find_export(path: str | Path) -> Path:
    """The export folder of a run (its latest complete checkpoint), of a checkpoint, or the export folder itself."""
    place = Path(path)
    if not place.exists():
        raise ValueError(f"{place} does not exist: name a run, such as runs/mutual, or a checkpoint inside one")
    if (place / MODEL).exists():
        return place
    if (place / "checkpoints").is_dir():
        found = complete(place / "checkpoints")
        if not found:
            raise ValueError(f"{place} has no complete checkpoint yet: run its `mfctl train` command to the end")
        return found[-1] / "export"
    if (place / "export" / MODEL).exists():
        if not (place / COMPLETE).exists():
            raise ValueError(f"{place} is not complete (its writer died): use another checkpoint of the run")
        return place / "export"
    raise ValueError(f"{place} is neither a run, a checkpoint nor an export: it has no checkpoints/ and no {MODEL}")


def load_card(path: str | Path) -> ModelCard:
    """The ``model.json`` of a run, checkpoint or export."""
    export = find_export(path)
    try:
        return config_io.load(ModelCard, read_json(export / MODEL))
    except ValueError as error:
        raise ValueError(f"{export / MODEL} cannot be read: {error}") from None


def load_weights(path: str | Path, weights: Weights = "ema") -> dict[str, Tensor]:
    file = find_export(path) / f"{weights}.safetensors"
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None


def load_export(path: str | Path, weights: Weights = "ema") -> tuple[nn.Module, ModelCard]:
    """The network of a run, checkpoint or export in evaluation mode, and its card. ValueError says what is wrong."""
    card = load_card(path)
    model = build_model(card.model, 0)
    load_strict(model, load_weights(path, weights), f"{weights}.safetensors of {path}")
    return model.eval().requires_grad_(False), card


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".tmp-{secrets.token_hex(4)}")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    return cast(dict[str, Any], json.loads(path.read_text()))


def _entry(folder: Path, path: Path) -> tuple[str, dict[str, Any]]:
    return path.relative_to(folder).as_posix(), {"size": path.stat().st_size, "sha256": _digest(path)}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
