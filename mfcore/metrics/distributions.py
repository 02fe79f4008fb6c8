"""Kullback-Leibler divergence of what is shown and said, by classes.

Letters: n observations, c classes.
"""

from collections.abc import Sequence
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


def smoothed_distribution(counts: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
    """Shares of ``counts (c,)`` with half an observation added to each class: none has probability 0."""
    return (counts + 0.5) / (counts.sum() + 0.5 * len(counts))


def mode_entropy(choices: NDArray[np.integer] | Sequence[int], modes: int) -> float:
    """Entropy in nats of observed modes 0 .. ``modes`` - 1; 0 for one mode, log(modes) for equal shares.

    Plug-in estimate with the Miller-Madow correction, (modes seen - 1) / (2 n), capped at log(modes).
    """
    counts = _counts(choices, modes)
    share = counts[counts > 0] / counts.sum()
    raw = -(share * np.log(share)).sum() + (len(share) - 1) / (2 * counts.sum())
    return float(min(max(raw, 0.0), np.log(modes)))


def entropy_ratio(
    choices: NDArray[np.integer] | Sequence[int], data: NDArray[np.integer] | Sequence[int], modes: int
) -> float:
    """Entropy of a model's choices / entropy of the data's: 1 keeps the variety, 0 is collapse, nan without any."""
    ours, theirs = mode_entropy(choices, modes), mode_entropy(data, modes)
    return ours / theirs if theirs > 0 else float("nan")


def _counts(choices: NDArray[np.integer] | Sequence[int], modes: int) -> NDArray[np.int64]:
    values = np.asarray(choices, np.int64).ravel()
    if not len(values) or values.min() < 0 or values.max() >= modes:
        raise ValueError(f"choices must be at least one number in 0 .. {modes - 1}: leave out those not recognised")
    return np.bincount(values, minlength=modes)
