"""Measures through trained networks whose weights the user has on disk."""

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

_FAR_LIPS = 20.0  # LSE-D of a clip that failed: twice what unrelated lips and sound have
_RARE = 1e-6  # least probability of a class


def lse_metrics(part: FeatureSet) -> MetricValues:
    """LSE-C (worst 0), LSE-D, and how far the best shift is from 0."""
    found = {id(r): lip_sync_error(r.tracks["lips"].values, r.tracks["voice"].values) for r in part}

    def item(name: str, worst: float) -> MetricValue:
        value = lambda r: float("nan") if (one := found[id(r)]) is None else abs(getattr(one, name))
        return mean_over_clips(part, value, worst, "silent")

    return {
        "lse_c": item("confidence", 0.0),
        "lse_d": item("distance", _FAR_LIPS),
        "lse_offset_s": item("offset_sec", MAX_SYNC_LAG_S),
    }


def whisper_errors(part: FeatureSet) -> MetricValues:
    """Word and character error rates by Whisper; nothing heard counts every word as wrong."""
    return _errors(part, "whisper", "")


def pocketsphinx_errors(part: FeatureSet) -> MetricValues:
    """The same by the embedded recogniser, whose own errors are many: a number beside, not instead."""
    return _errors(part, "pocketsphinx", "_pocketsphinx")


def _errors(part: FeatureSet, recogniser: str, ending: str) -> MetricValues:
    words = [_wrong(reading, recogniser, letters=False) for reading in part]
    letters = [_wrong(reading, recogniser, letters=True) for reading in part]
    failed = sum(not r.finite or r.is_silent for r in part)
    out: MetricValues = {}
    for name, counts in (("wer", words), ("cer", letters)):
        if any(said for _, said in counts):
            found = mean_interval([w for w, _ in counts], [s for _, s in counts])
            bounds = {"low": found.low, "high": found.high}
            out[name + ending] = MetricValue(value=found.value, count=len(part), failed=failed, **bounds)
    return out


def _wrong(reading: ClipFeatures, recogniser: str, *, letters: bool) -> tuple[int, int]:
    """Edits, and units said."""
    wrong = said = 0
    for utterance in reading.utterances:
        heard = utterance.heard[recogniser] if reading.finite and not reading.is_silent else ()
        wanted, got = (list(" ".join(x)) if letters else list(x) for x in (utterance.said, heard))
        wrong += edit_distance(got, wanted)
        said += len(wanted)
    return wrong, said


def videomae_frechet(part: FeatureSet, real: ReferenceFeatures) -> MetricValues:
    """Frechet distance of VideoMAE's features of two-second segments."""
    return _frechet(part, real, "videomae")


def clap_frechet(part: FeatureSet, real: ReferenceFeatures) -> MetricValues:
    """Frechet distance of CLAP's features of two-second segments."""
    return _frechet(part, real, "clap")


def _frechet(part: FeatureSet, real: ReferenceFeatures, name: str) -> MetricValues:
    clips = lambda readings: [r.tracks[name].values for r in readings if name in r.tracks]
    return generic.frechet_metrics(f"frechet_{name}", clips(part), clips(real.reference), generic.FRECHET_SHRINKAGE)


def face_similarity(part: FeatureSet) -> MetricValues:
    """Cosine of the face's vector with the first frame's, mean over segments (worst -1)."""

    def similarity(r: ClipFeatures) -> float:
        track = r.tracks["faces"]
        assert track.reference is not None
        return float(identity_similarity(track.values, track.reference).mean()) if len(track.values) else np.nan

    return {"face_similarity": mean_over_clips(part, similarity, -1.0)}


def audio_class_kl(part: FeatureSet, real: ReferenceFeatures) -> MetricValues:
    """Kullback-Leibler divergence of the sound classes of each clip's prompt, as really heard, from the sample's."""
    laws = [_law(r.tracks["sounds"].values) for r in real.prompts]
    if len(laws) != len(part):  # a window that not all of them reach into
        return {}
    pairs = {id(r): law for r, law in zip(part, laws, strict=True)}
    worst = -float(np.log(_RARE))

    def divergence(r: ClipFeatures) -> float:
        ours, theirs = _law(r.tracks["sounds"].values), pairs[id(r)]
        return float("nan") if ours is None or theirs is None else kl_divergence(theirs, ours)

    return {"sound_kl": mean_over_clips(part, divergence, worst, "silent")}


def _law(rows: NDArray[Any] | Sequence[Any]) -> NDArray[np.float64] | None:
    """Mean over segments."""
    if not len(rows):
        return None
    found = np.maximum(np.asarray(rows, np.float64).mean(0), _RARE)
    return found / found.sum()
