"""Crop that follows a face: constant size, smooth motion, with the whole face inside where the picture allows it."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter1d

from preprocessing.people.geometry import box_of
from preprocessing.people.tracking import FaceTrack
from preprocessing.records import Frames

Boxes = NDArray[np.float64]
"""float64 ``(n, 4)``: left, top, right, bottom in pixels, one box per frame."""


def face_boxes(track: FaceTrack, frames: int) -> Boxes:
    """Return the box of the face in every frame; where the face is missing, between its neighbors."""
    known = sorted(track.meshes)
    boxes = np.array([box_of(track.meshes[i].points) for i in known])
    return np.stack([np.interp(np.arange(frames), known, boxes[:, k]) for k in range(4)], 1)


def crop_boxes(
    faces: Boxes, frame: tuple[int, int], *, size: tuple[int, int], margin: float, smooth_frames: float
) -> Boxes:
    """Return the crop of every frame, within the picture.

    Args:
        faces: Boxes of the face.
        frame: Height and width of the picture in pixels.
        size: Height and width of the crops after scaling; only their ratio matters.
        margin: Least space around the largest face, as a share of its width and height.
        smooth_frames: Standard deviation of the Gaussian over time that smooths the center.
    """
    ratio = size[0] / size[1]
    largest = (faces[:, 2:] - faces[:, :2]).max(0) * (1 + 2 * margin)
    width = min(max(largest[0], largest[1] / ratio), frame[1], frame[0] / ratio)
    half = np.array([width, width * ratio]) / 2
    middle = gaussian_filter1d((faces[:, :2] + faces[:, 2:]) / 2, smooth_frames, axis=0, mode="nearest")
    # a fast face leaves the smoothed crop: it is followed as far as needed
    low, high = faces[:, 2:] - half, faces[:, :2] + half
    middle = np.where(low <= high, np.clip(middle, low, high), (low + high) / 2)
    middle = np.clip(middle, half, np.array(frame[::-1]) - half)
    return np.concatenate([middle - half, middle + half], 1)


def share_inside(faces: Boxes, crops: Boxes, frame: tuple[int, int]) -> float:
    """Return the share of frames with the whole visible part of the face in the crop, within a pixel."""
    visible = np.clip(faces, 0, [frame[1], frame[0], frame[1], frame[0]])
    inside = (visible[:, :2] >= crops[:, :2] - 1).all(1) & (visible[:, 2:] <= crops[:, 2:] + 1).all(1)
    return float(inside.mean())


def cut_crops(frames: Frames, crops: Boxes, size: tuple[int, int]) -> Frames:
    """Return the crops scaled to (height, width), uint8 ``(n, height, width, 3)``."""
    out = np.empty((len(frames), *size, 3), np.uint8)
    height, width = frames.shape[1:3]
    for i, (frame, crop) in enumerate(zip(frames, crops, strict=True)):
        box = tuple(np.clip(crop, 0, [width, height, width, height]).tolist())
        picture = Image.fromarray(frame).resize(
            (size[1], size[0]), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0
        )
        out[i] = np.asarray(picture)
    return out


def sharpness(frames: Frames, faces: Boxes, every: int) -> float:
    """Return the median variance of the Laplacian of the face, gray levels 0 to 255, scaled to 96 pixels a side."""
    found: list[float] = []
    for frame, face in zip(frames[::every], faces[::every], strict=True):
        box = np.clip(face, 0, [frame.shape[1], frame.shape[0]] * 2)
        if min(box[2] - box[0], box[3] - box[1]) < 2:
            continue
        gray = Image.fromarray(frame).convert("L")
        x = np.asarray(gray.resize((96, 96), Image.Resampling.BICUBIC, box=tuple(box.tolist())), np.float32)
        laplacian = x[1:-1, :-2] + x[1:-1, 2:] + x[:-2, 1:-1] + x[2:, 1:-1] - 4 * x[1:-1, 1:-1]
        found.append(float(laplacian.var()))
    return float(np.median(found)) if found else 0.0
