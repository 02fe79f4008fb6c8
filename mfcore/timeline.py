"""Conversions between seconds, frames, latents and chunks.

The modalities have different rates. A latent belongs to the chunk in which it *starts*: chunk k of length T holds the
latents that start in [k T, (k + 1) T). Counts may differ by one between chunks and are a pure function of (rates, T,
k). Arithmetic is exact (fractions). Only the timestamps for the network are float64.
"""

from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from mfcore.errors import UserInputError


@dataclass(frozen=True, kw_only=True)
class LatentClock:
    """Start times of the latents of one modality.

    Latent i >= 0 *after the head* starts at ``offset + i / rate``. Codecs that encode the first frame separately (Wan,
    DCT) have ``head = 1``: that latent is a condition, belongs to no chunk, and ``i`` does not count it.
    """

    rate: Fraction  # latents per second
    offset: Fraction = Fraction(0)  # seconds from the start of the clip to latent 0
    head: int = 0  # leading condition latents

    def __post_init__(self) -> None:
        if self.rate <= 0 or not 0 <= self.offset * self.rate < 1 or self.head < 0:
            raise UserInputError(f"a latent clock needs rate > 0, 0 <= offset < 1 / rate, head >= 0; got {self}")

    def start(self, index: int) -> Fraction:
        """Return the start of latent ``index`` (head not counted) in seconds."""
        return self.offset + index / self.rate

    def first_at(self, seconds: Fraction) -> int:
        """Return the index of the first latent that starts at or after ``seconds``."""
        return max(0, ceil((seconds - self.offset) * self.rate))


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """Latent clocks of all modalities, and the length of a chunk."""

    clocks: dict[str, LatentClock]
    chunk_seconds: Fraction

    def __post_init__(self) -> None:
        for name, clock in self.clocks.items():
            if clock.rate * self.chunk_seconds < 1:
                raise UserInputError(
                    f"a chunk of {float(self.chunk_seconds)} s holds no whole {name} latent at {float(clock.rate)} per "
                    "second: choose a longer chunk"
                )

    def bounds(self, modality: str, chunk: int) -> tuple[int, int]:
        """Return the half-open range of latent indices (head not counted) of ``chunk``."""
        clock = self.clocks[modality]
        return clock.first_at(chunk * self.chunk_seconds), clock.first_at((chunk + 1) * self.chunk_seconds)

    def count(self, modality: str, chunks: int, first: int = 0) -> int:
        """Return the number of latents in chunks ``first .. first + chunks - 1``."""
        return self.bounds(modality, first + chunks - 1)[1] - self.bounds(modality, first)[0] if chunks else 0

    def max_count(self, modality: str) -> int:
        """Return an upper bound of the latents in one chunk."""
        return ceil(self.clocks[modality].rate * self.chunk_seconds)

    def times(self, modality: str, chunks: int, first: int = 0) -> Float64[Tensor, " n"]:
        """Return the start times of the latents of consecutive chunks, in seconds since the start of the clip."""
        clock = self.clocks[modality]
        lo = self.bounds(modality, first)[0]
        return torch.tensor(
            [float(clock.start(lo + i)) for i in range(self.count(modality, chunks, first))], dtype=torch.float64
        )

    def chunk_index(self, modality: str, chunks: int, first: int = 0) -> Int64[Tensor, " n"]:
        """Return the chunk number of every latent of consecutive chunks."""
        sizes = [self.count(modality, 1, k) for k in range(first, first + chunks)]
        return torch.from_numpy(np.repeat(np.arange(first, first + chunks), sizes))

    def whole_chunks(self, latents: dict[str, int]) -> int:
        """Return the number of complete chunks, given the latents per modality (head not counted)."""
        return min(self._whole(name, n) for name, n in latents.items())

    def _whole(self, modality: str, latents: int) -> int:
        # the first missing latent starts in the first incomplete chunk
        return floor(self.clocks[modality].start(latents) / self.chunk_seconds)


def whole_frames(seconds: Fraction, fps: Fraction) -> int:
    """Return the number of frames that start before ``seconds``. Frame j starts at j / fps."""
    return max(0, ceil(seconds * fps))


def video_clock(fps: Fraction, group: int) -> LatentClock:
    """Return the clock of a causal video codec: one latent for the first frame, then one per ``group`` frames."""
    return LatentClock(rate=fps / group, offset=1 / fps, head=1)


def audio_clock(sample_rate: int, hop: int) -> LatentClock:
    """Return the clock of an audio codec with one latent per ``hop`` samples."""
    return LatentClock(rate=Fraction(sample_rate, hop))
