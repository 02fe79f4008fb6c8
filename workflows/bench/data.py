"""Latents of the right shapes without a dataset: what ``mfctl bench`` trains and streams on."""

from dataclasses import dataclass
from fractions import Fraction

import torch
from jaxtyping import Float
from torch import Tensor

from mfcore.codecs.dct import DctCodec
from mfcore.codecs.mel import MelCodec
from mfcore.codecs.stats import LatentStats
from mfcore.rng import generator
from mfcore.timeline import Timeline
from mfcore.types import AUDIO, VIDEO
from workflows.data import Assembly, Clips
from workflows.presets import LatentShapes

SIZE = (8, 8)  # latent height and width: 64 x 64 pixels, as the toy world
TEXT_DIM = 64
WORDS = 12  # of a caption, and of a transcript
CHUNK_SECONDS = Fraction(1, 2)
LONGEST = 16  # chunks of a synthetic clip


@dataclass(frozen=True, kw_only=True)
class NoiseClip:
    """One clip of white noise with as many words as a usual one."""

    id: str
    video: Float[Tensor, "m C h w"]
    audio: Float[Tensor, "n C"]
    caption_embedding: Float[Tensor, "L D"]
    words: Float[Tensor, "W D"]
    word_times: Tensor


def latent_shapes() -> LatentShapes:
    """Those of the embedded codecs."""
    video, audio = DctCodec(), MelCodec()
    return LatentShapes(
        channels={VIDEO: video.channels, AUDIO: audio.channels},
        size={VIDEO: SIZE, AUDIO: (1, 1)},
        still={VIDEO: video.still, AUDIO: audio.still},
        text_dim=TEXT_DIM,
        chunk_seconds=float(CHUNK_SECONDS),
        chunks=LONGEST,
    )


def assembly(modalities: tuple[str, ...]) -> Assembly:
    """Clocks of the embedded codecs; statistics that change nothing."""
    codecs = {VIDEO: DctCodec(), AUDIO: MelCodec()}
    clocks = {m: codecs[m].clock for m in modalities}
    ones = {m: (1.0,) * codecs[m].channels for m in modalities}
    zeros = {m: (0.0,) * codecs[m].channels for m in modalities}
    stats = {m: LatentStats(mean=zeros[m], std=ones[m], head_mean=zeros[m], head_std=ones[m]) for m in modalities}
    return Assembly(timeline=Timeline(clocks=clocks, chunk_seconds=CHUNK_SECONDS), stats=stats)


def noise_clips(chunks: int, count: int) -> Clips:
    """``count`` clips of ``chunks`` chunks in memory."""
    timeline = assembly((VIDEO, AUDIO)).timeline
    made = [_clip(i, timeline, chunks) for i in range(count)]
    return Clips(lengths=[chunks] * count, read=made.__getitem__)


def _clip(number: int, timeline: Timeline, chunks: int) -> NoiseClip:
    draw, shapes = generator(0, "bench/clip", number), latent_shapes()
    frames, sounds = 1 + timeline.count(VIDEO, chunks), timeline.count(AUDIO, chunks)
    starts = torch.rand(WORDS, 1, generator=draw, dtype=torch.float64) * float(chunks * CHUNK_SECONDS)
    return NoiseClip(
        id=f"noise-{number}",
        video=torch.randn(frames, shapes.channels[VIDEO], *SIZE, generator=draw),
        audio=torch.randn(sounds, shapes.channels[AUDIO], generator=draw),
        caption_embedding=torch.randn(WORDS, TEXT_DIM, generator=draw),
        words=torch.randn(WORDS, TEXT_DIM, generator=draw),
        word_times=torch.cat([starts, starts + 0.3], dim=1),
    )
