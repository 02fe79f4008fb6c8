"""A small network and random clips for tests of the method."""

from fractions import Fraction

import torch

from mfcore.model.config import BranchConfig, ModelConfig
from mfcore.model.transformer import AVTransformer, build_model
from mfcore.timeline import Timeline, audio_clock, video_clock
from mfcore.types import AUDIO, VIDEO, AVBatch, Condition, Stream

TIMELINE = Timeline(
    clocks={VIDEO: video_clock(Fraction(24), 4), AUDIO: audio_clock(16000, 1024)}, chunk_seconds=Fraction(1, 2)
)
SHAPES = {VIDEO: (6, 4, 4), AUDIO: (5,)}
BRANCHES = {
    VIDEO: BranchConfig(channels=6, size=(4, 4), patch=(2, 2)),
    AUDIO: BranchConfig(channels=5),
}


def model_config(*modalities: str, window: int = 2, **changes: object) -> ModelConfig:
    """Return a small configuration with ``changes``."""
    fields: dict[str, object] = dict(
        branches={m: BRANCHES[m] for m in modalities},
        dim=32,
        layers=2,
        heads=2,
        text_dim=8,
        chunk_seconds=0.5,
        window_chunks=window,
        local_start=changes.get("layout") != "wan",
        chunk_phase=True,
    )
    return ModelConfig(**(fields | changes))  # type: ignore[arg-type]


def network(*modalities: str, window: int = 2, seed: int = 0, **changes: object) -> AVTransformer:
    """Build a network in which every parameter has an effect: zeros are replaced by random values."""
    model = build_model(model_config(*(modalities or (VIDEO, AUDIO)), window=window, **changes), seed)
    draw = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            if float(p.abs().max()) == 0:
                p.copy_(0.3 * torch.randn(p.shape, generator=draw))
    return model


def batch(rows: int = 2, chunks: int = 4, *modalities: str, seed: int = 0) -> AVBatch:
    """Draw random clips with all conditions."""
    draw = torch.Generator().manual_seed(seed)
    present = modalities or (VIDEO, AUDIO)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    streams = {
        m: Stream(
            latents=normal(rows, TIMELINE.count(m, chunks), *SHAPES[m]),
            times=TIMELINE.times(m, chunks),
            chunk=TIMELINE.chunk_index(m, chunks),
        )
        for m in present
    }
    starts = torch.arange(6, dtype=torch.float64).expand(rows, 6) * 0.3
    cond = Condition(
        caption=normal(rows, 3, 8),
        caption_mask=torch.ones(rows, 3, dtype=torch.bool),
        words=normal(rows, 6, 8),
        words_mask=torch.ones(rows, 6, dtype=torch.bool),
        word_times=torch.stack([starts, starts + 0.2], dim=-1),
        first_frame=normal(rows, *SHAPES[VIDEO]) if VIDEO in present else None,
        voice=normal(rows, 8, *SHAPES[AUDIO]) if AUDIO in present else None,
        voice_mask=torch.ones(rows, dtype=torch.bool) if AUDIO in present else None,
    )
    return AVBatch(streams=streams, cond=cond, samples=torch.arange(rows))
