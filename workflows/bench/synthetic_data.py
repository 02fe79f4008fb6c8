"""Latents of the right shapes without a dataset: what ``mfctl bench train`` trains on."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mfcore.codecs.stats import LatentStats
from mfcore.model.config import ModelConfig
from mfcore.rng import generator
from mfcore.types import AUDIO, VIDEO
from workflows.config.latent_shapes import CHUNK_SECONDS, known_by
from workflows.data.batches import Clips
from workflows.data.collate import Assembly

WORDS = 12  # of a caption, and of a transcript


@dataclass(frozen=True, kw_only=True)
class NoiseClip:
    """One clip of white noise with as many words as a usual one."""

    id: str
    video: Float[Tensor, "m C h w"] | None
    audio: Float[Tensor, "n C"] | None
    caption_embedding: Float[Tensor, "L D"]
    words: Float[Tensor, "W D"]
    word_times: Tensor


def assembly(model: ModelConfig) -> Assembly:
    """Clocks of the codecs that the network is made for; statistics that change nothing."""
    ones = {m: (1.0,) * b.channels for m, b in model.branches.items()}
    zeros = {m: (0.0,) * b.channels for m, b in model.branches.items()}
    stats = {m: LatentStats(mean=zeros[m], std=ones[m], head_mean=zeros[m], head_std=ones[m]) for m in model.branches}
    return Assembly(timeline=known_by(model).timeline(tuple(model.branches)), stats=stats)


def noise_clips(model: ModelConfig, chunks: int, count: int) -> Clips:
    """``count`` clips of ``chunks`` chunks in memory."""
    made = [_clip(number, model, chunks) for number in range(count)]
    return Clips(lengths=[chunks] * count, read=made.__getitem__)


def _clip(number: int, model: ModelConfig, chunks: int) -> NoiseClip:
    draw, timeline = generator(0, "bench/clip", number), assembly(model).timeline
    shapes = {m: (b.channels, *(b.size if m == VIDEO else ())) for m, b in model.branches.items()}
    counts = {m: timeline.count(m, chunks) + (m == VIDEO) for m in shapes}  # the first frame stands before its clip
    latents = {m: torch.randn((counts[m], *shape), generator=draw) for m, shape in shapes.items()}
    starts = torch.rand(WORDS, 1, generator=draw, dtype=torch.float64) * float(chunks * CHUNK_SECONDS)
    return NoiseClip(
        id=f"noise-{number}",
        video=latents.get(VIDEO),
        audio=latents.get(AUDIO),
        caption_embedding=torch.randn(WORDS, model.text_dim, generator=draw),
        words=torch.randn(WORDS, model.text_dim, generator=draw),
        word_times=torch.cat([starts, starts + 0.3], dim=1),
    )
