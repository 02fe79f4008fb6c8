"""Do picture and sound move together, and how far apart are they?

Letters: n values of an envelope, f frames, b blocks of a picture, l lags. Value i of an envelope with rate R belongs
to the time i / R seconds.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter1d

_GRID = 200.0  # Hz, at least: envelopes are compared on a common grid, the peak is refined between its points

Envelope = NDArray[np.floating[Any]]


class SyncEstimate(NamedTuple):
    """Where two envelopes agree best."""

    offset_sec: float  # seconds by which b comes later than a
    correlation: float  # Pearson, -1 to 1, at that offset


def sync_offset(a: Envelope, rate_a: float, b: Envelope, rate_b: float, *, max_lag: float) -> SyncEstimate:
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
    reach = min(round(max_lag * rate), shorter // 2)
    lags = np.arange(-reach, reach + 1)
    scores = _correlations(x, y, reach)
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
    change = np.abs(np.diff(to_grayscale(frames), axis=0)).mean((1, 2)).astype(np.float64)
    return (np.concatenate([change[:1], change]) + np.concatenate([change, change[-1:]])) / 2


def to_grayscale(frames: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Mean of the three colours, ``(f, H, W, 3)`` to ``(f, H, W)``, 0 to 255."""
    grey = frames[..., 0].astype(np.float32)
    grey += frames[..., 1]
    grey += frames[..., 2]
    grey /= 3
    return grey


def sound_envelope(
    samples: NDArray[np.floating[Any]], sample_rate: int, rate: float, box: float | None = None
) -> NDArray[np.float64]:
    """Root mean square of sound, ``rate`` values a second; value i over ``box`` (2 / rate) seconds centred at i / rate.

    ``floor(samples / sample_rate * rate)`` values. Boxes are cut at the ends of the sound.
    """
    power = np.concatenate([[0.0], np.cumsum(np.square(samples, dtype=np.float64))])
    centres = np.arange(int(len(samples) / sample_rate * rate)) * sample_rate / rate
    half = sample_rate * (1 / rate if box is None else box / 2)
    lo = np.clip(np.round(centres - half), 0, len(samples)).astype(np.int64)
    hi = np.clip(np.round(centres + half), 0, len(samples)).astype(np.int64)
    return np.sqrt((power[hi] - power[lo]) / np.maximum(hi - lo, 1))


def _resample(values: Envelope, rate: float, grid: float) -> NDArray[np.float64]:
    """Linear interpolation to ``grid`` values a second."""
    if not len(values):
        return np.zeros(0)
    times = np.arange(int((len(values) - 1) / rate * grid) + 1) / grid
    return np.interp(times, np.arange(len(values)) / rate, np.asarray(values, np.float64))


def _correlations(x: NDArray[np.float64], y: NDArray[np.float64], reach: int) -> NDArray[np.float64]:
    """Pearson correlation of x[t] and y[t + lag] where both are, lags -reach .. reach; 0 where one is constant."""
    x, y = x - x.mean(), y - y.mean()  # of the whole: what is left of the means at a lag is small
    after = reach + max(0, len(x) - len(y))

    def lagged(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return sliding_window_view(np.pad(values, (reach, after)), len(x))[: 2 * reach + 1]

    there = lagged(np.ones(len(y)))
    n, sum_x, sum_y = there.sum(1), there @ x, lagged(y).sum(1)
    var_x, var_y = there @ (x * x) - sum_x**2 / n, lagged(y * y).sum(1) - sum_y**2 / n
    flat = (var_x <= 1e-12 * (x @ x)) | (var_y <= 1e-12 * (y @ y))
    return np.where(flat, 0.0, (lagged(y) @ x - sum_x * sum_y / n) / np.sqrt(np.where(flat, 1.0, var_x * var_y)))


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


# ------------------------------------------------------------------------------------------- picture against sound


class SyncResult(NamedTuple):
    """What an estimator says of a clip."""

    offset_sec: float  # seconds by which the sound comes later than the picture
    confidence: float  # on the estimator's own scale; 0 where nothing can be said


class SyncEstimator(Protocol):
    """Reads the offset of a clip."""

    def __call__(
        self, frames: NDArray[np.uint8], fps: float, sound: NDArray[np.floating[Any]], sample_rate: int
    ) -> SyncResult: ...


_BLOCKS = 8  # a side: a mouth fills one of them in a portrait
_AGREEING = 3  # blocks whose correlations make the score
_STEPS = 2  # lags per frame; the peak is refined between them
_SLOW = 0.8  # seconds: movements slower than this (a swaying head, a rising voice) are taken out
_LEAST_FRAMES = 20


class MotionSync:
    """Offset from pixels and loudness alone; needs no weights. For one who speaks in front of a camera that is still.

    The picture is cut into 8 x 8 blocks. A mouth changes the brightness of its blocks as it opens (level against sound
    pressure) and moves when the sound changes (motion energy against the change of pressure). Score of a lag: the root
    of the mean squared correlation of the two, in the three blocks where it is highest; so what else moves in the
    picture does not hide the mouth. ``confidence`` is the best score over the highest that chance gives: the same
    score of the sound reversed in time and of the sound shifted by more than two lags, at all rotations. About 1 and
    less: no evidence. Measured on 6 s of drawn talking heads: 1.36 to 2.3; with another clip's sound: at most 1.10 in
    95 of 100, 1.36 in the worst of 240.
    """

    def __init__(self, max_lag: float = 0.5) -> None:
        self.max_lag = max_lag

    def __call__(
        self, frames: NDArray[np.uint8], fps: float, sound: NDArray[np.floating[Any]], sample_rate: int
    ) -> SyncResult:
        return self.estimate(block_statistics(frames), fps, sound, sample_rate)

    def estimate(
        self, seen: "BlockStatistics", fps: float, sound: NDArray[np.floating[Any]], sample_rate: int
    ) -> SyncResult:
        """The same from what ``blocks_of`` keeps of a picture."""
        rate = fps * _STEPS
        pressure = sound_envelope(sound, sample_rate, rate, box=1 / fps)
        if min(len(seen.level), len(pressure) // _STEPS) < max(_LEAST_FRAMES, 2 * self.max_lag * fps):
            return SyncResult(0.0, 0.0)
        slow = round(_SLOW * fps)
        pairs = [
            (_fast(seen.level, slow), _fast(pressure, slow * _STEPS)),
            (_fast(seen.motion, slow), _fast(np.abs(np.gradient(pressure)), slow * _STEPS)),
        ]
        reach = round(self.max_lag * rate)
        lags = np.arange(-reach, reach + 1)
        scores = _score([_lagged(picture, heard, lags) for picture, heard in pairs])
        chance = _score([_lagged(picture, _rotations(heard, len(picture), reach)) for picture, heard in pairs]).max()
        best = int(scores.argmax())
        if scores[best] < 1e-6 or chance < 1e-6:
            return SyncResult(0.0, 0.0)
        step, height = _parabola(scores, best)
        return SyncResult(float((lags[best] + step) / rate), height / float(chance))


class BlockStatistics(NamedTuple):
    """What ``MotionSync`` needs of a picture: 8 x 8 blocks of every frame, ``(f, 64)`` each."""

    level: NDArray[np.float64]
    motion: NDArray[np.float64]


def block_statistics(frames: NDArray[np.uint8]) -> BlockStatistics:
    grey = to_grayscale(frames)
    return BlockStatistics(_block_levels(grey), _block_motion(grey))


def _block_levels(levels: NDArray[np.float32]) -> NDArray[np.float64]:
    """Mean over 8 x 8 blocks of each picture, ``(f, H, W)`` to ``(f, 64)``; the right and lower rest is left out."""
    return _blocks(levels)


def _block_motion(levels: NDArray[np.float32]) -> NDArray[np.float64]:
    """``motion_energy`` of 8 x 8 blocks, ``(f, H, W)`` to ``(f, 64)``."""
    change = _blocks(np.abs(np.diff(levels, axis=0)))
    return (np.concatenate([change[:1], change]) + np.concatenate([change, change[-1:]])) / 2


def _blocks(grey: NDArray[np.float32]) -> NDArray[np.float64]:
    count, height, width = grey.shape
    h, w = max(1, height // _BLOCKS), max(1, width // _BLOCKS)
    grey = grey[:, : h * _BLOCKS, : w * _BLOCKS]
    rows, columns = grey.shape[1] // h, grey.shape[2] // w
    return grey.reshape(count, rows, h, columns, w).mean((2, 4)).reshape(count, rows * columns).astype(np.float64)


def _fast(values: NDArray[np.float64], slow: int) -> NDArray[np.float64]:
    """What changes faster than over ``slow`` values."""
    return values - uniform_filter1d(values, slow, axis=0, mode="nearest")


def _rotations(heard: NDArray[np.float64], frames: int, reach: int) -> NDArray[np.float64]:
    """``(f, l)``: sound that has nothing to do with the picture but is as loud and as fast, a frame apart each."""
    turns = np.arange(0, len(heard), _STEPS)
    far = turns[(2 * reach < turns) & (turns < len(heard) - 2 * reach)]
    at = np.arange(0, min(len(heard), frames * _STEPS), _STEPS)[:, None]
    return np.concatenate([heard[::-1][(at - turns) % len(heard)], heard[(at - far) % len(heard)]], axis=1)


def _lagged(
    picture: NDArray[np.float64], heard: NDArray[np.float64], lags: NDArray[np.int64] | None = None
) -> NDArray[np.float64]:
    """Squared correlations ``(l, b)``: of the columns of ``heard``, or of one series at every lag where both are."""
    if lags is None:
        count = min(len(picture), len(heard))
        return _squared(picture[:count], heard[:count])
    rows: list[NDArray[np.float64]] = []
    for lag in lags:
        at = np.arange(len(picture)) * _STEPS + lag
        both = (at >= 0) & (at < len(heard))
        rows.append(_squared(picture[both], heard[at[both], None]))
    return np.concatenate(rows)


def _squared(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Squared Pearson correlations ``(columns of y, columns of x)``; 0 where one is constant."""
    x, y = x - x.mean(0), y - y.mean(0)
    norm = np.outer((y * y).sum(0), (x * x).sum(0))
    return np.where(norm > 1e-9, (y.T @ x) ** 2 / np.maximum(norm, 1e-9), 0.0)


def _score(squared: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Of ``(l, b)`` per kind of evidence: ``(l,)``."""
    mean = np.mean(squared, axis=0)
    return np.sqrt(np.sort(mean, axis=1)[:, -_AGREEING:].mean(1))
