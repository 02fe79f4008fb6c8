"""Kullback-Leibler divergence of what is shown and said, by classes.

Letters: n observations, c classes.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def kl_divergence(p: NDArray[np.floating[Any]], q: NDArray[np.floating[Any]]) -> float:
    """sum p log (p / q) in nats of two laws ``(c,)``; infinite where q is 0 and p is not. ValueError for no laws."""
    for law in (p, q):
        if law.shape != p.shape or (law < 0).any() or abs(float(law.sum()) - 1) > 1e-4:
            raise ValueError("a divergence compares two laws over the same classes, each adding up to 1")
    seen = p > 0
    with np.errstate(divide="ignore"):
        return float((p[seen] * np.log(p[seen] / q[seen])).sum())


def smoothed(counts: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
    """Shares of ``counts (c,)`` with half an observation added to each class: none has probability 0."""
    return (counts + 0.5) / (counts.sum() + 0.5 * len(counts))
