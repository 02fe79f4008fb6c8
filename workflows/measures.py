"""Measures of a set of clips, each with the worst score for a clip that failed.

A measure is a function of a part (the clips, or a window of each) and of the real clips read by the same readers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mfcore.metrics.choices import entropy as choice_entropy
from mfcore.metrics.choices import entropy_ratio
from mfcore.metrics.continuity import lag_one_correlation
from mfcore.metrics.frechet import frechet_distance
from mfcore.metrics.identity import identity_error
from mfcore.metrics.speech import edit_distance
from mfcore.metrics.sync import sound_envelope, sync_offset
from preprocessing.toyhearing import mouth_correlation
from preprocessing.toymatch import ChoiceReading, valid_share
from preprocessing.toyworld import CHOICES, PERSISTENT
from workflows.readings import ENVELOPE, HALF, Reading, cut_choice, decibel, rms

Part = Sequence[Reading]
Numbers = dict[str, float]

REACH = 0.4  # seconds either way in which the sound is searched; the offset of a clip that failed
SHRINKAGE = 0.3  # of the covariances of the Frechet distance: there are few half seconds
_FAR = 30.0  # real spreads at which features are cut, and what cannot be read is
_STILL_MOUTH = 0.05  # a mouth that opens by less than this does not speak


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


def _each(part: Part, value: Callable[[Reading], float], worst: float, *failures: str) -> float:
    """Mean over clips; ``worst`` for non-finite numbers, one of ``failures``, or where there is no value."""
    values: list[float] = []
    for reading in part:
        bad = any(FAILURES[kind](reading) for kind in ("not_finite", *failures))
        got = worst if bad else value(reading)
        values.append(got if np.isfinite(got) else worst)
    return float(np.mean(values))


def mouth_sync(part: Part, real: Real) -> Numbers:
    """Mouth opening against loudness: correlation at offset 0 (worst -1), and how far the best offset is from 0."""
    del real
    each = partial(_each, part)

    def correlation(r: Reading) -> float:
        assert r.picture is not None
        assert r.sound is not None
        return mouth_correlation(r.picture.opening, r.fps, r.sound, r.sample_rate)

    def offset(r: Reading) -> float:
        assert r.picture is not None
        return _offset(r, r.picture.opening)[0]

    return {
        "sync": each(correlation, -1.0, "silent", "no_mouth"),
        "sync_offset_s": each(offset, REACH, "silent", "no_mouth"),
    }


def motion_sync(part: Part, real: Real) -> Numbers:
    """The same for any video: motion of the whole picture against loudness, at the best offset."""
    del real

    def estimate(r: Reading, item: int) -> float:
        assert r.motion is not None
        return _offset(r, r.motion)[item]

    return {
        "motion_sync": _each(part, partial(estimate, item=1), -1.0, "silent"),
        "motion_sync_offset_s": _each(part, partial(estimate, item=0), REACH, "silent"),
    }


def _offset(reading: Reading, movement: NDArray[np.floating[Any]]) -> tuple[float, float]:
    """Distance from 0 of the best offset in seconds, correlation there."""
    assert reading.sound is not None
    envelope = sound_envelope(reading.sound, reading.sample_rate, ENVELOPE)
    found = sync_offset(movement, reading.fps, envelope, ENVELOPE, REACH)
    return abs(found.offset_sec), found.correlation


def syllables(part: Part, real: Real) -> Numbers:
    """Edit distance of syllables over their number, at most 1 for any one clip: babble is no better than silence."""
    del real
    wrong = said = 0
    for reading in part:
        assert reading.speech is not None
        wanted, heard = ([name for name, _ in units] for units in (reading.speech.said, reading.speech.heard))
        failed = not reading.finite or reading.silent
        wrong += len(wanted) if failed else min(len(wanted), edit_distance(heard, wanted))
        said += len(wanted)
    return {"syllable_error": wrong / said if said else float("nan")}


def identity(part: Part, real: Real) -> Numbers:
    """Colour of the face against the first frame's, root mean square over RGB in 0 .. 1 (worst 1)."""
    del real

    def error(r: Reading) -> float:
        assert r.picture is not None
        return float(identity_error(r.picture.face, r.picture.first_face).mean()) if len(r.picture.face) else np.nan

    return {"identity_error": _each(part, error, 1.0)}


def valid(part: Part, real: Real) -> Numbers:
    """Share of half seconds whose free choices are all one of the world's modes (worst 0)."""
    del real

    def share(r: Reading) -> float:
        return valid_share(choices) if (choices := free_choices(r)) else float("nan")

    # Tone can be read only where there is sound; a picture alone still has its own choices.
    return {"valid": _each(part, share, 0.0, *(() if part[0].picture else ("silent",)))}


def entropy(part: Part, real: Real) -> Numbers:
    """Entropy of the valid choices over the real clips', mean of the choices: pooled over clips, and within each.

    The first sees modes that are never used, the second clips that are stuck in one. A choice never valid counts as 0.
    """
    pooled: list[float] = []
    within: list[float] = []
    for name in free_choices(part[0]):
        ours, theirs = (_modes(x, name) for x in (part, real.prompts))
        # Equal lengths: the entropy of few observations depends on their number.
        length = min(map(len, (x for x in (*ours, *theirs) if len(x))), default=0)
        if not length or not any(map(len, theirs)):
            continue
        spread, wanted = (_mean_entropy(x, name, length) for x in (ours, theirs))
        within.append(spread / wanted if wanted > 0 else float("nan"))
        used = np.concatenate(ours)
        pooled.append(entropy_ratio(used, np.concatenate(theirs), CHOICES[name]) if len(used) else 0.0)
    return {"entropy": _mean(pooled), "entropy_within": _mean(within)}


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else float("nan")


def _mean_entropy(modes: Sequence[NDArray[np.int64]], name: str, length: int) -> float:
    """Mean over clips of the entropy of each one's first ``length`` choices, 0 for a clip without any."""
    return float(np.mean([choice_entropy(x[:length], CHOICES[name]) if len(x) else 0.0 for x in modes]))


def free_choices(reading: Reading) -> dict[str, ChoiceReading]:
    """Choice -> reading, all of the same number of half seconds."""
    found = dict(reading.picture.choices) if reading.picture else {}
    if reading.speech:
        found["tone"] = reading.speech.tone
    count = min((len(c.mode) for c in found.values()), default=0)
    return {name: cut_choice(c, slice(count)) for name, c in found.items()} if count else {}


def _modes(part: Part, name: str) -> list[NDArray[np.int64]]:
    """The valid modes of each clip."""
    found = [choices[name] for choices in map(free_choices, part) if name in choices]
    return [c.mode[c.valid] for c in found]


def persistence(part: Part, real: Real) -> Numbers:
    """Lag-1 correlation, half second to half second: of the head's place, and of the choices that persist.

    For a choice: how much more often than by chance the mode stays, (same - chance) / (1 - chance).
    """
    del real
    numbers = {f"lag1_{name}": _stays(part, name) for name in sorted(PERSISTENT)}
    heads = [_per_half(r) for r in part]
    steps = min(len(head) for head in heads)
    if steps > 1:
        pose = np.stack([head[:steps] for head in heads])  # [clips, K, 2]
        numbers["lag1_pose"] = float(np.mean([lag_one_correlation(pose[..., axis]) for axis in (0, 1)]))
    return numbers | {"lag1": float(np.mean(list(numbers.values())))}


def _per_half(reading: Reading) -> NDArray[np.float64]:
    assert reading.picture is not None
    size = round(reading.fps * HALF)
    whole = len(reading.picture.head) // size
    return reading.picture.head[: whole * size].reshape(whole, size, 2).mean(1)


def _stays(part: Part, name: str) -> float:
    chains = [choices[name].mode for choices in map(free_choices, part) if name in choices]
    same = np.concatenate([chain[1:] == chain[:-1] for chain in chains] or [np.zeros(0)])
    if not len(same):
        return float("nan")
    share = np.bincount(np.concatenate(chains)) / sum(map(len, chains))
    chance = float(np.square(share).sum())
    return float((same.mean() - chance) / (1 - chance)) if chance < 1 else float("nan")


def seams(part: Part, real: Real) -> Numbers:
    """Change across chunk borders over change inside chunks, divided by the same of real clips: 1 = as real ones."""
    numbers: Numbers = {}
    for name in part[0].seams:
        ours, theirs = _seam(part, name), _seam(real.prompts, name)
        numbers[f"seam_{name}"] = ours / theirs if theirs > 0 else float("nan")
        numbers[f"seam_{name}_raw"] = ours
    known = [v for k, v in numbers.items() if not k.endswith("_raw") and np.isfinite(v)]
    return numbers | ({"seam": float(np.mean(known))} if known else {})


def _seam(part: Part, name: str) -> float:
    """Pooled over clips; nan where nothing changes inside chunks, or there is no border."""
    energy = np.concatenate([r.seams[name].energy for r in part])
    border = np.concatenate([r.seams[name].border for r in part])
    if not border.any() or border.all() or not energy[~border].any():
        return float("nan")
    return float(energy[border].mean() / energy[~border].mean())


def distance(part: Part, real: Real) -> Numbers:
    """Frechet distance of the features of half seconds, in units of the real spread of each feature.

    Biased upwards for few half seconds: compare rows of equal ``frechet_n``; the row of real clips shows the floor.
    """
    kinds = part[0].features.keys()
    if not real.reference or not kinds <= real.reference[0].features.keys():
        return {}
    ours, theirs = (np.concatenate([_joint(r, tuple(kinds)) for r in x]) for x in (part, real.reference))
    if min(len(ours), len(theirs)) < 2:
        return {}
    middle, unit = theirs.mean(0), np.maximum(theirs.std(0), 1e-3)
    ours, theirs = (np.nan_to_num((x - middle) / unit, nan=_FAR).clip(-_FAR, _FAR) for x in (ours, theirs))
    return {
        "frechet": frechet_distance(ours, theirs, SHRINKAGE),
        "frechet_n": float(len(ours)),
        "frechet_n_real": float(len(theirs)),
        "frechet_shrinkage": SHRINKAGE,
    }


def _joint(reading: Reading, kinds: tuple[str, ...]) -> NDArray[np.float64]:
    count = min(len(reading.features[m]) for m in kinds)
    return np.concatenate([reading.features[m][:count] for m in kinds], axis=1)


def motion(part: Part, real: Real) -> Numbers:
    """Mean change of grey levels (0 .. 255) from frame to frame."""
    del real
    return {"motion": _each(part, lambda r: float(np.mean(r.motion)) if r.motion is not None else np.nan, 0.0)}


def loudness(part: Part, real: Real) -> Numbers:
    """Decibel of full scale, and the share of tenths of a second in which nothing can be heard."""
    del real

    def level(r: Reading) -> float:
        assert r.sound is not None
        return float(decibel(rms(r.sound))) if len(r.sound) else np.nan

    def quiet(r: Reading) -> float:
        assert r.sound is not None
        return float((sound_envelope(r.sound, r.sample_rate, 10.0) < 1e-3).mean()) if len(r.sound) else np.nan

    return {"loudness_db": _each(part, level, -60.0), "silence": _each(part, quiet, 1.0)}
