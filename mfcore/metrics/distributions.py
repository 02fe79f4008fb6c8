"""Divergence and entropy of class frequencies.

Letters: n observations, c classes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def kl_divergence(p: NDArray[np.floating[Any]], q: NDArray[np.floating[Any]]) -> float:
    """Return the Kullback-Leibler divergence, sum p log (p / q) in nats, of distributions ``(c,)``.

    Infinite if q is 0 where p is not. Raises ValueError unless both are distributions over the same classes.
    """
    for shares in (p, q):
        if shares.shape != p.shape or (shares < 0).any() or abs(float(shares.sum()) - 1) > 1e-4:
            raise ValueError("kl_divergence needs two distributions over the same classes, each adding up to 1")
    seen = p > 0
    with np.errstate(divide="ignore"):
        return float((p[seen] * np.log(p[seen] / q[seen])).sum())


def smoothed_distribution(counts: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
    """Return the shares of ``counts (c,)`` with half an observation added to each class, so none is 0."""
    return (counts + 0.5) / (counts.sum() + 0.5 * len(counts))


def mode_entropy(choices: NDArray[np.integer] | Sequence[int], modes: int) -> float:
    """Return the entropy in nats of modes 0 .. ``modes`` - 1; 0 for one mode, log(modes) for equal shares.

    Plug-in estimate with the Miller-Madow correction, (observed modes - 1) / (2 n), capped at log(modes).
    """
    counts = _counts(choices, modes)
    share = counts[counts > 0] / counts.sum()
    raw = -(share * np.log(share)).sum() + (len(share) - 1) / (2 * counts.sum())
    return float(min(max(raw, 0.0), np.log(modes)))


def entropy_ratio(
    choices: NDArray[np.integer] | Sequence[int], data: NDArray[np.integer] | Sequence[int], modes: int
) -> float:
    """Return entropy of the choices / entropy of the data: 1 keeps the variety, 0 is collapse, nan without variety."""
    entropy, data_entropy = mode_entropy(choices, modes), mode_entropy(data, modes)
    return entropy / data_entropy if data_entropy > 0 else float("nan")


def _counts(choices: NDArray[np.integer] | Sequence[int], modes: int) -> NDArray[np.int64]:
    values = np.asarray(choices, np.int64).ravel()
    if not len(values) or values.min() < 0 or values.max() >= modes:
        raise ValueError(f"choices must be at least one number in 0 .. {modes - 1}: leave out unrecognized ones")
    return np.bincount(values, minlength=modes)
