"""Metrics computed with pretrained networks from local files."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mfcore.metrics.bootstrap import mean_interval
from mfcore.metrics.distributions import kl_divergence
from mfcore.metrics.identity import identity_similarity
from mfcore.metrics.lip_sync_error import lip_sync_error
from mfcore.metrics.speech import edit_distance
from workflows.evaluation.clip_features import MAX_SYNC_LAG_S, ClipFeatures
from workflows.evaluation.metrics import generic
from workflows.evaluation.metrics.generic import (
    FeatureSet,
    MetricValue,
    MetricValues,
    ReferenceFeatures,
    mean_over_clips,
)

_WORST_LSE_D = 20.0  # LSE-D of a failed clip: twice that of unrelated video and audio
_MIN_PROBABILITY = 1e-6  # lower bound of a class probability


def lse_metrics(clips: FeatureSet) -> MetricValues:
    """Return LSE-C (worst 0), LSE-D and the absolute offset of the best shift in seconds."""
    found = {id(r): lip_sync_error(r.tracks["lips"].values, r.tracks["voice"].values) for r in clips}

    def item(name: str, worst: float) -> MetricValue:
        def value(clip: ClipFeatures) -> float:
            result = found[id(clip)]
            return float("nan") if result is None else abs(getattr(result, name))

        return mean_over_clips(clips, value, worst, "silent")

    return {
        "lse_c": item("confidence", 0.0),
        "lse_d": item("distance", _WORST_LSE_D),
        "lse_offset_s": item("offset_sec", MAX_SYNC_LAG_S),
    }


def whisper_errors(clips: FeatureSet) -> MetricValues:
    """Return word and character error rates of Whisper. Without any output, every word is an error."""
    return _errors(clips, "whisper", "")


def pocketsphinx_errors(clips: FeatureSet) -> MetricValues:
    """Return the error rates of PocketSphinx, a weak recognizer: supplementary to Whisper."""
    return _errors(clips, "pocketsphinx", "_pocketsphinx")


def _errors(clips: FeatureSet, recognizer: str, ending: str) -> MetricValues:
    words = [_count_errors(clip, recognizer, letters=False) for clip in clips]
    letters = [_count_errors(clip, recognizer, letters=True) for clip in clips]
    failed = sum(not r.finite or r.is_silent for r in clips)
    out: MetricValues = {}
    for name, counts in (("wer", words), ("cer", letters)):
        if any(expected for _, expected in counts):
            found = mean_interval([w for w, _ in counts], [s for _, s in counts])
            bounds = {"low": found.low, "high": found.high}
            out[name + ending] = MetricValue(value=found.value, count=len(clips), failed=failed, **bounds)
    return out


def _count_errors(clip: ClipFeatures, recognizer: str, *, letters: bool) -> tuple[int, int]:
    """Return the edit distance and the number of reference units, summed over the segments of a clip."""
    wrong = expected = 0
    for utterance in clip.utterances:
        detected = utterance.detected[recognizer] if clip.finite and not clip.is_silent else ()
        wanted, got = (list(" ".join(x)) if letters else list(x) for x in (utterance.expected, detected))
        wrong += edit_distance(got, wanted)
        expected += len(wanted)
    return wrong, expected


def videomae_frechet(clips: FeatureSet, real: ReferenceFeatures) -> MetricValues:
    """Return the Frechet distance of VideoMAE features of two-second segments."""
    return _frechet(clips, real, "videomae")


def clap_frechet(clips: FeatureSet, real: ReferenceFeatures) -> MetricValues:
    """Return the Frechet distance of CLAP features of two-second segments."""
    return _frechet(clips, real, "clap")


def _frechet(clips: FeatureSet, real: ReferenceFeatures, name: str) -> MetricValues:
    generated = [clip.tracks[name].values for clip in clips if name in clip.tracks]
    reference = [clip.tracks[name].values for clip in real.reference if name in clip.tracks]
    return generic.frechet_metrics(f"frechet_{name}", generated, reference, generic.FRECHET_SHRINKAGE)


def face_similarity(clips: FeatureSet) -> MetricValues:
    """Return the cosine similarity of face embeddings to the first frame, mean over segments (worst -1)."""

    def similarity(r: ClipFeatures) -> float:
        track = r.tracks["faces"]
        assert track.reference is not None
        return float(identity_similarity(track.values, track.reference).mean()) if len(track.values) else np.nan

    return {"face_similarity": mean_over_clips(clips, similarity, -1.0)}


def audio_class_kl(clips: FeatureSet, real: ReferenceFeatures) -> MetricValues:
    """Return the KL divergence of the audio classes of each real clip from those of its sample."""
    distributions = [_class_distribution(r.tracks["sounds"].values) for r in real.prompts]
    if len(distributions) != len(clips):  # some clips end before this window
        return {}
    pairs = {id(r): distribution for r, distribution in zip(clips, distributions, strict=True)}
    worst = -float(np.log(_MIN_PROBABILITY))

    def divergence(r: ClipFeatures) -> float:
        ours, theirs = _class_distribution(r.tracks["sounds"].values), pairs[id(r)]
        return float("nan") if ours is None or theirs is None else kl_divergence(theirs, ours)

    return {"sound_kl": mean_over_clips(clips, divergence, worst, "silent")}


def _class_distribution(rows: NDArray[Any] | Sequence[Any]) -> NDArray[np.float64] | None:
    """Return the mean class distribution over segments; None without segments."""
    if not len(rows):
        return None
    found = np.maximum(np.asarray(rows, np.float64).mean(0), _MIN_PROBABILITY)
    return found / found.sum()
