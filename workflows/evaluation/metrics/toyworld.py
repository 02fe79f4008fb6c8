"""Metrics of the toy world, computed with its exact readers."""

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

_MAX_DEVIATION = 30.0  # limit of standardized features; also the value of unreadable ones


def mouth_sync_metrics(clips: FeatureSet) -> MetricValues:
    """Return the correlation of mouth opening and loudness (worst -1) and the absolute best offset in seconds."""
    mean_of = partial(mean_over_clips, clips)

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


def viseme_sync(clips: FeatureSet) -> MetricValues:
    """Return the correlation of the mouth opening with that of the phonemes in the transcript (worst -1)."""

    def correlation(r: ClipFeatures) -> float:
        assert r.picture is not None
        assert r.picture.spoken_opening is not None
        return float(np.corrcoef(r.picture.opening, r.picture.spoken_opening)[0, 1])

    spoken = [r for r in clips if r.picture and r.picture.spoken_opening is not None and r.picture.spoken_opening.any()]
    with np.errstate(divide="ignore", invalid="ignore"):  # a mouth that never moves has no correlation: the worst value
        return {"viseme_sync": mean_over_clips(spoken, correlation, -1.0, "no_mouth")} if spoken else {}


def phoneme_accuracy(clips: FeatureSet) -> MetricValues:
    """Return the share of 10 ms frames in which the phoneme recognizer reads that of the transcript (worst 0)."""

    def share(r: ClipFeatures) -> float:
        assert r.phonemes is not None
        return float(r.phonemes.mean()) if len(r.phonemes) else float("nan")

    heard = [r for r in clips if r.phonemes is not None]
    return {"phoneme_accuracy": mean_over_clips(heard, share, 0.0)} if heard else {}


def syllable_error(clips: FeatureSet) -> MetricValues:
    """Return the edit distance of syllables over their number, limited to 1 per clip (as for silence)."""
    wrong: list[int] = []
    expected: list[int] = []
    failed = 0
    for clip in clips:
        assert clip.speech is not None
        wanted = [name for name, _ in clip.speech.expected]
        detected = [name for name, _ in clip.speech.detected]
        is_failed = not clip.finite or clip.is_silent
        failed += is_failed
        wrong.append(len(wanted) if is_failed else min(len(wanted), edit_distance(detected, wanted)))
        expected.append(len(wanted))
    if not any(expected):
        return {}
    found = mean_interval(wrong, expected)
    return {
        "syllable_error": MetricValue(
            value=found.value, count=len(clips), failed=failed, low=found.low, high=found.high
        )
    }


def mean_identity_error(clips: FeatureSet) -> MetricValues:
    """Return the RMS difference of the face color to the first frame, RGB in 0 to 1 (worst 1)."""

    def error(r: ClipFeatures) -> float:
        assert r.picture is not None
        return float(identity_error(r.picture.face, r.picture.first_face).mean()) if len(r.picture.face) else np.nan

    return {"identity_error": mean_over_clips(clips, error, 1.0)}


def valid_choices(clips: FeatureSet) -> MetricValues:
    """Return the share of half seconds in which all free choices are valid modes (worst 0)."""

    def share(r: ClipFeatures) -> float:
        choices = free_choices_of(r)
        return valid_fraction(choices) if choices else float("nan")

    # Silent clips with video still have visual choices.
    failures = () if clips[0].picture else ("silent",)
    return {"valid": mean_over_clips(clips, share, 0.0, *failures)}


def choice_entropy(clips: FeatureSet, real: ReferenceFeatures) -> MetricValues:
    """Return the entropy of choices relative to real clips, pooled and within clips, and the KL divergence in nats.

    The pooled entropy detects unused modes; the entropy within clips detects clips with a constant mode. A choice that
    is never valid counts as 0. The divergence adds half an observation to each mode.
    """
    pooled: list[float] = []
    within: list[float] = []
    divergence: list[float] = []
    for name in free_choices_of(clips[0]):
        ours = _modes(clips, name)
        theirs = _modes(real.prompts, name)
        # The entropy of few observations depends on their number, so lengths are equal.
        length = min(map(len, (x for x in (*ours, *theirs) if len(x))), default=0)
        if not length or not any(map(len, theirs)):
            continue
        entropy = _mean_entropy(ours, name, length)
        real_entropy = _mean_entropy(theirs, name, length)
        within.append(entropy / real_entropy if real_entropy > 0 else float("nan"))
        used, known = np.concatenate(ours), np.concatenate(theirs)
        pooled.append(entropy_ratio(used, known, CHOICES[name]) if len(used) else 0.0)
        counts = [np.bincount(x, minlength=CHOICES[name]) for x in (known, used)]
        divergence.append(kl_divergence(smoothed_distribution(counts[0]), smoothed_distribution(counts[1])))
    return shared_values(
        clips,
        {"entropy": finite_mean(pooled), "entropy_within": finite_mean(within), "choice_kl": finite_mean(divergence)},
    )


def _mean_entropy(modes: Sequence[NDArray[np.int64]], name: str, length: int) -> float:
    """Return the mean over clips of the entropy of the first ``length`` choices; 0 for a clip without choices."""
    return float(np.mean([mode_entropy(x[:length], CHOICES[name]) if len(x) else 0.0 for x in modes]))


def free_choices_of(clip: ClipFeatures) -> dict[str, ChoiceReading]:
    """Return the readings by choice, cut to the same number of half seconds."""
    found = dict(clip.picture.choices) if clip.picture else {}
    if clip.speech:
        found["tone"] = clip.speech.tone
    count = min((len(c.mode) for c in found.values()), default=0)
    return {name: crop_choice(c, slice(count)) for name, c in found.items()} if count else {}


def _modes(clips: FeatureSet, name: str) -> list[NDArray[np.int64]]:
    """Return the valid modes of each clip."""
    found = [choices[name] for choices in map(free_choices_of, clips) if name in choices]
    return [c.mode[c.valid] for c in found]


def lag_one_persistence(clips: FeatureSet) -> MetricValues:
    """Return the lag-1 correlation over half seconds, of the head position and of the persistent choices.

    For a choice this is (same - chance) / (1 - chance), with the observed and the chance rate of equal neighbors.
    """
    numbers: dict[str, float] = {f"lag1_{name}": _mode_persistence(clips, name) for name in sorted(PERSISTENT)}
    heads = [_head_per_half_second(r) for r in clips]
    steps = min(len(head) for head in heads)
    if steps > 1:
        pose = np.stack([head[:steps] for head in heads])  # [clips, K, 2]
        numbers["lag1_pose"] = float(np.mean([lag_one_correlation(pose[..., axis]) for axis in (0, 1)]))
    return shared_values(clips, numbers | {"lag1": float(np.mean(list(numbers.values())))})


def _head_per_half_second(clip: ClipFeatures) -> NDArray[np.float64]:
    assert clip.picture is not None
    size = round(clip.fps * HALF_SECOND)
    whole = len(clip.picture.head) // size
    return clip.picture.head[: whole * size].reshape(whole, size, 2).mean(1)


def _mode_persistence(clips: FeatureSet, name: str) -> float:
    chains = [choices[name].mode for choices in map(free_choices_of, clips) if name in choices]
    same = np.concatenate([chain[1:] == chain[:-1] for chain in chains] or [np.zeros(0)])
    if not len(same):
        return float("nan")
    share = np.bincount(np.concatenate(chains)) / sum(map(len, chains))
    chance = float(np.square(share).sum())
    return float((same.mean() - chance) / (1 - chance)) if chance < 1 else float("nan")


def toyworld_frechet(clips: FeatureSet, real: ReferenceFeatures) -> MetricValues:
    """Return the Frechet distance of half-second features, standardized by the real clips."""
    kinds = tuple(clips[0].features)
    if not real.reference or not set(kinds) <= real.reference[0].features.keys():
        return {}
    generated = [_joint_features(clip, kinds) for clip in clips]
    reference = [_joint_features(clip, kinds) for clip in real.reference]
    pooled = np.concatenate(reference)
    if len(pooled) < 2:
        return {}
    mean = pooled.mean(0)
    std = np.maximum(pooled.std(0), 1e-3)
    generated = [_standardize(x, mean, std) for x in generated]
    reference = [_standardize(x, mean, std) for x in reference]
    return generic.frechet_metrics("frechet", generated, reference, generic.FRECHET_SHRINKAGE)


def _standardize(x: NDArray[np.float64], mean: NDArray[np.float64], std: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.nan_to_num((x - mean) / std, nan=_MAX_DEVIATION).clip(-_MAX_DEVIATION, _MAX_DEVIATION)


def _joint_features(clip: ClipFeatures, kinds: tuple[str, ...]) -> NDArray[np.float64]:
    count = min(len(clip.features[m]) for m in kinds)
    return np.concatenate([clip.features[m][:count] for m in kinds], axis=1)
