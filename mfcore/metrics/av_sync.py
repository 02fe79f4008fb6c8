"""Audio-video synchronization: offset of two envelopes, and of the sound of a clip against its motion.

Letters: n values of an envelope, f frames, b blocks of a frame, l lags. Value i of an envelope with rate R belongs to
the time i / R seconds.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter1d

_MIN_GRID_HZ = 200.0  # rate of the common grid; the peak is refined between its points

Envelope = NDArray[np.floating[Any]]


class SyncEstimate(NamedTuple):
    """Lag at which two envelopes correlate best."""

    offset_sec: float  # positive: b is later than a
    correlation: float  # Pearson, -1 to 1, at that offset


def sync_offset(a: Envelope, rate_a: float, b: Envelope, rate_b: float, *, max_lag: float) -> SyncEstimate:
    """Return the offset of ``b`` against ``a``, both one-dimensional, within +- ``max_lag`` seconds.

    The score of lag L is the Pearson correlation of a(t) and b(t + L) over the times that both cover, at least half of
    the shorter one. A parabola refines the best lag. Offset and correlation are 0 if an envelope is constant or shorter
    than four grid points. Raises ValueError if a rate or the lag is not positive.
    """
    if min(rate_a, rate_b, max_lag) <= 0:
        raise ValueError(f"sync_offset needs positive rates and lag, got {rate_a} Hz, {rate_b} Hz, {max_lag} s")
    rate = max(rate_a, rate_b, _MIN_GRID_HZ)
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
    step, height = _refine_peak(scores, best)
    return SyncEstimate(offset_sec=float((lags[best] + step) / rate), correlation=height)


def motion_energy(frames: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the mean absolute change of gray levels (0 to 255) per frame of ``(f, H, W, 3)``.

    Value i is half the sum of the changes from frame i - 1 and to frame i + 1, so it belongs to the time of frame i.
    The two ends repeat their only change. One frame gives 0.
    """
    if len(frames) < 2:
        return np.zeros(len(frames))
    change = np.abs(np.diff(to_grayscale(frames), axis=0)).mean((1, 2)).astype(np.float64)
    return (np.concatenate([change[:1], change]) + np.concatenate([change, change[-1:]])) / 2


def to_grayscale(frames: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return the mean of the three colors, ``(f, H, W, 3)`` to ``(f, H, W)``, 0 to 255."""
    gray = frames[..., 0].astype(np.float32)
    gray += frames[..., 1]
    gray += frames[..., 2]
    gray /= 3
    return gray


def sound_envelope(
    samples: NDArray[np.floating[Any]], sample_rate: int, rate: float, box: float | None = None
) -> NDArray[np.float64]:
    """Return the root mean square of audio at ``rate`` values per second.

    Value i covers ``box`` seconds (default: 2 / rate) centered at i / rate; the boxes are cut at the ends. The result
    has ``floor(samples / sample_rate * rate)`` values.
    """
    power = np.concatenate([[0.0], np.cumsum(np.square(samples, dtype=np.float64))])
    centers = np.arange(int(len(samples) / sample_rate * rate)) * sample_rate / rate
    half = sample_rate * (1 / rate if box is None else box / 2)
    lo = np.clip(np.round(centers - half), 0, len(samples)).astype(np.int64)
    hi = np.clip(np.round(centers + half), 0, len(samples)).astype(np.int64)
    return np.sqrt((power[hi] - power[lo]) / np.maximum(hi - lo, 1))


def _resample(values: Envelope, rate: float, grid: float) -> NDArray[np.float64]:
    """Interpolate linearly to ``grid`` values per second."""
    if not len(values):
        return np.zeros(0)
    times = np.arange(int((len(values) - 1) / rate * grid) + 1) / grid
    return np.interp(times, np.arange(len(values)) / rate, np.asarray(values, np.float64))


def _correlations(x: NDArray[np.float64], y: NDArray[np.float64], reach: int) -> NDArray[np.float64]:
    """Return the Pearson correlation of x[t] and y[t + lag] for lags -reach .. reach; 0 where one is constant."""
    x, y = x - x.mean(), y - y.mean()  # global means, so the sums below stay small
    after = reach + max(0, len(x) - len(y))

    def lagged(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return sliding_window_view(np.pad(values, (reach, after)), len(x))[: 2 * reach + 1]

    overlap = lagged(np.ones(len(y)))
    n = overlap.sum(1)
    sum_x, sum_y = overlap @ x, lagged(y).sum(1)
    var_x, var_y = overlap @ (x * x) - sum_x**2 / n, lagged(y * y).sum(1) - sum_y**2 / n
    flat = (var_x <= 1e-12 * (x @ x)) | (var_y <= 1e-12 * (y @ y))
    return np.where(flat, 0.0, (lagged(y) @ x - sum_x * sum_y / n) / np.sqrt(np.where(flat, 1.0, var_x * var_y)))


def _refine_peak(scores: NDArray[np.float64], best: int) -> tuple[float, float]:
    """Return position (steps from ``best``) and height of the parabola through the best score and its neighbors."""
    if not 0 < best < len(scores) - 1:
        return 0.0, float(scores[best])
    left, peak, right = map(float, scores[best - 1 : best + 2])
    curvature = left - 2 * peak + right
    if curvature >= 0:
        return 0.0, peak
    step = 0.5 * (left - right) / curvature
    return step, min(1.0, peak - 0.25 * (left - right) * step)


# ------------------------------------------------------------------------------------------------ audio against video


class SyncResult(NamedTuple):
    """A/V offset of one clip."""

    offset_sec: float  # positive: audio is late
    confidence: float  # on the scale of the estimator; 0 without evidence


class SyncEstimator(Protocol):
    """Estimates the A/V offset of a clip."""

    def __call__(
        self, frames: NDArray[np.uint8], fps: float, sound: NDArray[np.floating[Any]], sample_rate: int
    ) -> SyncResult:
        """Return the offset of mono ``sound`` against ``frames`` (f, H, W, 3)."""
        ...


_BLOCKS = 8  # per side: in a portrait, a mouth fills one block
_BEST_BLOCKS = 3  # blocks with the largest correlations, which form the score
_STEPS = 2  # lags per frame; the peak is refined between them
_SLOW_SECONDS = 0.8  # slower motion and loudness changes are removed
_MIN_FRAMES = 20


class MotionSync:
    """A/V offset from pixels and loudness, without weights, for one speaker before a fixed camera.

    Frames are cut into 8 x 8 blocks. A mouth changes the brightness of its blocks as it opens (level against sound
    pressure) and moves when the sound changes (motion energy against the change of pressure). The score of a lag is the
    root of the mean squared correlation of the two, over the three best blocks, so other motion does not hide the
    mouth. ``confidence`` is the best score over the highest score by chance: of the audio reversed in time, and of the
    audio rotated by more than two lags. 1 or less shows nothing. On 6 s of drawn talking heads it is 1.36 to 2.3; with
    the audio of another clip at most 1.10 in 95 of 100, and 1.36 in the worst of 240.
    """

    def __init__(self, max_lag: float = 0.5) -> None:
        self.max_lag = max_lag

    def __call__(
        self, frames: NDArray[np.uint8], fps: float, sound: NDArray[np.floating[Any]], sample_rate: int
    ) -> SyncResult:
        """Return the offset of mono ``sound`` against ``frames`` (f, H, W, 3)."""
        return self.estimate(block_statistics(frames), fps, sound, sample_rate)

    def estimate(
        self, blocks: "BlockStatistics", fps: float, sound: NDArray[np.floating[Any]], sample_rate: int
    ) -> SyncResult:
        """Return the offset from the result of :func:`block_statistics`."""
        rate = fps * _STEPS
        pressure = sound_envelope(sound, sample_rate, rate, box=1 / fps)
        if min(len(blocks.level), len(pressure) // _STEPS) < max(_MIN_FRAMES, 2 * self.max_lag * fps):
            return SyncResult(0.0, 0.0)
        slow = round(_SLOW_SECONDS * fps)
        pairs = [
            (_remove_slow(blocks.level, slow), _remove_slow(pressure, slow * _STEPS)),
            (_remove_slow(blocks.motion, slow), _remove_slow(np.abs(np.gradient(pressure)), slow * _STEPS)),
        ]
        reach = round(self.max_lag * rate)
        lags = np.arange(-reach, reach + 1)
        scores = _score([_lagged(video, audio, lags) for video, audio in pairs])
        chance = _score([_lagged(video, _rotations(audio, len(video), reach)) for video, audio in pairs]).max()
        best = int(scores.argmax())
        if scores[best] < 1e-6 or chance < 1e-6:
            return SyncResult(0.0, 0.0)
        step, height = _refine_peak(scores, best)
        return SyncResult(float((lags[best] + step) / rate), height / float(chance))


class BlockStatistics(NamedTuple):
    """Input of ``MotionSync``: values of the 8 x 8 blocks of every frame, ``(f, 64)`` each."""

    level: NDArray[np.float64]
    motion: NDArray[np.float64]


def block_statistics(frames: NDArray[np.uint8]) -> BlockStatistics:
    """Return level and motion of the blocks of frames ``(f, H, W, 3)``."""
    gray = to_grayscale(frames)
    return BlockStatistics(_block_means(gray), _block_motion(gray))


def _block_motion(levels: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return ``motion_energy`` of 8 x 8 blocks, ``(f, H, W)`` to ``(f, 64)``."""
    change = _block_means(np.abs(np.diff(levels, axis=0)))
    return (np.concatenate([change[:1], change]) + np.concatenate([change, change[-1:]])) / 2


def _block_means(gray: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the means of 8 x 8 blocks, ``(f, H, W)`` to ``(f, 64)``, without the remainder at the right and bottom."""
    count, height, width = gray.shape
    h, w = max(1, height // _BLOCKS), max(1, width // _BLOCKS)
    gray = gray[:, : h * _BLOCKS, : w * _BLOCKS]
    rows, columns = gray.shape[1] // h, gray.shape[2] // w
    return gray.reshape(count, rows, h, columns, w).mean((2, 4)).reshape(count, rows * columns).astype(np.float64)


def _remove_slow(values: NDArray[np.float64], slow: int) -> NDArray[np.float64]:
    """Subtract the moving average over ``slow`` values."""
    return values - uniform_filter1d(values, slow, axis=0, mode="nearest")


def _rotations(audio: NDArray[np.float64], frames: int, reach: int) -> NDArray[np.float64]:
    """Return unrelated audio ``(f, l)`` of equal loudness and speed: reversed or rotated, one frame apart each."""
    count = len(audio)
    shifts = np.arange(0, count, _STEPS)
    far = shifts[(2 * reach < shifts) & (shifts < count - 2 * reach)]
    at = np.arange(0, min(count, frames * _STEPS), _STEPS)[:, None]
    return np.concatenate([audio[::-1][(at - shifts) % count], audio[(at - far) % count]], axis=1)


def _lagged(
    video: NDArray[np.float64], audio: NDArray[np.float64], lags: NDArray[np.int64] | None = None
) -> NDArray[np.float64]:
    """Return squared correlations ``(l, b)``: of the columns of ``audio``, or of one series at every lag."""
    if lags is None:
        count = min(len(video), len(audio))
        return _squared_correlation(video[:count], audio[:count])
    rows: list[NDArray[np.float64]] = []
    for lag in lags:
        at = np.arange(len(video)) * _STEPS + lag
        both = (at >= 0) & (at < len(audio))
        rows.append(_squared_correlation(video[both], audio[at[both], None]))
    return np.concatenate(rows)


def _squared_correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return squared Pearson correlations ``(columns of y, columns of x)``; 0 where one is constant."""
    x, y = x - x.mean(0), y - y.mean(0)
    norm = np.outer((y * y).sum(0), (x * x).sum(0))
    return np.where(norm > 1e-9, (y.T @ x) ** 2 / np.maximum(norm, 1e-9), 0.0)


def _score(squared: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Return the score of each lag ``(l,)`` from ``(l, b)`` per pair of signals."""
    mean = np.mean(squared, axis=0)
    return np.sqrt(np.sort(mean, axis=1)[:, -_BEST_BLOCKS:].mean(1))
