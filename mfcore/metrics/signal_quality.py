"""Signal statistics of audio and video without reference. Full scale of audio is 1."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mfcore.metrics.av_sync import sound_envelope, to_grayscale

CLIPPED = 0.999  # share of full scale; larger samples count as clipped
QUIET = 1e-3  # root mean square of silence, -60 dB
_WINDOWS = 10.0  # windows per second in the search for silence

Sound = NDArray[np.floating[Any]]


def rms(sound: Sound) -> float:
    """Return the root mean square of all samples."""
    return float(np.sqrt(np.square(sound, dtype=np.float64).mean()))


def to_decibels(level: Any) -> Any:
    """Return decibels relative to full scale, at least -60."""
    return 20 * np.log10(np.maximum(level, QUIET))


def clipped_fraction(sound: Sound) -> float:
    """Return the share of samples at full scale or above; nan without samples."""
    return float((np.abs(sound) >= CLIPPED).mean()) if len(sound) else float("nan")


def silent_fraction(sound: Sound, sample_rate: int) -> float:
    """Return the share of silent tenths of a second; nan without samples."""
    return float((sound_envelope(sound, sample_rate, _WINDOWS) < QUIET).mean()) if len(sound) else float("nan")


_BATCH = 16  # frames that fit into the processor cache


def sharpness(frames: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the root mean square Laplacian ``(f,)`` of gray levels (0 to 255) of frames ``(f, H, W, 3)``.

    Blur lowers it and noise raises it: compare it with the value of real clips. 0 if an edge is below 3 pixels.
    """
    if min(frames.shape[1:3]) < 3:
        return np.zeros(len(frames))
    parts = [frames[i : i + _BATCH] for i in range(0, len(frames), _BATCH)]
    return np.concatenate([np.zeros(0), *(_laplacian(to_grayscale(part)) for part in parts)])


def _laplacian(gray: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the root mean square Laplacian per frame, ``(f, H, W)`` to ``(f,)``."""
    center = gray[:, 1:-1, 1:-1]
    laplacian = gray[:, :-2, 1:-1] + gray[:, 2:, 1:-1] + gray[:, 1:-1, :-2] + gray[:, 1:-1, 2:] - 4 * center
    return np.sqrt(np.square(laplacian).mean((1, 2), dtype=np.float64))
