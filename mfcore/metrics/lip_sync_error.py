"""LSE-C and LSE-D (Prajwal et al. 2020): lip-sync error from embeddings of lips and audio, such as SyncNet's.

Published protocol: 25 frames per second, crops of one face, one vector of the lips and one of the 0.2 s of audio around
each frame. For each shift up to 15 frames, the mean distance of the two is computed. LSE-D is the minimum, LSE-C the
median minus the minimum, and the offset is the shift of the minimum.

Letters: n frames, D width of a vector.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

FPS = 25  # vectors per second
SHIFT = 15  # frames in both directions
Vectors = NDArray[np.floating[Any]]


class LipEmbeddingModel(Protocol):
    """Embedding of lips and audio into one space."""

    def __call__(
        self, frames: NDArray[np.uint8], fps: float, sound: NDArray[np.floating[Any]], sample_rate: int
    ) -> tuple[Vectors, Vectors]:
        """Return vectors ``(n, D)`` of lips and of audio, ``FPS`` per second, of equal number."""
        ...


class LipSyncError(NamedTuple):
    """Lip-sync error of one clip."""

    distance: float  # LSE-D, lower is better
    confidence: float  # LSE-C, higher is better
    offset_sec: float  # positive: audio is late


def lip_sync_error(lips: Vectors, sound: Vectors, shift: int = SHIFT) -> LipSyncError | None:
    """Return the error from vectors ``(n, D)``, None below two frames; audio is padded with zeros, as published."""
    if len(lips) != len(sound):
        raise ValueError(f"{len(lips)} vectors of lips but {len(sound)} of audio: give one of each per frame")
    if len(lips) < 2:
        return None
    padded = np.pad(np.asarray(sound, np.float64), ((shift, shift), (0, 0)))
    shifts = range(2 * shift + 1)
    means = np.array([np.linalg.norm(lips - padded[i : i + len(lips)], axis=1).mean() for i in shifts])
    best = int(means.argmin())
    return LipSyncError(
        distance=float(means[best]),
        confidence=float(np.median(means) - means[best]),
        offset_sec=(best - shift) / FPS,
    )
