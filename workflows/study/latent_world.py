"""Synthetic world of talking characters: latents with factors that can be read exactly.

A clip consists of factors over time, mixed into latents by a fixed rotation per modality. The inverse rotation recovers
the factors. Transcript, first frame and history leave some factors of a chunk open:

=========  ==========  ===========================================================================
factor     modality    law
=========  ==========  ===========================================================================
identity   video (2)   one point per character, uniform; the first frame shows it
voice      audio (2)   one of a few on a ring, drawn per clip; after the first chunk only history determines it
pose       video (1)   Ornstein-Uhlenbeck, correlation 0.95 over half a second
mouth      video (2)   shape of the syllable, times envelope, times the syllable's free stress
formants   audio (3)   formants of the syllable, likewise; loudness (1) is envelope times stress
brow       video (1)   one of 2, drawn for every chunk; likewise hand, blink
gesture    video (1)   one of 2, stays with probability 0.85 from chunk to chunk
tone       audio (1)   one of 2, drawn for every chunk
=========  ==========  ===========================================================================

Choices have a separation over spread of 20, so four Euler steps blur between them. Identity is anchored by the first
frame. A voice can drift: each chunk copies it from history, errors included. Snapping to the nearest of the few voices
would prevent drift, but on real history copying is equally good.
Letters: B clips, K chunks, n latents, J syllables.
"""

from dataclasses import dataclass, replace
from fractions import Fraction
from math import pi

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mfcore.rng import generator, normal_rows, uniform_rows
from mfcore.timeline import LatentClock, Timeline, video_clock
from mfcore.types import AUDIO, VIDEO, AVBatch, Condition, Stream

CHUNK_SECONDS = Fraction(1, 2)
TIMELINE = Timeline(
    clocks={VIDEO: video_clock(Fraction(24), 6), AUDIO: LatentClock(rate=Fraction(8))}, chunk_seconds=CHUNK_SECONDS
)
IDENTITY = slice(0, 2)  # video channels
POSE = slice(2, 3)
MOUTH = slice(3, 5)
BROW = slice(5, 6)
HAND = slice(6, 7)
BLINK = slice(7, 8)
GESTURE = slice(8, 9)
VOICE = slice(0, 2)  # audio channels
FORMANTS = slice(2, 5)
LOUDNESS = slice(5, 6)
TONE = slice(6, 7)
CHANNELS = {VIDEO: 9, AUDIO: 7}
SYLLABLES = 8
VOICES = 4
WORD_DIM = 16
SHORTEST, LONGEST = 0.25, 0.5  # seconds of a syllable or a pause
PAUSES = 0.2  # share of pauses
MODE_SPREAD = 0.1  # std around a choice of -1 or 1
NOISE = 0.05  # std around every other factor
PERSISTENCE = 0.95  # correlation of pose over a chunk
STAY_PROBABILITY = 0.85  # of a gesture, per chunk
TWO_MODES = (BROW, HAND, BLINK, GESTURE)
CHOICES = ("brow", "hand", "blink", "gesture", "tone")  # tone is audio, the others video


@dataclass(frozen=True, kw_only=True)
class GroundTruth:
    """Ground truth of a batch of clips."""

    identity: Float[Tensor, "B 2"]
    voice: Float[Tensor, "B 2"]
    voices: Float[Tensor, "V 2"]  # all voices
    syllable: Int64[Tensor, "B J"]  # SYLLABLES means a pause
    start: Float[Tensor, "B J"]  # seconds
    end: Float[Tensor, "B J"]
    choices: Int64[Tensor, "B K+1 5"]  # as CHOICES, 0 or 1; the first row is the first frame's

    def rows(self, index: Tensor | slice) -> "GroundTruth":
        """Return the truth of some of the clips."""
        own = {k: v[index] for k, v in vars(self).items() if k != "voices"}
        return replace(self, **own)


@dataclass(frozen=True, kw_only=True)
class SyntheticClips:
    """Batch of clips with its ground truth."""

    batch: AVBatch
    truth: GroundTruth


def mixing_matrix(modality: str) -> Float[Tensor, "C C"]:
    """Return the rotation from factors to latents: ``latents = factors @ rotation``."""
    size = CHANNELS[modality]
    return torch.linalg.qr(torch.randn(size, size, generator=generator(0, f"study/mix/{modality}", 0)))[0]


def read_factors(modality: str, latents: Tensor) -> Float[Tensor, "B n C"]:
    """Return the factors of latents ``(B, n, C)`` or ``(B, n, C, 1, 1)``."""
    flat = latents.reshape(*latents.shape[:2], -1).float()
    return flat @ mixing_matrix(modality).T.to(flat.device)


def _ring(count: int, radius: float) -> Float[Tensor, "count 2"]:
    angle = torch.arange(count) * (2 * pi / count)
    return radius * torch.stack([angle.cos(), angle.sin()], dim=-1)


def _codes(name: str, width: int, length: float) -> Float[Tensor, "S width"]:
    """Return a fixed vector of norm ``length`` per syllable, and zero for the pause."""
    drawn = torch.randn(SYLLABLES, width, generator=generator(0, f"study/{name}", 0))
    if width == 2:  # mouth shapes, spread around a circle
        drawn = _ring(SYLLABLES, 1.0)
    if width == 3:  # formants: far apart, the corners of a cube
        corners = torch.arange(SYLLABLES)[:, None] >> torch.arange(3) & 1
        drawn = corners * 2.0 - 1
    return torch.cat([length * drawn / drawn.norm(dim=-1, keepdim=True), torch.zeros(1, width)])


MOUTH_SHAPES = _codes("mouth", 2, 1.5)
FORMANT_SHAPES = _codes("formants", 3, 2.0)
WORDS = _codes("words", WORD_DIM, 4.0)


def voice_means(voices: int) -> Float[Tensor, "voices 2"]:
    """Return the positions of all voices."""
    return _ring(voices, 2**0.5)


def sample_clips(seed: int, samples: Int64[Tensor, " B"], chunks: int, voices: int = VOICES) -> SyntheticClips:
    """Return clips of ``chunks`` chunks; each is a function of (seed, sample number, chunks)."""
    truth = _draw_truth(seed, samples, chunks, voices)
    video = _video_factors(seed, samples, chunks, truth)
    audio = _audio_factors(seed, samples, chunks, truth)
    latents = {
        VIDEO: (video @ mixing_matrix(VIDEO))[..., None, None],
        AUDIO: audio @ mixing_matrix(AUDIO),
    }
    streams = {
        m: Stream(
            latents=latents[m][:, 1:] if m == VIDEO else latents[m],
            times=TIMELINE.times(m, chunks),
            chunk=TIMELINE.chunk_index(m, chunks),
        )
        for m in (VIDEO, AUDIO)
    }
    cond = _condition(truth, latents[VIDEO][:, 0])
    return SyntheticClips(batch=AVBatch(streams=streams, cond=cond, samples=samples), truth=truth)


def _draw_truth(seed: int, samples: Tensor, chunks: int, voices: int) -> GroundTruth:
    seconds = chunks * float(CHUNK_SECONDS)
    syllables = int(seconds / SHORTEST) + 1
    draws = uniform_rows(seed, "study/speech", samples, syllables, 3)
    lengths = SHORTEST + (LONGEST - SHORTEST) * draws[..., 0]
    end = lengths.cumsum(1)
    syllable = (draws[..., 1] * SYLLABLES).long()
    syllable = torch.where(draws[..., 2] < PAUSES, SYLLABLES, syllable)
    picks = uniform_rows(seed, "study/choices", samples, chunks + 1, 5)
    choices = (picks * 2).long()
    flips = (picks[:, 1:, 3] > STAY_PROBABILITY).long()
    choices[:, :, 3] = (choices[:, :1, 3] + torch.nn.functional.pad(flips.cumsum(1), (1, 0))) % 2
    identity = (uniform_rows(seed, "study/identity", samples, 2) * 2 - 1) * 3**0.5
    means = voice_means(voices)
    return GroundTruth(
        identity=identity,
        voice=means[(uniform_rows(seed, "study/voice", samples, 1)[:, 0] * voices).long()],
        voices=means,
        syllable=syllable,
        start=end - lengths,
        end=end,
        choices=choices,
    )


def _speech_at(seed: int, samples: Tensor, truth: GroundTruth, at: Tensor) -> tuple[Tensor, Tensor]:
    """Return syllables (B, n) and envelope times stress (B, n) at the seconds ``at``."""
    now = torch.searchsorted(truth.end, at.float().expand(len(samples), -1).contiguous(), right=True)
    now = now.clamp_max(truth.end.shape[1] - 1)
    start, end = truth.start.gather(1, now), truth.end.gather(1, now)
    stress = 0.6 + 0.8 * uniform_rows(seed, "study/stress", samples, truth.end.shape[1]).gather(1, now)
    envelope = torch.sin(pi * (at.float() - start) / (end - start)).clamp_min(0).sqrt()
    syllable = truth.syllable.gather(1, now)
    return syllable, torch.where(syllable == SYLLABLES, 0.0, envelope * stress)


def latent_midpoints(modality: str, chunks: int) -> Tensor:
    """Return the midpoint of every latent of a clip, in seconds."""
    return TIMELINE.times(modality, chunks) + 0.5 / float(TIMELINE.clocks[modality].rate)


def _video_factors(seed: int, samples: Tensor, chunks: int, truth: GroundTruth) -> Float[Tensor, "B 1+n C"]:
    count = TIMELINE.count(VIDEO, chunks)
    noise = normal_rows(seed, "study/video", samples, torch.empty(len(samples), 1 + count, CHANNELS[VIDEO]))
    syllable, loud = _speech_at(seed, samples, truth, latent_midpoints(VIDEO, chunks))
    mouth = MOUTH_SHAPES[syllable] * loud[..., None]
    factors = NOISE * noise
    factors[..., IDENTITY] += truth.identity[:, None]
    factors[..., POSE] = _ornstein_uhlenbeck(noise[..., POSE], PERSISTENCE ** (1 / TIMELINE.count(VIDEO, 1)))
    factors[:, 1:, MOUTH] += mouth
    of_latent = torch.cat([torch.zeros(1, dtype=torch.long), TIMELINE.chunk_index(VIDEO, chunks) + 1])
    picked = truth.choices[:, of_latent]
    for index, factor in enumerate(TWO_MODES):
        factors[..., factor] = picked[..., index : index + 1] * 2.0 - 1 + MODE_SPREAD * noise[..., factor]
    return factors


def _audio_factors(seed: int, samples: Tensor, chunks: int, truth: GroundTruth) -> Float[Tensor, "B n C"]:
    count = TIMELINE.count(AUDIO, chunks)
    noise = normal_rows(seed, "study/audio", samples, torch.empty(len(samples), count, CHANNELS[AUDIO]))
    syllable, loud = _speech_at(seed, samples, truth, latent_midpoints(AUDIO, chunks))
    tone = truth.choices[:, TIMELINE.chunk_index(AUDIO, chunks) + 1, 4:] * 2.0 - 1
    factors = NOISE * noise
    factors[..., VOICE] += truth.voice[:, None]
    factors[..., FORMANTS] += FORMANT_SHAPES[syllable] * loud[..., None]
    factors[..., LOUDNESS] += 1.5 * loud[..., None]
    factors[..., TONE] = tone + MODE_SPREAD * noise[..., TONE]
    return factors


def _ornstein_uhlenbeck(noise: Float[Tensor, "B n c"], keep: float) -> Tensor:
    """Return a stationary walk of unit variance: x_i = keep x_{i-1} + sqrt(1 - keep^2) noise_i."""
    steps = [noise[:, 0]]
    for i in range(1, noise.shape[1]):
        steps.append(keep * steps[-1] + (1 - keep**2) ** 0.5 * noise[:, i])
    return torch.stack(steps, dim=1)


def _condition(truth: GroundTruth, first_frame: Float[Tensor, "B C 1 1"]) -> Condition:
    batch = len(first_frame)
    is_word: Bool[Tensor, "B J"] = truth.syllable < SYLLABLES
    return Condition(
        caption=torch.zeros(batch, 1, WORD_DIM),
        caption_mask=torch.zeros(batch, 1, dtype=torch.bool),
        words=WORDS[truth.syllable],
        words_mask=is_word,
        word_times=torch.stack([truth.start, truth.end], dim=-1).double(),
        first_frame=first_frame,
        voice=torch.zeros(batch, 1, CHANNELS[AUDIO]),
        voice_mask=torch.zeros(batch, dtype=torch.bool),
    )
