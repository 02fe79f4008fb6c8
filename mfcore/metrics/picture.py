"""What can be said of pictures without knowing what they show.

Letters: f frames.
"""

import numpy as np
from numpy.typing import NDArray

from mfcore.metrics.sync import grey_levels

_AT_ONCE = 16  # frames: what is worked on stays in the processor's cache


def sharpness(frames: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Root mean square of the Laplacian of grey levels (0 to 255) of each frame ``(f, H, W, 3)``; ``(f,)``.

    Blur lowers it, noise raises it: read it beside the real clips' value, not as more is better. 0 for pictures of
    fewer than 3 pixels either way.
    """
    if min(frames.shape[1:3]) < 3:
        return np.zeros(len(frames))
    parts = [frames[i : i + _AT_ONCE] for i in range(0, len(frames), _AT_ONCE)]
    return np.concatenate([np.zeros(0), *(_laplacian(grey_levels(part)) for part in parts)])


def _laplacian(grey: NDArray[np.float32]) -> NDArray[np.float64]:
    """``(f, H, W)`` to ``(f,)``."""
    middle = grey[:, 1:-1, 1:-1]
    curve = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:] - 4 * middle
    return np.sqrt(np.square(curve).mean((1, 2), dtype=np.float64))
