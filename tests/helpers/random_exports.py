"""Export folders with random networks and the embedded codecs."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import torch
from safetensors.torch import save_file

from mfcore.codecs.dct import DctCodec, DctConfig
from mfcore.codecs.mel import MelCodec
from mfcore.codecs.stats import LatentStats
from mfcore.model.transformer import build_model
from mfcore.types import AUDIO, VIDEO
from workflows.checkpoints.model_card import ExportMetadata
from workflows.config import presets, serialization
from workflows.config.latent_shapes import LatentShapes
from workflows.config.stage_names import Stage
from workflows.utils.json_io import write_json

CHANNELS = {VIDEO: 48, AUDIO: 64}


def random_card(stage: Stage) -> ExportMetadata:
    """Return the metadata of a tiny network for 32 x 32 pixels."""
    codecs = {VIDEO: DctCodec(DctConfig()), AUDIO: MelCodec()}
    shapes = LatentShapes(
        channels=CHANNELS,
        size={VIDEO: (4, 4), AUDIO: (1, 1)},
        static_channels={VIDEO: 35, AUDIO: 0},
        text_dim=16,
        chunk_seconds=0.5,
        chunks=4,
    )
    config = presets.build_preset("tiny", stage, shapes)
    names = list(config.model.branches)
    flat = {
        m: LatentStats(mean=(0.1,) * n, std=(0.7,) * n, head_mean=(0.2,) * n, head_std=(0.9,) * n)
        for m, n in CHANNELS.items()
    }
    return ExportMetadata(
        model=replace(config.model, dim=32, layers=2, heads=2),
        stage=stage,
        codecs={m: codecs[m].id for m in names},
        stats={m: flat[m] for m in names},
        clocks={m: codecs[m].clock for m in names},
        chunk_seconds=Fraction(1, 2),
        text_codec="words-v1/d16",
        shift=dict.fromkeys(names, 1.0),
        dataset="none",
    )


def random_export(folder: Path, stage: Stage, **changes: object) -> Path:
    """Write ``folder/export`` with random weights, none of them zero. ``changes``: of the model configuration."""
    card = random_card(stage)
    card = replace(card, model=replace(card.model, **changes))  # type: ignore[arg-type]
    model = build_model(card.model, 0)
    draw = torch.Generator().manual_seed(0)
    weights = {k: v + 0.05 * torch.randn(v.shape, generator=draw) for k, v in model.state_dict().items()}
    place = folder / "export"
    place.mkdir(parents=True)
    save_file(weights, place / "ema.safetensors")
    write_json(place / "model.json", serialization.to_dict(card))
    return place
