"""What can be said of sound without knowing what it says. Full scale is 1."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mfcore.metrics.sync import sound_envelope

CLIPPED = 0.999  # of full scale: samples from here on are taken for cut off
QUIET = 1e-3  # root mean square below which nothing can be heard, -60 dB
_WINDOWS = 10.0  # per second, in which silence is looked for

Sound = NDArray[np.floating[Any]]


def rms(sound: Sound) -> float:
    return float(np.sqrt(np.square(sound, dtype=np.float64).mean()))


def decibel(level: Any) -> Any:
    """Of full scale, not below -60."""
    return 20 * np.log10(np.maximum(level, QUIET))


def clipping(sound: Sound) -> float:
    """Share of samples at full scale or above; nan without samples."""
    return float((np.abs(sound) >= CLIPPED).mean()) if len(sound) else float("nan")


def silence(sound: Sound, sample_rate: int) -> float:
    """Share of tenths of a second in which nothing can be heard; nan without samples."""
    return float((sound_envelope(sound, sample_rate, _WINDOWS) < QUIET).mean()) if len(sound) else float("nan")
