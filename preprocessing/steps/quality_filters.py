"""Technical quality filters, each with its reason.

The defaults are lenient: they reject black, frozen and digitally silent clips only.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mfcore.metrics.av_sync import motion_energy
from preprocessing.media.probe import VideoInfo
from preprocessing.records import Clip, Rejected


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Thresholds; None disables a filter."""

    min_side: int | None = 32  # pixels, shorter side of the source
    min_fps: float | None = 5.0  # of the source, if known
    max_pixels: int | None = 8192 * 4608  # pixels of a frame of the source; bounds the memory of a decoder
    black_level: float | None = 12.0  # largest 99th percentile of gray (0..255) of a black clip
    frozen_change: float | None = 0.1  # gray levels, largest mean change between frames of a frozen clip
    silence_db: float | None = -75.0  # dBFS, rms of the clip
    clipped_share: float | None = 0.05  # share of samples within 1% of full scale


def check_source(info: VideoInfo, config: FilterConfig) -> None:
    """Raise Rejected if the frames are too small or too large, or the frame rate is too low."""
    if config.min_side is not None and min(info.width, info.height) < config.min_side:
        raise Rejected("filter", "too_small", f"{info.width}x{info.height}, at least {config.min_side} a side")
    if config.max_pixels is not None and info.width * info.height > config.max_pixels:
        raise Rejected("filter", "too_large", f"{info.width}x{info.height}, at most {config.max_pixels} pixels")

    if config.min_fps is not None and 0 < info.fps < config.min_fps:
        raise Rejected("filter", "low_fps", f"{info.fps:g} frames per second, at least {config.min_fps:g}")


def check_duration(clip: Clip, min_frames: int, fps: float, sample_rate: int) -> Clip:
    """Raise Rejected for a clip of fewer than `min_frames` frames, or their length in audio."""
    frames = len(clip.frames) if clip.frames is not None else int((len(_sound(clip)) + 1) * fps / sample_rate)
    if frames < min_frames:
        raise Rejected("filter", "too_short", f"{frames / fps:.3f} s, at least {min_frames / fps:.3f} s")
    return clip


def _sound(clip: Clip) -> NDArray[np.float32]:
    return clip.waveform if clip.waveform is not None else np.zeros(0, np.float32)


def _thumbnails(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return every k-th pixel, about 32 per side: ``(n, h, w, 3)``."""
    step = max(1, min(frames.shape[1:3]) // 32)
    return frames[:, ::step, ::step]


def check_video(clip: Clip, config: FilterConfig) -> Clip:
    """Raise Rejected for black or frozen video."""
    if clip.frames is None:
        return clip
    small = _thumbnails(clip.frames)
    if config.black_level is not None and (level := _level(small[::4], 0.99)) < config.black_level:
        raise Rejected("filter", "black", f"99th percentile {level} of 255")
    if config.frozen_change is not None and (change := float(motion_energy(small).max())) < config.frozen_change:
        raise Rejected("filter", "frozen", f"largest change {change:.3f} gray levels")
    return clip


def _level(values: NDArray[np.uint8], share: float) -> int:
    """Return the quantile `share` of the values."""
    counts = np.bincount(values.ravel(), minlength=256).cumsum()
    return int(np.searchsorted(counts, share * counts[-1]))


def check_audio(clip: Clip, config: FilterConfig) -> Clip:
    """Return the clip with its audio level. Raise Rejected without samples, for silent and for clipped audio."""
    if clip.waveform is None:
        return clip
    if not len(clip.waveform):
        raise Rejected("filter", "no_audio_samples", "the audio of the source has no sample in this span")
    level = 20 * np.log10(np.sqrt(np.mean(np.square(clip.waveform, dtype=np.float64))) + 1e-10)
    if config.silence_db is not None and level < config.silence_db:
        raise Rejected("filter", "silent", f"{level:.1f} dBFS")
    clipped = float(np.mean(np.abs(clip.waveform) >= 0.99))
    if config.clipped_share is not None and clipped > config.clipped_share:
        raise Rejected("filter", "clipped", f"{100 * clipped:.1f}% of samples at full scale")
    return replace(clip, loudness_db=round(float(level), 2))
