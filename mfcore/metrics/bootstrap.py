"""Percentile bootstrap over clips; clips are independent, frames of one clip are not."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.9  # share of the draws inside an interval


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value with the bounds of its bootstrap interval."""

    value: float
    low: float
    high: float


def mean_interval(
    values: Sequence[float] | NDArray[np.floating[Any]],
    weights: Sequence[float] | None = None,
    *,
    seed: int = 0,
    draws: int = 1000,
    level: float = LEVEL,
) -> Interval:
    """Return the mean of one value per clip with its bootstrap interval.

    With ``weights`` the mean is sum of values / sum of weights, such as errors over words. The interval of one clip is
    the value alone. Draws in which all weights are 0 are left out. Raises ValueError without values, or for weights of
    another number.
    """
    x = np.asarray(values, np.float64)
    w = np.ones(len(x)) if weights is None else np.asarray(weights, np.float64)
    if not len(x) or len(w) != len(x):
        raise ValueError(f"{len(x)} values and {len(w)} weights: give at least one value, and one weight per value")
    if w.sum() <= 0:
        raise ValueError("all weights are 0: leave out clips without units to count")
    index = np.random.default_rng(seed).integers(len(x), size=(draws, len(x)))
    total = w[index].sum(1)
    means = x[index].sum(1)[total > 0] / total[total > 0]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value=float(x.sum() / w.sum()), low=float(low), high=float(high))
