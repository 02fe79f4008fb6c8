"""Configuration of preprocessing: a dataset is a function of it and of its sources."""

import json
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from math import log
from typing import Any, Literal

from mfcore.codecs.dct import DctConfig
from mfcore.codecs.factory import AudioConfig, VideoConfig
from mfcore.codecs.mel import MelConfig
from mfcore.codecs.t5 import T5Config
from mfcore.errors import UserInputError, check_range
from mfcore.types import AUDIO, VIDEO
from preprocessing.io.hashing import canonical_json, content_hash
from preprocessing.media.probe import DECODER_BYTES
from preprocessing.media.scene_cuts import SceneConfig
from preprocessing.people.config import PeopleConfig
from preprocessing.records import SourceLimits
from preprocessing.steps.av_sync import SyncConfig
from preprocessing.steps.caption import CaptionConfig
from preprocessing.steps.encode import EncoderConfig
from preprocessing.steps.quality_filters import FilterConfig
from preprocessing.steps.transcribe import WhisperConfig

MODALITIES = {"paired": (VIDEO, AUDIO), "video": (VIDEO,), "audio": (AUDIO,)}
MIN_FACE_SIDE = 240  # pixels of the shorter side of decoded frames, to find faces
MAX_SIDE = 8192  # pixels of an encoded frame, the longest side that decoders are tested with
_MIN_DECODER_BYTES = 1 << 26  # memory of ffmpeg without frames
_ASPECT_TOLERANCE = 0.01  # relative difference below which aspect ratios are equal


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """Settings of a dataset. `workers` does not affect its content."""

    modality: Literal["paired", "video", "audio"] = "paired"  # paired: reject a source that lacks a stream
    sizes: tuple[tuple[int, int], ...] = ((64, 64),)  # height, width of encoded frames in pixels; the nearest is used
    fit: Literal["crop", "pad"] = "crop"  # treatment of other aspect ratios
    audio_track: int | None = None  # number of the audio stream, from 0; None: the default stream of the file
    chunk_seconds: Fraction = Fraction(1, 2)  # chunk length of the model
    window_seconds: Fraction = Fraction(10)  # longest clip without its first frame
    min_chunks: int = 2  # whole chunks of the shortest clip
    video: VideoConfig = field(default_factory=DctConfig)  # its fps is the frame rate of the dataset
    audio: AudioConfig = field(default_factory=MelConfig)  # its sample_rate is the sample rate of the dataset
    text_width: int = 64  # width of the hashed embeddings of caption and transcript
    words: Literal[1, 2] = 2  # version of the hashed embeddings
    text: T5Config | None = None  # pretrained encoder of captions and transcripts; None: hashed embeddings
    whisper: WhisperConfig | None = None  # transcribes sources without a transcript
    caption: CaptionConfig | None = None  # captions of clips without one; None: they stay empty
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    scenes: SceneConfig = field(default_factory=SceneConfig)
    filters: FilterConfig = field(default_factory=FilterConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    people: PeopleConfig | None = None  # selection of clips in which one person speaks; None: off
    limits: SourceLimits = field(default_factory=SourceLimits)
    keep_duplicates: bool = False  # keep sources with equal bytes
    latent_dtype: Literal["float32", "float16"] = "float32"  # of stored latents
    sources_per_unit: int = 16  # sources per work unit
    stall_seconds: float = 60.0  # timeout of a decoder without output
    decoder_bytes: int = DECODER_BYTES  # memory limit of one decoder
    workers: int | None = None  # Ray workers, or decoders for encoders on a GPU; None: one per CPU; 0: without Ray

    def __post_init__(self) -> None:
        if not self.sizes:
            raise UserInputError("sizes is empty: give at least one height and width, such as 64x64")
        for name, most in (("chunk_seconds", 60), ("window_seconds", 3600), ("stall_seconds", 86400)):
            check_range(name, getattr(self, name), 0, most, above=True)
        for name, most in (("min_chunks", 10**6), ("text_width", 65536), ("sources_per_unit", 10**6)):
            check_range(name, getattr(self, name), 1, most)
        check_range("workers", self.workers, 0, 10**5)
        check_range("audio_track", self.audio_track, 0, 10**4)
        check_range("decoder_bytes", self.decoder_bytes, _MIN_DECODER_BYTES, 2**50)
        for height, width in self.sizes:
            check_range("sizes", min(height, width), 1, MAX_SIDE)
            check_range("sizes", max(height, width), 1, MAX_SIDE)
            if height % self.video.block or width % self.video.block or height % 2 or width % 2:
                raise UserInputError(
                    f"size {height}x{width}: height and width must be even multiples of video.block={self.video.block}"
                )
        if self.people is not None and not self.people.models:
            raise UserInputError("people: the models are not named. Add --people to the command")
        if self.caption is not None and not self.caption.weights and self.people is None:
            raise UserInputError(
                "--caption measured: nothing is measured without --people. Add --people, or --caption DIR"
            )
        if self.min_chunks * self.chunk_seconds > self.window_seconds:
            raise UserInputError(
                f"min_chunks={self.min_chunks} of {float(self.chunk_seconds)} s do not fit into window_seconds="
                f"{float(self.window_seconds)}. Set fewer chunks or a longer window"
            )

    @property
    def modalities(self) -> tuple[str, ...]:
        """Return the names of the modalities in the dataset."""
        return MODALITIES[self.modality]

    @property
    def fps(self) -> Fraction:
        """Return the frame rate of the dataset."""
        return Fraction(self.video.fps)

    @property
    def sample_rate(self) -> int:
        """Return the sample rate of the dataset in Hz."""
        return self.audio.sample_rate

    @property
    def device(self) -> str:
        """Return the torch device of pretrained networks."""
        return "cuda" if self.encoder.gpus else "cpu"

    @property
    def worker_resources(self) -> dict[str, float]:
        """Return the Ray resources that one worker reserves; no GPU entry without a GPU."""
        return {"CPU": 1.0} | ({"GPU": self.encoder.gpus} if self.encoder.gpus else {})

    def target_size(self, shown: tuple[float, float]) -> tuple[int, int]:
        """Return the configured size for a source displayed as (height, width).

        The nearest aspect ratio is used; among equals the largest size without upscaling, else the smallest.
        """

        def distance(size: tuple[int, int]) -> tuple[int, bool, float]:
            shape = abs(log(size[1] * shown[0] / (size[0] * shown[1])))
            enlarges = size[0] > shown[0] and size[1] > shown[1]
            return round(shape / _ASPECT_TOLERANCE), enlarges, size[0] * size[1] * (1 if enlarges else -1)

        return min(self.sizes, key=distance)

    def decoded_size(self, shown: tuple[float, float]) -> tuple[int, int]:
        """Return the size of decoded frames for a source displayed as (height, width).

        It is the target size, or for people a larger one in the shape of the source, from which the face is cut.
        """
        target = self.target_size(shown)
        if self.people is None:
            return target
        side = min(self.people.short_side, max(MIN_FACE_SIDE, 2 * min(target)))
        scale = min(1.0, side / min(shown))
        height, width = (max(2, 2 * round(side * scale / 2)) for side in shown)
        return height, width

    @property
    def weight_folders(self) -> dict[str, str]:
        """Return the folders of pretrained weights by modality, or "text"."""
        codecs = {VIDEO: self.video, AUDIO: self.audio}
        used = {**{m: codecs[m] for m in self.modalities}, "text": self.text}
        folders = {name: getattr(part, "folder", "") for name, part in used.items()}
        return {name: folder for name, folder in folders.items() if folder}

    @property
    def uses_models(self) -> bool:
        """Return True if encoding, transcription or captions need weights, which a worker loads once."""
        captions = self.caption is not None and bool(self.caption.weights)
        return bool(self.weight_folders or self.whisper or captions)

    def resolved(self) -> dict[str, Any]:
        """Return the settings that affect the content of the dataset as plain JSON values."""
        values: dict[str, Any] = json.loads(canonical_json(asdict(self)))
        del values["workers"]
        for part in ("video", "audio", "text", "whisper", "caption"):
            (values[part] or {}).pop("folder", None)  # the digest of the weights is kept
        del values["sync"]["file"]
        values["encoder"] = {"batch": self.encoder.batch, "bfloat16": self.encoder.gpus > 0}
        return values

    @property
    def fingerprint(self) -> str:
        """Return the hash of the resolved configuration.

        Default limits, and filters of people and captions that are off, are not part of it: datasets from before them
        can be extended.
        """
        values = self.resolved()
        if self.limits == SourceLimits():
            del values["limits"]
        for name in ("people", "caption"):
            if getattr(self, name) is None:
                del values[name]
        return content_hash(values)
