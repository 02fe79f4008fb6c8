"""Scores of a set of clips: every metric says what it needs, and without it is reported as not measured, never as 0."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from workflows import measures
from workflows.measures import FAILURES, Numbers, Part, Real

_TOY = "a toy world dataset"
_PICTURE = "a checkpoint that makes pictures"
_SOUND = "a checkpoint that makes sound"
_SPEECH = "clips with a transcript"


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One or more related numbers."""

    names: tuple[str, ...]
    needs: tuple[str, ...]
    measure: Callable[[Part, Real], Numbers]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a set of clips scores in one window."""

    metrics: Numbers
    not_measured: dict[str, str]  # metric -> "not measured: needs ..."
    failures: dict[str, int]  # kind of failure -> clips


def score(part: Part, real: Real) -> Scores:
    """All metrics. A number that has no value for these clips counts as not measured."""
    present = _present(part)
    metrics: Numbers = {}
    missing: dict[str, str] = {}
    for metric in METRICS:
        lacking = [need for need in metric.needs if need not in present]
        numbers = {} if lacking else metric.measure(part, real)
        needs = ", ".join(lacking) or "longer clips, or some in which it varies"
        for name in metric.names:
            value = numbers.get(name, float("nan"))
            if np.isfinite(value):
                metrics[name] = float(value)
            else:
                missing[name] = f"not measured: needs {needs}"
    failures = {kind: sum(map(failed, part)) for kind, failed in FAILURES.items()}
    metrics["failed"] = float(sum(any(failed(r) for failed in FAILURES.values()) for r in part))
    return Scores(metrics=metrics, not_measured=missing, failures=failures)


def _present(part: Part) -> set[str]:
    first = part[0]
    found = {_TOY} if first.features else set[str]()
    found |= {_PICTURE} if first.motion is not None else set()
    found |= {_SOUND} if first.sound is not None else set()
    return found | ({_SPEECH} if any(r.speech and r.speech.said for r in part) else set())


_OF_PICTURE = ("seam_pixels", "seam_pixels_raw", "seam_video_latents", "seam_video_latents_raw")
_OF_SOUND = ("seam_sound", "seam_sound_raw", "seam_audio_latents", "seam_audio_latents_raw")

METRICS = (
    Metric(names=("sync", "sync_offset_s"), needs=(_TOY, _PICTURE, _SOUND), measure=measures.mouth_sync),
    Metric(names=("motion_sync", "motion_sync_offset_s"), needs=(_PICTURE, _SOUND), measure=measures.motion_sync),
    Metric(names=("syllable_error",), needs=(_TOY, _SOUND, _SPEECH), measure=measures.syllables),
    Metric(names=("identity_error",), needs=(_TOY, _PICTURE), measure=measures.identity),
    Metric(names=("valid",), needs=(_TOY,), measure=measures.valid),
    Metric(names=("entropy", "entropy_within"), needs=(_TOY,), measure=measures.entropy),
    Metric(
        names=("lag1", "lag1_hand", "lag1_light", "lag1_pose"), needs=(_TOY, _PICTURE), measure=measures.persistence
    ),
    Metric(names=("seam",), needs=(), measure=measures.seams),
    Metric(names=_OF_PICTURE, needs=(_PICTURE,), measure=measures.seams),
    Metric(names=_OF_SOUND, needs=(_SOUND,), measure=measures.seams),
    Metric(
        names=("frechet", "frechet_n", "frechet_n_real", "frechet_shrinkage"), needs=(_TOY,), measure=measures.distance
    ),
    Metric(names=("motion",), needs=(_PICTURE,), measure=measures.motion),
    Metric(names=("loudness_db", "silence"), needs=(_SOUND,), measure=measures.loudness),
)
