"""Estimate and record the A/V offset of clips; optionally filter by it and correct it.

``motion`` needs no weights and only records by default. ``syncnet`` (weights from a local file) filters and corrects
with the thresholds of LatentSync: confidence at least 3, offset at most 6 frames at 25 fps. A corrected clip keeps the
whole chunks with both video and shifted audio; nothing is padded.
"""

from bisect import bisect_right
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from math import ceil
from typing import Literal

from mfcore.errors import UserInputError
from mfcore.metrics.av_sync import MotionSync, SyncEstimator
from mfcore.metrics.syncnet import SyncNetSync, load_syncnet
from preprocessing.io.hashing import sha256_file
from preprocessing.records import Clip, Rejected
from preprocessing.spans import SpanPlan

_MIN_SIDE = 64  # pixels, shorter side of the frames for motion


@dataclass(frozen=True, kw_only=True)
class SyncConfig:
    """Estimator and thresholds on its scale; None disables a threshold."""

    estimator: Literal["motion", "syncnet"] | None = "motion"  # None: no estimate
    min_confidence: float | None = None  # motion: 1.3 is significant at 99%; syncnet: 3
    max_offset: float | None = None  # seconds
    shift: bool = False  # move the audio of accepted clips to offset 0
    weights: str = ""  # digest of the file, for syncnet
    file: str = ""  # location of the weights, not part of the dataset

    def __post_init__(self) -> None:
        if self.estimator == "syncnet" and not self.weights:
            raise UserInputError("sync.estimator=syncnet needs weights: use --sync syncnet:FILE")
        if self.shift and self.min_confidence is None:
            raise UserInputError(
                "sync.shift needs sync.min_confidence: set it, so that only reliable offsets are corrected"
            )


def syncnet_config(file: str) -> SyncConfig:
    """Return a SyncNet configuration with the thresholds of LatentSync for a weights file.

    Raises UserInputError if the file has other content.
    """
    load_syncnet(file)
    return SyncConfig(
        estimator="syncnet", min_confidence=3.0, max_offset=6 / 25, shift=True, weights=_digest(file), file=file
    )


def _digest(file: str) -> str:
    try:
        return sha256_file(file)[:12]
    except OSError as error:
        raise UserInputError(f"the weights of SyncNet, {file}, cannot be read: {error.strerror}") from None


@cache
def build_estimator(config: SyncConfig) -> SyncEstimator | None:
    """Return the estimator, cached per process. Raise ValueError if the weights changed."""
    if config.estimator != "syncnet":
        return MotionSync() if config.estimator == "motion" else None
    if _digest(config.file) != config.weights:
        raise UserInputError(
            f"{config.file} has other weights than the dataset was built with. Restore the original file"
        )
    return SyncNetSync(load_syncnet(config.file))


def check_sync(clip: Clip, config: SyncConfig, plan: SpanPlan, *, fps: Fraction, sample_rate: int) -> Clip:
    """Return the clip with offset and confidence. Raise Rejected beyond the thresholds."""
    estimator = build_estimator(config)
    if estimator is None or clip.frames is None or clip.waveform is None:
        return clip
    step = max(1, min(clip.frames.shape[1:3]) // _MIN_SIDE) if config.estimator == "motion" else 1
    frames = clip.frames[:, ::step, ::step]
    found = estimator(frames, float(fps), clip.waveform, sample_rate)
    if config.min_confidence is not None and found.confidence < config.min_confidence:
        raise Rejected("sync", "unsure", f"confidence {found.confidence:.2f}, at least {config.min_confidence}")
    if config.max_offset is not None and abs(found.offset_sec) > config.max_offset + 1e-9:
        raise Rejected("sync", "out_of_sync", f"audio {found.offset_sec:+.3f} s, at most {config.max_offset:.3f} s")
    offset, confidence = round(found.offset_sec, 6), round(found.confidence, 4)
    if not config.shift or offset == 0:
        return replace(clip, sync=(offset, confidence))
    return replace(shift_audio(clip, offset, plan, fps=fps, sample_rate=sample_rate), sync=(0.0, confidence))


def shift_audio(clip: Clip, late: float, plan: SpanPlan, *, fps: Fraction, sample_rate: int) -> Clip:
    """Move the audio `late` seconds earlier and keep the whole chunks with both streams.

    If the audio was early (`late` < 0), the first frames have no audio and are dropped. Raise Rejected if too few
    chunks remain.
    """
    assert clip.frames is not None
    assert clip.waveform is not None
    skipped = ceil(-late * fps) if late < 0 else 0  # frames without audio
    frames = clip.frames[skipped:]
    sound = clip.waveform[round((skipped / float(fps) + late) * sample_rate) :]
    audio_chunks = bisect_right(plan.samples, len(sound)) - 1
    chunks = min(bisect_right(plan.frames, len(frames)) - 1, audio_chunks)
    if chunks < plan.min_chunks:
        raise Rejected("sync", "too_short", f"{chunks} whole chunks remain after moving the audio by {late:+.3f} s")
    start = clip.span[0] + skipped / float(fps)
    return replace(
        clip,
        span=(round(start, 6), round(start + plan.frames[chunks] / float(fps), 6)),
        frames=frames[: plan.frames[chunks]],
        waveform=sound[: plan.samples[chunks]],
        moved=late,
    )
