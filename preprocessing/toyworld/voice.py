"""Voice of the toy world: harmonics of a pitch, shaped by syllables and a tone.

A syllable is a consonant and a vowel. The vowel sets the two lower resonances, the consonant the third one and the
start of the glide of the second one. The tone is a free choice per half second. It tilts the spectrum and adds a ring
above the resonances.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

VOICES = (125.0, 155.0, 192.0, 238.0)  # pitch, Hz
TONES: dict[str, tuple[float, float]] = {  # name -> (exponent of the fall with frequency, strength of the ring)
    "warm": (1.25, 0.05),
    "bright": (-0.05, 0.05),
    "ringing": (1.25, 0.6),
    "brassy": (-0.05, 0.6),
}
_VOWELS = {"a": (850.0, 1300.0), "e": (520.0, 1850.0), "i": (290.0, 2350.0), "o": (470.0, 860.0)}  # Hz
_CONSONANTS = {  # name -> (third resonance, start of the glide of the second), Hz
    "b": (2600.0, 750.0),
    "d": (3350.0, 1700.0),
    "g": (4300.0, 2300.0),
    "m": (5400.0, 1000.0),
    "l": (2950.0, 1300.0),
    "s": (3800.0, 1950.0),
}
_RING = 7100.0  # Hz, above all resonances
VOCABULARY = tuple(c + v for c in _CONSONANTS for v in _VOWELS)
"""All 24 syllables; a world of n syllables uses the first n."""

MIN_SAMPLE_RATE = 16000  # Hz, for the highest resonance
HALF_SECOND = 0.5  # seconds of a free choice
_CONTROL = 250  # Hz, rate of amplitudes before interpolation
_SPREADS = (0.15, 0.13, 0.09, 0.05)  # widths of the resonances and the ring, in log frequency
_LEVEL = 0.16  # rms at the middle of a syllable
_NOISE_LEVEL = 0.0008  # rms of the background noise


class TranscriptWord(TypedDict):
    """One entry of a transcript: a syllable and its times in seconds."""

    word: str
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Voice:
    """Pitch and tones of a spoken transcript."""

    pitch: float  # Hz
    tones: tuple[int, ...]  # per half second, positions in TONES; the last one continues


def speech_envelope(transcript: Sequence[TranscriptWord], times: Array) -> tuple[Array, NDArray[np.int64], Array]:
    """Return envelope (0 to 1), transcript entry (-1: pause) and phase in the syllable (0 to 1).

    The envelope at each of `times` is a half sine per syllable; it also opens the mouth.
    """
    starts = np.asarray([w["start"] for w in transcript] + [1e9])  # the last entry also serves index -1
    ends = np.asarray([w["end"] for w in transcript] + [2e9])
    entry = np.searchsorted(starts, times, side="right") - 1
    place = (times - starts[entry]) / np.maximum(ends[entry] - starts[entry], 1e-6)
    spoken = (entry >= 0) & (place < 1)
    place = np.where(spoken, place, 0.0)
    return np.sin(np.pi * place) * spoken, np.where(spoken, entry, -1), place


def synthesize(
    transcript: Sequence[TranscriptWord], voice: Voice, *, samples: int, sample_rate: int, seed: int
) -> NDArray[np.float32]:
    """Return the spoken transcript with background noise, float32 ``[samples]`` in [-1, 1]."""
    points = np.arange(samples * _CONTROL // sample_rate + 2) / _CONTROL
    envelope, entry, place = speech_envelope(transcript, points)
    pitch = voice.pitch * (1.03 - 0.06 * place)
    at = np.arange(samples) / sample_rate
    phase = 2 * np.pi * np.cumsum(np.interp(at, points, pitch)) / sample_rate
    names = np.asarray([VOCABULARY.index(w["word"]) for w in transcript] + [0])
    tones = np.asarray(voice.tones)[np.minimum((points / HALF_SECOND).astype(int), len(voice.tones) - 1)]
    gains = _harmonics(names[entry], place, tones, pitch, base=voice.pitch, sample_rate=sample_rate)
    gains *= envelope[:, None]
    gains[1:-1] = (gains[:-2] + 2 * gains[1:-1] + gains[2:]) / 4  # 12 ms per change of tone prevent clicks
    sound = _LEVEL * _sum_harmonics(phase, at * _CONTROL, gains)
    sound += _NOISE_LEVEL * np.random.default_rng([seed, 0x50]).standard_normal(samples)
    return np.clip(sound, -1, 1).astype(np.float32)


def _harmonics(
    syllable: NDArray[np.int64], place: Array, tone: NDArray[np.int64], pitch: Array, *, base: float, sample_rate: int
) -> Array:
    """Return amplitudes ``[points, harmonics]`` of unit total power."""
    count = int(min(7400, 0.46 * sample_rate) / (1.03 * base))
    order = np.arange(1, count + 1)
    frequency = pitch[:, None] * order
    vowels = np.asarray([_VOWELS[name[1]] for name in VOCABULARY])[syllable]
    consonants = np.asarray([_CONSONANTS[name[0]] for name in VOCABULARY])[syllable]
    glide = np.exp(-place / 0.12)
    second = vowels[:, 1] * (consonants[:, 1] / vowels[:, 1]) ** glide
    log_frequency = np.log(frequency)
    fall, ring = np.asarray(list(TONES.values()))[tone].T[:, :, None]
    gain = np.full(frequency.shape, 0.01)
    for center, spread in zip((vowels[:, 0], second, consonants[:, 0]), _SPREADS, strict=False):
        gain += np.exp(-0.5 * np.square((log_frequency - np.log(center)[:, None]) / spread))
    gain *= (frequency / 500) ** -fall
    gain += ring * np.exp(-0.5 * np.square((log_frequency - np.log(_RING)) / _SPREADS[-1]))
    return gain * np.sqrt(2 / np.square(gain).sum(1, keepdims=True))


def _sum_harmonics(phase: Array, position: Array, gains: Array) -> Array:
    """Return the sum over h of gain_h sin(h phase + offset_h), with interpolated gains."""
    low = position.astype(np.int64)
    part = position - low
    turn = np.exp(1j * phase)
    wave = np.ones_like(turn)
    total = np.zeros_like(phase)
    count = gains.shape[1]
    for h in range(count):
        wave *= turn
        gain = gains[low, h] * (1 - part) + gains[low + 1, h] * part
        # Phase offsets after Schroeder keep the peaks low without an effect on the mel spectrum.
        total += gain * (wave * np.exp(-1j * np.pi * (h + 1) ** 2 / count)).imag
    return total
