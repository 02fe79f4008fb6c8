"""Metrics for clips of any kind. A failed clip gets the worst score.

A metric is a function of the clips or of one window of each. With ``needs_reference`` it also gets the real clips.
Each value has a count, the number of failed clips, and a bootstrap interval if clips have separate values.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mfcore.metrics.av_sync import SyncResult
from mfcore.metrics.bootstrap import mean_interval
from mfcore.metrics.frechet import frechet_bias, frechet_interval
from mfcore.metrics.signal_quality import clipped_fraction, rms, silent_fraction, to_decibels
from workflows.evaluation.clip_features import MAX_SYNC_LAG_S, ClipFeatures

FeatureSet = Sequence[ClipFeatures]
Numbers = dict[str, float]

FRECHET_SHRINKAGE = 0.3  # of covariances: clips are fewer than features
_DRAWS = 100  # bootstrap draws of a Frechet distance; a fifth for many features
_MANY_FEATURES = 100  # feature dimension from which draws are slow
_MIN_MOUTH_RANGE = 0.05  # least range of the opening of a speaking mouth


@dataclass(frozen=True, kw_only=True)
class MetricValue:
    """Value of one metric for one set of clips."""

    value: float
    count: int  # clips, including failed ones
    failed: int = 0  # clips that got the worst score
    low: float | None = None  # bounds of the 90% bootstrap interval over clips
    high: float | None = None


MetricValues = dict[str, MetricValue]


@dataclass(frozen=True, kw_only=True)
class ReferenceFeatures:
    """Features of the real clips."""

    prompts: FeatureSet  # clips with the conditions of the samples
    reference: FeatureSet  # other real clips


def has_still_mouth(clip: ClipFeatures) -> bool:
    """Return True if the clip has no mouth or a mouth that never opens."""
    return clip.picture is not None and float(np.ptp(clip.picture.opening)) < _MIN_MOUTH_RANGE


def is_mute(clip: ClipFeatures) -> bool:
    """Return True if the transcript has words but no speech was detected."""
    return clip.speech is not None and bool(clip.speech.expected) and not clip.speech.detected


FAILURE_PREDICATES: Mapping[str, Callable[[ClipFeatures], bool]] = {
    "not_finite": lambda r: not r.finite,
    "silent": lambda r: r.is_silent,
    "nothing_said": is_mute,
    "no_mouth": has_still_mouth,
}


def mean_over_clips(
    clips: FeatureSet, value: Callable[[ClipFeatures], float], worst: float, *failures: str
) -> MetricValue:
    """Return the mean over clips. A clip that is non-finite, fails a predicate or has no value counts as ``worst``."""
    values: list[float] = []
    failed = 0
    for clip in clips:
        is_failed = any(FAILURE_PREDICATES[kind](clip) for kind in ("not_finite", *failures))
        score = worst if is_failed else value(clip)
        is_failed = is_failed or not np.isfinite(score)
        failed += is_failed
        values.append(worst if is_failed else score)
    found = mean_interval(values)
    return MetricValue(value=found.value, count=len(clips), failed=failed, low=found.low, high=found.high)


def shared_values(clips: FeatureSet, numbers: Mapping[str, float]) -> MetricValues:
    """Return values that describe the whole set of clips, without intervals."""
    return {name: MetricValue(value=value, count=len(clips)) for name, value in numbers.items()}


def finite_mean(values: Sequence[float]) -> float:
    """Return the mean of the finite values; nan without any."""
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else float("nan")


def motion_sync_metrics(clips: FeatureSet) -> MetricValues:
    """Return the confidence of ``MotionSync`` (worst 0, chance 1) and its absolute offset in seconds."""

    def confidence(r: ClipFeatures) -> float:
        assert r.motion_sync is not None
        return r.motion_sync.confidence

    def distance(r: ClipFeatures) -> float:
        assert r.motion_sync is not None
        return abs(r.motion_sync.offset_sec) if r.motion_sync.confidence else float("nan")

    return {
        "motion_sync": mean_over_clips(clips, confidence, 0.0, "silent"),
        "motion_sync_offset_s": mean_over_clips(clips, distance, MAX_SYNC_LAG_S, "silent"),
    }


def sync_offsets(clips: FeatureSet) -> list[float | None]:
    """Return the A/V offset per clip in seconds (positive: audio lags); None for a failed clip.

    The offset is measured on the mouth in the toy world, else on the motion of the whole frame.
    """

    def signed(clip: ClipFeatures) -> float | None:
        found = clip.mouth_sync or clip.motion_sync
        if found is None or any(f(clip) for f in FAILURE_PREDICATES.values()):
            return None
        return None if isinstance(found, SyncResult) and not found.confidence else found.offset_sec

    return [signed(clip) for clip in clips]


def offset_statistics(clips: FeatureSet) -> MetricValues:
    """Return the median A/V offset, the 90th percentile of the deviation, and the share within 0.08 s."""
    found = sync_offsets(clips)
    finite = np.array([x for x in found if x is not None])
    failed = len(found) - len(finite)

    def metric(value: float) -> MetricValue:
        return MetricValue(value=value, count=len(found), failed=failed)

    if not len(finite):
        return {"sync_within_80ms": metric(0.0)}
    median = float(np.median(finite))
    return {
        "sync_offset_median_s": metric(median),
        "sync_offset_spread_s": metric(float(np.quantile(np.abs(finite - median), 0.9))),
        "sync_within_80ms": metric(float((np.abs(finite) <= 0.08).sum()) / len(found)),
    }


def chunk_seam_energy(clips: FeatureSet, real: ReferenceFeatures) -> MetricValues:
    """Return the seam energy per signal, relative to real clips (1: equal to real clips), and unscaled."""
    numbers: Numbers = {}
    for name in clips[0].seams:
        ratio = _border_ratio(clips, name)
        real_ratio = _border_ratio(real.prompts, name)
        numbers[f"seam_{name}"] = ratio / real_ratio if real_ratio > 0 else float("nan")
        numbers[f"seam_{name}_raw"] = ratio
    finite = [v for k, v in numbers.items() if not k.endswith("_raw") and np.isfinite(v)]
    return shared_values(clips, numbers | ({"seam": float(np.mean(finite))} if finite else {}))


def _border_ratio(clips: FeatureSet, name: str) -> float:
    """Return the change across chunk borders over the change inside chunks, pooled over clips; nan if undefined."""
    energy = np.concatenate([r.seams[name].energy for r in clips])
    border = np.concatenate([r.seams[name].border for r in clips])
    if not border.any() or border.all() or not energy[~border].any():
        return float("nan")
    return float(energy[border].mean() / energy[~border].mean())


def frechet_metrics(
    name: str, ours: Sequence[NDArray[Any]], theirs: Sequence[NDArray[Any]], shrinkage: float
) -> MetricValues:
    """Return the Frechet distance of the feature rows of clips, with its interval, bias and sample sizes.

    The estimate is biased upwards by about ``_bias``. Compare only values with equal ``_n``; the row of real clips
    gives the floor. The result is empty with fewer than two feature rows on either side.
    """
    ours = [x for x in ours if len(x)]
    theirs = [x for x in theirs if len(x)]
    rows = sum(map(len, ours))
    rows_real = sum(map(len, theirs))
    if min(rows, rows_real) < 2:
        return {}
    draws = _DRAWS if ours[0].shape[1] < _MANY_FEATURES else _DRAWS // 5
    found = frechet_interval(ours, theirs, draws=draws, shrinkage=shrinkage)

    def metric(value: float) -> MetricValue:
        return MetricValue(value=float(value), count=len(ours))

    return {
        name: MetricValue(value=found.value, count=len(ours), low=found.low, high=found.high),
        f"{name}_bias": metric(frechet_bias(ours, theirs, draws=draws // 5, shrinkage=shrinkage)),
        f"{name}_n": metric(rows),
        f"{name}_n_real": metric(rows_real),
        f"{name}_shrinkage": metric(shrinkage),
    }


def motion_and_sharpness(clips: FeatureSet) -> MetricValues:
    """Return the mean change of gray levels (0 to 255) between frames, and the mean sharpness."""

    def value(values: NDArray[np.float64] | None) -> float:
        return float(np.mean(values)) if values is not None and len(values) else np.nan

    return {
        "motion": mean_over_clips(clips, lambda r: value(r.motion), 0.0),
        "sharpness": mean_over_clips(clips, lambda r: value(r.sharpness), 0.0),
    }


def motion_and_sharpness_ratio(clips: FeatureSet, real: ReferenceFeatures) -> MetricValues:
    """Return motion and sharpness relative to real clips (1: equal to real clips)."""
    ours, theirs = motion_and_sharpness(clips), motion_and_sharpness(real.prompts)
    whole = {k: ours[k].value / theirs[k].value if theirs[k].value > 0 else float("nan") for k in ours}
    return shared_values(clips, {f"{name}_over_real": value for name, value in whole.items()})


def loudness_metrics(clips: FeatureSet) -> MetricValues:
    """Return loudness in dB of full scale, and the clipped and silent shares of the audio."""

    def level(r: ClipFeatures) -> float:
        assert r.sound is not None
        return float(to_decibels(rms(r.sound))) if len(r.sound) else np.nan

    def clipped(r: ClipFeatures) -> float:
        assert r.sound is not None
        return clipped_fraction(r.sound)

    def quiet(r: ClipFeatures) -> float:
        assert r.sound is not None
        return silent_fraction(r.sound, r.sample_rate)

    return {
        "loudness_db": mean_over_clips(clips, level, -60.0),
        "clipping": mean_over_clips(clips, clipped, 1.0),
        "silence": mean_over_clips(clips, quiet, 1.0),
    }
