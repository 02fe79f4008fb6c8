"""Tracks of faces through the frames of a clip: detected on some frames, followed by their landmarks between."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from preprocessing.people.faces import MIN_PRESENCE, FaceMesh, FaceModels
from preprocessing.people.geometry import RotatedSquare, box_of, overlap
from preprocessing.records import Frames

MAX_FACES = 4  # followed at a time; the cost of a frame grows with each
SAME_FACE = 0.2  # least overlap of a detection and a track
MAX_GAP = 25  # frames after which a lost face is another one


@dataclass(frozen=True, kw_only=True)
class FaceTrack:
    """Meshes of one face by frame; frames without the face are missing."""

    meshes: Mapping[int, FaceMesh]

    @property
    def size(self) -> float:
        """Return the median height of the face in pixels of the frames."""
        heights = sorted(box[3] - box[1] for box in (box_of(mesh.points) for mesh in self.meshes.values()))
        return heights[len(heights) // 2]


@dataclass(kw_only=True, eq=False)
class _ActiveTrack:
    meshes: dict[int, FaceMesh] = field(default_factory=dict)
    square: RotatedSquare | None = None  # in which the face is expected; None: lost

    def add(self, number: int, mesh: FaceMesh) -> None:
        self.meshes[number] = mesh
        self.square = mesh.square

    @property
    def last(self) -> int:
        return max(self.meshes)


def track_faces(frames: Frames, models: FaceModels, every: int, *, stride: int = 1) -> list[FaceTrack]:
    """Return the tracks of all faces, the one with the most frames first.

    Args:
        frames: uint8 ``(n, height, width, 3)``.
        models: Detector and mesh.
        every: Frames between two detections; a lost face is searched in the next frame, too.
        stride: Frames between two landmarks; the others are not looked at.
    """
    tracks: list[_ActiveTrack] = []
    next_detection = 0
    for number in range(0, len(frames), stride):
        frame = frames[number]
        active = [track for track in tracks if track.square is not None]
        for track in active:
            assert track.square is not None
            mesh = models.mesh(frame, track.square)
            if mesh.presence >= MIN_PRESENCE:
                track.add(number, mesh)
            else:
                track.square = None
        lost = any(track.square is None for track in active)
        _drop_doubles(tracks, number)
        due = number >= next_detection
        next_detection += every if due else 0
        if due or lost:
            _add_detections(tracks, frame, number, models)
    done = [FaceTrack(meshes=track.meshes) for track in tracks]
    return sorted(done, key=lambda track: (-len(track.meshes), -track.size))


def _drop_doubles(tracks: Sequence[_ActiveTrack], number: int) -> None:
    """Stop the newer of two tracks that follow one face."""
    current = [track for track in tracks if track.square is not None and track.last == number]
    for i, newer in enumerate(current):
        for older in current[:i]:
            if overlap(box_of(newer.meshes[number].points), box_of(older.meshes[number].points)) > 0.5:
                newer.square = None


def _add_detections(tracks: list[_ActiveTrack], frame: Frames, number: int, models: FaceModels) -> None:
    """Continue lost tracks and begin new ones with the faces that no track follows."""
    for found in models.detect(frame):
        current = [track for track in tracks if track.square is not None]
        near = [track for track in tracks if overlap(found.box, box_of(track.meshes[track.last].points)) > SAME_FACE]
        if len(current) >= MAX_FACES or any(track in current for track in near):
            continue
        mesh = models.mesh(frame, found.square)
        if mesh.presence < MIN_PRESENCE:
            continue
        recent = [track for track in near if number - track.last <= MAX_GAP]
        if not recent:
            recent = [_ActiveTrack()]
            tracks.extend(recent)
        recent[0].add(number, mesh)
