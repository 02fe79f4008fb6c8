"""What can be said of sound without knowing what it says. Full scale is 1."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mfcore.metrics.av_sync import sound_envelope, to_grayscale

CLIPPED = 0.999  # of full scale: samples from here on are taken for cut off
QUIET = 1e-3  # root mean square below which nothing can be heard, -60 dB
_WINDOWS = 10.0  # per second, in which silence is looked for

Sound = NDArray[np.floating[Any]]


def rms(sound: Sound) -> float:
    return float(np.sqrt(np.square(sound, dtype=np.float64).mean()))


def to_decibels(level: Any) -> Any:
    """Of full scale, not below -60."""
    return 20 * np.log10(np.maximum(level, QUIET))


def clipped_fraction(sound: Sound) -> float:
    """Share of samples at full scale or above; nan without samples."""
    return float((np.abs(sound) >= CLIPPED).mean()) if len(sound) else float("nan")


def silent_fraction(sound: Sound, sample_rate: int) -> float:
    """Share of tenths of a second in which nothing can be heard; nan without samples."""
    return float((sound_envelope(sound, sample_rate, _WINDOWS) < QUIET).mean()) if len(sound) else float("nan")


_AT_ONCE = 16  # frames: what is worked on stays in the processor's cache


def sharpness(frames: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Root mean square of the Laplacian of grey levels (0 to 255) of each frame ``(f, H, W, 3)``; ``(f,)``.

    Blur lowers it, noise raises it: read it beside the real clips' value, not as more is better. 0 for pictures of
    fewer than 3 pixels either way.
    """
    if min(frames.shape[1:3]) < 3:
        return np.zeros(len(frames))
    parts = [frames[i : i + _AT_ONCE] for i in range(0, len(frames), _AT_ONCE)]
    return np.concatenate([np.zeros(0), *(_laplacian(to_grayscale(part)) for part in parts)])


def _laplacian(grey: NDArray[np.float32]) -> NDArray[np.float64]:
    """``(f, H, W)`` to ``(f,)``."""
    middle = grey[:, 1:-1, 1:-1]
    curve = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:] - 4 * middle
    return np.sqrt(np.square(curve).mean((1, 2), dtype=np.float64))
