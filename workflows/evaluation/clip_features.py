"""What can be seen and heard in one clip, in a form that can be cut to a window of time and scored.

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
from preprocessing.toyworld.choices import ChoiceReading

Array = NDArray[np.float64]

ENVELOPE_RATE_HZ = 100.0  # values of a sound envelope per second
MAX_SYNC_LAG_S = 0.4  # seconds either way in which the sound is searched; the offset of a clip that failed
HALF_SECOND = 0.5  # seconds of one observation of the toy readers


@dataclass(frozen=True, kw_only=True)
class ChunkBoundaryEnergy:
    """Changes from step to step, when they happen, and whether a chunk begins there."""

    energy: Array
    times: Array
    border: NDArray[np.bool_]

    def cut(self, window: TimeWindow) -> "ChunkBoundaryEnergy":
        keep = (self.times >= window.start) & (self.times < window.end)
        return ChunkBoundaryEnergy(energy=self.energy[keep], times=self.times[keep], border=self.border[keep])


@dataclass(frozen=True, kw_only=True)
class ToyVideoFeatures:
    """What the toy readers see."""

    opening: Array  # [n] of the mouth
    head: Array  # [n, 2]
    face: Array  # [K, 3] colour, 0 to 1
    first_face: Array  # [3] colour in the first frame
    choices: Mapping[str, ChoiceReading]

    def cut(self, window: TimeWindow, fps: float) -> "ToyVideoFeatures":
        frames, halves = window.slice(fps, len(self.opening)), window.slice(1 / HALF_SECOND, len(self.face))
        return replace(
            self,
            opening=self.opening[frames],
            head=self.head[frames],
            face=self.face[halves],
            choices={name: crop_choice(c, halves) for name, c in self.choices.items()},
        )


@dataclass(frozen=True, kw_only=True)
class ToyAudioFeatures:
    """What the toy readers hear."""

    heard: tuple[tuple[str, float], ...]  # syllables and the middles of their times
    said: tuple[tuple[str, float], ...]  # what was to be said
    tone: ChoiceReading

    def cut(self, window: TimeWindow) -> "ToyAudioFeatures":
        inside = lambda units: tuple(u for u in units if window.start <= u[1] < window.end)
        halves = window.slice(1 / HALF_SECOND, len(self.tone.mode))
        return ToyAudioFeatures(heard=inside(self.heard), said=inside(self.said), tone=crop_choice(self.tone, halves))


@dataclass(frozen=True, kw_only=True)
class FeatureTrack:
    """What a network made of a clip; row i belongs to the times from i / rate seconds on."""

    values: NDArray[np.floating[Any]]  # [n, d]
    rate: float
    reference: NDArray[np.floating[Any]] | None = None  # [d] of the first frame

    def cut(self, window: TimeWindow) -> "FeatureTrack":
        return replace(self, values=self.values[window.slice(self.rate, len(self.values))])


@dataclass(frozen=True, kw_only=True)
class SpeechSegment:
    """Some seconds of speech, cut where nobody speaks."""

    at: float  # their middle
    said: tuple[str, ...]  # what was to be said, words
    heard: Mapping[str, tuple[str, ...]]  # recogniser -> words


@dataclass(frozen=True, kw_only=True, eq=False)
class ClipFeatures:
    """One clip, or a window of it."""

    finite: bool
    fps: float
    sample_rate: int
    motion: Array | None  # [n] change of grey levels per frame
    sharpness: Array | None  # [n]
    blocks: BlockStatistics | None  # [n, 64] each: a coarse picture, to find what moves with the sound
    sound: NDArray[np.float32] | None
    seams: Mapping[str, ChunkBoundaryEnergy]
    features: Mapping[str, Array]  # modality -> [K, d]; the toy world only
    picture: ToyVideoFeatures | None
    speech: ToyAudioFeatures | None
    words: bool = False  # there is something to say, in words
    tracks: Mapping[str, FeatureTrack] = field(default_factory=dict[str, FeatureTrack])
    utterances: tuple[SpeechSegment, ...] = ()

    @property
    def is_silent(self) -> bool:
        return self.sound is not None and (not len(self.sound) or rms(self.sound) < QUIET)

    @cached_property
    def mouth_sync(self) -> SyncEstimate | None:
        """Opening of the mouth against loudness; None where no toy reader sees one, or nothing is heard."""
        if self.picture is None or self.sound is None:
            return None
        envelope = sound_envelope(self.sound, self.sample_rate, ENVELOPE_RATE_HZ)
        return sync_offset(self.picture.opening, self.fps, envelope, ENVELOPE_RATE_HZ, max_lag=MAX_SYNC_LAG_S)

    @cached_property
    def motion_sync(self) -> SyncResult | None:
        """What moves in the picture against loudness, for any video."""
        if self.blocks is None or self.sound is None:
            return None
        return MotionSync(MAX_SYNC_LAG_S).estimate(self.blocks, self.fps, self.sound, self.sample_rate)

    def crop(self, window: TimeWindow) -> "ClipFeatures":
        """The part of a window."""
        if window.start == 0 and window.end == inf:
            return self
        motion, sharp, sound, blocks = self.motion, self.sharpness, self.sound, self.blocks
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
            tracks={name: track.cut(window) for name, track in self.tracks.items()},
            utterances=tuple(u for u in self.utterances if window.start <= u.at < window.end),
        )


def crop_choice(choice: ChoiceReading, halves: slice) -> ChoiceReading:
    return ChoiceReading(**{name: values[halves] for name, values in vars(choice).items()})
