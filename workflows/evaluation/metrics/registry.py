"""Registry of the metrics of a sweep.

Every metric lists its requirements. With an unmet requirement it is reported as not measured, never as 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mfcore.metrics.windows import TimeWindow
from workflows.evaluation.clip_features import ClipFeatures
from workflows.evaluation.feature_models import requirement_text
from workflows.evaluation.metrics import generic, people, pretrained, toyworld
from workflows.evaluation.metrics.generic import (
    FAILURE_PREDICATES,
    FeatureSet,
    MetricValue,
    MetricValues,
    Numbers,
    ReferenceFeatures,
)

MIN_WINDOW_SECONDS = 1.0  # seconds of a clip that must be inside a window
_TOY = "a toy world dataset"
_VIDEO = "a checkpoint that generates video"
_AUDIO = "a checkpoint that generates audio"
_SPEECH = "clips with a transcript"
_WORDS = "a transcript with words (toy syllables do not count)"
_PHONEMES = "a transcript of phonemes"
_LIPS = requirement_text("syncnet")
_PEOPLE = requirement_text("people")
_NETWORKS = ("videomae", "clap", "faces", "sounds")


@dataclass(frozen=True, kw_only=True)
class MetricSpec:
    """One or more related metrics that are computed together."""

    names: tuple[str, ...]
    needs: tuple[str, ...]
    measure: Callable[..., MetricValues]  # of the clips, and of the real clips if needs_reference
    needs_reference: bool = False

    def compute(self, clips: FeatureSet, real: ReferenceFeatures) -> MetricValues:
        """Return the values for the clips; names without a value are absent."""
        return self.measure(clips, real) if self.needs_reference else self.measure(clips)


@dataclass(frozen=True, kw_only=True)
class ClipSetScores:
    """Metrics of a set of clips in one window."""

    found: MetricValues
    not_measured: dict[str, str]  # metric -> "not measured: needs ..."
    failures: dict[str, int]  # kind of failure -> clips

    @property
    def metrics(self) -> Numbers:
        """Return the values without counts and intervals."""
        return {name: score.value for name, score in self.found.items()}


@dataclass(frozen=True, kw_only=True)
class WindowScores:
    """Clips cut to one time window, with their scores."""

    window: str  # name; "all": whole clips
    clips: FeatureSet
    scores: ClipSetScores


def compute_metrics_by_window(
    clips: FeatureSet, lengths: Sequence[float], windows: Sequence[TimeWindow], real: ReferenceFeatures
) -> list[WindowScores]:
    """Return the scores of whole clips, then of each window that clips reach into by a second or more."""
    made: list[WindowScores] = []
    named = [("all", TimeWindow(start=0.0)), *((w.name, w) for w in windows)]
    for name, window in named:
        least = window.start + MIN_WINDOW_SECONDS if name != "all" else 0.0
        inside = [r.crop(window) for r, length in zip(clips, lengths, strict=True) if length >= least]
        if inside:
            made.append(WindowScores(window=name, clips=inside, scores=compute_metrics(inside, real)))
    return made


def compute_metrics(clips: FeatureSet, real: ReferenceFeatures) -> ClipSetScores:
    """Return all metrics of the clips. A metric that is not finite counts as not measured."""
    present = _available_inputs(clips)
    found: MetricValues = {}
    not_measured: dict[str, str] = {}
    for metric in METRICS:
        unmet = [need for need in metric.needs if need not in present]
        scores = {} if unmet else metric.compute(clips, real)
        requirement = ", ".join(unmet) or "longer clips, more of them, or some in which it varies"
        for name in metric.names:
            if name in scores and np.isfinite(scores[name].value):
                found[name] = scores[name]
            else:
                not_measured[name] = f"not measured: needs {requirement}"
    failures = {kind: sum(map(failed, clips)) for kind, failed in FAILURE_PREDICATES.items()}
    failed = sum(any(failed(r) for failed in FAILURE_PREDICATES.values()) for r in clips)
    found["failed"] = MetricValue(value=float(failed), count=len(clips), failed=failed)
    return ClipSetScores(found=found, not_measured=not_measured, failures=failures)


def _available_inputs(clips: FeatureSet) -> set[str]:
    first = clips[0]
    found = {_TOY} if first.features else set[str]()
    found |= {_VIDEO} if first.motion is not None else set()
    found |= {_AUDIO} if first.sound is not None else set()
    found |= {requirement_text(name) for name in _NETWORKS if name in first.tracks}
    found |= {_PEOPLE} if {"face", "speaker"} & set(first.tracks) else set()
    found |= {_LIPS} if "lips" in first.tracks else set()
    found |= {requirement_text(name) for r in clips for u in r.utterances for name in u.detected}
    found |= {_PHONEMES} if any(map(_has_phonemes, clips)) else set()
    found |= {_WORDS} if any(r.words for r in clips) else set()
    return found | ({_SPEECH} if any(r.speech and r.speech.expected for r in clips) else set())


def _has_phonemes(r: ClipFeatures) -> bool:
    return r.phonemes is not None or (r.picture is not None and r.picture.spoken_opening is not None)


_VIDEO_SEAMS = ("seam_pixels", "seam_pixels_raw", "seam_video_latents", "seam_video_latents_raw")
_AUDIO_SEAMS = ("seam_sound", "seam_sound_raw", "seam_audio_latents", "seam_audio_latents_raw")


def _frechet_names(name: str) -> tuple[str, ...]:
    return name, f"{name}_bias", f"{name}_n", f"{name}_n_real", f"{name}_shrinkage"


METRICS = (
    MetricSpec(names=("sync", "sync_offset_s"), needs=(_TOY, _VIDEO, _AUDIO), measure=toyworld.mouth_sync_metrics),
    MetricSpec(
        names=("motion_sync", "motion_sync_offset_s"), needs=(_VIDEO, _AUDIO), measure=generic.motion_sync_metrics
    ),
    MetricSpec(
        names=("sync_offset_median_s", "sync_offset_spread_s", "sync_within_80ms"),
        needs=(_VIDEO, _AUDIO),
        measure=generic.offset_statistics,
    ),
    MetricSpec(names=("lse_c", "lse_d", "lse_offset_s"), needs=(_VIDEO, _AUDIO, _LIPS), measure=pretrained.lse_metrics),
    MetricSpec(names=("viseme_sync",), needs=(_TOY, _VIDEO, _PHONEMES), measure=toyworld.viseme_sync),
    MetricSpec(names=("phoneme_accuracy",), needs=(_TOY, _AUDIO, _PHONEMES), measure=toyworld.phoneme_accuracy),
    MetricSpec(names=("syllable_error",), needs=(_TOY, _AUDIO, _SPEECH), measure=toyworld.syllable_error),
    MetricSpec(names=("identity_error",), needs=(_TOY, _VIDEO), measure=toyworld.mean_identity_error),
    MetricSpec(names=("valid",), needs=(_TOY,), measure=toyworld.valid_choices),
    MetricSpec(
        names=("entropy", "entropy_within", "choice_kl"),
        needs=(_TOY,),
        measure=toyworld.choice_entropy,
        needs_reference=True,
    ),
    MetricSpec(
        names=("lag1", "lag1_hand", "lag1_light", "lag1_pose"),
        needs=(_TOY, _VIDEO),
        measure=toyworld.lag_one_persistence,
    ),
    MetricSpec(names=("seam",), needs=(), measure=generic.chunk_seam_energy, needs_reference=True),
    MetricSpec(names=_VIDEO_SEAMS, needs=(_VIDEO,), measure=generic.chunk_seam_energy, needs_reference=True),
    MetricSpec(names=_AUDIO_SEAMS, needs=(_AUDIO,), measure=generic.chunk_seam_energy, needs_reference=True),
    MetricSpec(names=_frechet_names("frechet"), needs=(_TOY,), measure=toyworld.toyworld_frechet, needs_reference=True),
    MetricSpec(
        names=_frechet_names("frechet_videomae"),
        needs=(_VIDEO, requirement_text("videomae")),
        measure=pretrained.videomae_frechet,
        needs_reference=True,
    ),
    MetricSpec(
        names=_frechet_names("frechet_clap"),
        needs=(_AUDIO, requirement_text("clap")),
        measure=pretrained.clap_frechet,
        needs_reference=True,
    ),
    MetricSpec(
        names=("sound_kl",),
        needs=(_AUDIO, requirement_text("sounds")),
        measure=pretrained.audio_class_kl,
        needs_reference=True,
    ),
    MetricSpec(
        names=("face_similarity",), needs=(_VIDEO, requirement_text("faces")), measure=pretrained.face_similarity
    ),
    MetricSpec(
        names=("wer", "cer"), needs=(_AUDIO, _WORDS, requirement_text("whisper")), measure=pretrained.whisper_errors
    ),
    MetricSpec(
        names=("wer_pocketsphinx", "cer_pocketsphinx"),
        needs=(_AUDIO, _WORDS, requirement_text("pocketsphinx")),
        measure=pretrained.pocketsphinx_errors,
    ),
    MetricSpec(names=("motion", "sharpness"), needs=(_VIDEO,), measure=generic.motion_and_sharpness),
    MetricSpec(
        names=("motion_over_real", "sharpness_over_real"),
        needs=(_VIDEO,),
        measure=generic.motion_and_sharpness_ratio,
        needs_reference=True,
    ),
    MetricSpec(names=("loudness_db", "clipping", "silence"), needs=(_AUDIO,), measure=generic.loudness_metrics),
    MetricSpec(
        names=("face_found", "face_jitter", "blinks_per_minute"), needs=(_VIDEO, _PEOPLE), measure=people.face_metrics
    ),
    MetricSpec(names=("speech_quality",), needs=(_AUDIO, _PEOPLE), measure=people.speech_quality_metrics),
    MetricSpec(
        names=("speaker_similarity",), needs=(_AUDIO, _PEOPLE), measure=people.speaker_similarity, needs_reference=True
    ),
)
