"""Features of real people from models inside packages (``--weights people=packages``): face, speech quality, voice."""

import numpy as np
from numpy.typing import NDArray

from preprocessing.people import speech
from preprocessing.people.faces import FaceMesh, load_face_models
from preprocessing.people.geometry import box_of
from preprocessing.people.packages import check_packages
from preprocessing.people.tracking import track_faces
from preprocessing.records import Frames, Waveform
from workflows.evaluation.clip_features import FeatureTrack

DETECT_EVERY = 10  # frames between two detections
QUALITY_SECONDS = 3.0  # of one value of speech quality
EYELIDS = ((159, 145, 33, 133), (386, 374, 362, 263))  # upper, lower and corners of each eye
FACE_COLUMNS = ("found", "x", "y", "height", "eyes")


class PeopleModels:
    """Face and speech models of the extra ``people``. Raises UserInputError if a package is missing."""

    def __init__(self) -> None:
        check_packages()
        self._faces = load_face_models()

    def tracks(
        self, frames: Frames | None, fps: float, sound: Waveform | None, sample_rate: int
    ) -> dict[str, FeatureTrack]:
        """Return the tracks ``face`` (see FACE_COLUMNS), ``quality`` and ``speaker`` of a clip."""
        found: dict[str, FeatureTrack] = {}
        if frames is not None:
            found["face"] = FeatureTrack(values=self._face_track(frames), rate=fps)
        if sound is not None:
            heard = speech.to_model_rate(np.ascontiguousarray(sound, np.float32), sample_rate)
            found["quality"] = FeatureTrack(values=_quality_track(heard), rate=1 / QUALITY_SECONDS)
            seconds = speech.PARTIAL_STEP * speech.MEL_HOP / speech.RATE
            found["speaker"] = FeatureTrack(values=speech.partial_embeddings(heard), rate=1 / seconds)
        return found

    def _face_track(self, frames: Frames) -> NDArray[np.float64]:
        """Return (n, 5): FACE_COLUMNS of the most frequent face; a frame without it has zeros."""
        values = np.zeros((len(frames), len(FACE_COLUMNS)))
        tracks = track_faces(frames, self._faces, DETECT_EVERY)
        for number, mesh in (tracks[0].meshes if tracks else {}).items():
            left, top, right, bottom = box_of(mesh.points)
            values[number] = 1, (left + right) / 2, (top + bottom) / 2, bottom - top, eye_opening(mesh)
        return values


def eye_opening(mesh: FaceMesh) -> float:
    """Return the distance of the eyelids over the width of the eye, mean of both eyes (eye aspect ratio)."""
    ratios = [
        float(np.linalg.norm(mesh.points[upper, :2] - mesh.points[lower, :2]))
        / max(1e-6, float(np.linalg.norm(mesh.points[a, :2] - mesh.points[b, :2])))
        for upper, lower, a, b in EYELIDS
    ]
    return sum(ratios) / len(ratios)


def _quality_track(sound: Waveform) -> NDArray[np.float64]:
    """Return (n, 1): the overall DNSMOS of each part of QUALITY_SECONDS; a rest below a third of it is dropped."""
    size = round(QUALITY_SECONDS * speech.RATE)
    parts = [sound[i : i + size] for i in range(0, len(sound), size)]
    scores = [speech.speech_quality(part) for part in parts if len(part) >= size // 3 or len(parts) == 1]
    return np.array([[score] for score in scores if score is not None]).reshape(-1, 1)
