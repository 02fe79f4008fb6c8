"""Do picture and sound move together, and how far apart are they?

Letters: n values of an envelope, f frames. Value i of an envelope with rate R belongs to the time i / R seconds.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_GRID = 200.0  # Hz, at least: envelopes are compared on a common grid, the peak is refined between its points

Envelope = NDArray[np.floating[Any]]


class SyncEstimate(NamedTuple):
    """Where two envelopes agree best."""

    offset_sec: float  # seconds by which b comes later than a
    correlation: float  # Pearson, -1 to 1, at that offset


def sync_offset(a: Envelope, rate_a: float, b: Envelope, rate_b: float, max_lag: float) -> SyncEstimate:
    """Offset of ``b`` against ``a``, both one-dimensional, within +- ``max_lag`` seconds.

    At every lag L: Pearson correlation of a(t) and b(t + L) over the times that both cover, at least half of the
    shorter one. The best lag is refined by a parabola. Offset 0 and correlation 0 where nothing can be said: an
    envelope that is constant or shorter than four grid points. ValueError for rates or a lag that are not positive.
    """
    if min(rate_a, rate_b, max_lag) <= 0:
        raise ValueError(f"sync needs positive rates and lag; got {rate_a} Hz, {rate_b} Hz, {max_lag} s")
    rate = max(rate_a, rate_b, _GRID)
    x, y = _resample(a, rate_a, rate), _resample(b, rate_b, rate)
    shorter = min(len(x), len(y))
    if shorter < 4:
        return SyncEstimate(offset_sec=0.0, correlation=0.0)
    lags = np.arange(-_limit(max_lag, rate, shorter), _limit(max_lag, rate, shorter) + 1)
    scores = np.array([_correlation_at(x, y, int(lag)) for lag in lags])
    best = int(scores.argmax())
    if scores[best] == 0 and not scores.any():
        return SyncEstimate(offset_sec=0.0, correlation=0.0)
    step, height = _parabola(scores, best)
    return SyncEstimate(offset_sec=float((lags[best] + step) / rate), correlation=height)


def motion_energy(frames: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Mean absolute change of grey levels (0 to 255) per frame, for frames ``(f, H, W, 3)``.

    Value i is half the sum of the changes from frame i - 1 and to frame i + 1, so that it belongs to the time of
    frame i; the two ends repeat their only neighbour. One frame gives 0.
    """
    if len(frames) < 2:
        return np.zeros(len(frames))
    grey = frames.astype(np.float32).mean(-1)
    change = np.abs(np.diff(grey, axis=0)).mean((1, 2)).astype(np.float64)
    return (np.concatenate([change[:1], change]) + np.concatenate([change, change[-1:]])) / 2


def sound_envelope(samples: NDArray[np.floating[Any]], sample_rate: int, rate: float) -> NDArray[np.float64]:
    """Root mean square of sound, ``rate`` values a second; value i over a box of 2 / rate seconds centred at i / rate.

    ``floor(samples / sample_rate * rate)`` values. Boxes are cut at the ends of the sound.
    """
    power = np.concatenate([[0.0], np.cumsum(np.square(samples, dtype=np.float64))])
    centres = np.arange(int(len(samples) / sample_rate * rate)) * sample_rate / rate
    lo = np.clip(np.round(centres - sample_rate / rate), 0, len(samples)).astype(np.int64)
    hi = np.clip(np.round(centres + sample_rate / rate), 0, len(samples)).astype(np.int64)
    return np.sqrt((power[hi] - power[lo]) / np.maximum(hi - lo, 1))


def _resample(values: Envelope, rate: float, grid: float) -> NDArray[np.float64]:
    """Linear interpolation to ``grid`` values a second."""
    if not len(values):
        return np.zeros(0)
    times = np.arange(int((len(values) - 1) / rate * grid) + 1) / grid
    return np.interp(times, np.arange(len(values)) / rate, np.asarray(values, np.float64))


def _limit(max_lag: float, rate: float, shorter: int) -> int:
    return min(round(max_lag * rate), shorter // 2)


def _correlation_at(x: NDArray[np.float64], y: NDArray[np.float64], lag: int) -> float:
    """Pearson correlation of x[t] and y[t + lag]; 0 where one is constant."""
    n = min(len(x) - max(0, -lag), len(y) - max(0, lag))
    u, v = x[max(0, -lag) :][:n], y[max(0, lag) :][:n]
    u, v = u - u.mean(), v - v.mean()
    norm = np.sqrt((u @ u) * (v @ v))
    return float(u @ v / norm) if norm > 1e-12 * n else 0.0


def _parabola(scores: NDArray[np.float64], best: int) -> tuple[float, float]:
    """Place (in steps from ``best``) and height of the parabola through the best score and its neighbours."""
    if not 0 < best < len(scores) - 1:
        return 0.0, float(scores[best])
    left, here, right = (float(s) for s in scores[best - 1 : best + 2])
    bend = left - 2 * here + right
    if bend >= 0:
        return 0.0, here
    step = 0.5 * (left - right) / bend
    return step, min(1.0, here - 0.25 * (left - right) * step)
