"""Records that pass between steps: a source, a clip cut from it, a rejection."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mfcore.errors import UserInputError


@dataclass(frozen=True, kw_only=True)
class Word:
    """One spoken word; seconds since the start of the source (sidecar) or of the span (clip)."""

    word: str
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class SourceLimits:
    """Limits of time and text of one source; what exceeds them is rejected."""

    wall_seconds: float = 21600.0  # from the start of its decoder to the last clip
    claimed_seconds: float = 86400.0  # length in the header, or of the part that is used
    decoded_frames: int = 2_592_000  # frames of the dataset's frame rate; 30 hours at 24 per second
    gap_seconds: float = 600.0  # time without a frame or sample
    sidecar_bytes: int = 1 << 24  # of each file with text
    caption_letters: int = 10_000
    transcript_letters: int = 10_000  # of one clip

    def __post_init__(self) -> None:
        wrong = [f"limits.{name}={value}" for name, value in vars(self).items() if not value > 0]
        if wrong:
            raise UserInputError(f"{', '.join(wrong)}: must be positive")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One input file, or a part of it. `uri` is percent-encoded from the bytes of the name."""

    uri: str
    size: int  # bytes
    fingerprint: str  # of the size and the first and last 64 KiB
    caption: str | None = None  # from a manifest; None: use the sidecar
    transcript: tuple[Word, ...] | None = None
    duplicate_of: str | None = None  # URI of an earlier source with the same bytes
    world: str = ""  # synthetic world that the sidecar names, such as toyworld/1; empty: none


@dataclass(frozen=True, kw_only=True)
class FaceFacts:
    """What was measured of the face of a clip."""

    share: float  # of frames with the face
    pixels: float  # median height of the face in the source
    frontal_share: float  # of frames with the face
    sharpness: float  # variance of the Laplacian, gray levels
    inside_share: float  # of frames with the whole face in the crop
    height_share: float  # median height of the face over the height of the crop
    boxes: NDArray[np.float32]  # (n, 4) crops as shares of the picture: left, top, right, bottom


@dataclass(frozen=True, kw_only=True)
class SpeechFacts:
    """What was measured of the voice of a clip."""

    seconds: float  # of voice activity
    quality: float | None  # DNSMOS overall, 1 to 5; None: not measured
    voice_similarity: float | None  # cosine of the speaker embeddings of both halves of the speech


@dataclass(frozen=True, kw_only=True)
class Clip:
    """Span of a source: frame j is at ``span[0] + j / fps``, sample i at ``span[0] + i / rate``."""

    source: Source
    span: tuple[float, float]  # seconds since the source's origin
    frames: NDArray[np.uint8] | None  # (n, height, width, 3); None in an audio-only dataset
    waveform: NDArray[np.float32] | None  # (samples,); None in a video-only dataset
    content: str = ""  # hash of the content of the source file, independent of its location
    source_scale: float = 1.0  # pixels of the source per pixel of the frames
    source_fps: float | None = None  # average frames per second in the header of the source
    loudness_db: float | None = None  # dBFS, rms
    fingerprint: bytes | None = None  # features of appearance, motion and sound
    caption: str = ""
    caption_source: str = ""  # manifest, sidecar, measured or the id of a model; empty: no caption
    transcript: tuple[Word, ...] = ()
    transcript_source: str = ""  # manifest, sidecar or the id of a Whisper model; empty: no transcript
    sync: tuple[float, float] | None = None  # offset in seconds (positive: audio lags), confidence
    moved: float = 0.0  # seconds by which audio and transcript were moved earlier
    face: FaceFacts | None = None
    speech: SpeechFacts | None = None
    latents: Mapping[str, Tensor] | None = None  # raw: video (1 + n, C, h, w), audio (n, C); set by the last step
    caption_embedding: Tensor | None = None  # (L, D)
    words_embedding: Tensor | None = None  # (W, D)


class Rejected(Exception):
    """Raised by a step to exclude a clip, or a whole source if `span` is None."""

    def __init__(self, step: str, reason: str, detail: str = "", span: tuple[float, float] | None = None) -> None:
        super().__init__(step, reason, detail, span)  # all arguments: pickle repeats the call with them
        self.step, self.reason = step, reason
        self.detail, self.span = detail, span

    def __str__(self) -> str:
        return f"{self.step}: {self.reason} ({self.detail})"


Frames = NDArray[np.uint8]
"""uint8 ``(n, height, width, 3)``, RGB."""
Waveform = NDArray[np.float32]
"""float32 ``(samples,)``, mono, nominally in [-1, 1]."""
