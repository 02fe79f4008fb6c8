"""A small packaged model with random weights, in a temporary folder of packaged models."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.random_exports import random_card, random_export
from workflows.checkpoints import packaged
from workflows.checkpoints.pack import pack_model
from workflows.config import serialization
from workflows.config.stage_names import Stage
from workflows.utils.json_io import write_json

CARD: dict[str, Any] = {
    "summary": "A character speaks English sentences",
    "language": "English",
    "license": "Apache-2.0",
    "world": "toyworld-english/1",
    "data": "Clips of the toy world.",
    "commands": ["mfctl toyworld clips", "mfctl train --stage video"],
    "training_hours": 9.5,
    "training_machine": "2 CPU cores",
    "limits": ["It speaks English."],
}


def english_export(folder: Path, stage: Stage = "mutual") -> Path:
    """Write an export with random weights of a network that was trained on English speech of the toy world."""
    export = random_export(folder, stage)
    card = replace(random_card(stage), transcript="phonemes", world="toyworld-english/1")
    write_json(export / "model.json", serialization.to_dict(card))
    return export


def package_talker(folder: Path, patch: pytest.MonkeyPatch, name: str = packaged.DEFAULT_MODEL) -> Path:
    """Pack a random network below ``folder`` as the only packaged model and return its folder."""
    patch.setattr(packaged, "MODELS_DIR", folder / "models")
    target = folder / "models" / name
    pack_model(english_export(folder / "run"), target, card=CARD)
    return target
