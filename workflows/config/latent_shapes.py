"""Latent shapes of known codecs, for cost estimates and benchmarks without data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil

from mfcore.codecs.dct import DctCodec, DctConfig
from mfcore.codecs.mel import MelCodec, MelConfig
from mfcore.errors import UserInputError
from mfcore.model.config import ModelConfig
from mfcore.timeline import LatentClock, Timeline, audio_clock, video_clock
from mfcore.types import AUDIO, VIDEO

FPS = Fraction(24)
CHUNK_SECONDS = Fraction(1, 2)
CHUNKS = 20  # of a usual clip
CAPTION_TOKENS = 128  # of a usual caption
VISIBLE_WORDS = 8  # words that one chunk attends to


@dataclass(frozen=True, kw_only=True)
class LatentShapes:
    """Latent and text shapes that determine the layers of a network."""

    channels: Mapping[str, int]
    size: Mapping[str, tuple[int, int]]  # height and width; (1, 1) for audio
    static_channels: Mapping[str, int]  # leading channels that the first frame shares with later latents
    text_dim: int
    chunk_seconds: float
    chunks: int  # whole chunks of a usual clip


@dataclass(frozen=True, kw_only=True)
class LatentGeometry:
    """Geometry of the latents of a set of video, audio and text codecs."""

    name: str
    channels: dict[str, int]
    still: dict[str, int]  # channels that a first frame shares with later latents
    clocks: dict[str, LatentClock]
    pixels: int  # edge of the square that one latent covers
    multiple: int  # of which a padded frame edge is, pixels
    text_dim: int

    def timeline(self, modalities: Sequence[str] = (VIDEO, AUDIO)) -> Timeline:
        """Return the timeline of some modalities."""
        return Timeline(clocks={m: self.clocks[m] for m in modalities}, chunk_seconds=CHUNK_SECONDS)

    def padded(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return height and width rounded up to a multiple that codec and patches accept, pixels."""
        if min(size) < 1:
            raise UserInputError(f"frame size {size[0]}x{size[1]}: both edges must be positive")
        height, width = (self.multiple * ceil(edge / self.multiple) for edge in size)
        return height, width

    def shapes(self, size: tuple[int, int]) -> LatentShapes:
        """Return the latent shapes of frames of ``size`` (height, width) in pixels."""
        height, width = self.padded(size)
        return LatentShapes(
            channels=self.channels,
            size={VIDEO: (height // self.pixels, width // self.pixels), AUDIO: (1, 1)},
            static_channels=self.still,
            text_dim=self.text_dim,
            chunk_seconds=float(CHUNK_SECONDS),
            chunks=CHUNKS,
        )


def _embedded(name: str, video: DctCodec, audio: MelCodec) -> LatentGeometry:
    return LatentGeometry(
        name=name,
        channels={VIDEO: video.channels, AUDIO: audio.channels},
        still={VIDEO: video.static_channels, AUDIO: audio.static_channels},
        clocks={VIDEO: video.clock, AUDIO: audio.clock},
        pixels=video.config.block,
        multiple=video.config.block,
        text_dim=64,
    )


def _published(wan: str, channels: int, pixels: int) -> LatentGeometry:
    """Return the geometry of Wan, Stable Audio 2 and UMT5-XXL; patches are two latents wide."""
    return LatentGeometry(
        name=f"Wan {wan}, Stable Audio 2 and UMT5-XXL",
        channels={VIDEO: channels, AUDIO: 64},
        still={VIDEO: channels, AUDIO: 0},
        clocks={VIDEO: video_clock(FPS, 4), AUDIO: audio_clock(44100, 2048)},
        pixels=pixels,
        multiple=2 * pixels,
        text_dim=4096,
    )


EMBEDDED = _embedded("the embedded codecs", DctCodec(), MelCodec())
# English voices and larger pictures: 8 audio latents per chunk, so that sessions of a server share passes.
TALKER = _embedded(
    "the embedded codecs of the toy talker",
    DctCodec(DctConfig(block=12, channels=64)),
    MelCodec(MelConfig(window=640, hop=160, group=5, channels=96)),
)
WAN_2_1 = _published("2.1", 16, 8)
WAN_2_2 = _published("2.2", 48, 16)


def geometry_for_preset(preset: str) -> LatentGeometry:
    """Return the geometry of the codecs that a preset is designed for."""
    return {"tiny": EMBEDDED, "toy": TALKER, "base": WAN_2_1}.get(preset, WAN_2_2)


def geometry_of_model(model: ModelConfig) -> LatentGeometry:
    """Return the geometry of the known codecs with the latent shapes of ``model``; ValueError for none."""
    for known in (EMBEDDED, TALKER, WAN_2_2, WAN_2_1):
        if known.text_dim == model.text_dim and all(known.channels[m] == b.channels for m, b in model.branches.items()):
            return known
    raise UserInputError("no known codec has these latent channels and text width: keep the values of the preset")


def default_size(preset: str) -> tuple[int, int]:
    """Return height and width in pixels: of the toy world, or the smallest size of the paper."""
    return {"tiny": (64, 64), "toy": (96, 96)}.get(preset, (192, 336))
