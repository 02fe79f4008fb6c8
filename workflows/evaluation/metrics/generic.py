"""Measures of a set of clips of any world, each with the worst score for a clip that failed.

A metric is a function of the clips (or of one window of each) and, if its ``MetricSpec`` says so, of the real clips.
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
_DRAWS = 100  # of a Frechet distance's bootstrap; fewer where features are many
_WIDE = 100  # features from which each draw takes long
_STILL_MOUTH = 0.05  # a mouth that opens by less than this does not speak


@dataclass(frozen=True, kw_only=True)
class MetricValue:
    """One number of one row."""

    value: float
    count: int  # clips it was measured on, the failed ones included
    failed: int = 0  # clips that got the worst score
    low: float | None = None  # of the 90% bootstrap interval over clips
    high: float | None = None


MetricValues = dict[str, MetricValue]


@dataclass(frozen=True, kw_only=True)
class ReferenceFeatures:
    """What real clips show to the same readers."""

    prompts: FeatureSet  # the clips whose conditions the samples were made from
    reference: FeatureSet  # other real clips


def has_still_mouth(reading: ClipFeatures) -> bool:
    """No mouth, or one that never opens."""
    return reading.picture is not None and float(np.ptp(reading.picture.opening)) < _STILL_MOUTH


def is_mute(reading: ClipFeatures) -> bool:
    """Nothing said although something was to be said."""
    return reading.speech is not None and bool(reading.speech.said) and not reading.speech.heard


FAILURE_PREDICATES: Mapping[str, Callable[[ClipFeatures], bool]] = {
    "not_finite": lambda r: not r.finite,
    "silent": lambda r: r.is_silent,
    "nothing_said": is_mute,
    "no_mouth": has_still_mouth,
}


def mean_over_clips(
    part: FeatureSet, value: Callable[[ClipFeatures], float], worst: float, *failures: str
) -> MetricValue:
    """Mean over clips; ``worst`` for non-finite numbers, one of ``failures``, or where there is no value."""
    values: list[float] = []
    failed = 0
    for reading in part:
        bad = any(FAILURE_PREDICATES[kind](reading) for kind in ("not_finite", *failures))
        got = worst if bad else value(reading)
        bad = bad or not np.isfinite(got)
        failed += bad
        values.append(worst if bad else got)
    found = mean_interval(values)
    return MetricValue(value=found.value, count=len(part), failed=failed, low=found.low, high=found.high)


def shared_values(part: FeatureSet, numbers: Mapping[str, float]) -> MetricValues:
    """Numbers that belong to all clips together."""
    return {name: MetricValue(value=value, count=len(part)) for name, value in numbers.items()}


def finite_mean(values: Sequence[float]) -> float:
    """Of those that are finite; nan without any."""
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else float("nan")


def motion_sync_metrics(part: FeatureSet) -> MetricValues:
    """The same for any video: confidence of ``MotionSync`` (worst 0; 1 is chance), and how far its offset is from 0."""

    def confidence(r: ClipFeatures) -> float:
        assert r.motion_sync is not None
        return r.motion_sync.confidence

    def distance(r: ClipFeatures) -> float:
        assert r.motion_sync is not None
        return abs(r.motion_sync.offset_sec) if r.motion_sync.confidence else float("nan")

    return {
        "motion_sync": mean_over_clips(part, confidence, 0.0, "silent"),
        "motion_sync_offset_s": mean_over_clips(part, distance, MAX_SYNC_LAG_S, "silent"),
    }


def sync_offsets(part: FeatureSet) -> list[float | None]:
    """Of each clip: seconds by which the sound comes later than the picture, where they agree best; None: failed.

    By the mouth where the toy readers see one, else by the motion of the whole picture.
    """

    def signed(reading: ClipFeatures) -> float | None:
        found = reading.mouth_sync or reading.motion_sync
        if found is None or any(f(reading) for f in FAILURE_PREDICATES.values()):
            return None
        return None if isinstance(found, SyncResult) and not found.confidence else found.offset_sec

    return [signed(reading) for reading in part]


def offset_statistics(part: FeatureSet) -> MetricValues:
    """The middle of the offsets, how far nine of ten lie from it, and the share within 0.08 s (two frames at 25)."""
    found = sync_offsets(part)
    known = np.array([x for x in found if x is not None])
    failed = len(found) - len(known)
    made = lambda value: MetricValue(value=value, count=len(found), failed=failed)
    if not len(known):
        return {"sync_within_80ms": made(0.0)}
    middle = float(np.median(known))
    return {
        "sync_offset_median_s": made(middle),
        "sync_offset_spread_s": made(float(np.quantile(np.abs(known - middle), 0.9))),
        "sync_within_80ms": made(float((np.abs(known) <= 0.08).sum()) / len(found)),
    }


def chunk_seam_energy(part: FeatureSet, real: ReferenceFeatures) -> MetricValues:
    """Change across chunk borders over change inside chunks, divided by the same of real clips: 1 = as real ones."""
    numbers: Numbers = {}
    for name in part[0].seams:
        ours, theirs = _seam(part, name), _seam(real.prompts, name)
        numbers[f"seam_{name}"] = ours / theirs if theirs > 0 else float("nan")
        numbers[f"seam_{name}_raw"] = ours
    known = [v for k, v in numbers.items() if not k.endswith("_raw") and np.isfinite(v)]
    return shared_values(part, numbers | ({"seam": float(np.mean(known))} if known else {}))


def _seam(part: FeatureSet, name: str) -> float:
    """Pooled over clips; nan where nothing changes inside chunks, or there is no border."""
    energy = np.concatenate([r.seams[name].energy for r in part])
    border = np.concatenate([r.seams[name].border for r in part])
    if not border.any() or border.all() or not energy[~border].any():
        return float("nan")
    return float(energy[border].mean() / energy[~border].mean())


def frechet_metrics(
    name: str, ours: Sequence[NDArray[Any]], theirs: Sequence[NDArray[Any]], shrinkage: float
) -> MetricValues:
    """Frechet distance of the rows of each clip, its interval, and how much of it is due to small numbers.

    The estimate is biased upwards: compare rows of equal ``_n``; ``_bias`` is its size, and the row of real clips shows
    the floor. Nothing below two rows on either side.
    """
    ours, theirs = ([x for x in part if len(x)] for part in (ours, theirs))
    rows = [sum(map(len, part)) for part in (ours, theirs)]
    if min(rows) < 2:
        return {}
    draws = _DRAWS if ours[0].shape[1] < _WIDE else _DRAWS // 5
    found = frechet_interval(ours, theirs, draws=draws, shrinkage=shrinkage)
    made = lambda value: MetricValue(value=float(value), count=len(ours))
    return {
        name: MetricValue(value=found.value, count=len(ours), low=found.low, high=found.high),
        f"{name}_bias": made(frechet_bias(ours, theirs, draws=draws // 5, shrinkage=shrinkage)),
        f"{name}_n": made(rows[0]),
        f"{name}_n_real": made(rows[1]),
        f"{name}_shrinkage": made(shrinkage),
    }


def motion_and_sharpness(part: FeatureSet) -> MetricValues:
    """Mean change of grey levels (0 .. 255) from frame to frame; sharpness, also over that of the real clips."""
    value = lambda values: float(np.mean(values)) if values is not None and len(values) else np.nan
    return {
        "motion": mean_over_clips(part, lambda r: value(r.motion), 0.0),
        "sharpness": mean_over_clips(part, lambda r: value(r.sharpness), 0.0),
    }


def motion_and_sharpness_ratio(part: FeatureSet, real: ReferenceFeatures) -> MetricValues:
    """Motion and sharpness over the real clips': 1 = as real ones."""
    ours, theirs = motion_and_sharpness(part), motion_and_sharpness(real.prompts)
    whole = {k: ours[k].value / theirs[k].value if theirs[k].value > 0 else float("nan") for k in ours}
    return shared_values(part, {f"{name}_over_real": value for name, value in whole.items()})


def loudness_metrics(part: FeatureSet) -> MetricValues:
    """Decibel of full scale; shares of the sound that are cut off, and in which nothing can be heard."""

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
        "loudness_db": mean_over_clips(part, level, -60.0),
        "clipping": mean_over_clips(part, clipped, 1.0),
        "silence": mean_over_clips(part, quiet, 1.0),
    }
