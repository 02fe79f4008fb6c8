"""LSE-C and LSE-D (Prajwal et al. 2020): lip-sync error from vectors of lips and of sound, such as SyncNet's.

Protocol, as published: 25 frames a second, crops of one face, a vector of the lips and one of the 0.2 s of sound with
them for every frame. At each shift of up to 15 frames the mean distance of the two is taken; LSE-D is the least of
these, LSE-C their median less the least, the offset is the shift at which it is least.

Letters: n frames, D numbers of a vector.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

FPS = 25  # vectors a second
SHIFT = 15  # frames either way
Vectors = NDArray[np.floating[Any]]


class LipEmbeddingModel(Protocol):
    """Vectors ``(n, D)`` of lips and of sound, ``FPS`` a second, of equal number."""

    def __call__(
        self, frames: NDArray[np.uint8], fps: float, sound: NDArray[np.floating[Any]], sample_rate: int
    ) -> tuple[Vectors, Vectors]: ...


class LipSyncError(NamedTuple):
    """Lip-sync error of one clip."""

    distance: float  # LSE-D, lower is better
    confidence: float  # LSE-C, higher is better
    offset_sec: float  # by which the sound is late


def lip_sync_error(lips: Vectors, sound: Vectors, shift: int = SHIFT) -> LipSyncError | None:
    """From vectors ``(n, D)``; None below two frames. Beyond the ends of the sound there are zeros, as published."""
    if len(lips) != len(sound):
        raise ValueError(f"{len(lips)} vectors of lips but {len(sound)} of sound: give one of each per frame")
    if len(lips) < 2:
        return None
    around = np.pad(np.asarray(sound, np.float64), ((shift, shift), (0, 0)))
    shifts = range(2 * shift + 1)
    means = np.array([np.linalg.norm(lips - around[i : i + len(lips)], axis=1).mean() for i in shifts])
    least = int(means.argmin())
    return LipSyncError(
        distance=float(means[least]),
        confidence=float(np.median(means) - means[least]),
        offset_sec=(least - shift) / FPS,
    )
