"""Tracks of faces with detections and landmarks of known faces in place of the models."""

from dataclasses import replace

import numpy as np
import pytest

from preprocessing.people import face_step
from preprocessing.people.config import PeopleConfig
from preprocessing.people.face_step import crop_to_face, speaking_score
from preprocessing.people.faces import CHIN, EDGES, EYES, LIPS, TOP, Detection, FaceMesh
from preprocessing.people.tracking import track_faces
from preprocessing.records import Clip, Rejected, Source

FRAMES, SIZE = 40, (240, 320)
CONFIG = PeopleConfig(min_sharpness=None, detect_every=5, landmark_every=1)


def _mesh(x, y, height=80.0, *, yaw=0.0, opening=0.1, presence=1.0):
    """Return an upright face around (x, y) turned by ``yaw`` degrees."""
    points = np.tile([x, y, 0.0], (468, 1)).astype(np.float32)
    half = 0.4 * height
    depth = half * np.tan(np.radians(yaw))
    for (left, right), wide in ((EDGES, half), (EYES, half / 2)):
        points[left] += [-wide, 0, -depth]
        points[right] += [wide, 0, depth]
    points[TOP] += [0, -height / 2, 0]
    points[CHIN] += [0, height / 2, 0]
    points[LIPS[0]] += [0, height / 4, 0]
    points[LIPS[1]] += [0, height / 4 + opening * height, 0]
    return FaceMesh(presence=presence, points=points)


class _KnownFaces:
    """Models that know the faces of every frame; the first pixel of a frame is its number."""

    def __init__(self, faces):
        self.faces, self.detections, self.meshes = faces, 0, 0

    def _of(self, frame):
        return [face for face in (each(int(frame[0, 0, 0])) for each in self.faces) if face is not None]

    def detect(self, frame):
        self.detections += 1
        found = []
        for mesh in self._of(frame):
            low, high = mesh.points[:, :2].min(0), mesh.points[:, :2].max(0)
            found.append(Detection(score=0.9, box=(*low.tolist(), *high.tolist()), eyes=mesh.points[list(EYES), :2]))
        return found

    def mesh(self, frame, square):
        self.meshes += 1
        near = [m for m in self._of(frame) if np.hypot(m.points[0, 0] - square.x, m.points[0, 1] - square.y) < 40]
        return near[0] if near else _mesh(square.x, square.y, presence=0.0)


def _frames():
    frames = np.zeros((FRAMES, *SIZE, 3), np.uint8)
    frames[:, 0, 0] = np.arange(FRAMES)[:, None]
    return frames


def _clip(waveform=None):
    return Clip(source=Source(uri="x", size=0, fingerprint=""), span=(0.0, 1.6), frames=_frames(), waveform=waveform)


def _crop(faces, monkeypatch, config=CONFIG, waveform=None):
    monkeypatch.setattr(face_step, "load_face_models", lambda: _KnownFaces(faces))
    return crop_to_face(_clip(waveform), config, target_size=lambda shape: (64, 64), fps=25.0)


def _reason(faces, monkeypatch, config=CONFIG):
    with pytest.raises(Rejected) as rejected:
        _crop(faces, monkeypatch, config)
    return rejected.value.reason


def test_a_moving_face_is_one_track_with_few_detections():
    models = _KnownFaces([lambda i: _mesh(100 + 3 * i, 120)])
    (track,) = track_faces(_frames(), models, every=10)
    assert sorted(track.meshes) == list(range(FRAMES))
    assert track.size == pytest.approx(80)
    assert models.detections == 4


def test_landmarks_of_every_second_frame_give_the_same_crop(monkeypatch):
    faces = [lambda i: _mesh(100 + 2 * i, 120)]
    whole, half = (_crop(faces, monkeypatch, replace(CONFIG, landmark_every=k)) for k in (1, 2))
    assert half.face.share == 1.0
    assert np.allclose(whole.face.boxes[:-1], half.face.boxes[:-1], atol=2 / 240)


def test_a_hidden_face_continues_its_track():
    (track,) = track_faces(_frames(), _KnownFaces([lambda i: None if 10 <= i < 15 else _mesh(100, 120)]), every=10)
    assert sorted(track.meshes) == [*range(10), *range(20, FRAMES)]  # found again by the next detection


def test_two_faces_are_two_tracks_and_the_longer_comes_first():
    faces = [lambda i: _mesh(80, 120) if i < 20 else None, lambda i: _mesh(240, 120)]
    tracks = track_faces(_frames(), _KnownFaces(faces), every=5)
    assert [len(track.meshes) for track in tracks] == [FRAMES, 20]


def test_the_clip_is_cropped_to_the_face(monkeypatch):
    clip = _crop([lambda i: _mesh(100 + i, 120)], monkeypatch)
    assert clip.frames.shape == (FRAMES, 64, 64, 3)
    assert (clip.face.share, clip.face.frontal_share, clip.face.inside_share) == (1.0, 1.0, 1.0)
    assert clip.face.pixels == pytest.approx(80)
    left, top, right, bottom = clip.face.boxes[20] * [320, 240, 320, 240]
    assert (left + right) / 2 == pytest.approx(120, abs=3)
    assert right - left == pytest.approx(bottom - top, abs=1e-3)


def test_pixels_are_those_of_the_source(monkeypatch):
    monkeypatch.setattr(face_step, "load_face_models", lambda: _KnownFaces([lambda i: _mesh(100, 120, 40)]))
    with pytest.raises(Rejected, match="small_face"):
        crop_to_face(_clip(), CONFIG, target_size=lambda shape: (64, 64), fps=25.0)
    large = crop_to_face(replace(_clip(), source_scale=2.0), CONFIG, target_size=lambda shape: (64, 64), fps=25.0)
    assert large.face.pixels == pytest.approx(80)


@pytest.mark.parametrize(
    ("faces", "reason"),
    [
        ([], "no_face"),
        ([lambda i: _mesh(100, 120) if i < 5 else None], "no_face"),
        ([lambda i: _mesh(100, 120) if i < 30 else None], "face_lost"),
        ([lambda i: _mesh(100, 120, 30)], "small_face"),
        ([lambda i: _mesh(100, 120, yaw=50)], "turned_away"),
        ([lambda i: _mesh(80, 120), lambda i: _mesh(240, 120, 60)], "several_faces"),
    ],
)
def test_reasons(faces, reason, monkeypatch):
    assert _reason(faces, monkeypatch) == reason


def test_blurred_faces_are_rejected(monkeypatch):
    assert _reason([lambda i: _mesh(100, 120)], monkeypatch, PeopleConfig()) == "blurred"  # the frames are black


def test_a_small_second_face_does_not_count(monkeypatch):
    assert _crop([lambda i: _mesh(80, 120), lambda i: _mesh(240, 120, 25)], monkeypatch).face.pixels == pytest.approx(
        80
    )


def test_the_speaking_face_is_followed(monkeypatch):
    rate, loud = 16000, np.sin(np.arange(FRAMES) * 0.7) > 0
    waveform = np.repeat(loud, rate // 25).astype(np.float32) * np.sin(np.arange(FRAMES * rate // 25)).astype(
        np.float32
    )
    faces = [
        lambda i: _mesh(80, 120, 90, opening=0.05),
        lambda i: _mesh(240, 120, opening=0.2 * (i % 2) * loud[min(i, FRAMES - 1)]),
    ]
    clip = _crop(faces, monkeypatch, replace(CONFIG, faces="speaking"), waveform)
    assert clip.face.boxes[10, [0, 2]].mean() * 320 == pytest.approx(240, abs=4)
    assert speaking_score([(i, faces[0](i)) for i in range(FRAMES)], waveform, FRAMES) == 0.0


def test_yaw_of_thirty_degrees_is_the_limit_of_a_frontal_face():
    assert _mesh(0, 0, yaw=29).frontal and not _mesh(0, 0, yaw=31).frontal
