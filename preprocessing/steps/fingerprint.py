"""Fingerprints of clips for near-duplicates: appearance, motion and sound as signed bytes."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from preprocessing.records import Clip

_GRID, _INSTANTS, _MOMENTS = 8, 16, 64
_BANDS = np.geomspace(100, 6000, 9)  # Hz
FINGERPRINT_PARTS = {"look": _GRID**2, "motion": _GRID**2 * _INSTANTS, "sound": 8 * _MOMENTS}
_FULL_SCALE = 3.0  # standard deviations of the largest signed byte


def fingerprint(clip: Clip, sample_rate: int) -> Clip:
    """Return the clip with its fingerprint; parts of missing streams are zeros."""
    look = motion = np.zeros(0)
    if clip.frames is not None:
        look, motion = _video_features(clip.frames)
    sound = np.zeros(0) if clip.waveform is None else _audio_features(clip.waveform, sample_rate)
    parts = dict(zip(FINGERPRINT_PARTS, (look, motion, sound), strict=True))
    return replace(clip, fingerprint=b"".join(_bytes(parts[name], size) for name, size in FINGERPRINT_PARTS.items()))


def _video_features(frames: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the mean frame ``(64,)`` and its changes ``(16 * 64,)``."""
    centers = (np.arange(_INSTANTS) + 0.5) / _INSTANTS * len(frames)
    around = np.clip(centers[:, None].astype(int) + np.arange(-1, 2), 0, len(frames) - 1)  # three frames each
    chosen = frames[around.ravel()]
    rows, columns = (np.arange(_GRID + 1) * size // _GRID for size in chosen.shape[1:3])
    stripes = np.add.reduceat(chosen, rows[:-1], axis=1, dtype=np.uint32)  # integer sums are exact and fast
    sums = np.add.reduceat(stripes, columns[:-1], axis=2, dtype=np.uint32).sum(-1)
    levels = sums / (3 * np.outer(np.maximum(np.diff(rows), 1), np.maximum(np.diff(columns), 1)))
    instants = levels.reshape(_INSTANTS, 3, _GRID**2).mean(1)
    mean = instants.mean(0)
    return mean - mean.mean(), (instants - mean).ravel()


def _audio_features(sound: NDArray[np.float32], sample_rate: int) -> NDArray[np.float64]:
    """Return log band powers ``(8 * 64,)`` minus the mean of each band, independent of loudness."""
    edges = np.linspace(0, len(sound), _MOMENTS + 1).astype(int)
    powers = np.zeros((_MOMENTS, 8))
    for i, (start, end) in enumerate(zip(edges, edges[1:], strict=False)):
        if start == end:  # fewer samples than moments
            continue
        spectrum = np.abs(np.fft.rfft(sound[start:end])) ** 2 / (end - start)
        at = np.searchsorted(np.fft.rfftfreq(end - start, 1 / sample_rate), _BANDS)
        powers[i] = [spectrum[a:b].sum() for a, b in zip(at, at[1:], strict=False)]
    floor = max(powers.max() * 1e-5, 1e-12)
    levels = np.log(powers + floor)
    return (levels - levels.mean(0)).ravel()


def _bytes(values: NDArray[np.float64], size: int) -> bytes:
    spread = float(values.std()) if len(values) else 0.0
    if spread < 1e-9:
        return bytes(size)
    return np.clip(np.round(values / spread * 127 / _FULL_SCALE), -127, 127).astype(np.int8).tobytes()
