"""Settings of the selection of clips in which one person speaks (``mfctl preprocess --people``)."""

from dataclasses import dataclass
from typing import Literal

from mfcore.errors import UserInputError, check_range


@dataclass(frozen=True, kw_only=True)
class PeopleConfig:
    """Thresholds of people filters; None disables one. Pixels are those of the source."""

    models: str = ""  # digest of the model files, set by --people
    faces: Literal["one", "speaking"] = "one"  # several faces: reject the clip, or follow the one with moving lips
    short_side: int = 480  # most pixels of the shorter side of decoded frames; twice that of small target sizes
    detect_every: int = 12  # frames between two detections; landmarks follow the face between
    landmark_every: int = 2  # frames between two landmarks; the face is interpolated between
    margin: float = 0.45  # space around the face in the crop, as a share of its size
    smooth_seconds: float = 0.4  # standard deviation of the smoothing of the crop's motion
    min_face_share: float | None = 0.9  # of frames with the face
    min_face_pixels: float | None = 64.0  # median height of the face, from forehead to chin
    min_frontal_share: float | None = 0.5  # of frames in which the face turns by at most 30 degrees
    min_sharpness: float | None = 15.0  # variance of the Laplacian of the face at 96 pixels
    second_face: float | None = 0.4  # height over the first one from which a second face counts
    min_speech_seconds: float | None = 1.0  # of voice activity in a clip
    min_speech_quality: float | None = 2.0  # DNSMOS overall, 1 to 5
    min_voice_similarity: float | None = 0.65  # of both halves of the speech; below: several voices

    def __post_init__(self) -> None:
        check_range("people.short_side", self.short_side, 64, 4096)
        check_range("people.detect_every", self.detect_every, 1, 250)
        check_range("people.landmark_every", self.landmark_every, 1, 25)
        check_range("people.margin", self.margin, 0, 4)
        check_range("people.smooth_seconds", self.smooth_seconds, 0, 60)
        for name, most in (
            ("min_face_share", 1),
            ("min_face_pixels", 8192),
            ("min_frontal_share", 1),
            ("min_sharpness", 1e6),
            ("second_face", 10),
            ("min_speech_seconds", 3600),
            ("min_speech_quality", 5),
            ("min_voice_similarity", 1),
        ):
            check_range(f"people.{name}", getattr(self, name), 0, most)
        if self.faces not in ("one", "speaking"):
            raise UserInputError(f"people.faces={self.faces!r}: choose one or speaking")
