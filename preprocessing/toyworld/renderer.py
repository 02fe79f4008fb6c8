"""Draw the character of the toy world: soft-edged shapes on arrays of frames.

Lengths are in units of 1/64 of the side of a frame, so all sizes have the same content. x points right, y down. Edges
are soft by about two units, so that a truncated DCT preserves the features that the readers need.

Letters: n frames, H W height and width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from preprocessing.toyworld.voice import VOCABULARY

Array = NDArray[np.floating[Any]]
Color = tuple[int, int, int]
_Shape = Callable[..., Array]  # coverage at x, y
Box = tuple[float, float, float, float]  # x0, x1, y0, y1 in units

FACES: dict[str, Color] = {
    "red": (225, 70, 60),
    "orange": (245, 140, 30),
    "yellow": (250, 215, 50),
    "green": (70, 175, 60),
    "teal": (40, 185, 190),
    "blue": (50, 90, 220),
    "purple": (125, 50, 190),
    "magenta": (215, 60, 150),
}
HAIRS: dict[str, Color] = {
    "black": (30, 28, 34),
    "brown": (120, 75, 40),
    "white": (238, 236, 228),
    "crimson": (160, 30, 60),
    "indigo": (60, 50, 140),
}
BACKGROUNDS: dict[str, Color] = {
    "mint": (130, 215, 165),
    "sky": (125, 190, 240),
    "sand": (235, 205, 130),
    "lilac": (190, 150, 240),
    "rose": (240, 160, 160),
    "grey": (190, 190, 190),
}
SHAPES: dict[str, tuple[float, float, int]] = {  # half width, half height, exponent of the superellipse
    "round": (18.0, 19.5, 2),
    "square": (17.0, 19.0, 4),
    "slim": (15.6, 20.0, 2),
}
STYLES = ("short", "long", "bunned")
GAZES = 8  # directions, 45 degrees apart, 0 = to the right of the picture, then clockwise
BROWS: dict[str, tuple[float, float]] = {"raised": (-15.0, 0.0), "frown": (-11.6, 0.5), "worried": (-12.6, -0.5)}
"""(height, slope) by state; a positive slope lowers the inner ends."""
HANDS: dict[str, tuple[float, float]] = {
    "low left": (7.0, 49.5),
    "low right": (57.0, 49.5),
    "high left": (7.0, 15.0),
    "high right": (57.0, 15.0),
}
LIGHTS = (0.7, 0.8, 1.0)  # factors of the background color, none the mean of two others

HEAD = (32.0, 33.0)  # center of a head at rest, units
EYE = (7.6, -4.0)  # distance from the middle line, y from the center of the head
MOUTH = 11.0
_EYE_RADIUS, _PUPIL_RADIUS, _PUPIL_SHIFT = 6.0, 3.1, 2.7
_OPEN = 4.8  # half height of a wide open mouth
_SOFT = 2.2  # width of an edge, units

_SHIRT, _DARK, _WHITE = (62, 72, 96), (38, 26, 30), (250, 250, 246)
_LIPS, _THROAT, _TONGUE, _TOOTH = (160, 45, 65), (95, 22, 38), (235, 130, 135), (240, 232, 224)
_WIDTH = {"a": 5.6, "e": 7.2, "i": 8.8, "o": 3.8, "": 6.0}  # half width of the mouth by vowel; "": at rest
_TEETH = {"b": 0.0, "d": 0.45, "g": 0.0, "m": 0.0, "l": 0.3, "s": 0.9, "": 0.0}  # share of the opening, from above
_TONGUES = {"b": 0.0, "d": 0.0, "g": 1.0, "m": 0.0, "l": 1.0, "s": 0.0, "": 0.0}
_LIP = {"b": 1.2, "d": 1.2, "g": 1.2, "m": 2.3, "l": 1.2, "s": 1.2, "": 1.2}  # thickness of the lips
_MOUTH_TABLES = {"width": (_WIDTH, 1), "teeth": (_TEETH, 0), "tongue": (_TONGUES, 0), "lip": (_LIP, 0)}
"""Table of each field, with the letter of a syllable that keys it."""


@dataclass(frozen=True, kw_only=True)
class Appearance:
    """Constant features of a clip, as positions in the tables above."""

    face: int
    shape: int
    hair: int
    style: int
    background: int


@dataclass(frozen=True, kw_only=True)
class Pose:
    """Features per frame. Integers are positions in the tables above."""

    head: Array  # [n, 2] displacement of the head, units
    lid: Array  # [n] 0 = eyes open, 1 = closed
    opening: Array  # [n] of the mouth, 0 to 1
    width: Array  # [n] half width of the mouth, units
    teeth: Array  # [n] visible share of the opening, from above
    tongue: Array  # [n] visibility
    lip: Array  # [n] thickness of the lips, units
    gaze: NDArray[np.int64]  # [n]
    brows: NDArray[np.int64]  # [n]
    hand: NDArray[np.int64]  # [n]
    light: NDArray[np.int64]  # [n]


def draw_still(n: int, **changes: NDArray[np.generic]) -> Pose:
    """Return the pose of a character at rest for `n` frames, with some fields replaced."""
    zeros = np.zeros(n, np.float32)
    whole = np.zeros(n, np.int64)
    rest = {"head": np.zeros((n, 2), np.float32), "lid": zeros, "opening": zeros, **syllable_mouths(whole - 1)}
    free = {"gaze": whole, "brows": whole, "hand": whole, "light": whole + len(LIGHTS) - 1}
    return Pose(**(rest | free | changes))  # pyright: ignore[reportArgumentType]


def syllable_mouths(syllable: NDArray[np.int64]) -> dict[str, Array]:
    """Return the fields of `Pose` for the mouths of syllables ``[n]``: positions in VOCABULARY, -1 = at rest."""
    names = [*VOCABULARY, ""]
    return {
        field: np.asarray([table[name[letter : letter + 1]] for name in names], np.float32)[syllable]
        for field, (table, letter) in _MOUTH_TABLES.items()
    }


def draw_frames(size: int, look: Appearance, pose: Pose) -> NDArray[np.uint8]:
    """Return frames uint8 ``[n, size, size, 3]`` of the character."""
    board = _Board(size, len(pose.lid))
    light = np.asarray(LIGHTS, np.float32)[pose.light]
    board.fill(np.asarray(list(BACKGROUNDS.values())[look.background], np.float32)[:, None] * light)
    _draw_head(board, look, pose)
    _draw_eyes(board, pose)
    _draw_brows(board, pose)
    _draw_mouth(board, pose)
    _draw_hand(board, pose)
    return board.frames()


class _Board:
    """Planar float frames with one operation: blend a color by coverage."""

    def __init__(self, size: int, n: int) -> None:
        self.size, self.unit = size, size / 64
        self.planes = np.empty((3, n, size, size), np.float32)
        self.soft = max(_SOFT, 1 / self.unit)  # at least one pixel wide

    def fill(self, color: Array) -> None:
        """Fill all frames with a color per frame."""
        self.planes[:] = color[:, :, None, None]

    def grid(self, box: Box) -> tuple[tuple[slice, slice], Array, Array]:
        """Return (rows, columns) of a box and its pixel centers x ``[w]``, y ``[h, 1]`` in units."""
        x0, x1, y0, y1 = (int(np.clip(round(edge * self.unit), 0, self.size)) for edge in box)
        x = (np.arange(x0, x1, dtype=np.float32) + 0.5) / self.unit
        y = (np.arange(y0, y1, dtype=np.float32) + 0.5) / self.unit
        return (slice(y0, y1), slice(x0, x1)), x.astype(np.float32), y[:, None].astype(np.float32)

    def cover(self, distance: Array) -> Array:
        """Return the covered share of a pixel at a signed distance in units."""
        return np.clip(0.5 - distance / np.float32(self.soft), 0, 1)

    def paint(self, box: Box, color: Color, shape: _Shape) -> None:
        """Blend `color` by the coverage ``shape(x, y)``, ``[n or 1, h, w]``."""
        (rows, columns), x, y = self.grid(box)
        alpha = shape(x, y)
        for plane, value in zip(self.planes, color, strict=True):
            part = plane[:, rows, columns]
            part += alpha * (np.float32(value) - part)

    def frames(self) -> NDArray[np.uint8]:
        """Return the frames as uint8 RGB."""
        return np.ascontiguousarray((self.planes + 0.5).astype(np.uint8).transpose(1, 2, 3, 0))


def _at(pose: Pose, dx: float, dy: float) -> tuple[Array, Array]:
    """Return x and y of a point of the head in every frame, each ``[n, 1, 1]``."""
    point = pose.head + np.asarray([HEAD[0] + dx, HEAD[1] + dy], np.float32)
    return point[:, :1, None], point[:, 1:, None]


def _ellipse(x: Array, y: Array, rx: Array | float, ry: Array | float, *, power: int = 2) -> Array:
    """Return the distance to a superellipse of power 2 or 4, exact on the axes."""
    u, v = np.square(x / rx), np.square(y / ry)
    radius = np.sqrt(u + v) if power == 2 else np.sqrt(np.sqrt(u * u + v * v))
    return ((radius - 1) * np.minimum(rx, ry)).astype(np.float32)


def _draw_head(board: _Board, look: Appearance, pose: Pose) -> None:
    hair, face = list(HAIRS.values())[look.hair], list(FACES.values())[look.face]
    rx, ry, power = list(SHAPES.values())[look.shape]
    cx, cy = _at(pose, 0, 0)
    style = STYLES[look.style]

    def mane(x: Array, y: Array) -> Array:
        # Each style has the same height and is symmetric: the reader locates the head by both.
        cap = np.maximum(_ellipse(x - cx, y - cy + 5, 20.5, 19.0), y - cy + 2)
        if style != "long":
            return board.cover(cap)
        drape = np.maximum(np.abs(x - cx) - 20.5, np.maximum(y - cy - 15, cy - 6 - y))
        return board.cover(np.minimum(cap, drape))

    board.paint((8, 56, 5, 52), hair, mane)
    if style == "bunned":
        for side in (-1, 1):
            bx, by = _at(pose, side * 14.5, -17.5)
            board.paint((8, 56, 6, 26), hair, lambda x, y, bx=bx, by=by: board.cover(np.hypot(x - bx, y - by) - 5.8))
    board.paint((22, 42, 44, 62), face, lambda x, y: board.cover(np.abs(x - cx) - 5.5) + 0 * y)
    board.paint((6, 58, 50, 64), _SHIRT, lambda x, y: board.cover(_ellipse(x - 32, y - 68, 23, 13)[None]))
    board.paint((12, 52, 10, 56), face, lambda x, y: board.cover(_ellipse(x - cx, y - cy, rx, ry, power=power)))

    def fringe(x: Array, y: Array) -> Array:
        line = -16.6 + np.square(x - cx) * 0.012
        return board.cover(np.maximum(_ellipse(x - cx, y - cy + 5, 20.5, 19.0), y - cy - line))

    board.paint((12, 52, 4, 24), hair, fringe)


def _draw_eyes(board: _Board, pose: Pose) -> None:
    angle = pose.gaze[:, None, None] * np.float32(2 * np.pi / GAZES)
    height = np.maximum(_EYE_RADIUS * (1 - pose.lid), 0.7).astype(np.float32)[:, None, None]
    for side in (-1, 1):
        cx, cy = _at(pose, side * EYE[0], EYE[1])
        px, py = cx + _PUPIL_SHIFT * np.cos(angle), cy + _PUPIL_SHIFT * np.sin(angle)
        box = (15, 32, 20, 38) if side < 0 else (32, 49, 20, 38)

        def white(x: Array, y: Array, cx: Array = cx, cy: Array = cy) -> Array:
            return board.cover(_ellipse(x - cx, y - cy, _EYE_RADIUS, height))

        def pupil(x: Array, y: Array, *, px: Array = px, py: Array = py, white: _Shape = white) -> Array:
            return white(x, y) * board.cover(np.hypot(x - px, y - py) - _PUPIL_RADIUS)

        board.paint(box, _WHITE, white)
        board.paint(box, _DARK, pupil)


def _draw_brows(board: _Board, pose: Pose) -> None:
    height, slope = np.asarray(list(BROWS.values()), np.float32)[pose.brows].T[:, :, None, None]
    for side in (-1, 1):
        cx, cy = _at(pose, side * EYE[0], 0)

        def brow(x: Array, y: Array, *, cx: Array = cx, cy: Array = cy, side: int = side) -> Array:
            along = np.clip(x - cx, -4.2, 4.2)
            return board.cover(np.hypot(x - cx - along, y - cy - height + side * slope * along) - 1.6)

        board.paint((17, 32, 12, 26) if side < 0 else (32, 47, 12, 26), _DARK, brow)


def _draw_mouth(board: _Board, pose: Pose) -> None:
    cx, cy = _at(pose, 0, MOUTH)
    width, teeth, tongue, lip = (
        values.astype(np.float32)[:, None, None] for values in (pose.width, pose.teeth, pose.tongue, pose.lip)
    )
    half = (0.3 + _OPEN * pose.opening).astype(np.float32)[:, None, None]
    box = (18, 46, 34, 56)

    def lips(x: Array, y: Array) -> Array:
        return board.cover(_ellipse(x - cx, y - cy, width + lip, half + lip))

    def throat(x: Array, y: Array) -> Array:
        return board.cover(_ellipse(x - cx, y - cy, width, half))

    board.paint(box, _LIPS, lips)
    board.paint(box, _THROAT, throat)
    board.paint(box, _TONGUE, lambda x, y: tongue * throat(x, y) * board.cover(cy + 0.25 * half - y))
    board.paint(box, _TOOTH, lambda x, y: (teeth > 0) * throat(x, y) * board.cover(y - cy + half * (1 - 2 * teeth)))


def _draw_hand(board: _Board, pose: Pose) -> None:
    for state, (hx, hy) in enumerate(HANDS.values()):
        shown = (pose.hand == state).astype(np.float32)[:, None, None]
        thumb = 4.5 if hx < 32 else -4.5  # toward the head

        def glove(x: Array, y: Array, *, hx: float = hx, hy: float = hy, thumb: float = thumb) -> Array:
            palm = _ellipse(x - hx, y - hy, 4.6, 6.0)
            return board.cover(np.minimum(palm, np.hypot(x - hx - thumb, y - hy - 0.5) - 2.3))

        box = (hx - 9, hx + 9, hy - 9, hy + 9)
        board.paint(box, _WHITE, lambda x, y, glove=glove, shown=shown: shown * glove(x, y)[None])
