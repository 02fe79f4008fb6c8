"""Read the toy world from audio: syllables with times, tone, pitch and mouth correlation.

Analysis by synthesis, as in `video_reader`: loudness segments the audio into syllables. Each is compared with all
syllables of all voices in all tones, as synthesized by `voice`.

Letters: T spectral frames, B bands, S syllables, V voices, N tones, C slices of a syllable, K half seconds.
"""

import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.signal import find_peaks

from preprocessing.toyworld.choices import ChoiceReading, make_reading, nearest_mode
from preprocessing.toyworld.voice import HALF_SECOND, TONES, VOCABULARY, VOICES, TranscriptWord, Voice, synthesize
from preprocessing.toyworld.world import ToyConfig

Array = NDArray[np.float64]

_HOP = 0.01  # seconds between spectra
_WINDOW = 0.048  # seconds of one spectrum, resolves the harmonics of the lowest voice
_BANDS = 72
_POWER = 0.3  # exponent of the magnitude: like a logarithm, but finite for silence
_SLICES = 10  # of one syllable
_EDGE = 0.03  # seconds around a change of tone that are ignored
_QUIET = 0.12  # share of the loudest syllable below which there is silence
_MIN_DISTANCE = 0.12  # seconds between syllables


@dataclass(frozen=True, kw_only=True)
class AudioReadings:
    """Readings of the audio."""

    syllables: tuple[TranscriptWord, ...]
    residual: Array  # [len(syllables)] distance to the syllable read, in units of the distance to its neighbor
    tone: ChoiceReading  # per half second; not present without speech
    voice: int  # nearest of VOICES for most syllables; -1 without speech
    pitch: float  # Hz, nan without speech


def read_audio(waveform: NDArray[np.float32], sample_rate: int, config: ToyConfig) -> AudioReadings:
    """Read mono audio ``[samples]``; only the vocabulary of `config` is used."""
    halves = max(1, round(len(waveform) / sample_rate / HALF_SECOND))
    spans = _spans(*loudness_envelope(waveform, sample_rate))
    if not spans:
        silent = make_reading(np.zeros(halves, np.int64), np.full(halves, np.inf), np.zeros(halves, bool))
        return AudioReadings(syllables=(), residual=np.zeros(0), tone=silent, voice=-1, pitch=float("nan"))
    modes = _synthesized(sample_rate)[: config.syllables]  # [S, V, N, C, B]
    observed = _slices(_spectra(waveform, sample_rate), spans)  # [spans, C, B]
    names, voices, residual = _classify(observed, modes)
    voice = int(np.bincount(voices).argmax())
    return AudioReadings(
        syllables=tuple(
            TranscriptWord(word=VOCABULARY[s], start=start, end=end)
            for s, (start, end) in zip(names, spans, strict=True)
        ),
        residual=residual,
        tone=_read_tone(observed, modes[names, voice], spans, halves),
        voice=voice,
        pitch=_read_pitch(waveform, sample_rate, spans, VOICES[voice]),
    )


def loudness_envelope(waveform: NDArray[np.float32], sample_rate: int, step: float = 0.004) -> tuple[Array, Array]:
    """Return times and loudness (rms in a window of about 30 ms) every `step` seconds."""
    width = max(1, round(0.015 * sample_rate))
    power = np.square(waveform.astype(np.float64))
    times = np.arange(0, len(waveform) / sample_rate, step)
    for _ in range(2):  # two box filters form a triangle
        total = np.concatenate([[0.0], np.cumsum(power)])
        at = np.arange(len(power))
        low, high = np.maximum(at - width // 2, 0), np.minimum(at + width - width // 2, len(power))
        power = (total[high] - total[low]) / width
    return times, np.sqrt(np.maximum(np.interp(times * sample_rate, np.arange(len(power)), power), 0))


def _spans(times: Array, loud: Array) -> list[tuple[float, float]]:
    """Return start and end of each syllable: a loudness peak down to the dips around it."""
    if not len(loud) or loud.max() < 1e-3:
        return []
    loud = loud / np.quantile(loud, 0.95)
    step = times[1] - times[0]
    peaks, _ = find_peaks(loud, height=2 * _QUIET, distance=max(1, int(_MIN_DISTANCE / step)), prominence=0.2)
    dips = [int(a + loud[a:b].argmin()) for a, b in itertools.pairwise(peaks)]
    spans: list[tuple[float, float]] = []
    for peak, low, high in zip(peaks, [0, *dips], [*dips, len(loud) - 1], strict=True):
        quiet = _QUIET * loud[peak]
        before, after = np.flatnonzero(loud[low:peak] < quiet), np.flatnonzero(loud[peak:high] < quiet)
        start = times[low + before[-1]] if len(before) else times[low]
        end = times[peak + after[0]] if len(after) else times[high]
        spans.append((float(start), float(end)))
    return spans


@lru_cache(maxsize=8)
def _filters(sample_rate: int, bins: int) -> Array:
    """Return triangular bands ``[bins, B]``, 60 Hz to 7.6 kHz."""
    edges = 700 * (np.exp(np.linspace(np.log(1 + 60 / 700), np.log(1 + 7600 / 700), _BANDS + 2)) - 1)
    frequency = np.arange(bins)[:, None] * sample_rate / 2 / (bins - 1)
    up = (frequency - edges[:-2]) / (edges[1:-1] - edges[:-2])
    down = (edges[2:] - frequency) / (edges[2:] - edges[1:-1])
    bands = np.maximum(np.minimum(up, down), 0)
    return bands / np.maximum(bands.sum(0), 1e-9)


def _spectra(waveform: NDArray[np.float32], sample_rate: int) -> Array:
    """Return compressed band spectra ``[T, B]``, frame i centered at i hops."""
    hop, width = round(_HOP * sample_rate), round(_WINDOW * sample_rate)
    padded = np.pad(waveform.astype(np.float64), (width // 2, width))
    frames = np.lib.stride_tricks.sliding_window_view(padded, width)[::hop]
    length = 1 << (width - 1).bit_length()
    power = np.square(np.abs(np.fft.rfft(frames * np.hanning(width), length)))
    return (power @ _filters(sample_rate, power.shape[1])) ** (_POWER / 2)


def _slices(spectra: Array, spans: list[tuple[float, float]]) -> Array:
    """Return normalized spectra at C positions in each syllable: ``[spans, C, B]``."""
    at = np.asarray(spans)[:, :1] + np.diff(np.asarray(spans)) * _POSITIONS
    frame = np.clip(at / _HOP, 0, len(spectra) - 1.001)
    low = frame.astype(np.int64)
    part = (frame - low)[..., None]
    found = spectra[low] * (1 - part) + spectra[np.minimum(low + 1, len(spectra) - 1)] * part
    return found / np.maximum(np.linalg.norm(found, axis=-1, keepdims=True), 1e-9)


_POSITIONS = np.linspace(0.2, 0.8, _SLICES)


@lru_cache(maxsize=4)
def _synthesized(sample_rate: int) -> Array:
    """Return `_slices` of all syllables in all voices and tones, ``[S, V, N, C, B]``."""
    length, gap = 0.24, 0.1
    words = [
        TranscriptWord(word=name, start=i * (length + gap) + gap, end=(i + 1) * (length + gap))
        for i, name in enumerate(VOCABULARY)
    ]
    spans = [(w["start"], w["end"]) for w in words]
    samples = round((words[-1]["end"] + gap) * sample_rate)
    voices = [Voice(pitch=pitch, tones=(tone,)) for pitch in VOICES for tone in range(len(TONES))]
    waves = (synthesize(words, voice, samples=samples, sample_rate=sample_rate, seed=0) for voice in voices)
    slices = [_slices(_spectra(wave, sample_rate), spans) for wave in waves]
    return np.stack(slices, axis=1).reshape(len(VOCABULARY), len(VOICES), len(TONES), _SLICES, _BANDS)


def _classify(observed: Array, modes: Array) -> tuple[NDArray[np.int64], NDArray[np.int64], Array]:
    """Return syllable, voice and residual of each span, with the best tone per slice."""
    flat = modes.reshape(-1, *modes.shape[-2:])
    cost = np.stack([2 - 2 * observed[:, c] @ flat[:, c].T for c in range(_SLICES)])
    cost = cost.reshape(_SLICES, len(observed), *modes.shape[:3]).min(-1).sum(0)  # [spans, S, V]
    by_name = np.sort(cost.min(2), axis=1)
    name = cost.min(2).argmin(1)
    residual = np.sqrt(np.maximum(by_name[:, 0], 0) / np.maximum(by_name[:, 1], 1e-9))
    return name, cost[np.arange(len(name)), name].argmin(1), residual


def _read_tone(slices: Array, modes: Array, spans: list[tuple[float, float]], halves: int) -> ChoiceReading:
    """Return the tone per half second; ``modes [spans, N, C, B]`` are of the read syllables."""
    times = np.asarray(spans)[:, :1] + np.diff(np.asarray(spans)) * _POSITIONS
    half = (times / HALF_SECOND).astype(np.int64)
    inside = np.abs(times / HALF_SECOND - np.round(times / HALF_SECOND)) * HALF_SECOND > _EDGE
    mode = np.zeros(halves, np.int64)
    residual = np.full(halves, np.inf)
    present = np.zeros(halves, bool)
    for k in range(halves):
        span, position = np.nonzero(inside & (half == k))
        if len(span) >= 3:
            present[k] = True
            observed, tones = slices[span, position].ravel(), modes[span, :, position].transpose(1, 0, 2)
            nearest, distance = nearest_mode(observed[None], tones.reshape(len(TONES), -1))
            mode[k], residual[k] = nearest[0], distance[0]
    return make_reading(mode, residual, present)


def _read_pitch(
    waveform: NDArray[np.float32], sample_rate: int, spans: list[tuple[float, float]], near: float
) -> float:
    """Return the median pitch over syllables in Hz, within 12% of `near`."""
    width = round(0.06 * sample_rate)
    lags = np.arange(int(sample_rate / near / 1.12), int(sample_rate / near * 1.12) + 2)
    found: list[float] = []
    for start, end in spans:
        begin = max(0, round((start + end) / 2 * sample_rate) - width // 2)
        part = waveform[begin : begin + width].astype(np.float64)
        if len(part) <= lags[-1]:
            continue
        match = np.correlate(part, part, "full")[len(part) - 1 :][lags] / (len(part) - lags)
        best = int(match[1:-1].argmax()) + 1
        below, here, above = match[best - 1 : best + 2]
        bend = below - 2 * here + above
        found.append(sample_rate / (lags[best] + (0.5 * (below - above) / bend if bend < 0 else 0.0)))
    return float(np.median(found)) if found else float("nan")


def mouth_correlation(mouth_opening: Array, fps: float, waveform: NDArray[np.float32], sample_rate: int) -> float:
    """Return the correlation of mouth opening and loudness at offset 0."""
    times, loud = loudness_envelope(waveform, sample_rate)
    return _correlation(mouth_opening, np.arange(len(mouth_opening)) / float(fps), times, loud)


def _correlation(opening: Array, at: Array, times: Array, loud: Array) -> float:
    inside = (at >= 0) & (at <= times[-1])
    a, b = opening[inside], np.interp(at[inside], times, loud)
    a, b = a - a.mean(), b - b.mean()
    return float((a @ b) / max(np.sqrt((a @ a) * (b @ b)), 1e-12))
