"""Scores of a set of clips: every metric says what it needs, and without it is reported as not measured, never as 0."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mfcore.metrics.windows import Window
from workflows.evaluation.feature_models import needs
from workflows.evaluation.metrics import generic, pretrained, toyworld
from workflows.evaluation.metrics.generic import FAILURES, Found, Numbers, Part, Real, Score

SHORTEST = 1.0  # seconds of a clip that must lie in a window
_TOY = "a toy world dataset"
_PICTURE = "a checkpoint that makes pictures"
_SOUND = "a checkpoint that makes sound"
_SPEECH = "clips with a transcript"
_WORDS = "a transcript in words (toy syllables are none)"
_LIPS = needs("syncnet")
_NETWORKS = ("videomae", "clap", "faces", "sounds")


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One or more related numbers."""

    names: tuple[str, ...]
    needs: tuple[str, ...]
    measure: Callable[[Part, Real], Found]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a set of clips scores in one window."""

    found: Found
    not_measured: dict[str, str]  # metric -> "not measured: needs ..."
    failures: dict[str, int]  # kind of failure -> clips

    @property
    def metrics(self) -> Numbers:
        return {name: score.value for name, score in self.found.items()}


@dataclass(frozen=True, kw_only=True)
class Windowed:
    """Some clips in one window of time."""

    window: str  # its name; "all": whole clips
    part: Part
    scores: Scores


def score_windows(part: Part, lengths: Sequence[float], windows: Sequence[Window], real: Real) -> list[Windowed]:
    """Whole clips, then each window, over those whose ``lengths`` reach a second or more into it."""
    made: list[Windowed] = []
    for name, window in [("all", Window(start=0.0)), *((w.name, w) for w in windows)]:
        least = window.start + SHORTEST if name != "all" else 0.0
        inside = [r.cut(window) for r, length in zip(part, lengths, strict=True) if length >= least]
        if inside:
            made.append(Windowed(window=name, part=inside, scores=score(inside, real)))
    return made


def score(part: Part, real: Real) -> Scores:
    """All metrics. A number that has no value for these clips counts as not measured."""
    present = _present(part)
    found: Found = {}
    missing: dict[str, str] = {}
    for metric in METRICS:
        lacking = [need for need in metric.needs if need not in present]
        scores = {} if lacking else metric.measure(part, real)
        wanted = ", ".join(lacking) or "longer clips, more of them, or some in which it varies"
        for name in metric.names:
            if name in scores and np.isfinite(scores[name].value):
                found[name] = scores[name]
            else:
                missing[name] = f"not measured: needs {wanted}"
    failures = {kind: sum(map(failed, part)) for kind, failed in FAILURES.items()}
    failed = sum(any(failed(r) for failed in FAILURES.values()) for r in part)
    found["failed"] = Score(value=float(failed), count=len(part), failed=failed)
    return Scores(found=found, not_measured=missing, failures=failures)


def _present(part: Part) -> set[str]:
    first = part[0]
    found = {_TOY} if first.features else set[str]()
    found |= {_PICTURE} if first.motion is not None else set()
    found |= {_SOUND} if first.sound is not None else set()
    found |= {needs(name) for name in _NETWORKS if name in first.tracks} | (
        {_LIPS} if "lips" in first.tracks else set()
    )
    found |= {needs(name) for r in part for u in r.utterances for name in u.heard}
    found |= {_WORDS} if any(r.words for r in part) else set()
    return found | ({_SPEECH} if any(r.speech and r.speech.said for r in part) else set())


_OF_PICTURE = ("seam_pixels", "seam_pixels_raw", "seam_video_latents", "seam_video_latents_raw")
_OF_SOUND = ("seam_sound", "seam_sound_raw", "seam_audio_latents", "seam_audio_latents_raw")


def _distance(name: str) -> tuple[str, ...]:
    return (name, *(f"{name}_{part}" for part in ("bias", "n", "n_real", "shrinkage")))


METRICS = (
    Metric(names=("sync", "sync_offset_s"), needs=(_TOY, _PICTURE, _SOUND), measure=toyworld.mouth_sync),
    Metric(names=("motion_sync", "motion_sync_offset_s"), needs=(_PICTURE, _SOUND), measure=generic.motion_sync),
    Metric(
        names=("sync_offset_median_s", "sync_offset_spread_s", "sync_within_80ms"),
        needs=(_PICTURE, _SOUND),
        measure=generic.offset_law,
    ),
    Metric(names=("lse_c", "lse_d", "lse_offset_s"), needs=(_PICTURE, _SOUND, _LIPS), measure=pretrained.lips),
    Metric(names=("syllable_error",), needs=(_TOY, _SOUND, _SPEECH), measure=toyworld.syllables),
    Metric(names=("identity_error",), needs=(_TOY, _PICTURE), measure=toyworld.identity),
    Metric(names=("valid",), needs=(_TOY,), measure=toyworld.valid),
    Metric(names=("entropy", "entropy_within", "choice_kl"), needs=(_TOY,), measure=toyworld.entropy),
    Metric(
        names=("lag1", "lag1_hand", "lag1_light", "lag1_pose"), needs=(_TOY, _PICTURE), measure=toyworld.persistence
    ),
    Metric(names=("seam",), needs=(), measure=generic.seams),
    Metric(names=_OF_PICTURE, needs=(_PICTURE,), measure=generic.seams),
    Metric(names=_OF_SOUND, needs=(_SOUND,), measure=generic.seams),
    Metric(names=_distance("frechet"), needs=(_TOY,), measure=toyworld.distance),
    Metric(names=_distance("frechet_videomae"), needs=(_PICTURE, needs("videomae")), measure=pretrained.videomae),
    Metric(names=_distance("frechet_clap"), needs=(_SOUND, needs("clap")), measure=pretrained.clap),
    Metric(names=("sound_kl",), needs=(_SOUND, needs("sounds")), measure=pretrained.sound_kl),
    Metric(names=("face_similarity",), needs=(_PICTURE, needs("faces")), measure=pretrained.faces),
    Metric(names=("wer", "cer"), needs=(_SOUND, _WORDS, needs("whisper")), measure=pretrained.whisper_errors),
    Metric(
        names=("wer_pocketsphinx", "cer_pocketsphinx"),
        needs=(_SOUND, _WORDS, needs("pocketsphinx")),
        measure=pretrained.sphinx_errors,
    ),
    Metric(names=("motion", "sharpness"), needs=(_PICTURE,), measure=generic.picture),
    Metric(names=("motion_over_real", "sharpness_over_real"), needs=(_PICTURE,), measure=generic.picture_ratio),
    Metric(names=("loudness_db", "clipping", "silence"), needs=(_SOUND,), measure=generic.loudness),
)
