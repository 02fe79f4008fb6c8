"""Are free choices still free? Few-step models collapse modes before they blur them."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def entropy(choices: NDArray[np.integer] | Sequence[int], modes: int) -> float:
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
    ours, theirs = entropy(choices, modes), entropy(data, modes)
    return ours / theirs if theirs > 0 else float("nan")


def _counts(choices: NDArray[np.integer] | Sequence[int], modes: int) -> NDArray[np.int64]:
    values = np.asarray(choices, np.int64).ravel()
    if not len(values) or values.min() < 0 or values.max() >= modes:
        raise ValueError(f"choices must be at least one number in 0 .. {modes - 1}: leave out those not recognised")
    return np.bincount(values, minlength=modes)
