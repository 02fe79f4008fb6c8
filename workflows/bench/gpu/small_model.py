"""A small network with random clips, in which every parameter has an effect, for parity checks on a device."""

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch

from mfcore.model.config import BranchConfig, ModelConfig
from mfcore.model.ring_cache import to_ring_cache
from mfcore.model.transformer import AVTransformer, build_model
from mfcore.rollout import join_chunks, noise_starts, rollout
from mfcore.solver import DenoiserContext, schedule
from mfcore.timeline import Timeline, audio_clock, video_clock
from mfcore.types import AUDIO, VIDEO, AVBatch, Condition, Stream, Streams, VelocityModel

TIMELINE = Timeline(
    clocks={VIDEO: video_clock(Fraction(24), 4), AUDIO: audio_clock(16000, 1024)}, chunk_seconds=Fraction(1, 2)
)
SHAPES: dict[str, tuple[int, ...]] = {VIDEO: (6, 4, 4), AUDIO: (5,)}
TEXT_DIM = 8
BRANCHES = {
    VIDEO: BranchConfig(channels=6, size=(4, 4), patch=(2, 2)),
    AUDIO: BranchConfig(channels=5),
}
RING_TOKENS = sum(TIMELINE.max_count(m) * b.tokens for m, b in BRANCHES.items())
SCHEDULE = schedule(2, {VIDEO: 3.0, AUDIO: 1.0})


def small_network(device: torch.device, *, window: int = 2, **changes: Any) -> AVTransformer:
    """Return a network of two layers; parameters that start at zero are random."""
    fields: dict[str, Any] = {"dim": 32, "layers": 2, "heads": 2, "text_dim": TEXT_DIM, "chunk_seconds": 0.5}
    fields |= {"branches": BRANCHES, "window_chunks": window, "local_start": True, "chunk_phase": True}
    model = build_model(ModelConfig(**(fields | changes)), 0)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if float(parameter.abs().max()) == 0:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
    return model.to(device)


def small_batch(device: torch.device, *, rows: int = 2, chunks: int = 4) -> AVBatch:
    """Return random clips with all conditions."""
    draw = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=draw)
    streams: dict[str, Stream] = {}
    for m, shape in SHAPES.items():
        latents = normal(rows, TIMELINE.count(m, chunks), *shape)
        streams[m] = Stream(latents=latents, times=TIMELINE.times(m, chunks), chunk=TIMELINE.chunk_index(m, chunks))
    starts = torch.arange(6, dtype=torch.float64).expand(rows, 6) * 0.3
    cond = Condition(
        caption=normal(rows, 3, TEXT_DIM),
        caption_mask=torch.ones(rows, 3, dtype=torch.bool),
        words=normal(rows, 6, TEXT_DIM),
        words_mask=torch.ones(rows, 6, dtype=torch.bool),
        word_times=torch.stack([starts, starts + 0.2], dim=-1),
        first_frame=normal(rows, *SHAPES[VIDEO]),
        voice=normal(rows, 8, *SHAPES[AUDIO]),
        voice_mask=torch.ones(rows, dtype=torch.bool),
    )
    return AVBatch(streams=streams, cond=cond, samples=torch.arange(rows)).to(device)


def ring_context(model: VelocityModel, cond: Condition) -> DenoiserContext:
    """Return the context of a new stream."""
    prefilled = DenoiserContext(model=model, cond=cond).prefill()
    return prefilled.map_caches(lambda cache: to_ring_cache(cache, RING_TOKENS))


def chunk_starts(batch: AVBatch, chunks: int) -> Iterator[Streams]:
    """Yield the noise of each chunk."""
    return noise_starts(TIMELINE, SHAPES, range(chunks), seed=0, samples=batch.samples, like=batch.cond.caption)


@torch.no_grad()
def small_stream(model: VelocityModel, batch: AVBatch, *, chunks: int) -> dict[str, Stream]:
    """Return a streamed clip; caption and transcript change at chunk 8."""
    other = replace(batch.cond, caption=-batch.cond.caption, word_times=batch.cond.word_times + 2.5)
    conds = [batch.cond] * min(8, chunks) + [other] * max(0, chunks - 8)
    made = rollout(ring_context(model, batch.cond), chunk_starts(batch, chunks), SCHEDULE, conds=conds)
    return join_chunks(chunk.clean for chunk in made)
