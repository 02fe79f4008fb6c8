"""Boxes and rotated squares in pictures, in pixels: x to the right, y down."""

from dataclasses import dataclass
from math import atan2, cos, sin

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from preprocessing.records import Frames

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""
Points = NDArray[np.floating]
"""Float ``(n, 2)`` or ``(n, 3)``: x, y and depth."""


@dataclass(frozen=True, kw_only=True)
class RotatedSquare:
    """Square around (x, y) with a side in pixels, rotated by an angle in radians (clockwise in the picture)."""

    x: float
    y: float
    side: float
    angle: float

    def cut(self, frame: Frames, size: int) -> Frames:
        """Return the square as a picture of ``size`` x ``size``; outside of the frame it is black."""
        scale, c, s = self.side / size, cos(self.angle), sin(self.angle)
        left = self.x - (c - s) * self.side / 2
        top = self.y - (s + c) * self.side / 2
        matrix = (c * scale, -s * scale, left, s * scale, c * scale, top)
        source, target = Image.fromarray(frame), (size, size)
        return np.asarray(source.transform(target, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR))

    def to_frame(self, points: Points) -> Points:
        """Return points of the square, with coordinates 0 to 1, in pixels of the frame; depth in pixels."""
        c, s = cos(self.angle), sin(self.angle)
        x, y = (points[:, 0] - 0.5) * self.side, (points[:, 1] - 0.5) * self.side
        out = points.astype(np.float32) * np.float32(self.side)
        out[:, 0], out[:, 1] = self.x + c * x - s * y, self.y + s * x + c * y
        return out


def square_around(points: Points, left_to_right: tuple[Points, Points], scale: float) -> RotatedSquare:
    """Return a square around points, upright with respect to a line from a left to a right point.

    The side is the longer side of their box in rotated axes, times ``scale``.
    """
    (x0, y0), (x1, y1) = left_to_right[0][:2], left_to_right[1][:2]
    angle = atan2(float(y1 - y0), float(x1 - x0))
    c, s = cos(angle), sin(angle)
    u, v = points[:, 0] * c + points[:, 1] * s, -points[:, 0] * s + points[:, 1] * c
    middle_u, middle_v = float(u.min() + u.max()) / 2, float(v.min() + v.max()) / 2
    side = max(float(np.ptp(u)), float(np.ptp(v))) * scale
    return RotatedSquare(x=middle_u * c - middle_v * s, y=middle_u * s + middle_v * c, side=side, angle=angle)


def box_of(points: Points) -> Box:
    """Return the smallest box that contains points."""
    left, top = points[:, :2].min(0)
    right, bottom = points[:, :2].max(0)
    return float(left), float(top), float(right), float(bottom)


def overlap(a: Box, b: Box) -> float:
    """Return intersection over union of two boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    area = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - width * height
    return width * height / area
