"""Measures of a set of clips of any world, each with the worst score for a clip that failed.

A measure is a function of a part (the clips, or a window of each) and of the real clips read by the same readers. What
it finds comes with its count, the clips that failed, and a bootstrap interval where clips have values of their own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mfcore.metrics.av_sync import SyncReading
from mfcore.metrics.bootstrap import mean_interval
from mfcore.metrics.frechet import frechet_bias, frechet_interval
from mfcore.metrics.signal_quality import clipping, decibel, rms, silence
from workflows.evaluation.clip_features import REACH, Reading

Part = Sequence[Reading]
Numbers = dict[str, float]

_DRAWS = 100  # of a Frechet distance's bootstrap; fewer where features are many
_WIDE = 100  # features from which each draw takes long
_STILL_MOUTH = 0.05  # a mouth that opens by less than this does not speak


@dataclass(frozen=True, kw_only=True)
class Score:
    """One number of one row."""

    value: float
    count: int  # clips it was measured on, the failed ones included
    failed: int = 0  # clips that got the worst score
    low: float | None = None  # of the 90% bootstrap interval over clips
    high: float | None = None


Found = dict[str, Score]


@dataclass(frozen=True, kw_only=True)
class Real:
    """What real clips show to the same readers."""

    prompts: Part  # the clips whose conditions the samples were made from
    reference: Part  # other real clips


def still_mouth(reading: Reading) -> bool:
    """No mouth, or one that never opens."""
    return reading.picture is not None and float(np.ptp(reading.picture.opening)) < _STILL_MOUTH


def mute(reading: Reading) -> bool:
    """Nothing said although something was to be said."""
    return reading.speech is not None and bool(reading.speech.said) and not reading.speech.heard


FAILURES: Mapping[str, Callable[[Reading], bool]] = {
    "not_finite": lambda r: not r.finite,
    "silent": lambda r: r.silent,
    "nothing_said": mute,
    "no_mouth": still_mouth,
}


def each(part: Part, value: Callable[[Reading], float], worst: float, *failures: str) -> Score:
    """Mean over clips; ``worst`` for non-finite numbers, one of ``failures``, or where there is no value."""
    values: list[float] = []
    failed = 0
    for reading in part:
        bad = any(FAILURES[kind](reading) for kind in ("not_finite", *failures))
        got = worst if bad else value(reading)
        bad = bad or not np.isfinite(got)
        failed += bad
        values.append(worst if bad else got)
    found = mean_interval(values)
    return Score(value=found.value, count=len(part), failed=failed, low=found.low, high=found.high)


def of_all(part: Part, numbers: Mapping[str, float]) -> Found:
    """Numbers that belong to all clips together."""
    return {name: Score(value=value, count=len(part)) for name, value in numbers.items()}


def mean(values: Sequence[float]) -> float:
    """Of those that are finite; nan without any."""
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else float("nan")


def motion_sync(part: Part, real: Real) -> Found:
    """The same for any video: confidence of ``MotionSync`` (worst 0; 1 is chance), and how far its offset is from 0."""
    del real

    def confidence(r: Reading) -> float:
        assert r.motion_sync is not None
        return r.motion_sync.confidence

    def distance(r: Reading) -> float:
        assert r.motion_sync is not None
        return abs(r.motion_sync.offset_sec) if r.motion_sync.confidence else float("nan")

    return {
        "motion_sync": each(part, confidence, 0.0, "silent"),
        "motion_sync_offset_s": each(part, distance, REACH, "silent"),
    }


def offsets(part: Part) -> list[float | None]:
    """Of each clip: seconds by which the sound comes later than the picture, where they agree best; None: failed.

    By the mouth where the toy readers see one, else by the motion of the whole picture.
    """

    def signed(reading: Reading) -> float | None:
        found = reading.mouth_sync or reading.motion_sync
        if found is None or any(f(reading) for f in FAILURES.values()):
            return None
        return None if isinstance(found, SyncReading) and not found.confidence else found.offset_sec

    return [signed(reading) for reading in part]


def offset_law(part: Part, real: Real) -> Found:
    """The middle of the offsets, how far nine of ten lie from it, and the share within 0.08 s (two frames at 25)."""
    del real
    found = offsets(part)
    known = np.array([x for x in found if x is not None])
    failed = len(found) - len(known)
    made = lambda value: Score(value=value, count=len(found), failed=failed)
    if not len(known):
        return {"sync_within_80ms": made(0.0)}
    middle = float(np.median(known))
    return {
        "sync_offset_median_s": made(middle),
        "sync_offset_spread_s": made(float(np.quantile(np.abs(known - middle), 0.9))),
        "sync_within_80ms": made(float((np.abs(known) <= 0.08).sum()) / len(found)),
    }


def seams(part: Part, real: Real) -> Found:
    """Change across chunk borders over change inside chunks, divided by the same of real clips: 1 = as real ones."""
    numbers: Numbers = {}
    for name in part[0].seams:
        ours, theirs = _seam(part, name), _seam(real.prompts, name)
        numbers[f"seam_{name}"] = ours / theirs if theirs > 0 else float("nan")
        numbers[f"seam_{name}_raw"] = ours
    known = [v for k, v in numbers.items() if not k.endswith("_raw") and np.isfinite(v)]
    return of_all(part, numbers | ({"seam": float(np.mean(known))} if known else {}))


def _seam(part: Part, name: str) -> float:
    """Pooled over clips; nan where nothing changes inside chunks, or there is no border."""
    energy = np.concatenate([r.seams[name].energy for r in part])
    border = np.concatenate([r.seams[name].border for r in part])
    if not border.any() or border.all() or not energy[~border].any():
        return float("nan")
    return float(energy[border].mean() / energy[~border].mean())


def distance(name: str, ours: Sequence[NDArray[Any]], theirs: Sequence[NDArray[Any]], shrinkage: float) -> Found:
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
    made = lambda value: Score(value=float(value), count=len(ours))
    return {
        name: Score(value=found.value, count=len(ours), low=found.low, high=found.high),
        f"{name}_bias": made(frechet_bias(ours, theirs, draws=draws // 5, shrinkage=shrinkage)),
        f"{name}_n": made(rows[0]),
        f"{name}_n_real": made(rows[1]),
        f"{name}_shrinkage": made(shrinkage),
    }


def picture(part: Part, real: Real) -> Found:
    """Mean change of grey levels (0 .. 255) from frame to frame; sharpness, also over that of the real clips."""
    del real
    value = lambda values: float(np.mean(values)) if values is not None and len(values) else np.nan
    return {
        "motion": each(part, lambda r: value(r.motion), 0.0),
        "sharpness": each(part, lambda r: value(r.sharpness), 0.0),
    }


def picture_ratio(part: Part, real: Real) -> Found:
    """Motion and sharpness over the real clips': 1 = as real ones."""
    ours, theirs = picture(part, real), picture(real.prompts, real)
    whole = {k: ours[k].value / theirs[k].value if theirs[k].value > 0 else float("nan") for k in ours}
    return of_all(part, {f"{name}_over_real": value for name, value in whole.items()})


def loudness(part: Part, real: Real) -> Found:
    """Decibel of full scale; shares of the sound that are cut off, and in which nothing can be heard."""
    del real

    def level(r: Reading) -> float:
        assert r.sound is not None
        return float(decibel(rms(r.sound))) if len(r.sound) else np.nan

    def clipped(r: Reading) -> float:
        assert r.sound is not None
        return clipping(r.sound)

    def quiet(r: Reading) -> float:
        assert r.sound is not None
        return silence(r.sound, r.sample_rate)

    return {
        "loudness_db": each(part, level, -60.0),
        "clipping": each(part, clipped, 1.0),
        "silence": each(part, quiet, 1.0),
    }
