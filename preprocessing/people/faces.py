"""Face detection and landmarks with the BlazeFace full-range model and the 468-point face mesh (LiteRT, CPU).

BlazeFace: arXiv 1907.05047; face mesh: arXiv 1907.06724. One thread, so equal frames give equal results.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from preprocessing.people.geometry import Box, Points, RotatedSquare, overlap, square_around
from preprocessing.people.packages import model_file
from preprocessing.records import Frames

DETECTOR_SIDE, CELLS = 192, 48  # pixels and anchors along a side of the detector's input
MESH_SIDE = 192
MESH_SCALE = 1.5  # side of the mesh's input over the face box
MIN_SCORE = 0.6  # of a detection
MAX_OVERLAP = 0.3  # of two detections
MIN_PRESENCE = 0.5  # of a face in the square of a mesh
EYES = (33, 263)  # outer corners of the eyes, left and right in the picture
EDGES = (234, 454)  # of the face, left and right in the picture
TOP, CHIN = 10, 152
LIPS = (13, 14)  # inner middle of upper and lower lip
MAX_YAW, MAX_PITCH = 30.0, 30.0  # degrees of a frontal face


@dataclass(frozen=True, kw_only=True, eq=False)
class Detection:
    """Detected face in pixels of the frame."""

    score: float
    box: Box
    eyes: Points  # (2, 2), left and right in the picture

    @property
    def square(self) -> RotatedSquare:
        """Return the input of the mesh."""
        corners = np.array([self.box[:2], self.box[2:]], np.float32)
        upright = square_around(corners, (self.eyes[0], self.eyes[0] + np.array((1.0, 0.0))), MESH_SCALE)
        turned = square_around(corners, (self.eyes[0], self.eyes[1]), MESH_SCALE)
        return RotatedSquare(x=upright.x, y=upright.y, side=upright.side, angle=turned.angle)


@dataclass(frozen=True, kw_only=True, eq=False)
class FaceMesh:
    """Landmarks of a face in pixels of the frame."""

    presence: float  # probability that the square shows a face
    points: Points  # (468, 3)

    @property
    def square(self) -> RotatedSquare:
        """Return the input of the mesh in the next frame."""
        return square_around(self.points, (self.points[EYES[0]], self.points[EYES[1]]), MESH_SCALE)

    @property
    def frontal(self) -> bool:
        """Return True if the face turns by at most MAX_YAW and MAX_PITCH degrees."""
        across, down = (self.points[b] - self.points[a] for a, b in (EDGES, (TOP, CHIN)))
        yaw = np.degrees(np.arctan2(abs(across[2]), np.hypot(*across[:2])))
        pitch = np.degrees(np.arctan2(abs(down[2]), np.hypot(*down[:2])))
        return bool(yaw <= MAX_YAW and pitch <= MAX_PITCH)

    @property
    def mouth_opening(self) -> float:
        """Return the distance of the inner lips over the height of the face."""
        lips, face = (self.points[b] - self.points[a] for a, b in (LIPS, (TOP, CHIN)))
        return float(np.linalg.norm(lips) / np.linalg.norm(face))


class _LiteModel:
    """TensorFlow Lite model on one thread."""

    def __init__(self, name: str) -> None:
        from ai_edge_litert.interpreter import Interpreter  # pyright: ignore

        self._model: Any = Interpreter(str(model_file(name)), num_threads=1)
        self._model.allocate_tensors()
        self._input = self._model.get_input_details()[0]["index"]
        self._outputs = [each["index"] for each in self._model.get_output_details()]

    def __call__(self, picture: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        self._model.set_tensor(self._input, picture[None])
        self._model.invoke()
        return [self._model.get_tensor(index)[0] for index in self._outputs]


class FaceModels:
    """Detector and mesh. Not thread-safe."""

    def __init__(self) -> None:
        self._detector, self._mesh = _LiteModel("face_detector"), _LiteModel("face_landmarks")
        middles = (np.arange(CELLS, dtype=np.float32) + 0.5) / CELLS
        self._anchors = np.stack(np.meshgrid(middles, middles), -1).reshape(-1, 2)

    def detect(self, frame: Frames) -> list[Detection]:
        """Return the faces of a frame, uint8 ``(height, width, 3)``, best first."""
        picture, scale, left, top = _letterbox(frame)
        raw, logits = self._detector(picture)
        scores = 1 / (1 + np.exp(-np.clip(logits[:, 0], -100, 100)))
        found: list[Detection] = []
        for i in sorted(np.flatnonzero(scores >= MIN_SCORE), key=lambda i: (-scores[i], i)):
            places = raw[i, 4:8].reshape(2, 2) / DETECTOR_SIDE + self._anchors[i]
            middle = raw[i, :2] / DETECTOR_SIDE + self._anchors[i]
            half = raw[i, 2:4] / DETECTOR_SIDE / 2
            corners = np.concatenate([middle - half, middle + half]).reshape(2, 2)
            corners, eyes = ((p * DETECTOR_SIDE - (left, top)) / scale for p in (corners, places))
            box = (float(corners[0, 0]), float(corners[0, 1]), float(corners[1, 0]), float(corners[1, 1]))
            if all(overlap(box, other.box) <= MAX_OVERLAP for other in found):
                found.append(Detection(score=float(scores[i]), box=box, eyes=eyes.astype(np.float32)))
        return found

    def mesh(self, frame: Frames, square: RotatedSquare) -> FaceMesh:
        """Return the landmarks of the face in a square of a frame."""
        picture = square.cut(frame, MESH_SIDE).astype(np.float32) / np.float32(255)
        points, flag = self._mesh(picture)
        presence = float(1 / (1 + np.exp(-np.clip(flag.reshape(-1)[0], -100, 100))))
        return FaceMesh(presence=presence, points=square.to_frame(points.reshape(468, 3) / MESH_SIDE))


@lru_cache(maxsize=1)
def load_face_models() -> FaceModels:
    """Return the models, loaded once per process."""
    return FaceModels()


def _letterbox(frame: Frames) -> tuple[NDArray[np.float32], float, float, float]:
    """Return the detector's input, -1 to 1, and the scale and the offsets of the frame in it."""
    height, width = frame.shape[:2]
    scale = DETECTOR_SIDE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    left, top = (DETECTOR_SIDE - size[0]) // 2, (DETECTOR_SIDE - size[1]) // 2
    small = np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0), np.float32)
    picture = np.full((DETECTOR_SIDE, DETECTOR_SIDE, 3), -1, np.float32)
    picture[top : top + size[1], left : left + size[0]] = small / 127.5 - 1
    return picture, scale, float(left), float(top)
