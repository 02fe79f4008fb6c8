"""Frechet distance between two sets of features, each fitted by one Gaussian.

Letters: n samples, d features.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mfcore.metrics.bootstrap import LEVEL, Interval

Features = NDArray[np.floating[Any]]


def frechet_distance(a: Features, b: Features, shrinkage: float = 0.0) -> float:
    """Return |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2) of features ``(n, d)``.

    The bias is about d^2 / n for equal distributions: compare only values of equal n. ``shrinkage`` in [0, 1] moves
    covariances towards their diagonals, S <- (1 - shrinkage) S + shrinkage diag(S). It lowers the variance of the
    estimate and hides correlations. Singular covariances (n < d) are allowed. Raises ValueError for fewer than two
    samples, unequal widths, or non-finite features.
    """
    (mean_a, cov_a), (mean_b, cov_b) = (_gaussian(x, shrinkage) for x in (a, b))
    if mean_a.shape != mean_b.shape:
        raise ValueError(
            f"feature widths differ: {len(mean_a)} and {len(mean_b)}. Use the same feature model for both sets"
        )
    root = _matrix_root(cov_a)
    # tr (S_a^1/2 S_b S_a^1/2)^1/2 is the sum of the singular values of S_a^1/2 S_b^1/2. This form avoids the root of a
    # product of rounded matrices, which may be complex.
    cross = np.linalg.svd(root @ _matrix_root(cov_b), compute_uv=False).sum()
    spread = np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    return float(np.square(mean_a - mean_b).sum() + max(0.0, spread))


def frechet_interval(
    a: Sequence[Features],
    b: Sequence[Features],
    *,
    seed: int = 0,
    draws: int = 200,
    level: float = LEVEL,
    shrinkage: float = 0.0,
) -> Interval:
    """Return :func:`frechet_distance` of all rows with a percentile bootstrap interval over clips.

    ``a`` and ``b`` contain the rows ``(n, d)`` of each clip. Resampling repeats rows, which adds the bias of the
    estimator a second time, so the draws are moved down by the difference of their median and the value.
    """
    rng = np.random.default_rng(seed)
    value = frechet_distance(np.concatenate(a), np.concatenate(b), shrinkage)
    values = [frechet_distance(_resample(a, rng), _resample(b, rng), shrinkage) for _ in range(draws)]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2]) - (np.median(values) - value)
    return Interval(value=value, low=max(0.0, float(low)), high=float(high))


def frechet_bias(
    a: Sequence[Features], b: Sequence[Features], *, seed: int = 0, draws: int = 20, shrinkage: float = 0.0
) -> float:
    """Return the bias of :func:`frechet_distance` from the finite number of clips, in its units.

    The bias falls as 1 / n (Chong and Forsyth 2020), so halves of both sets have twice the bias: the mean distance of
    random halves minus the distance of all is the bias of all. nan below four clips on either side.
    """
    if min(len(a), len(b)) < 4:
        return float("nan")
    rng = np.random.default_rng(seed)
    whole = frechet_distance(np.concatenate(a), np.concatenate(b), shrinkage)
    halves = [frechet_distance(_random_half(a, rng), _random_half(b, rng), shrinkage) for _ in range(draws)]
    return float(np.mean(halves)) - whole


def _resample(clips: Sequence[Features], rng: np.random.Generator) -> Features:
    return np.concatenate([clips[i] for i in rng.integers(len(clips), size=len(clips))])


def _random_half(clips: Sequence[Features], rng: np.random.Generator) -> Features:
    return np.concatenate([clips[i] for i in rng.permutation(len(clips))[: len(clips) // 2]])


def _gaussian(features: Features, shrinkage: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the mean and the unbiased covariance."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features of shape {features.shape}: the Frechet distance needs (n, d) with n of 2 or more")
    if not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage={shrinkage}: choose a number in [0, 1]")
    x = features.astype(np.float64)
    if not np.isfinite(x).all():
        raise ValueError("features are not finite: drop or repair those samples")
    cov = np.atleast_2d(np.cov(x, rowvar=False))
    return x.mean(0), (1 - shrinkage) * cov + shrinkage * np.diag(np.diag(cov))


def _matrix_root(cov: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the symmetric square root; negative eigenvalues are rounding errors."""
    values, vectors = np.linalg.eigh(cov)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
