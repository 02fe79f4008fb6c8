"""Metrics of real people: face, blinks, speech quality and voice. They need the extra ``people``."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mfcore.metrics.identity import identity_similarity
from workflows.evaluation.clip_features import ClipFeatures
from workflows.evaluation.metrics.generic import FeatureSet, MetricValues, ReferenceFeatures, mean_over_clips

_WORST_JITTER = 1.0  # face heights per frame
_WORST_QUALITY = 1.0  # lowest opinion score
_CLOSED = 0.6  # opening of the eyes over its median in a blink
_BLINK_SECONDS = (0.04, 0.6)
_MIN_BLINK_CLIP_SECONDS = 2.0


def face_metrics(clips: FeatureSet) -> MetricValues:
    """Return the share of frames with a face (worst 0), its jitter (worst 1) and blinks per minute.

    Jitter: median change of the face's velocity between frames, in heights of the face.
    """
    return {
        "face_found": mean_over_clips(clips, lambda r: _mean(r.tracks["face"].values[:, 0]), 0.0),
        "face_jitter": mean_over_clips(clips, _jitter, _WORST_JITTER),
        "blinks_per_minute": mean_over_clips(clips, _blink_rate, 0.0),
    }


def speech_quality_metrics(clips: FeatureSet) -> MetricValues:
    """Return the overall DNSMOS, 1 to 5, mean over parts of 3 s (worst 1)."""
    quality = mean_over_clips(clips, lambda r: _mean(r.tracks["quality"].values), _WORST_QUALITY, "silent")
    return {"speech_quality": quality}


def speaker_similarity(clips: FeatureSet, real: ReferenceFeatures) -> MetricValues:
    """Return the cosine of speaker embeddings with the real clip of the same prompt (worst -1)."""
    voices = [r.tracks["speaker"].values for r in real.prompts]
    if len(voices) != len(clips):  # some clips end before this window
        return {}
    pairs = {id(r): voice for r, voice in zip(clips, voices, strict=True)}

    def similarity(r: ClipFeatures) -> float:
        ours, theirs = r.tracks["speaker"].values, pairs[id(r)]
        if not len(ours) or not len(theirs):
            return float("nan")
        return float(identity_similarity(ours.mean(0)[None], theirs.mean(0))[0])

    return {"speaker_similarity": mean_over_clips(clips, similarity, -1.0, "silent")}


def _mean(values: NDArray[np.floating[Any]]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def _jitter(r: ClipFeatures) -> float:
    """Return the median second difference of the center of the face over its height; NaN without three frames."""
    face = r.tracks["face"].values
    seen = (face[2:, 0] * face[1:-1, 0] * face[:-2, 0]).astype(bool)
    if not seen.any():
        return float("nan")
    change = np.linalg.norm(face[2:, 1:3] - 2 * face[1:-1, 1:3] + face[:-2, 1:3], axis=1)
    return float(np.median(change[seen] / face[1:-1, 3][seen]))


def _blink_rate(r: ClipFeatures) -> float:
    """Return the blinks per minute: dips of the opening of the eyes. NaN with less than two seconds of a face."""
    face = r.tracks["face"].values
    opening = face[face[:, 0] > 0, 4]
    seconds = len(opening) / r.fps
    if seconds < _MIN_BLINK_CLIP_SECONDS:
        return float("nan")
    closed = np.concatenate([[False], opening < _CLOSED * np.median(opening), [False]])
    (edges,) = np.nonzero(np.diff(closed.astype(int)))
    lengths = (edges[1::2] - edges[::2]) / r.fps
    blinks = int(((lengths >= _BLINK_SECONDS[0] - 0.5 / r.fps) & (lengths <= _BLINK_SECONDS[1])).sum())
    return 60 * blinks / seconds
