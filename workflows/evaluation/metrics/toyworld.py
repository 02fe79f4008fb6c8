"""Measures that know the toy world, through its exact readers."""

from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from mfcore.metrics.bootstrap import mean_interval
from mfcore.metrics.continuity import lag_one_correlation
from mfcore.metrics.distributions import entropy_ratio, kl_divergence, mode_entropy, smoothed_distribution
from mfcore.metrics.identity import identity_error
from mfcore.metrics.speech import edit_distance
from preprocessing.toyworld.audio_reader import mouth_correlation
from preprocessing.toyworld.choices import ChoiceReading, valid_fraction
from preprocessing.toyworld.world import CHOICES, PERSISTENT
from workflows.evaluation.clip_features import HALF_SECOND, MAX_SYNC_LAG_S, ClipFeatures, crop_choice
from workflows.evaluation.metrics import generic
from workflows.evaluation.metrics.generic import (
    FeatureSet,
    MetricValue,
    MetricValues,
    ReferenceFeatures,
    finite_mean,
    mean_over_clips,
    shared_values,
)

_FAR = 30.0  # real spreads at which features are cut, and what cannot be read is


def mouth_sync_metrics(part: FeatureSet) -> MetricValues:
    """Mouth opening against loudness: correlation at offset 0 (worst -1), and how far the best offset is from 0."""
    mean_of = partial(mean_over_clips, part)

    def correlation(r: ClipFeatures) -> float:
        assert r.picture is not None
        assert r.sound is not None
        return mouth_correlation(r.picture.opening, r.fps, r.sound, r.sample_rate)

    def distance(r: ClipFeatures) -> float:
        assert r.mouth_sync is not None
        return abs(r.mouth_sync.offset_sec)

    return {
        "sync": mean_of(correlation, -1.0, "silent", "no_mouth"),
        "sync_offset_s": mean_of(distance, MAX_SYNC_LAG_S, "silent", "no_mouth"),
    }


def syllable_error(part: FeatureSet) -> MetricValues:
    """Edit distance of syllables over their number, at most 1 for any one clip: babble is no better than silence."""
    wrong: list[int] = []
    said: list[int] = []
    failed = 0
    for reading in part:
        assert reading.speech is not None
        wanted, heard = ([name for name, _ in units] for units in (reading.speech.said, reading.speech.heard))
        bad = not reading.finite or reading.is_silent
        failed += bad
        wrong.append(len(wanted) if bad else min(len(wanted), edit_distance(heard, wanted)))
        said.append(len(wanted))
    if not any(said):
        return {}
    found = mean_interval(wrong, said)
    return {
        "syllable_error": MetricValue(value=found.value, count=len(part), failed=failed, low=found.low, high=found.high)
    }


def mean_identity_error(part: FeatureSet) -> MetricValues:
    """Colour of the face against the first frame's, root mean square over RGB in 0 .. 1 (worst 1)."""

    def error(r: ClipFeatures) -> float:
        assert r.picture is not None
        return float(identity_error(r.picture.face, r.picture.first_face).mean()) if len(r.picture.face) else np.nan

    return {"identity_error": mean_over_clips(part, error, 1.0)}


def valid_choices(part: FeatureSet) -> MetricValues:
    """Share of half seconds whose free choices are all one of the world's modes (worst 0)."""

    def share(r: ClipFeatures) -> float:
        return valid_fraction(choices) if (choices := free_choices_of(r)) else float("nan")

    # Tone can be read only where there is sound; a picture alone still has its own choices.
    return {"valid": mean_over_clips(part, share, 0.0, *(() if part[0].picture else ("silent",)))}


def choice_entropy(part: FeatureSet, real: ReferenceFeatures) -> MetricValues:
    """Entropy of the valid choices over the real clips', mean of the choices: pooled over clips, and within each.

    Also the Kullback-Leibler divergence of the real clips' choices from these, nats, half an observation added to each.
    The first sees modes that are never used, the second clips that are stuck in one. A choice never valid counts as 0.
    """
    pooled: list[float] = []
    within: list[float] = []
    divergence: list[float] = []
    for name in free_choices_of(part[0]):
        ours, theirs = (_modes(x, name) for x in (part, real.prompts))
        # Equal lengths: the entropy of few observations depends on their number.
        length = min(map(len, (x for x in (*ours, *theirs) if len(x))), default=0)
        if not length or not any(map(len, theirs)):
            continue
        spread, wanted = (_mean_entropy(x, name, length) for x in (ours, theirs))
        within.append(spread / wanted if wanted > 0 else float("nan"))
        used, known = np.concatenate(ours), np.concatenate(theirs)
        pooled.append(entropy_ratio(used, known, CHOICES[name]) if len(used) else 0.0)
        counts = [np.bincount(x, minlength=CHOICES[name]) for x in (known, used)]
        divergence.append(kl_divergence(smoothed_distribution(counts[0]), smoothed_distribution(counts[1])))
    return shared_values(
        part,
        {"entropy": finite_mean(pooled), "entropy_within": finite_mean(within), "choice_kl": finite_mean(divergence)},
    )


def _mean_entropy(modes: Sequence[NDArray[np.int64]], name: str, length: int) -> float:
    """Mean over clips of the entropy of each one's first ``length`` choices, 0 for a clip without any."""
    return float(np.mean([mode_entropy(x[:length], CHOICES[name]) if len(x) else 0.0 for x in modes]))


def free_choices_of(reading: ClipFeatures) -> dict[str, ChoiceReading]:
    """Choice -> reading, all of the same number of half seconds."""
    found = dict(reading.picture.choices) if reading.picture else {}
    if reading.speech:
        found["tone"] = reading.speech.tone
    count = min((len(c.mode) for c in found.values()), default=0)
    return {name: crop_choice(c, slice(count)) for name, c in found.items()} if count else {}


def _modes(part: FeatureSet, name: str) -> list[NDArray[np.int64]]:
    """The valid modes of each clip."""
    found = [choices[name] for choices in map(free_choices_of, part) if name in choices]
    return [c.mode[c.valid] for c in found]


def lag_one_persistence(part: FeatureSet) -> MetricValues:
    """Lag-1 correlation, half second to half second: of the head's place, and of the choices that persist.

    For a choice: how much more often than by chance the mode stays, (same - chance) / (1 - chance).
    """
    numbers: dict[str, float] = {f"lag1_{name}": _stays(part, name) for name in sorted(PERSISTENT)}
    heads = [_per_half(r) for r in part]
    steps = min(len(head) for head in heads)
    if steps > 1:
        pose = np.stack([head[:steps] for head in heads])  # [clips, K, 2]
        numbers["lag1_pose"] = float(np.mean([lag_one_correlation(pose[..., axis]) for axis in (0, 1)]))
    return shared_values(part, numbers | {"lag1": float(np.mean(list(numbers.values())))})


def _per_half(reading: ClipFeatures) -> NDArray[np.float64]:
    assert reading.picture is not None
    size = round(reading.fps * HALF_SECOND)
    whole = len(reading.picture.head) // size
    return reading.picture.head[: whole * size].reshape(whole, size, 2).mean(1)


def _stays(part: FeatureSet, name: str) -> float:
    chains = [choices[name].mode for choices in map(free_choices_of, part) if name in choices]
    same = np.concatenate([chain[1:] == chain[:-1] for chain in chains] or [np.zeros(0)])
    if not len(same):
        return float("nan")
    share = np.bincount(np.concatenate(chains)) / sum(map(len, chains))
    chance = float(np.square(share).sum())
    return float((same.mean() - chance) / (1 - chance)) if chance < 1 else float("nan")


def toyworld_frechet(part: FeatureSet, real: ReferenceFeatures) -> MetricValues:
    """Frechet distance of the features of half seconds, in units of the real spread of each feature."""
    kinds = tuple(part[0].features)
    if not real.reference or not set(kinds) <= real.reference[0].features.keys():
        return {}
    ours, theirs = ([_joint(r, kinds) for r in x] for x in (part, real.reference))
    everything = np.concatenate(theirs)
    if len(everything) < 2:
        return {}
    middle, unit = everything.mean(0), np.maximum(everything.std(0), 1e-3)
    ours, theirs = ([_scaled(x, middle, unit) for x in clips] for clips in (ours, theirs))
    return generic.frechet_metrics("frechet", ours, theirs, generic.FRECHET_SHRINKAGE)


def _scaled(x: NDArray[np.float64], middle: NDArray[np.float64], unit: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.nan_to_num((x - middle) / unit, nan=_FAR).clip(-_FAR, _FAR)


def _joint(reading: ClipFeatures, kinds: tuple[str, ...]) -> NDArray[np.float64]:
    count = min(len(reading.features[m]) for m in kinds)
    return np.concatenate([reading.features[m][:count] for m in kinds], axis=1)
