"""Step: follow the face of a clip, check it, and crop the frames to it."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from preprocessing.people.config import PeopleConfig
from preprocessing.people.crop import Boxes, crop_boxes, cut_crops, face_boxes, share_inside, sharpness
from preprocessing.people.faces import FaceMesh, load_face_models
from preprocessing.people.tracking import FaceTrack, track_faces
from preprocessing.records import Clip, FaceFacts, Frames, Rejected, Waveform

TargetSize = Callable[[tuple[int, int]], tuple[int, int]]
STEP = "face"
MIN_FRAMES, MIN_SHARE = 5, 0.2  # of a face that counts
BLUR_EVERY = 5  # frames


def crop_to_face(clip: Clip, config: PeopleConfig, *, target_size: TargetSize, fps: float) -> Clip:
    """Return the clip with frames that follow its face, in the target size (height, width) of its frames.

    Raise Rejected with the reason no_face, several_faces, face_lost, small_face, turned_away or blurred.
    """
    if clip.frames is None:
        return clip
    frames = clip.frames
    track = _choose_track(frames, clip.waveform, config)
    meshes = list(track.meshes.values())
    share = len(meshes) / _looked_at(frames, config)
    _check("face_lost", "share of frames with the face", share, config.min_face_share)
    pixels = track.size * clip.source_scale
    _check("small_face", "height of the face in pixels", pixels, config.min_face_pixels)
    frontal = float(np.mean([mesh.frontal for mesh in meshes]))
    _check("turned_away", "share of frontal frames", frontal, config.min_frontal_share)
    faces = face_boxes(track, len(frames))
    sharp = sharpness(frames, faces, BLUR_EVERY)
    _check("blurred", "sharpness of the face", sharp, config.min_sharpness)
    shape = (frames.shape[1], frames.shape[2])
    size = target_size(shape)
    crops = crop_boxes(faces, shape, size=size, margin=config.margin, smooth_frames=config.smooth_seconds * fps)
    facts = FaceFacts(
        share=share,
        pixels=pixels,
        frontal_share=frontal,
        sharpness=sharp,
        inside_share=share_inside(faces, crops, shape),
        height_share=float(np.median((faces[:, 3] - faces[:, 1]) / (crops[:, 3] - crops[:, 1]))),
        boxes=_relative(crops, shape),
    )
    return replace(clip, frames=cut_crops(frames, crops, size), face=facts)


def _relative(crops: Boxes, shape: tuple[int, int]) -> np.ndarray:
    return (crops / np.array([shape[1], shape[0]] * 2)).astype(np.float32)


def _check(reason: str, what: str, value: float, least: float | None) -> None:
    if least is not None and value < least:
        raise Rejected(STEP, reason, f"{what}: {value:.3g}, at least {least:g}")


def _looked_at(frames: Frames, config: PeopleConfig) -> int:
    """Return the number of frames in which faces are searched."""
    return -(-len(frames) // config.landmark_every)


def _choose_track(frames: Frames, waveform: Waveform | None, config: PeopleConfig) -> FaceTrack:
    """Return the track of the only face, or of the one with lips that move with the sound."""
    least = max(MIN_FRAMES, MIN_SHARE * _looked_at(frames, config))
    tracks = track_faces(frames, load_face_models(), config.detect_every, stride=config.landmark_every)
    found = [track for track in tracks if len(track.meshes) >= least]
    if not found:
        raise Rejected(STEP, "no_face", "no face in a fifth of the frames")
    largest = max(found, key=lambda track: track.size * len(track.meshes))
    if config.second_face is None:
        return largest
    rivals = [track for track in found if track.size >= config.second_face * largest.size]
    if len(rivals) == 1:
        return largest
    if config.faces == "one":
        raise Rejected(STEP, "several_faces", f"{len(rivals)} faces. Set people.faces=speaking to follow the speaker")
    if waveform is None:
        return largest
    return max(rivals, key=lambda track: speaking_score(list(track.meshes.items()), waveform, len(frames)))


def speaking_score(meshes: list[tuple[int, FaceMesh]], waveform: Waveform, frames: int) -> float:
    """Return the correlation of lip speed and loudness over the frames of a clip; 0 without motion or sound."""
    opening = np.interp(np.arange(frames), [i for i, _ in meshes], [mesh.mouth_opening for _, mesh in meshes])
    speed = np.abs(np.diff(opening))
    usable = len(waveform) // frames * frames
    if usable == 0 or frames < 3:
        return 0.0
    energy = np.sqrt(np.square(waveform[:usable].reshape(frames, -1)).mean(1))[1:]
    if speed.std() == 0 or energy.std() == 0:
        return 0.0
    return float(np.corrcoef(speed, energy)[0, 1])
