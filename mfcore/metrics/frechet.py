"""Frechet distance between two sets of features, each taken as one Gaussian.

Letters: n samples, d features.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mfcore.metrics.bootstrap import LEVEL, Interval

Features = NDArray[np.floating[Any]]


def frechet_distance(a: Features, b: Features, shrinkage: float = 0.0) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2), in squared units of the features ``(n, d)``.

    Biased upwards by about d^2 / n for equal laws: compare only numbers from equal n. Fewer samples than features leave
    the covariances singular, which is allowed; ``shrinkage`` in [0, 1] then moves them towards their diagonals,
    S <- (1 - shrinkage) S + shrinkage diag(S), which lowers the variance of the estimate and blinds it to correlations.
    ValueError for fewer than two samples, unequal widths, or numbers that are not finite.
    """
    (mean_a, cov_a), (mean_b, cov_b) = (_gaussian(x, shrinkage) for x in (a, b))
    if mean_a.shape != mean_b.shape:
        raise ValueError(f"the two sets have {len(mean_a)} and {len(mean_b)} features: compute them the same way")
    root = _root(cov_a)
    # tr (S_a^1/2 S_b S_a^1/2)^1/2 is the sum of the singular values of S_a^1/2 S_b^1/2: no root of a product of
    # rounded matrices, hence nothing complex or negative.
    cross = np.linalg.svd(root @ _root(cov_b), compute_uv=False).sum()
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
    """:func:`frechet_distance` of all rows, with a percentile bootstrap interval: clips of both sets are drawn anew.

    ``a`` and ``b`` hold the rows ``(n, d)`` of each clip: rows of one clip are not independent, so clips are drawn.
    Resampling repeats rows, which adds the estimator's bias a second time, so the draws are moved down by the
    difference of their median and the value.
    """
    rng = np.random.default_rng(seed)
    value = frechet_distance(np.concatenate(a), np.concatenate(b), shrinkage)
    values = [frechet_distance(_drawn(a, rng), _drawn(b, rng), shrinkage) for _ in range(draws)]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2]) - (np.median(values) - value)
    return Interval(value=value, low=max(0.0, float(low)), high=float(high))


def frechet_bias(
    a: Sequence[Features], b: Sequence[Features], *, seed: int = 0, draws: int = 20, shrinkage: float = 0.0
) -> float:
    """How much of :func:`frechet_distance` is due to the number of clips, in its units; about 0 for very many.

    The bias falls as 1 / n (Chong and Forsyth 2020), so halves of both sets have twice of it: the mean distance of
    random halves less that of the whole is the whole's bias. nan below four clips on either side.
    """
    if min(len(a), len(b)) < 4:
        return float("nan")
    rng = np.random.default_rng(seed)
    whole = frechet_distance(np.concatenate(a), np.concatenate(b), shrinkage)
    halves = [frechet_distance(_half(a, rng), _half(b, rng), shrinkage) for _ in range(draws)]
    return float(np.mean(halves)) - whole


def _drawn(clips: Sequence[Features], rng: np.random.Generator) -> Features:
    return np.concatenate([clips[i] for i in rng.integers(len(clips), size=len(clips))])


def _half(clips: Sequence[Features], rng: np.random.Generator) -> Features:
    return np.concatenate([clips[i] for i in rng.permutation(len(clips))[: len(clips) // 2]])


def _gaussian(features: Features, shrinkage: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and unbiased covariance."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features of shape {features.shape}: the Frechet distance needs (n, d) with n of 2 or more")
    if not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage={shrinkage}: choose a number in [0, 1]")
    x = features.astype(np.float64)
    if not np.isfinite(x).all():
        raise ValueError("features hold numbers that are not finite: drop or repair those samples first")
    cov = np.atleast_2d(np.cov(x, rowvar=False))
    return x.mean(0), (1 - shrinkage) * cov + shrinkage * np.diag(np.diag(cov))


def _root(cov: NDArray[np.float64]) -> NDArray[np.float64]:
    """Symmetric square root; eigenvalues below zero are rounding."""
    values, vectors = np.linalg.eigh(cov)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
