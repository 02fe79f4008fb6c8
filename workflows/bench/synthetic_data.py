"""Random latents with the shapes of a dataset, for ``mfctl bench train``."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mfcore.codecs.stats import LatentStats
from mfcore.model.config import ModelConfig
from mfcore.rng import generator
from mfcore.types import AUDIO, VIDEO
from workflows.config.latent_shapes import CHUNK_SECONDS, geometry_of_model
from workflows.data.batches import ClipSplit
from workflows.data.collate import BatchCollator

WORDS_PER_CLIP = 12  # of a caption and of a transcript


@dataclass(frozen=True, kw_only=True)
class SyntheticClip:
    """Clip of white noise with a typical number of words."""

    id: str
    video: Float[Tensor, "m C h w"] | None
    audio: Float[Tensor, "n C"] | None
    caption_embedding: Float[Tensor, "L D"]
    words: Float[Tensor, "W D"]
    word_times: Tensor


def synthetic_collator(model: ModelConfig) -> BatchCollator:
    """Return a collator with the clocks of the network's codecs and identity statistics."""
    ones = {m: (1.0,) * b.channels for m, b in model.branches.items()}
    zeros = {m: (0.0,) * b.channels for m, b in model.branches.items()}
    stats = {m: LatentStats(mean=zeros[m], std=ones[m], head_mean=zeros[m], head_std=ones[m]) for m in model.branches}
    return BatchCollator(timeline=geometry_of_model(model).timeline(tuple(model.branches)), stats=stats)


def synthetic_clips(model: ModelConfig, chunks: int, count: int) -> ClipSplit:
    """Return ``count`` clips of ``chunks`` chunks in memory."""
    made = [_clip(number, model, chunks) for number in range(count)]
    return ClipSplit(lengths=[chunks] * count, read=made.__getitem__)


def _clip(number: int, model: ModelConfig, chunks: int) -> SyntheticClip:
    draw, timeline = generator(0, "bench/clip", number), synthetic_collator(model).timeline
    shapes = {m: (b.channels, *(b.size if m == VIDEO else ())) for m, b in model.branches.items()}
    counts = {m: timeline.count(m, chunks) + (m == VIDEO) for m in shapes}  # the first frame precedes the clip
    latents = {m: torch.randn((counts[m], *shape), generator=draw) for m, shape in shapes.items()}
    starts = torch.rand(WORDS_PER_CLIP, 1, generator=draw, dtype=torch.float64) * float(chunks * CHUNK_SECONDS)
    return SyntheticClip(
        id=f"noise-{number}",
        video=latents.get(VIDEO),
        audio=latents.get(AUDIO),
        caption_embedding=torch.randn(WORDS_PER_CLIP, model.text_dim, generator=draw),
        words=torch.randn(WORDS_PER_CLIP, model.text_dim, generator=draw),
        word_times=torch.cat([starts, starts + 0.3], dim=1),
    )
