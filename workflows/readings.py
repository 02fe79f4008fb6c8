"""What can be seen and heard in one clip, in a form that can be cut to a window of time and scored.

Letters: n frames, K half seconds, d features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mfcore.metrics.continuity import step_energy
from mfcore.metrics.sync import motion_energy, sound_envelope
from mfcore.metrics.windows import Window
from mfcore.types import AUDIO, VIDEO
from preprocessing.record import Word
from preprocessing.toyhearing import read_sound
from preprocessing.toymatch import ChoiceReading
from preprocessing.toyreaders import read_frames
from workflows.heldout import HeldOut, Signals, frame_rate

Array = NDArray[np.float64]

ENVELOPE = 100.0  # values of a sound envelope per second
HALF = 0.5  # seconds of one observation of the toy readers
_SILENT = 1e-3  # root mean square below which nothing can be heard
_EDGES = (60.0, 400.0, 1200.0, 3000.0, 8000.0)  # Hz, bands of the sound's features
_FAR = 2.0  # residuals of a reading are cut here: what is read nowhere is not infinitely far


@dataclass(frozen=True, kw_only=True)
class Seam:
    """Changes from step to step, when they happen, and whether a chunk begins there."""

    energy: Array
    times: Array
    border: NDArray[np.bool_]

    def cut(self, window: Window) -> "Seam":
        keep = (self.times >= window.start) & (self.times < window.end)
        return Seam(energy=self.energy[keep], times=self.times[keep], border=self.border[keep])


@dataclass(frozen=True, kw_only=True)
class ToyPicture:
    """What the toy readers see."""

    opening: Array  # [n] of the mouth
    head: Array  # [n, 2]
    face: Array  # [K, 3] colour, 0 to 1
    first_face: Array  # [3] colour in the first frame
    choices: Mapping[str, ChoiceReading]

    def cut(self, window: Window, fps: float) -> "ToyPicture":
        frames, halves = window.slice(fps, len(self.opening)), window.slice(1 / HALF, len(self.face))
        return replace(
            self,
            opening=self.opening[frames],
            head=self.head[frames],
            face=self.face[halves],
            choices={name: cut_choice(c, halves) for name, c in self.choices.items()},
        )


@dataclass(frozen=True, kw_only=True)
class ToySpeech:
    """What the toy readers hear."""

    heard: tuple[tuple[str, float], ...]  # syllables and the middles of their times
    said: tuple[tuple[str, float], ...]  # what was to be said
    tone: ChoiceReading

    def cut(self, window: Window) -> "ToySpeech":
        inside = lambda units: tuple(u for u in units if window.start <= u[1] < window.end)
        halves = window.slice(1 / HALF, len(self.tone.mode))
        return ToySpeech(heard=inside(self.heard), said=inside(self.said), tone=cut_choice(self.tone, halves))


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One clip, or a window of it."""

    finite: bool
    fps: float
    sample_rate: int
    motion: Array | None  # [n] change of grey levels per frame
    sound: NDArray[np.float32] | None
    seams: Mapping[str, Seam]
    features: Mapping[str, Array]  # modality -> [K, d]; the toy world only
    picture: ToyPicture | None
    speech: ToySpeech | None

    @property
    def silent(self) -> bool:
        return self.sound is not None and (not len(self.sound) or rms(self.sound) < _SILENT)

    def cut(self, window: Window) -> "Reading":
        """The part of a window."""
        motion, sound = self.motion, self.sound
        return replace(
            self,
            motion=None if motion is None else motion[window.slice(self.fps, len(motion))],
            sound=None if sound is None else sound[window.slice(self.sample_rate, len(sound))],
            seams={name: seam.cut(window) for name, seam in self.seams.items()},
            features={m: x[window.slice(1 / HALF, len(x))] for m, x in self.features.items()},
            picture=self.picture and self.picture.cut(window, self.fps),
            speech=self.speech and self.speech.cut(window),
        )


def cut_choice(choice: ChoiceReading, halves: slice) -> ChoiceReading:
    return ChoiceReading(**{name: values[halves] for name, values in vars(choice).items()})


def rms(sound: NDArray[np.floating[Any]]) -> float:
    return float(np.sqrt(np.square(sound, dtype=np.float64).mean()))


class Reader:
    """Reads clips of one dataset."""

    def __init__(self, held: HeldOut) -> None:
        self._held, self._toy = held, held.toy
        self._fps = float(frame_rate(held.meta))
        codec: Any = held.codecs.get(AUDIO)
        self.sample_rate = codec.config.sample_rate if codec else 16000

    def read(self, signals: Signals) -> Reading:
        frames = None if signals.frames is None else signals.frames.numpy()
        sound = None if signals.sound is None else signals.sound.numpy()
        picture = self._picture(frames) if frames is not None and self._toy else None
        motion = None if frames is None else motion_energy(frames)
        features: dict[str, Array] = {}
        if picture is not None and motion is not None and frames is not None:
            features[VIDEO] = _picture_features(picture, motion, frames, self._fps)
        if sound is not None and self._toy:
            features[AUDIO] = _sound_features(sound, self.sample_rate)
        return Reading(
            finite=signals.finite,
            fps=self._fps,
            sample_rate=self.sample_rate,
            motion=motion,
            sound=sound,
            seams=self._seams(signals, frames, sound),
            features=features,
            picture=picture,
            speech=self._speech(sound, signals.words) if sound is not None and self._toy else None,
        )

    def _picture(self, frames: NDArray[np.uint8]) -> ToyPicture:
        assert self._toy is not None
        # The first frame is read as every other one: as half a second of it.
        still = np.repeat(frames[:1], int(self._fps * HALF) + 1, axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):  # what is generated may have no contrast at all
            seen, first = read_frames(frames, self._toy), read_frames(still, self._toy)
        return ToyPicture(
            opening=seen.opening,
            head=seen.head,
            face=seen.face_colour / 255,
            first_face=first.face_colour[0] / 255,
            choices=seen.choices,
        )

    def _speech(self, sound: NDArray[np.float32], words: Sequence[Word]) -> ToySpeech:
        assert self._toy is not None
        heard = read_sound(sound, self.sample_rate, self._toy)
        return ToySpeech(
            heard=tuple((w["word"], (w["start"] + w["end"]) / 2) for w in heard.syllables),
            said=tuple((w.word, (w.start + w.end) / 2) for w in words),
            tone=heard.tone,
        )

    def _seams(
        self, signals: Signals, frames: NDArray[np.uint8] | None, sound: NDArray[np.float32] | None
    ) -> dict[str, Seam]:
        chunk, seams = float(self._held.meta.chunk_seconds), {}
        if frames is not None:
            # The first frame belongs to what came before: frame j shows the world at j / fps, chunk k ends with it.
            seams["pixels"] = _seam(frames, (np.arange(len(frames)) - 1) / self._fps, chunk)
        if sound is not None:
            envelope = sound_envelope(sound, self.sample_rate, ENVELOPE)
            seams["sound"] = _seam(envelope, np.arange(len(envelope)) / ENVELOPE, chunk)
        timeline = self._held.meta.timeline()
        for m, latents in signals.latents.items():
            whitened = self._held.meta.stats[m].whiten(latents.float(), space=latents.ndim - 2).numpy()
            chunks = -(-len(latents) // timeline.count(m, 1)) + 1
            clock = timeline.clocks[m]
            times = timeline.times(m, chunks).numpy()[: len(latents)] - float(clock.offset)
            index = timeline.chunk_index(m, chunks).numpy()[: len(latents)]
            seams[f"{m}_latents"] = Seam(energy=step_energy(whitened), times=times[1:], border=np.diff(index) != 0)
        return seams


def _seam(values: Array | NDArray[np.uint8], times: Array, chunk: float) -> Seam:
    index = np.floor(times / chunk + 1e-6)
    return Seam(energy=step_energy(values), times=np.maximum(times[1:], 0), border=np.diff(index) != 0)


def _halves(values: Array, per_half: float, count: int) -> list[Array]:
    """The parts of ``values`` that belong to each half second; the last one may be short."""
    edges = np.round(np.arange(count + 1) * per_half).astype(int)
    return [values[a : max(b, a + 1)] for a, b in zip(edges[:-1], edges[1:], strict=True)]


def _picture_features(picture: ToyPicture, motion: Array, frames: NDArray[np.uint8], fps: float) -> Array:
    """``[K, 8]``: mouth (mean, spread), head, motion, sharpness, colour drift, distance to the modes of the choices."""
    count = len(picture.face)
    parts = lambda values: _halves(values[1:], fps * HALF, count)
    grey = frames[..., 1].astype(np.float32)
    sharp = np.abs(np.diff(grey, axis=2)).mean((1, 2))
    residuals = np.mean([np.minimum(c.residual[:count], _FAR) for c in picture.choices.values()], axis=0)
    return np.stack(
        [
            np.array([part.mean() for part in parts(picture.opening)]),
            np.array([part.std() for part in parts(picture.opening)]),
            *np.array([part.mean(0) for part in parts(picture.head)]).T,
            np.log(1e-2 + np.array([part.mean() for part in parts(motion)])),
            np.log(1e-2 + np.array([part.mean() for part in parts(sharp)])),
            np.sqrt(np.square(picture.face - picture.first_face).mean(1)),
            residuals,
        ],
        axis=1,
    )


def _sound_features(sound: NDArray[np.float32], sample_rate: int) -> Array:
    """``[K, 6]``: loudness and its spread in dB, the shares of four bands in dB."""
    rows: list[list[float]] = []
    for part in _halves(sound.astype(np.float64), sample_rate * HALF, max(1, round(len(sound) / sample_rate / HALF))):
        power = np.square(np.abs(np.fft.rfft(part * np.hanning(len(part)))))
        at = np.fft.rfftfreq(len(part), 1 / sample_rate)
        bands = [power[(at >= a) & (at < b)].sum() for a, b in zip(_EDGES[:-1], _EDGES[1:], strict=True)]
        envelope = decibel(sound_envelope(part, sample_rate, ENVELOPE))
        shares = 10 * np.log10(1e-4 + np.array(bands) / (sum(bands) + 1e-12))
        rows.append([decibel(rms(part)), float(envelope.std()), *shares])
    return np.array(rows)


def decibel(level: Any) -> Any:
    """Of full scale, not below -60."""
    return 20 * np.log10(np.maximum(level, 1e-3))
