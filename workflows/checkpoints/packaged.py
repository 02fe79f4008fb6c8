"""Models inside the Python package, and model cards: ``workflows/models/NAME/`` is a folder of ``mfctl export``.

Matrices are stored in bfloat16; they load as float32. See ``workflows.checkpoints.hub_folder`` for the files.

A name is resolved without torch: the command line does so for every checkpoint argument.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mfcore.errors import UserInputError
from workflows.checkpoints.layout import CARD_FILE, CONFIG_FILE
from workflows.utils import environment

MODELS_DIR = Path(__file__).resolve().parents[1] / "models"
DEFAULT_MODEL = "toy-talker"
"""Model of `generate` and `serve` without a checkpoint."""
MAX_BYTES = 12_000_000  # of all packaged weights
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True, kw_only=True)
class CardMetric:
    """One metric of a model, with the value of real clips after encoding and decoding."""

    value: float
    real: float | None = None
    low: float | None = None  # of the interval over clips
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class CardEvaluation:
    """Held-out clips and settings of the metrics of a card."""

    commands: tuple[str, ...]  # mfctl toyworld, preprocess and evaluate, with --out results
    clips: int
    mode: str
    steps: int
    seeds: int


@dataclass(frozen=True, kw_only=True)
class CardPoint:
    """One setting of the sweep, as means over noise seeds."""

    mode: str
    steps: int
    nfe: int  # function evaluations per chunk
    metrics: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """Content of ``card.json``."""

    name: str
    summary: str
    language: str
    stage: str
    license: str
    parameters: int
    data: str  # description of the training set
    commands: tuple[str, ...]  # that reproduce the training
    training_hours: float | None = None
    training_machine: str | None = None
    limits: tuple[str, ...]
    evaluation: CardEvaluation | None = None
    metrics: dict[str, CardMetric]
    dataset: str | None = None  # fingerprint of the preprocessing
    samples_seen: int | None = None  # clips, with repetitions
    sweep: tuple[CardPoint, ...] = ()


def packaged_names() -> list[str]:
    """Return the names of the packaged models."""
    return sorted(file.parent.name for file in MODELS_DIR.glob(f"*/{CONFIG_FILE}"))


def check_name(name: str) -> None:
    """Raise UserInputError for a name that a packaged model cannot have."""
    if not _NAME.fullmatch(name):
        raise UserInputError(f"{name!r} is not the name of a model. Use lower-case letters, digits and hyphens")


def packaged_folder(name: str) -> Path | None:
    """Return the folder of a packaged model, None for another name."""
    if not _NAME.fullmatch(name):
        return None
    folder = MODELS_DIR / name
    return folder if (folder / CONFIG_FILE).is_file() else None


def resolve_checkpoint(text: str) -> str:
    """Return an absolute path or a URI; the name of a packaged model is unchanged unless a file has this name."""
    if text.startswith("models:/"):  # of a registry
        return text
    path = environment.resolve_path(text)
    return text if packaged_folder(text) is not None and not Path(path).exists() else path


def default_model() -> str:
    """Return the name of the model that is used without a checkpoint. Raises UserInputError if it is not packaged."""
    if packaged_folder(DEFAULT_MODEL) is None:
        raise UserInputError(
            f"{DEFAULT_MODEL} is not part of this installation. Name a checkpoint, such as runs/mutual"
        )
    return DEFAULT_MODEL


def model_card(name: str) -> ModelCard:
    """Return the card of a packaged model.

    Raises:
        UserInputError: There is no such model, or its card is damaged.
    """
    folder = packaged_folder(name)
    if folder is None:
        raise UserInputError(f"{name!r} is not a packaged model. Use one of {', '.join(packaged_names()) or '(none)'}")
    return read_card(folder, remedy="Install the package again")


def read_card(folder: Path, *, remedy: str = "Copy or download the whole folder again") -> ModelCard:
    """Return the card of an exported folder. Raises UserInputError if it is missing or damaged."""
    from workflows.config import serialization  # pydantic: not at the start of the command line

    try:
        return serialization.from_dict(ModelCard, json.loads((folder / CARD_FILE).read_text()))
    except (OSError, ValueError) as error:
        raise UserInputError(f"{folder / CARD_FILE} cannot be read: {error}. {remedy}") from None


def list_models() -> dict[str, Any]:
    """Return the packaged models with the facts of their cards, under ``models``; sizes in bytes."""
    from workflows.config import serialization

    return {
        "models": [
            serialization.to_dict(model_card(name))
            | {"path": str(MODELS_DIR / name), "bytes": folder_bytes(MODELS_DIR / name)}
            for name in packaged_names()
        ]
    }


def folder_bytes(folder: Path) -> int:
    """Return the size of all files of a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
