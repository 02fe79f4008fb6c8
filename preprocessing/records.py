"""The values that travel from step to step: a source, a clip cut from it, the verdict that ends its way."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Word:
    """One spoken word; seconds since the start of the source (sidecar) or of the span (clip)."""

    word: str
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Source:
    """One input file. ``uri`` is percent-encoded from the filesystem's bytes, so any name fits in any text column."""

    uri: str
    size: int  # bytes
    fingerprint: str  # of the size and the first and last 64 KiB
    caption: str | None = None  # from a manifest; a sidecar fills in where this is None
    transcript: tuple[Word, ...] | None = None
    duplicate_of: str | None = None  # URI of an earlier source with the same bytes


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One span of a source on one clock: frame j shows ``span[0] + j / fps``, sample i is at ``span[0] + i / rate``."""

    source: Source
    span: tuple[float, float]  # seconds since the source's origin
    frames: NDArray[np.uint8] | None  # (n, height, width, 3); None in a set without picture
    waveform: NDArray[np.float32] | None  # (samples,); None in a set without sound
    content: str = ""  # hash that tells the source's file from others, wherever it lies
    source_fps: float | None = None  # average frames per second as the source claims them
    loudness_db: float | None = None  # dBFS, rms
    fingerprint: bytes | None = None  # of how it looks, moves and sounds
    caption: str = ""
    transcript: tuple[Word, ...] = ()
    transcript_source: str = ""  # manifest, sidecar, the id of a Whisper; empty: there is no transcript
    sync: tuple[float, float] | None = None  # offset in seconds (positive: sound late), confidence
    moved: float = 0.0  # seconds by which the sound was moved to be earlier, its transcript with it
    latents: Mapping[str, Tensor] | None = None  # raw: video (1 + n, C, h, w), audio (n, C); set by the last step
    caption_embedding: Tensor | None = None  # (L, D)
    words_embedding: Tensor | None = None  # (W, D)


class Rejected(Exception):
    """Raised by a step: this clip, or this source where no span is known, does not enter the dataset."""

    def __init__(self, step: str, reason: str, detail: str = "", span: tuple[float, float] | None = None) -> None:
        super().__init__(f"{step}: {reason} ({detail})")
        self.step, self.reason, self.detail, self.span = step, reason, detail, span


Frames = NDArray[np.uint8]
"""uint8 ``(n, height, width, 3)``, RGB."""
Waveform = NDArray[np.float32]
"""float32 ``(samples,)``, mono, nominally in [-1, 1]."""
