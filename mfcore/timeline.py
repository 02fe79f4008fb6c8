"""Every conversion between seconds, frames, latents and chunks stands here.

The two modalities tick at different rates. A latent belongs to the chunk in which it *starts*: chunk k of length T
holds the latents whose start lies in [k T, (k + 1) T), so counts may differ by one between chunks and are a pure
function of (rates, T, k). All arithmetic is exact (fractions); only the timestamps handed to the network are floats
(float64).
"""

from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LatentClock:
    """When the latents of one modality start.

    Latent i >= 0 *after the head* starts at ``offset + i / rate``. A codec that encodes the first frame alone (Wan, our
    DCT) has ``head = 1``: that latent is the condition, belongs to no chunk, and is not counted by ``i``.
    """

    rate: Fraction  # latents per second
    offset: Fraction = Fraction(0)  # seconds from the start of the clip to latent 0
    head: int = 0  # leading condition latents

    def __post_init__(self) -> None:
        if self.rate <= 0 or not 0 <= self.offset * self.rate < 1 or self.head < 0:
            raise ValueError(f"a latent clock needs rate > 0, 0 <= offset < 1 / rate, head >= 0; got {self}")

    def start(self, index: int) -> Fraction:
        """Seconds at which latent ``index`` (head not counted) starts."""
        return self.offset + index / self.rate

    def first_at(self, seconds: Fraction) -> int:
        """Index of the first latent that starts at or after ``seconds``."""
        return max(0, ceil((seconds - self.offset) * self.rate))


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """The latent clocks of all modalities present, cut into chunks of ``chunk_seconds``."""

    clocks: dict[str, LatentClock]
    chunk_seconds: Fraction

    def __post_init__(self) -> None:
        for name, clock in self.clocks.items():
            if clock.rate * self.chunk_seconds < 1:
                raise ValueError(
                    f"a chunk of {float(self.chunk_seconds)} s holds no whole {name} latent at {float(clock.rate)} per "
                    "second: choose a longer chunk"
                )

    def bounds(self, modality: str, chunk: int) -> tuple[int, int]:
        """Half-open range of latent indices (head not counted) of ``chunk``."""
        clock = self.clocks[modality]
        return clock.first_at(chunk * self.chunk_seconds), clock.first_at((chunk + 1) * self.chunk_seconds)

    def count(self, modality: str, chunks: int, first: int = 0) -> int:
        """Number of latents in chunks ``first .. first + chunks - 1``."""
        return self.bounds(modality, first + chunks - 1)[1] - self.bounds(modality, first)[0] if chunks else 0

    def max_count(self, modality: str) -> int:
        """Upper bound of the latents that any one chunk can hold."""
        return ceil(self.clocks[modality].rate * self.chunk_seconds)

    def times(self, modality: str, chunks: int, first: int = 0) -> Float64[Tensor, " n"]:
        """Start times, in seconds since the start of the clip, of the latents of a run of chunks."""
        clock = self.clocks[modality]
        lo = self.bounds(modality, first)[0]
        return torch.tensor(
            [float(clock.start(lo + i)) for i in range(self.count(modality, chunks, first))], dtype=torch.float64
        )

    def chunk_index(self, modality: str, chunks: int, first: int = 0) -> Int64[Tensor, " n"]:
        """Chunk number of every latent of a run of chunks."""
        sizes = [self.count(modality, 1, k) for k in range(first, first + chunks)]
        return torch.from_numpy(np.repeat(np.arange(first, first + chunks), sizes))

    def whole_chunks(self, latents: dict[str, int]) -> int:
        """Chunks that are complete in every modality, given latents per modality (head not counted)."""
        return min(self._whole(name, n) for name, n in latents.items())

    def _whole(self, modality: str, latents: int) -> int:
        # the first missing latent starts in the first incomplete chunk
        return floor(self.clocks[modality].start(latents) / self.chunk_seconds)


def whole_frames(seconds: Fraction, fps: Fraction) -> int:
    """Frames that start before ``seconds``: frame j starts at j / fps."""
    return max(0, ceil(seconds * fps))


def video_clock(fps: Fraction, group: int) -> LatentClock:
    """Clock of a causal video codec: the first frame alone, then one latent per ``group`` frames."""
    return LatentClock(rate=fps / group, offset=1 / fps, head=1)


def audio_clock(sample_rate: int, hop: int) -> LatentClock:
    """Clock of an audio codec with one latent per ``hop`` samples."""
    return LatentClock(rate=Fraction(sample_rate, hop))
