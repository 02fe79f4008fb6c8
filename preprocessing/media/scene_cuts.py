"""Detect scene cuts: frames with a high scene score, without flashes and light changes."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mfcore.errors import UserInputError
from preprocessing.records import Frames

_POINTS = 36  # compared on the shorter side; with fewer, a moving object outweighs the scene
_DARK_LEVEL = 8.0  # gray levels of noise
_MAX_GRADIENT = 0.1  # change of the logarithm at which gradients are clipped
_CHANGED = 12.0  # difference of a changed pixel in gray levels


@dataclass(frozen=True, kw_only=True)
class SceneConfig:
    """Thresholds of scene cuts. Changes are mean absolute differences in percent of full scale.

    The defaults are from videos of talking heads. Within a scene, the score of ffmpeg is below 3 and the correlation of
    gradients at least 0.27, also when a light is switched. Between scenes, the score is about 29 and the correlation at
    most 0.1; between two speakers in one studio it is 0.19. Dissolves are not detected.
    """

    threshold: float | None = 5.0  # scene score of a candidate; None: no cuts
    likeness: float = 0.25  # correlation of gradients within one scene ...
    certain: float = 20.0  # ... unless the change is at least this
    spread: float = 0.3  # minimum share of changed pixels; less is a title or an object
    flash_seconds: float = 0.3  # maximum length of a flash, after which the scene returns

    def __post_init__(self) -> None:
        if (self.threshold is not None and not 0 < self.threshold < 100) or self.flash_seconds < 0:
            raise UserInputError(
                f"scenes.threshold={self.threshold} must be between 0 and 100, or null for no cuts; "
                f"scenes.flash_seconds={self.flash_seconds} must not be negative"
            )


class SceneCutDetector:
    """Detector of the cuts of one source, called with consecutive windows."""

    def __init__(self, config: SceneConfig, flash_frames: int) -> None:
        self._config, self._flash_frames = config, flash_frames
        self._settled = 0  # candidates before this frame belong to a flash

    def next_cut(self, candidates: Sequence[int], first: int, frames: Frames) -> int | None:
        """Return the first frame after `first` that begins a scene; None: none of `frames` does.

        Args:
            candidates: Numbers of frames with a high score, ascending.
            first: Number of ``frames[0]``.
            frames: Consecutive frames.
        """
        for candidate in candidates[bisect_right(candidates, first) :]:
            i = candidate - first
            if i >= len(frames):
                return None
            if candidate < self._settled or self._is_same_scene(frames[i - 1], frames[i]):
                continue
            following = frames[i + 1 : i + 1 + self._flash_frames]
            returns = (n for n, frame in enumerate(following) if self._is_same_scene(frames[i - 1], frame))
            flash_length = next(returns, None)
            if flash_length is None:
                return candidate
            self._settled = candidate + 1 + flash_length + 1
        return None

    def _is_same_scene(self, one: NDArray[np.uint8], other: NDArray[np.uint8]) -> bool:
        """Return True if two frames show one scene."""
        assert self._config.threshold is not None
        step = max(1, min(one.shape[:2]) // _POINTS)
        a, b = (frame[::step, ::step].astype(np.float64).mean(2) for frame in (one, other))
        difference = np.abs(a - b)
        change = float(difference.mean()) * 100 / 255
        if change < self._config.threshold / 2 or (difference > _CHANGED).mean() < self._config.spread:
            return True
        return change < self._config.certain and _correlation(_gradients(a), _gradients(b)) >= self._config.likeness


def _gradients(gray: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return clipped gradients of the logarithm.

    The logarithm reduces the effect of light. Clipping limits the weight of strong edges, such as those of a head.
    """
    log = np.log(gray + _DARK_LEVEL)
    return np.clip(
        np.concatenate([np.diff(log, axis=0).ravel(), np.diff(log, axis=1).ravel()]), -_MAX_GRADIENT, _MAX_GRADIENT
    )


def _correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Return the correlation of two sets of gradients of zero mean; 0 if one is empty."""
    norm: Any = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / norm) if norm > 0 else 0.0
