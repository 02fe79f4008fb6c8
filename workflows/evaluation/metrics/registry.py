"""Scores of a set of clips: every metric says what it needs, and without it is reported as not measured, never as 0."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mfcore.metrics.windows import TimeWindow
from workflows.evaluation.feature_models import requirement_text
from workflows.evaluation.metrics import generic, pretrained, toyworld
from workflows.evaluation.metrics.generic import (
    FAILURE_PREDICATES,
    FeatureSet,
    MetricValue,
    MetricValues,
    Numbers,
    ReferenceFeatures,
)

MIN_WINDOW_SECONDS = 1.0  # seconds of a clip that must lie in a window
_TOY = "a toy world dataset"
_PICTURE = "a checkpoint that makes pictures"
_SOUND = "a checkpoint that makes sound"
_SPEECH = "clips with a transcript"
_WORDS = "a transcript in words (toy syllables are none)"
_LIPS = requirement_text("syncnet")
_NETWORKS = ("videomae", "clap", "faces", "sounds")


@dataclass(frozen=True, kw_only=True)
class MetricSpec:
    """One or more related numbers."""

    names: tuple[str, ...]
    needs: tuple[str, ...]
    measure: Callable[..., MetricValues]  # of the clips, and of the real clips if needs_reference
    needs_reference: bool = False

    def compute(self, part: FeatureSet, real: ReferenceFeatures) -> MetricValues:
        """Return the values for the clips; names without a value are absent."""
        return self.measure(part, real) if self.needs_reference else self.measure(part)


@dataclass(frozen=True, kw_only=True)
class ClipSetScores:
    """What a set of clips scores in one window."""

    found: MetricValues
    not_measured: dict[str, str]  # metric -> "not measured: needs ..."
    failures: dict[str, int]  # kind of failure -> clips

    @property
    def metrics(self) -> Numbers:
        return {name: score.value for name, score in self.found.items()}


@dataclass(frozen=True, kw_only=True)
class WindowScores:
    """Some clips in one window of time."""

    window: str  # its name; "all": whole clips
    part: FeatureSet
    scores: ClipSetScores


def compute_metrics_by_window(
    part: FeatureSet, lengths: Sequence[float], windows: Sequence[TimeWindow], real: ReferenceFeatures
) -> list[WindowScores]:
    """Whole clips, then each window, over those whose ``lengths`` reach a second or more into it."""
    made: list[WindowScores] = []
    for name, window in [("all", TimeWindow(start=0.0)), *((w.name, w) for w in windows)]:
        least = window.start + MIN_WINDOW_SECONDS if name != "all" else 0.0
        inside = [r.crop(window) for r, length in zip(part, lengths, strict=True) if length >= least]
        if inside:
            made.append(WindowScores(window=name, part=inside, scores=compute_metrics(inside, real)))
    return made


def compute_metrics(part: FeatureSet, real: ReferenceFeatures) -> ClipSetScores:
    """All metrics. A number that has no value for these clips counts as not measured."""
    present = _present(part)
    found: MetricValues = {}
    missing: dict[str, str] = {}
    for metric in METRICS:
        lacking = [need for need in metric.needs if need not in present]
        scores = {} if lacking else metric.compute(part, real)
        wanted = ", ".join(lacking) or "longer clips, more of them, or some in which it varies"
        for name in metric.names:
            if name in scores and np.isfinite(scores[name].value):
                found[name] = scores[name]
            else:
                missing[name] = f"not measured: needs {wanted}"
    failures = {kind: sum(map(failed, part)) for kind, failed in FAILURE_PREDICATES.items()}
    failed = sum(any(failed(r) for failed in FAILURE_PREDICATES.values()) for r in part)
    found["failed"] = MetricValue(value=float(failed), count=len(part), failed=failed)
    return ClipSetScores(found=found, not_measured=missing, failures=failures)


def _present(part: FeatureSet) -> set[str]:
    first = part[0]
    found = {_TOY} if first.features else set[str]()
    found |= {_PICTURE} if first.motion is not None else set()
    found |= {_SOUND} if first.sound is not None else set()
    found |= {requirement_text(name) for name in _NETWORKS if name in first.tracks} | (
        {_LIPS} if "lips" in first.tracks else set()
    )
    found |= {requirement_text(name) for r in part for u in r.utterances for name in u.heard}
    found |= {_WORDS} if any(r.words for r in part) else set()
    return found | ({_SPEECH} if any(r.speech and r.speech.said for r in part) else set())


_OF_PICTURE = ("seam_pixels", "seam_pixels_raw", "seam_video_latents", "seam_video_latents_raw")
_OF_SOUND = ("seam_sound", "seam_sound_raw", "seam_audio_latents", "seam_audio_latents_raw")


def _distance(name: str) -> tuple[str, ...]:
    return (name, *(f"{name}_{part}" for part in ("bias", "n", "n_real", "shrinkage")))


METRICS = (
    MetricSpec(names=("sync", "sync_offset_s"), needs=(_TOY, _PICTURE, _SOUND), measure=toyworld.mouth_sync_metrics),
    MetricSpec(
        names=("motion_sync", "motion_sync_offset_s"), needs=(_PICTURE, _SOUND), measure=generic.motion_sync_metrics
    ),
    MetricSpec(
        names=("sync_offset_median_s", "sync_offset_spread_s", "sync_within_80ms"),
        needs=(_PICTURE, _SOUND),
        measure=generic.offset_statistics,
    ),
    MetricSpec(
        names=("lse_c", "lse_d", "lse_offset_s"), needs=(_PICTURE, _SOUND, _LIPS), measure=pretrained.lse_metrics
    ),
    MetricSpec(names=("syllable_error",), needs=(_TOY, _SOUND, _SPEECH), measure=toyworld.syllable_error),
    MetricSpec(names=("identity_error",), needs=(_TOY, _PICTURE), measure=toyworld.mean_identity_error),
    MetricSpec(names=("valid",), needs=(_TOY,), measure=toyworld.valid_choices),
    MetricSpec(
        names=("entropy", "entropy_within", "choice_kl"),
        needs=(_TOY,),
        measure=toyworld.choice_entropy,
        needs_reference=True,
    ),
    MetricSpec(
        names=("lag1", "lag1_hand", "lag1_light", "lag1_pose"),
        needs=(_TOY, _PICTURE),
        measure=toyworld.lag_one_persistence,
    ),
    MetricSpec(names=("seam",), needs=(), measure=generic.chunk_seam_energy, needs_reference=True),
    MetricSpec(names=_OF_PICTURE, needs=(_PICTURE,), measure=generic.chunk_seam_energy, needs_reference=True),
    MetricSpec(names=_OF_SOUND, needs=(_SOUND,), measure=generic.chunk_seam_energy, needs_reference=True),
    MetricSpec(names=_distance("frechet"), needs=(_TOY,), measure=toyworld.toyworld_frechet, needs_reference=True),
    MetricSpec(
        names=_distance("frechet_videomae"),
        needs=(_PICTURE, requirement_text("videomae")),
        measure=pretrained.videomae_frechet,
        needs_reference=True,
    ),
    MetricSpec(
        names=_distance("frechet_clap"),
        needs=(_SOUND, requirement_text("clap")),
        measure=pretrained.clap_frechet,
        needs_reference=True,
    ),
    MetricSpec(
        names=("sound_kl",),
        needs=(_SOUND, requirement_text("sounds")),
        measure=pretrained.audio_class_kl,
        needs_reference=True,
    ),
    MetricSpec(
        names=("face_similarity",), needs=(_PICTURE, requirement_text("faces")), measure=pretrained.face_similarity
    ),
    MetricSpec(
        names=("wer", "cer"), needs=(_SOUND, _WORDS, requirement_text("whisper")), measure=pretrained.whisper_errors
    ),
    MetricSpec(
        names=("wer_pocketsphinx", "cer_pocketsphinx"),
        needs=(_SOUND, _WORDS, requirement_text("pocketsphinx")),
        measure=pretrained.pocketsphinx_errors,
    ),
    MetricSpec(names=("motion", "sharpness"), needs=(_PICTURE,), measure=generic.motion_and_sharpness),
    MetricSpec(
        names=("motion_over_real", "sharpness_over_real"),
        needs=(_PICTURE,),
        measure=generic.motion_and_sharpness_ratio,
        needs_reference=True,
    ),
    MetricSpec(names=("loudness_db", "clipping", "silence"), needs=(_SOUND,), measure=generic.loudness_metrics),
)
