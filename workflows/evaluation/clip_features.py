"""Features of one clip that metrics are computed from; they can be cut to a time window.

Letters: n frames, K half seconds, d features.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mfcore.metrics.av_sync import (
    BlockStatistics,
    MotionSync,
    SyncEstimate,
    SyncResult,
    sound_envelope,
    sync_offset,
)
from mfcore.metrics.signal_quality import QUIET, rms
from mfcore.metrics.windows import TimeWindow
from preprocessing.speech import recognizer
from preprocessing.toyworld.choices import ChoiceReading

Array = NDArray[np.float64]

ENVELOPE_RATE_HZ = 100.0  # envelope values per second
MAX_SYNC_LAG_S = 0.4  # search range of A/V offsets; also the offset of a failed clip
HALF_SECOND = 0.5  # duration of one observation of the toy readers


@dataclass(frozen=True, kw_only=True)
class ChunkBoundaryEnergy:
    """Change between neighboring steps of a signal, with times in seconds and chunk borders."""

    energy: Array
    times: Array
    border: NDArray[np.bool_]

    def cut(self, window: TimeWindow) -> "ChunkBoundaryEnergy":
        """Return the part inside ``window``."""
        keep = (self.times >= window.start) & (self.times < window.end)
        return ChunkBoundaryEnergy(energy=self.energy[keep], times=self.times[keep], border=self.border[keep])


@dataclass(frozen=True, kw_only=True)
class ToyVideoFeatures:
    """Video features of the toy world."""

    opening: Array  # [n] of the mouth
    head: Array  # [n, 2]
    face: Array  # [K, 3] color, 0 to 1
    first_face: Array  # [3] color in the first frame
    choices: Mapping[str, ChoiceReading]
    spoken_opening: Array | None = None  # [n] that the phonemes of the transcript have; None without phonemes

    def cut(self, window: TimeWindow, fps: float) -> "ToyVideoFeatures":
        """Return the part inside ``window``."""
        frames = window.slice(fps, len(self.opening))
        halves = window.slice(1 / HALF_SECOND, len(self.face))
        return replace(
            self,
            opening=self.opening[frames],
            spoken_opening=None if self.spoken_opening is None else self.spoken_opening[frames],
            head=self.head[frames],
            face=self.face[halves],
            choices={name: crop_choice(c, halves) for name, c in self.choices.items()},
        )


@dataclass(frozen=True, kw_only=True)
class ToyAudioFeatures:
    """Audio features of the toy world."""

    detected: tuple[tuple[str, float], ...]  # detected syllables with mid times
    expected: tuple[tuple[str, float], ...]  # syllables of the transcript
    tone: ChoiceReading

    def cut(self, window: TimeWindow) -> "ToyAudioFeatures":
        """Return the part inside ``window``."""
        halves = window.slice(1 / HALF_SECOND, len(self.tone.mode))
        return ToyAudioFeatures(
            detected=tuple(unit for unit in self.detected if window.start <= unit[1] < window.end),
            expected=tuple(unit for unit in self.expected if window.start <= unit[1] < window.end),
            tone=crop_choice(self.tone, halves),
        )


@dataclass(frozen=True, kw_only=True)
class FeatureTrack:
    """Embeddings of a clip by one network; row i starts at i / rate seconds."""

    values: NDArray[np.floating[Any]]  # [n, d]
    rate: float
    reference: NDArray[np.floating[Any]] | None = None  # [d] of the first frame

    def cut(self, window: TimeWindow) -> "FeatureTrack":
        """Return the part inside ``window``."""
        return replace(self, values=self.values[window.slice(self.rate, len(self.values))])


@dataclass(frozen=True, kw_only=True)
class SpeechSegment:
    """A few seconds of speech, cut between words."""

    at: float  # middle of the segment, seconds
    expected: tuple[str, ...]  # words of the transcript
    detected: Mapping[str, tuple[str, ...]]  # recognizer -> words


@dataclass(frozen=True, kw_only=True, eq=False)
class ClipFeatures:
    """Features of one clip or of a window of it."""

    finite: bool
    fps: float
    sample_rate: int
    motion: Array | None  # [n] change of gray levels per frame
    sharpness: Array | None  # [n]
    blocks: BlockStatistics | None  # [n, 64] each: a coarse image for motion sync
    sound: NDArray[np.float32] | None
    seams: Mapping[str, ChunkBoundaryEnergy]
    features: Mapping[str, Array]  # modality -> [K, d]; the toy world only
    picture: ToyVideoFeatures | None
    speech: ToyAudioFeatures | None
    phonemes: NDArray[np.bool_] | None = None  # [n] read correctly; English toy world only
    words: bool = False  # the transcript has words (toy syllables are none)
    tracks: Mapping[str, FeatureTrack] = field(default_factory=dict[str, FeatureTrack])
    utterances: tuple[SpeechSegment, ...] = ()

    @property
    def is_silent(self) -> bool:
        """Return True if the audio is empty or silent."""
        return self.sound is not None and (not len(self.sound) or rms(self.sound) < QUIET)

    @cached_property
    def mouth_sync(self) -> SyncEstimate | None:
        """Return the A/V offset of mouth opening and loudness; None outside the toy world or without audio."""
        if self.picture is None or self.sound is None:
            return None
        envelope = sound_envelope(self.sound, self.sample_rate, ENVELOPE_RATE_HZ)
        return sync_offset(self.picture.opening, self.fps, envelope, ENVELOPE_RATE_HZ, max_lag=MAX_SYNC_LAG_S)

    @cached_property
    def motion_sync(self) -> SyncResult | None:
        """Return the A/V offset of motion and loudness; None without video or audio."""
        if self.blocks is None or self.sound is None:
            return None
        return MotionSync(MAX_SYNC_LAG_S).estimate(self.blocks, self.fps, self.sound, self.sample_rate)

    def crop(self, window: TimeWindow) -> "ClipFeatures":
        """Return the features inside ``window``."""
        if window.start == 0 and window.end == inf:
            return self
        motion = self.motion
        sharp = self.sharpness
        sound = self.sound
        blocks = self.blocks
        heard = self.phonemes
        return replace(
            self,
            motion=None if motion is None else motion[window.slice(self.fps, len(motion))],
            sharpness=None if sharp is None else sharp[window.slice(self.fps, len(sharp))],
            blocks=None if blocks is None else BlockStatistics(*(x[window.slice(self.fps, len(x))] for x in blocks)),
            sound=None if sound is None else sound[window.slice(self.sample_rate, len(sound))],
            seams={name: seam.cut(window) for name, seam in self.seams.items()},
            features={m: x[window.slice(1 / HALF_SECOND, len(x))] for m, x in self.features.items()},
            picture=self.picture and self.picture.cut(window, self.fps),
            speech=self.speech and self.speech.cut(window),
            phonemes=None if heard is None else heard[window.slice(recognizer.RATE, len(heard))],
            tracks={name: track.cut(window) for name, track in self.tracks.items()},
            utterances=tuple(u for u in self.utterances if window.start <= u.at < window.end),
        )


def crop_choice(choice: ChoiceReading, halves: slice) -> ChoiceReading:
    """Return the half seconds ``halves`` of a reading."""
    return ChoiceReading(**{name: values[halves] for name, values in vars(choice).items()})
