"""The sync filter: how much later than the picture the sound is; recorded, judged if thresholds say so, and mended.

``motion`` needs no weights and by default only records. ``syncnet`` (weights from a local file) rejects and shifts by
LatentSync's thresholds: confidence of at least 3, an offset of at most 6 frames at 25 per second, which is then taken
out. The clip keeps only whole chunks in which both picture and shifted sound are real: nothing is padded.
"""

from bisect import bisect_right
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from math import ceil
from typing import Literal

from mfcore.metrics.av_sync import MotionSync, SyncEstimator
from mfcore.metrics.syncnet import SyncNetSync, load_syncnet
from preprocessing.io.hashing import sha256_file
from preprocessing.records import Clip, Rejected
from preprocessing.spans import SpanPlan

_SIDE = 64  # pixels, at least, of the picture in which motion is looked for


@dataclass(frozen=True, kw_only=True)
class SyncConfig:
    """Thresholds are on the estimator's own scale; None switches one off."""

    estimator: Literal["motion", "syncnet"] | None = "motion"  # None: nothing is estimated
    min_confidence: float | None = None  # motion: 1.3 is beyond chance in 99 of 100; syncnet: 3
    max_offset: float | None = None  # seconds
    shift: bool = False  # move the sound to offset 0 where the clip passed
    weights: str = ""  # digest of the file, for syncnet
    file: str = ""  # where the weights are; changes nothing

    def __post_init__(self) -> None:
        if self.estimator == "syncnet" and not self.weights:
            raise ValueError("sync.estimator=syncnet needs weights: name their file with --sync syncnet:FILE")
        if self.shift and self.min_confidence is None:
            raise ValueError("sync.shift moves sound: set sync.min_confidence too, so that only sure offsets move it")


def syncnet_config(file: str) -> SyncConfig:
    """LatentSync's thresholds over the weights of a file. ValueError when there is no such file."""
    return SyncConfig(
        estimator="syncnet", min_confidence=3.0, max_offset=6 / 25, shift=True, weights=_digest(file), file=file
    )


def _digest(file: str) -> str:
    try:
        return sha256_file(file)[:12]
    except OSError as error:
        raise ValueError(f"the weights of SyncNet, {file}, cannot be read: {error.strerror}") from None


@cache
def build_estimator(config: SyncConfig) -> SyncEstimator | None:
    """The estimator, kept for all clips of a process. ValueError when the weights are gone or are others."""
    if config.estimator != "syncnet":
        return MotionSync() if config.estimator == "motion" else None
    if _digest(config.file) != config.weights:
        raise ValueError(f"{config.file} holds other weights than the dataset was begun with: put those back")
    return SyncNetSync(load_syncnet(config.file))


def check_sync(clip: Clip, config: SyncConfig, plan: SpanPlan, *, fps: Fraction, sample_rate: int) -> Clip:
    """The clip with its offset and confidence, its sound in step if so configured. Rejected beyond the thresholds."""
    estimator = build_estimator(config)
    if estimator is None or clip.frames is None or clip.waveform is None:
        return clip
    step = max(1, min(clip.frames.shape[1:3]) // _SIDE) if config.estimator == "motion" else 1
    frames = clip.frames[:, ::step, ::step]
    found = estimator(frames, float(fps), clip.waveform, sample_rate)
    if config.min_confidence is not None and found.confidence < config.min_confidence:
        raise Rejected("sync", "unsure", f"confidence {found.confidence:.2f}, at least {config.min_confidence}")
    if config.max_offset is not None and abs(found.offset_sec) > config.max_offset + 1e-9:
        raise Rejected("sync", "out_of_sync", f"sound {found.offset_sec:+.3f} s, at most {config.max_offset:.3f} s")
    offset, confidence = round(found.offset_sec, 6), round(found.confidence, 4)
    if not config.shift or offset == 0:
        return replace(clip, sync=(offset, confidence))
    return replace(shift_audio(clip, offset, plan, fps=fps, sample_rate=sample_rate), sync=(0.0, confidence))


def shift_audio(clip: Clip, late: float, plan: SpanPlan, *, fps: Fraction, sample_rate: int) -> Clip:
    """The clip with its sound ``late`` seconds earlier, cut to the whole chunks in which both are there.

    Sound that came too early has none for the first frames: they are left out. Rejected when too little remains.
    """
    assert clip.frames is not None
    assert clip.waveform is not None
    skipped = ceil(-late * fps) if late < 0 else 0  # frames without sound
    frames, sound = clip.frames[skipped:], clip.waveform[round((skipped / float(fps) + late) * sample_rate) :]
    heard = bisect_right(plan.samples, len(sound)) - 1
    chunks = min(bisect_right(plan.frames, len(frames)) - 1, heard)
    if chunks < plan.min_chunks:
        raise Rejected("sync", "too_short", f"{chunks} whole chunks are left when the sound is moved by {late:+.3f} s")
    start = clip.span[0] + skipped / float(fps)
    return replace(
        clip,
        span=(round(start, 6), round(start + plan.frames[chunks] / float(fps), 6)),
        frames=frames[: plan.frames[chunks]],
        waveform=sound[: plan.samples[chunks]],
        moved=late,
    )
