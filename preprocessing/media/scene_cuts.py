"""Where one scene ends and the next begins. ffmpeg's scene score names the places; this file tells cuts from lights
that are switched and from flashes."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from preprocessing.records import Frames

_POINTS = 36  # compared on the shorter side: fewer, and a thing that moves weighs as much as the scene
_DARK, _STRONG = 8.0, 0.1  # grey levels below which there is mostly noise; change of a logarithm that counts fully
_CHANGED = 12.0  # grey levels by which a pixel must differ to count as changed


@dataclass(frozen=True, kw_only=True)
class SceneConfig:
    """When a picture counts as another scene. Changes are mean absolute differences in percent of full scale.

    The defaults are from collected talking heads: within a scene ffmpeg's score stays below 3 and edges stay where they
    are (correlation of their gradients 0.27 and more, also when a light is switched), from scene to scene the score is
    around 29 and the correlation at most 0.1, between two speakers of one studio 0.19. A dissolve is not seen.
    """

    threshold: float | None = 5.0  # ffmpeg's scene score of a frame that is looked at; None: never cut
    likeness: float = 0.25  # correlation of gradients from which on two pictures are one scene ...
    certain: float = 20.0  # ... unless they differ by this much
    spread: float = 0.3  # share of the picture that a cut changes at least; less is a title or a thing in the scene
    flash_seconds: float = 0.3  # a scene that comes back within so long was interrupted by a flash

    def __post_init__(self) -> None:
        if (self.threshold is not None and not 0 < self.threshold < 100) or self.flash_seconds < 0:
            raise ValueError(
                f"scenes.threshold={self.threshold} must lie between 0 and 100 (or be null: no cuts), "
                f"scenes.flash_seconds={self.flash_seconds} must not be negative"
            )


class SceneCutDetector:
    """The cuts of one source, window after window."""

    def __init__(self, config: SceneConfig, flash_frames: int) -> None:
        self._config, self._flash_frames = config, flash_frames
        self._settled = 0  # places before this frame belong to a flash

    def next_cut(self, places: Sequence[int], first: int, frames: Frames) -> int | None:
        """The first frame behind ``first`` that begins a scene, as far as the frames show it; None: not among them.

        ``places``: frames with a high score, ascending, in the count of which ``frames[0]`` has the number ``first``.
        """
        for place in places[bisect_right(places, first) :]:
            at = place - first
            if at >= len(frames):
                return None
            if place < self._settled or self._same(frames[at - 1], frames[at]):
                continue
            behind = frames[at + 1 : at + 1 + self._flash_frames]
            back = next((i for i, frame in enumerate(behind) if self._same(frames[at - 1], frame)), None)
            if back is None:
                return place
            self._settled = place + 1 + back + 1
        return None

    def _same(self, one: NDArray[np.uint8], other: NDArray[np.uint8]) -> bool:
        """Whether two pictures show one scene."""
        assert self._config.threshold is not None
        step = max(1, min(one.shape[:2]) // _POINTS)
        a, b = (picture[::step, ::step].astype(np.float64).mean(2) for picture in (one, other))
        difference = np.abs(a - b)
        change = float(difference.mean()) * 100 / 255
        if change < self._config.threshold / 2 or (difference > _CHANGED).mean() < self._config.spread:
            return True
        return change < self._config.certain and _correlation(_gradients(a), _gradients(b)) >= self._config.likeness


def _gradients(grey: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of the logarithm, which light multiplies by hardly anything, and cut off: else the few strongest edges, which may
    be those of a head that turns, would speak for the whole picture."""
    log = np.log(grey + _DARK)
    return np.clip(np.concatenate([np.diff(log, axis=0).ravel(), np.diff(log, axis=1).ravel()]), -_STRONG, _STRONG)


def _correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Of two sets of gradients, whose means are zero but for the edge of the picture; 0 where one has none."""
    norm: Any = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / norm) if norm > 0 else 0.0
