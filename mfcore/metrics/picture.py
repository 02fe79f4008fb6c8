"""What can be said of pictures without knowing what they show.

Letters: f frames.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def sharpness(frames: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Root mean square of the Laplacian of grey levels (0 to 255) of each frame ``(f, H, W, 3)``; ``(f,)``.

    Blur lowers it, noise raises it: read it beside the real clips' value, not as more is better. 0 for pictures of
    fewer than 3 pixels either way.
    """
    if min(frames.shape[1:3]) < 3:
        return np.zeros(len(frames))
    return np.array([_laplacian(frame.astype(np.float32).mean(-1)) for frame in frames])


def _laplacian(grey: NDArray[np.floating[Any]]) -> float:
    middle = grey[1:-1, 1:-1]
    curve = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * middle
    return float(np.sqrt(np.square(curve).mean()))
